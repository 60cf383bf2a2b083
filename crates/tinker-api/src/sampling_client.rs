//! One sampler: continuations of prompts, and the log-probabilities of prompts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tinker_http::{Client, ErrorKind, RequestType, RetryPolicy};
use tinker_types::{
    CheckpointKind, CreateSamplingSessionRequest, CreateSamplingSessionTag, ModelInput, RequestId,
    SampleRequest, SampleResponse, SampleTag, SamplingParams, SamplingSessionId,
};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::api_future::ApiFuture;
use crate::error::{Error, Result};
use crate::options::{SampleOptions, SamplingSource};
use crate::resolve::resolve;
use crate::session::Session;

/// How often a sample that the server forgot is submitted anew.
const MAX_RESUBMISSIONS: u32 = 10;

/// A sampler. Cheap to clone.
///
/// Samples are submitted when the method is called and run in any order. Failed submissions are
/// repeated under the same number; a sample that the server forgot is submitted under a new one.
#[derive(Debug, Clone)]
pub struct SamplingClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    session: Arc<Session>,
    id: SamplingSessionId,
    base_model: String,
    next_seq_id: AtomicU64,
    in_flight: Semaphore,
    max_resubmissions: u32,
    retry: RetryPolicy,
}

impl SamplingClient {
    /// Creates a sampler in a session.
    pub(crate) async fn create(session: Arc<Session>, source: SamplingSource) -> Result<Self> {
        let (base_model, model_path) = match source {
            SamplingSource::BaseModel(name) => (Some(name), None),
            SamplingSource::Checkpoint(path) => {
                Error::check_kind(&path, CheckpointKind::Sampler)?;
                (None, Some(path.to_string()))
            }
        };
        let request = CreateSamplingSessionRequest {
            session_id: session.id.clone(),
            sampling_session_seq_id: session.next_sampler(),
            base_model: base_model.clone(),
            model_path,
            tag: CreateSamplingSessionTag,
        };
        let created = session.http.create_sampling_session(&request).await?;
        let id = created.sampling_session_id;
        let base_model = match base_model {
            Some(name) => name,
            None => session.http.get_sampler(&id).await?.base_model,
        };
        Ok(Self::of_sampler(session, id, base_model))
    }

    /// A client of a sampler that exists.
    pub(crate) fn of_sampler(
        session: Arc<Session>,
        id: SamplingSessionId,
        base_model: String,
    ) -> Self {
        let config = &session.config;
        let n_in_flight = usize::try_from(config.sample_max_concurrent_requests)
            .unwrap_or(usize::MAX)
            .clamp(1, Semaphore::MAX_PERMITS);
        let (retry, max_resubmissions) = if config.sample_no_retries {
            (RetryPolicy::never(), 0)
        } else {
            (session.http.retry_policy().clone(), MAX_RESUBMISSIONS)
        };
        let inner = Inner {
            id,
            base_model,
            next_seq_id: AtomicU64::new(0),
            in_flight: Semaphore::new(n_in_flight),
            max_resubmissions,
            retry,
            session,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The sampler.
    #[must_use]
    pub fn sampling_session_id(&self) -> &SamplingSessionId {
        &self.inner.id
    }

    /// Name of the base model.
    #[must_use]
    pub fn base_model(&self) -> &str {
        &self.inner.base_model
    }

    /// Draws `options.num_samples` continuations of `prompt`.
    ///
    /// The sequences hold the sampled tokens only, each with its log-probability (natural log,
    /// ≤ 0) under the sampler. Dropping the future gives the sample up.
    ///
    /// Endpoint: `POST /api/v1/asample`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the prompt is empty or no sample is asked for;
    /// [`Error::RequestFailed`] if the server cannot sample.
    pub fn sample(
        &self,
        prompt: ModelInput,
        params: SamplingParams,
        options: SampleOptions,
    ) -> ApiFuture<SampleResponse> {
        let operation = RequestType::Sample;
        let open = self.inner.session.check_open();
        if let Err(error) = open.and_then(|()| check(&prompt, &params, &options)) {
            return ApiFuture::refused(operation, error);
        }
        let request = self.request(prompt, params, options);
        let inner = Arc::clone(&self.inner);
        let (promise, future) = ApiFuture::new(operation);
        let task = self.inner.session.runtime.spawn(async move {
            let result = inner.run(request).await;
            // Nobody listens any more if this fails.
            promise.send(result).ok();
        });
        future.aborting(task.abort_handle())
    }

    /// The log-probability of every token of `prompt` given those before it: natural log, ≤ 0,
    /// `None` for the first one.
    ///
    /// Endpoint: `POST /api/v1/asample`.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn compute_logprobs(&self, prompt: ModelInput) -> ApiFuture<Vec<Option<f32>>> {
        let params = SamplingParams {
            max_tokens: Some(1),
            ..SamplingParams::default()
        };
        let options = SampleOptions {
            prompt_logprobs: true,
            ..SampleOptions::default()
        };
        let sample = self.sample(prompt, params, options);
        let (promise, future) = ApiFuture::new(RequestType::Sample);
        let task = self.inner.session.runtime.spawn(async move {
            let result = sample.await.and_then(|response| {
                response.prompt_logprobs.ok_or_else(|| {
                    Error::Protocol("the server returned no prompt log-probabilities".into())
                })
            });
            promise.send(result).ok();
        });
        future.aborting(task.abort_handle())
    }

    fn request(
        &self,
        prompt: ModelInput,
        sampling_params: SamplingParams,
        options: SampleOptions,
    ) -> SampleRequest {
        SampleRequest {
            num_samples: options.num_samples,
            prompt,
            sampling_params,
            sampling_session_id: Some(self.inner.id.clone()),
            seq_id: None,
            prompt_logprobs: Some(options.prompt_logprobs),
            topk_prompt_logprobs: options.topk_prompt_logprobs,
            topk_sample_logprobs: options.topk_sample_logprobs,
            target_prompt_logprobs: options.target_prompt_logprobs,
            prompt_alt_tokens_k: options.prompt_alt_tokens_k,
            prompt_logprobs_last_n: options.prompt_logprobs_last_n,
            record_stability_info: options.record_stability_info,
            base_model: None,
            model_path: None,
            tag: SampleTag,
        }
    }
}

impl Inner {
    /// Submits until a result comes: again under a new number if the server forgot the future.
    async fn run(&self, mut request: SampleRequest) -> Result<SampleResponse> {
        let http = &self.session.http;
        let _in_flight = self.in_flight.acquire().await;
        let mut n_resubmissions = 0;
        loop {
            request.seq_id = Some(self.next_seq_id.fetch_add(1, Ordering::Relaxed));
            let started = http.now();
            let dispatch = &self.session.dispatch;
            let future = dispatch.submit(http, &request, self.retry.clone()).await?;
            let took = http.now().saturating_sub(started);
            let id = &future.request_id;
            let mut abandoned = CancelOnDrop::armed(&self.session, id);
            let outcome = http.retrieve_sample(id, Some(took)).await;
            abandoned.disarm();
            match outcome {
                Ok(resolved) => {
                    let response = resolve(RequestType::Sample, id, resolved)?;
                    return complete(response, &request, future.sample_sequence_ids);
                }
                Err(error)
                    if *error.kind() == ErrorKind::Expired
                        && n_resubmissions < self.max_resubmissions =>
                {
                    n_resubmissions += 1;
                    tracing::debug!(request.id = %id, "the server forgot a sample; submitting anew");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn check(prompt: &ModelInput, params: &SamplingParams, options: &SampleOptions) -> Result<()> {
    let fault = |text: String| Err(Error::InvalidRequest(text));
    if prompt.chunks.is_empty() || prompt.length().is_ok_and(|n| n == 0) {
        return fault("the prompt is empty: at least one token is needed".into());
    }
    if options.num_samples == 0 {
        return fault("num_samples is 0: at least one sample is needed".into());
    }
    if !(params.temperature.is_finite() && params.temperature >= 0.0) {
        return fault(format!(
            "temperature {}: it must be a number of at least 0",
            params.temperature
        ));
    }
    if !(params.top_p > 0.0 && params.top_p <= 1.0) {
        return fault(format!("top_p {}: it must be in (0, 1]", params.top_p));
    }
    Ok(())
}

/// Checks that the response has what was asked for, and names its sequences.
fn complete(
    mut response: SampleResponse,
    request: &SampleRequest,
    sequence_ids: Option<Vec<String>>,
) -> Result<SampleResponse> {
    let n_sequences = response.sequences.len();
    if n_sequences != request.num_samples as usize {
        return Err(Error::Protocol(format!(
            "the server returned {n_sequences} samples for {} asked for",
            request.num_samples
        )));
    }
    if request.prompt_alt_tokens_k > 0 && response.prompt_alt_tokens.is_none() {
        return Err(Error::Protocol(
            "the server did not draw alternatives for the prompt".into(),
        ));
    }
    for (sequence, id) in response
        .sequences
        .iter_mut()
        .zip(sequence_ids.into_iter().flatten())
    {
        sequence.sequence_id = Some(id);
    }
    Ok(response)
}

/// Tells the server if a sample is given up, where servers want to know.
struct CancelOnDrop {
    http: Client,
    runtime: Handle,
    request_id: Option<RequestId>,
}

impl CancelOnDrop {
    fn armed(session: &Session, request_id: &RequestId) -> Self {
        Self {
            http: session.http.clone(),
            runtime: session.runtime.clone(),
            request_id: Some(request_id.clone()),
        }
    }

    fn disarm(&mut self) {
        self.request_id = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        let Some(request_id) = self.request_id.take() else {
            return;
        };
        let http = self.http.clone();
        self.runtime.spawn(async move {
            let is_wanted = http
                .dynamic_config()
                .await
                .is_ok_and(|config| config.sample_cancel_enabled);
            if is_wanted && let Err(error) = http.cancel_future(&request_id).await {
                tracing::debug!(request.id = %request_id, %error, "a sample was not cancelled");
            }
        });
    }
}
