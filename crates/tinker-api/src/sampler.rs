//! One sampler at work: submits a sample, waits for its result, and submits anew what was forgotten.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tinker_http::machine::ProgressWatch;
use tinker_http::{Completed, CompletionPoller, Error as HttpError, Resolved};
use tinker_http::{ErrorKind, RequestType, RetryPolicy};
use tinker_types::{
    CompletionsTarget, RequestId, SampleRequest, SampleResponse, SamplingSessionId,
};

use crate::cancel::Canceller;
use crate::error::{Error, Result};
use crate::resolve::resolve;
use crate::sample_numbers::{MAX_RESUBMISSIONS, SampleNumbers};
use crate::session::Session;

/// What the samples of one sampler share.
#[derive(Debug)]
pub(crate) struct Sampler {
    pub(crate) session: Arc<Session>,
    pub(crate) id: SamplingSessionId,
    numbers: SampleNumbers,
    max_resubmissions: u32,
    retry: RetryPolicy,
    poller: Option<CompletionPoller>,
    canceller: Canceller,
    progress: Option<Mutex<ProgressWatch>>,
}

impl Sampler {
    /// A sampler whose samples carry the numbers of client `client_number`.
    pub(crate) fn new(session: Arc<Session>, id: SamplingSessionId, client_number: u64) -> Self {
        let config = &session.config;
        let (retry, max_resubmissions) = if config.sample_no_retries {
            (RetryPolicy::never(), 0)
        } else {
            (session.http.retry_policy().clone(), MAX_RESUBMISSIONS)
        };
        let target = || CompletionsTarget::SamplingSession {
            sampling_session_id: id.clone(),
            cloned_sampler_id: client_number,
        };
        let start = || CompletionPoller::start(&session.runtime, session.http.clone(), target());
        let watch = || {
            Mutex::new(ProgressWatch::new(
                session.http.poll_policy().progress_timeout,
            ))
        };
        Self {
            numbers: SampleNumbers::of_client(client_number),
            max_resubmissions,
            retry,
            poller: config.sample_use_retrieve_futures.then(start),
            progress: config.sample_enable_stuck_detection.then(watch),
            canceller: Canceller::start(&session.runtime, session.http.clone()),
            id,
            session,
        }
    }

    /// The number of the next sample.
    pub(crate) fn next_number(&self) -> Result<u64> {
        self.numbers.next_call()
    }

    /// Most samples in flight.
    pub(crate) fn max_in_flight(&self) -> usize {
        // One poll for all costs the server nothing per sample, so the shared limit is enough.
        if self.poller.is_some() {
            return usize::MAX;
        }
        let n = self.session.config.sample_max_concurrent_requests;
        usize::try_from(n).unwrap_or(usize::MAX).max(1)
    }

    /// Draws a sample that has a number, unless nothing at all comes back for too long.
    pub(crate) async fn draw(&self, request: SampleRequest) -> Result<SampleResponse> {
        let Some(progress) = &self.progress else {
            return self.submit_until_done(request).await;
        };
        let now = || self.session.http.now();
        let waiting = Waiting::begin(progress, now());
        tokio::select! {
            result = self.submit_until_done(request) => {
                if result.is_ok() {
                    waiting.lock().advance(now());
                }
                result
            }
            () = self.patience(&waiting) => Err(Error::TimedOut {
                operation: RequestType::Sample,
                after: self.session.http.poll_policy().progress_timeout,
            }),
        }
    }

    /// Ends when no sample of this sampler has come back for too long.
    async fn patience(&self, waiting: &Waiting<'_>) {
        let http = &self.session.http;
        loop {
            let remaining = waiting.lock().remaining(http.now());
            if remaining.is_zero() {
                return;
            }
            http.sleep(remaining).await;
        }
    }

    // Its parts are boxed, so that a sample that waits takes a small task.
    /// Submits until a result comes: again under a new number if the server forgot the future.
    async fn submit_until_done(&self, mut request: SampleRequest) -> Result<SampleResponse> {
        let http = &self.session.http;
        // What has no connection to be polled on waits here and not with the server.
        let _poll = match &self.poller {
            None => http.sample_gate().poll().await,
            Some(_) => None,
        };
        let mut n_resubmissions = 0;
        loop {
            let started = http.now();
            let dispatch = &self.session.dispatch;
            let turn = http.sample_gate().submission().await;
            let future = Box::pin(dispatch.submit(http, &request, self.retry.clone())).await?;
            drop(turn);
            let took = http.now().saturating_sub(started);
            let id = &future.request_id;
            let abandoned = self.canceller.unless_disarmed(id);
            let outcome = self.result(id, took).await;
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
                    request.seq_id = request.seq_id.map(SampleNumbers::anew);
                    tracing::debug!(request.id = %id, "the server forgot a sample; submitting anew");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a result: by the poll of the sampler if servers want that, else by its own.
    async fn result(
        &self,
        id: &RequestId,
        took: Duration,
    ) -> Result<Resolved<SampleResponse>, HttpError> {
        let http = &self.session.http;
        let Some(poller) = &self.poller else {
            return Box::pin(http.retrieve_sample(id, Some(took))).await;
        };
        let outcome = match poller.completed(id).await {
            Completed::Finished { n_bytes } => {
                let _turn = http.sample_gate().fetch().await;
                Box::pin(http.retrieve_announced_sample(id, n_bytes, Some(took))).await
            }
            Completed::AskSingly => {
                let _poll = http.sample_gate().poll().await;
                Box::pin(http.retrieve_sample(id, Some(took))).await
            }
        };
        if outcome.is_ok() {
            poller.fetched(id);
        }
        outcome
    }
}

/// One sample that waits, for as long as this lives.
struct Waiting<'a>(&'a Mutex<ProgressWatch>);

impl<'a> Waiting<'a> {
    fn begin(progress: &'a Mutex<ProgressWatch>, now: Duration) -> Self {
        let waiting = Self(progress);
        waiting.lock().begin(now);
        waiting
    }

    fn lock(&self) -> MutexGuard<'_, ProgressWatch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.lock().end();
    }
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
    crate::dialect::align_prompt_logprobs(&mut response, request);
    if request.prompt_alt_tokens_k > 0 && response.prompt_alt_tokens.is_none() {
        return Err(Error::Protocol(
            "the server did not draw alternatives for the prompt".into(),
        ));
    }
    if let Some(n) = request.prompt_logprobs_last_n {
        let rows = response.prompt_logprobs.as_deref().unwrap_or_default();
        let n_before = rows.len().saturating_sub(n as usize);
        if rows.iter().take(n_before).any(Option::is_some) {
            return Err(Error::Protocol(format!(
                "the server does not heed prompt_logprobs_last_n: it returned more than the last {n}"
            )));
        }
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
