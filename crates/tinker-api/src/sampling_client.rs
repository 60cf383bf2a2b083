//! One sampler: continuations of prompts, and the log-probabilities of prompts.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use tinker_http::RequestType;
use tinker_types::{
    CheckpointKind, CreateSamplingSessionRequest, CreateSamplingSessionTag, DType, ModelInput,
    SampleRequest, SampleResponse, SampleTag, SamplingParams, SamplingSessionId,
};

use crate::api_future::ApiFuture;
use crate::error::{Error, Result};
use crate::options::{SampleOptions, SamplingSource};
use crate::sample_numbers::NUMBERS_PER_CLIENT;
use crate::sample_queue::{Job, SampleQueue};
use crate::sampler::Sampler;
use crate::sampler_handle::{Holder, SamplerHandle};
use crate::session::Session;

/// A sampler. Cheap to clone.
///
/// Samples are queued when the method is called and submitted in that order, so many at once as
/// servers allow; they run in any order, and each future brings its own result. Failed submissions
/// are repeated under the same number; a sample that the server forgot is submitted under a new one.
#[derive(Debug, Clone)]
pub struct SamplingClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    sampler: Arc<Sampler>,
    base_model: String,
    /// Every sample does, whatever its options say.
    record_stability_info: bool,
    queue: SampleQueue,
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

    /// The first client of a sampler that exists.
    pub(crate) fn of_sampler(
        session: Arc<Session>,
        id: SamplingSessionId,
        base_model: String,
    ) -> Self {
        Self::numbered(Sampler::new(session, id, 0), base_model, false)
    }

    /// One more client of a sampler.
    pub(crate) async fn join(session: Arc<Session>, handle: &SamplerHandle) -> Result<Self> {
        let id = handle.sampling_session_id.clone();
        let number = if session.config.sample_join_sampling_session {
            session.http.join_sampling_session(&id).await?
        } else {
            // As the official client: one of a billion, so that two clients hardly ever collide.
            1 + RandomState::new().hash_one(()) % NUMBERS_PER_CLIENT
        };
        let sampler = Sampler::new(session, id, number);
        let base_model = handle.base_model.clone();
        Ok(Self::numbered(
            sampler,
            base_model,
            handle.record_stability_info,
        ))
    }

    fn numbered(sampler: Sampler, base_model: String, record_stability_info: bool) -> Self {
        let sampler = Arc::new(sampler);
        Self {
            inner: Arc::new(Inner {
                queue: SampleQueue::start(Arc::clone(&sampler)),
                sampler,
                base_model,
                record_stability_info,
            }),
        }
    }

    /// What another process needs to sample from this sampler, by
    /// [`ServiceClient::create_sampling_client_from_handle`](crate::ServiceClient::create_sampling_client_from_handle).
    ///
    /// # Errors
    /// If the server's settings cannot be fetched.
    pub async fn get_sampler_handle(&self) -> Result<SamplerHandle> {
        let Sampler { session, id, .. } = &*self.inner.sampler;
        Ok(SamplerHandle {
            session_id: session.id.clone(),
            sampling_session_id: id.clone(),
            holder: Holder {
                base_url: session.http.base_url().to_string(),
                default_headers_overrides: serde_json::Map::new(),
                client_config: session.config.clone(),
                client_dynamic_config: session.http.dynamic_config().await?,
            },
            base_model: self.inner.base_model.clone(),
            record_stability_info: self.inner.record_stability_info,
        })
    }

    /// The sampler.
    #[must_use]
    pub fn sampling_session_id(&self) -> &SamplingSessionId {
        &self.inner.sampler.id
    }

    /// Name of the base model.
    #[must_use]
    pub fn base_model(&self) -> &str {
        &self.inner.base_model
    }

    /// Most samples in flight now, of all samplers of this process with the same server and key. It
    /// halves when the server holds samples back and grows while results come.
    #[must_use]
    pub fn concurrency_limit(&self) -> u32 {
        self.inner.sampler.session.http.sample_gate().limit()
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
        let request = match self.request(prompt, params, options) {
            Ok(request) => request,
            Err(error) => return ApiFuture::refused(operation, error),
        };
        let (promise, future) = ApiFuture::new(operation);
        self.inner.queue.push(Job { request, promise });
        future
    }

    /// The log-probability of every token of `prompt` given those before it: natural log, ≤ 0,
    /// `None` for the first one.
    ///
    /// Endpoint: `POST /api/v1/asample`.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn compute_logprobs(&self, prompt: ModelInput) -> ApiFuture<Vec<Option<f32>>> {
        self.logprobs(prompt, None)
    }

    /// As [`compute_logprobs`](Self::compute_logprobs), of the last `n` tokens only, 1 to the
    /// prompt's length less one; the tokens before have `None`. The server need not keep the rest.
    ///
    /// Endpoint: `POST /api/v1/asample`.
    ///
    /// # Errors
    /// As [`compute_logprobs`](Self::compute_logprobs), and if `n` is out of range.
    pub fn compute_last_logprobs(&self, prompt: ModelInput, n: u32) -> ApiFuture<Vec<Option<f32>>> {
        self.logprobs(prompt, Some(n))
    }

    fn logprobs(&self, prompt: ModelInput, last_n: Option<u32>) -> ApiFuture<Vec<Option<f32>>> {
        let params = SamplingParams {
            max_tokens: Some(1),
            ..SamplingParams::default()
        };
        let options = SampleOptions {
            prompt_logprobs: true,
            prompt_logprobs_last_n: last_n,
            ..SampleOptions::default()
        };
        let sample = self.sample(prompt, params, options);
        let (promise, future) = ApiFuture::new(RequestType::Sample);
        let task = self.inner.sampler.session.runtime.spawn(async move {
            let result = sample.await.and_then(|response| {
                response.prompt_logprobs.ok_or_else(|| {
                    Error::Protocol("the server returned no prompt log-probabilities".into())
                })
            });
            promise.send(result).ok();
        });
        future.aborting(task.abort_handle())
    }

    /// The request, checked and numbered: what is refused takes no number.
    fn request(
        &self,
        prompt: ModelInput,
        sampling_params: SamplingParams,
        options: SampleOptions,
    ) -> Result<SampleRequest> {
        self.inner.sampler.session.check_open()?;
        check(&prompt, &sampling_params, &options)?;
        Ok(SampleRequest {
            num_samples: options.num_samples,
            prompt,
            sampling_params,
            sampling_session_id: Some(self.inner.sampler.id.clone()),
            seq_id: Some(self.inner.sampler.next_number()?),
            prompt_logprobs: Some(options.prompt_logprobs),
            topk_prompt_logprobs: options.topk_prompt_logprobs,
            topk_sample_logprobs: options.topk_sample_logprobs,
            target_prompt_logprobs: options.target_prompt_logprobs,
            prompt_alt_tokens_k: options.prompt_alt_tokens_k,
            prompt_logprobs_last_n: options.prompt_logprobs_last_n,
            record_stability_info: options.record_stability_info
                || self.inner.record_stability_info,
            base_model: None,
            model_path: None,
            tag: SampleTag,
        })
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
    check_prompt_options(prompt, options)
}

/// Checks what is asked about a prompt, as far as its length is known.
fn check_prompt_options(prompt: &ModelInput, options: &SampleOptions) -> Result<()> {
    let fault = |text: String| Err(Error::InvalidRequest(text));
    let n_tokens = prompt.length().ok();
    if let Some(n) = options.prompt_logprobs_last_n {
        if !options.prompt_logprobs {
            return fault("prompt_logprobs_last_n needs prompt_logprobs".into());
        }
        if n == 0 || n_tokens.is_some_and(|n_tokens| n as usize >= n_tokens) {
            return fault(format!(
                "prompt_logprobs_last_n {n}: it must be 1 to the prompt's length less one"
            ));
        }
    }
    if let Some(targets) = &options.target_prompt_logprobs {
        let rows = n_tokens.map(|n_tokens| n_tokens.saturating_sub(1));
        let fits = targets.dtype() == DType::Int64
            && matches!(targets.shape(), [n, _] if rows.is_none_or(|rows| rows == *n));
        if !fits {
            return fault(format!(
                "target_prompt_logprobs of shape {:?}: it must be int64 [prompt tokens - 1, k]",
                targets.shape()
            ));
        }
    }
    Ok(())
}
