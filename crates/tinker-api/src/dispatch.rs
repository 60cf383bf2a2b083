//! Holding back samples: so many at once, so many bytes, and together when the server asks for it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tinker_http::machine::SharedPause;
use tinker_http::{AsampleReply, ByteGate, Client, Event, RetryPolicy};
use tinker_types::{Chunk, ClientConfig, ModelInput, SampleRequest, UntypedFuture};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};

/// Submissions at once.
const MAX_SUBMISSIONS: usize = 400;
/// Submissions at once during and shortly after a pause.
const MAX_CAREFUL_SUBMISSIONS: usize = 10;
/// How much more a byte counts during and shortly after a pause.
const CAREFUL_BYTE_FACTOR: u64 = 20;
/// Prompts above this size cause a longer pause.
const LARGE_PROMPT: u64 = 128 << 10;
/// Pause after a refused submission.
const PAUSE: Duration = Duration::from_secs(1);
/// Pause after a refused submission of a large prompt.
const LONG_PAUSE: Duration = Duration::from_secs(5);

/// The budgets that the samplers of a session share.
#[derive(Debug)]
pub(crate) struct Dispatch {
    submissions: Semaphore,
    careful_submissions: Semaphore,
    bytes: ByteGate,
    pause: Mutex<SharedPause>,
}

impl Dispatch {
    pub(crate) fn new(config: &ClientConfig) -> Self {
        Self {
            submissions: Semaphore::new(MAX_SUBMISSIONS),
            careful_submissions: Semaphore::new(MAX_CAREFUL_SUBMISSIONS),
            bytes: ByteGate::new(config.sample_dispatch_bytes_semaphore_size),
            pause: Mutex::default(),
        }
    }

    /// Submits one sample: the same request is sent until the server takes it.
    pub(crate) async fn submit(
        &self,
        http: &Client,
        request: &SampleRequest,
        policy: RetryPolicy,
    ) -> Result<UntypedFuture> {
        let n_bytes = estimate(&request.prompt);
        let _submission = self.submissions.acquire().await.map_err(closed)?;
        let is_careful = self.pause().is_recent(http.now());
        let _careful = if is_careful {
            Some(self.careful_submissions.acquire().await.map_err(closed)?)
        } else {
            None
        };
        let factor = if is_careful { CAREFUL_BYTE_FACTOR } else { 1 };
        let _bytes = self.bytes.acquire(n_bytes.saturating_mul(factor)).await;
        loop {
            self.wait_out_pause(http).await;
            match http.asample(request, policy.clone()).await? {
                AsampleReply::Accepted(future) => return Ok(future),
                AsampleReply::Backpressure { reason } => {
                    let wait = pause_after(n_bytes);
                    tracing::debug!(?reason, ?wait, "the server holds samples back");
                    self.pause().pause(http.now(), wait);
                    if let Some(limit) = http.sample_gate().refuse(http.now()) {
                        tracing::info!(limit, "at most {limit} samples in flight from now on");
                        http.tell(&Event::SamplingLimit { limit });
                    }
                    http.tell(&Event::SamplingPaused { wait, reason });
                }
            }
        }
    }

    async fn wait_out_pause(&self, http: &Client) {
        loop {
            let Some(rest) = self.pause().remaining(http.now()) else {
                return;
            };
            http.sleep(rest).await;
        }
    }

    fn pause(&self) -> std::sync::MutexGuard<'_, SharedPause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed<E>(_: E) -> Error {
    Error::Stopped("the session's budgets are closed".into())
}

/// How long to hold back after a prompt of this size was refused.
const fn pause_after(n_bytes: u64) -> Duration {
    if n_bytes > LARGE_PROMPT {
        LONG_PAUSE
    } else {
        PAUSE
    }
}

/// Size of a prompt as JSON: ten bytes a token.
fn estimate(prompt: &ModelInput) -> u64 {
    prompt
        .chunks
        .iter()
        .map(|chunk| match chunk {
            Chunk::EncodedText { tokens } => tokens.len() as u64 * 10,
            other => other.estimated_bytes() as u64,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_prompts_cause_longer_pauses() {
        let pause = |n_tokens: usize| {
            let prompt = ModelInput::from_tokens(vec![1; n_tokens]);
            pause_after(estimate(&prompt)).as_secs()
        };

        assert_eq!(pause(1), 1);
        assert_eq!(pause(13_107), 1);
        assert_eq!(pause(13_108), 5);
    }
}
