//! Taking leave of the server: apart from the run, whose outcome is recorded by then.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tinker_types::FinishReason;

use crate::trainer::Service;

/// How long a server is waited for that is told of the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// The session that a run leaves behind, shared between the run and whoever ends the session.
#[derive(Clone, Default)]
pub struct Goodbye(Arc<Mutex<Option<Left>>>);

/// A session that nothing is done in any more.
struct Left {
    service: Box<dyn Service>,
    reason: FinishReason,
}

impl Goodbye {
    /// One of a run that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the session, if there is one that a resumed run does not go on with. It takes 2 s at
    /// most and may be given up at any time: a server that was not told finds out by the missing
    /// heartbeat.
    pub async fn say(&self) {
        let left = self.left().take();
        if let Some(Left { service, reason }) = left {
            end(&*service, reason).await;
        }
    }

    /// Leaves a session to be ended.
    pub(super) fn leave(&self, service: Box<dyn Service>, reason: FinishReason) {
        *self.left() = Some(Left { service, reason });
    }

    fn left(&self) -> std::sync::MutexGuard<'_, Option<Left>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Goodbye {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.left().as_ref().map(|left| left.reason);
        f.debug_tuple("Goodbye").field(&reason).finish()
    }
}

/// Ends a session, unless the server takes too long.
pub(super) async fn end(service: &dyn Service, reason: FinishReason) {
    match tokio::time::timeout(PATIENCE, service.close(reason)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the session was not ended"),
        Err(_) => tracing::debug!("the session was not ended in time"),
    }
}
