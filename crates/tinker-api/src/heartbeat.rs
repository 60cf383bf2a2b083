//! Keeping a session alive for as long as somebody uses it.

use std::time::Duration;

use tinker_http::{Client, ErrorKind, Event};
use tinker_types::SessionId;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// Time between heartbeats.
const INTERVAL: Duration = Duration::from_secs(10);
/// Time without a successful heartbeat after which it is worth a warning.
const PATIENCE: Duration = Duration::from_secs(120);

/// The task that keeps a session alive; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Heartbeat(AbortHandle);

impl Heartbeat {
    /// Starts the task on a runtime.
    pub(crate) fn start(runtime: &Handle, http: Client, session_id: SessionId) -> Self {
        Self(runtime.spawn(beat(http, session_id)).abort_handle())
    }

    /// Ends the task.
    pub(crate) fn stop(&self) {
        self.0.abort();
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn beat(http: Client, session_id: SessionId) {
    let mut last_success = http.now();
    loop {
        http.sleep(INTERVAL).await;
        match http.session_heartbeat(&session_id).await {
            Ok(()) => last_success = http.now(),
            Err(error) if *error.kind() == ErrorKind::Expired => return,
            Err(error) => {
                let since = http.now().saturating_sub(last_success);
                if since > PATIENCE {
                    tracing::warn!(session.id = %session_id, ?since, %error, "heartbeats fail");
                    http.tell(&Event::HeartbeatFailing {
                        since,
                        error: error.to_string(),
                    });
                }
            }
        }
        http.refresh_dynamic_config().await;
    }
}
