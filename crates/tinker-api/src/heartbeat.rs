//! Keeping a session alive for as long as somebody uses it.

use std::time::Duration;

use tinker_http::{Client, ErrorKind, Event};
use tinker_types::SessionId;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// Time between heartbeats, unless the service client says otherwise.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);
/// Time without a successful heartbeat after which it is worth a warning.
const PATIENCE: Duration = Duration::from_secs(120);

/// The task that keeps a session alive; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Heartbeat(AbortHandle);

impl Heartbeat {
    /// Starts the task on a runtime.
    pub(crate) fn start(
        runtime: &Handle,
        http: Client,
        session_id: SessionId,
        interval: Duration,
    ) -> Self {
        Self(
            runtime
                .spawn(beat(http, session_id, interval))
                .abort_handle(),
        )
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

async fn beat(http: Client, session_id: SessionId, interval: Duration) {
    let mut last_success = http.now();
    loop {
        http.sleep(interval).await;
        match http.session_heartbeat(&session_id).await {
            Ok(()) => {
                tracing::debug!(session.id = %session_id, "kept alive");
                last_success = http.now();
            }
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

#[cfg(test)]
mod tests {
    use wiremock::matchers::path;
    use wiremock::{Mock, MockServer, ResponseTemplate};

    use super::*;

    async fn client(heartbeat: ResponseTemplate) -> (MockServer, Client) {
        let server = MockServer::start().await;
        let config = ResponseTemplate::new(200).set_body_json(serde_json::json!({}));
        for (route, answer) in [("client/config", config), ("session_heartbeat", heartbeat)] {
            Mock::given(path(format!("/api/v1/{route}")))
                .respond_with(answer)
                .mount(&server)
                .await;
        }
        let builder = Client::builder(server.uri()).api_key("tml-x".parse().unwrap());
        let client = builder.build().unwrap();
        (server, client)
    }

    #[tokio::test]
    async fn ends_when_the_session_is_over() {
        let (_server, http) = client(ResponseTemplate::new(410)).await;

        beat(http, "S1".parse().unwrap(), Duration::from_millis(1)).await;
    }

    #[tokio::test]
    async fn ends_when_its_handle_is_dropped() {
        let (_server, http) = client(ResponseTemplate::new(200)).await;
        let interval = Duration::from_millis(1);
        let heartbeat = Heartbeat::start(&Handle::current(), http, "S1".parse().unwrap(), interval);
        let task = heartbeat.0.clone();

        drop(heartbeat);

        while !task.is_finished() {
            tokio::task::yield_now().await;
        }
    }
}
