//! What a client tells its observer while it waits and retries.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tinker_types::{QueueState, RequestId};

use crate::request_type::RequestType;

/// Something a person who waits would like to know.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The server cannot be reached; the client waits for it.
    ServerLost {
        /// How it was noticed.
        error: String,
    },
    /// It answers again.
    ServerBack {
        /// How long it was away.
        after: Duration,
    },
    /// The server takes polls and leaves them unanswered; the client goes on asking.
    ServerSilent {
        /// The future.
        request_id: RequestId,
        /// Of what operation.
        request_type: RequestType,
        /// For how long.
        since: Duration,
    },
    /// It answers polls of that future again.
    ServerAnswers {
        /// The future.
        request_id: RequestId,
        /// How long it was silent.
        after: Duration,
    },
    /// A call failed and will be sent again.
    Retrying {
        /// Path of the call.
        route: String,
        /// Why it failed.
        reason: String,
        /// How often it was sent.
        attempts: u32,
        /// Time to the next attempt.
        wait: Duration,
    },
    /// The queue that a future waits in changed its state or reason.
    Queue {
        /// The future.
        request_id: RequestId,
        /// Of what operation.
        request_type: RequestType,
        /// The new state.
        state: QueueState,
        /// Its reason, if the server gives one.
        reason: Option<String>,
    },
    /// Samples are held back because the server asked for it.
    SamplingPaused {
        /// For how long.
        wait: Duration,
        /// Why, if the server says so.
        reason: Option<String>,
    },
    /// The limit on samples in flight changed, which all clients of this process with the same
    /// server and key share: it shrank since the server held samples back, or has grown to twice
    /// what was told last, or to its maximum.
    SamplingLimit {
        /// Most samples at once from now on.
        limit: u32,
    },
    /// The session cannot be kept alive; it may expire.
    HeartbeatFailing {
        /// How long no heartbeat has succeeded.
        since: Duration,
        /// Why the last one failed.
        error: String,
    },
}

type Callback = dyn Fn(&Event) + Send + Sync;

/// The observer of a client, if it has one.
#[derive(Clone, Default)]
pub(crate) struct Observer(Option<Arc<Callback>>);

impl Observer {
    pub(crate) fn new(callback: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(callback)))
    }

    /// Tells the observer; its panics are logged and go no further.
    pub(crate) fn tell(&self, event: &Event) {
        tracing::debug!(?event, "transport event");
        let Some(callback) = &self.0 else { return };
        if catch_unwind(AssertUnwindSafe(|| callback(event))).is_err() {
            tracing::error!("the observer of the client panicked");
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Observer" } else { "None" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panicking_observer_does_no_harm() {
        let observer = Observer::new(|_| panic!("observer"));

        observer.tell(&Event::ServerBack {
            after: Duration::ZERO,
        });
    }
}
