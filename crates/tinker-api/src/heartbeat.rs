//! Keeping a session alive for as long as somebody uses it.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use tinker_http::{Client, ErrorKind, Event, Heartbeats};
use tinker_types::SessionId;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

/// Time between heartbeats, unless the service client says otherwise.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);
/// Time without a successful heartbeat after which it is worth a warning.
const PATIENCE: Duration = Duration::from_secs(120);

/// What keeps a session alive; it ends when this is dropped.
///
/// It has a thread, a runtime and connections of its own, so that a program that keeps its runtime
/// busy, by building large requests or by its own work, does not lose its session. Nothing else runs
/// there: the settings that may change are refreshed on the program's runtime, whose connections
/// would end with a session's otherwise.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    beats: Mutex<Option<oneshot::Sender<Infallible>>>,
    refreshes: AbortHandle,
}

impl Heartbeat {
    /// Starts it for a session of the program on `runtime`; there if the system has no thread left.
    pub(crate) fn start(
        runtime: &Handle,
        http: Client,
        session_id: SessionId,
        interval: Duration,
    ) -> Self {
        let (handle, is_dropped) = oneshot::channel();
        let refreshes = runtime.spawn(refresh(http.clone(), interval));
        let work = async move {
            tokio::select! {
                _ = is_dropped => {}
                () = beat(http, session_id, interval) => {}
            }
        };
        spawn_apart(runtime, work);
        Self {
            beats: Mutex::new(Some(handle)),
            refreshes: refreshes.abort_handle(),
        }
    }

    /// Ends it.
    pub(crate) fn stop(&self) {
        let mut handle = self.beats.lock().unwrap_or_else(PoisonError::into_inner);
        handle.take();
        self.refreshes.abort();
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs `work` on a thread and a runtime of its own; on `program` where the system has none left.
fn spawn_apart<F>(program: &Handle, work: F)
where
    F: Future<Output = ()> + Send + 'static,
{
    fn share(program: &Handle, work: impl Future<Output = ()> + Send + 'static, why: &io::Error) {
        tracing::warn!(error = %why, "heartbeats share the runtime of the program");
        program.spawn(work);
    }
    // Handed over by a channel, since a thread that does not start keeps what it was given.
    let (sender, receiver) = mpsc::channel::<F>();
    let own_program = program.clone();
    let run = move || {
        let Ok(work) = receiver.recv() else {
            return;
        };
        // Made here: within a runtime, such as the program's, another one must not be dropped.
        match Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(work),
            Err(error) => share(&own_program, work, &error),
        }
    };
    let thread = std::thread::Builder::new().name("tinker-heartbeat".into());
    match thread.spawn(run) {
        Err(error) => share(program, work, &error),
        Ok(_) => {
            // It waits for the work, so this does not fail.
            sender.send(work).ok();
        }
    }
}

async fn beat(http: Client, session_id: SessionId, interval: Duration) {
    let mut last_success = http.now();
    let mut heartbeats = None;
    loop {
        http.sleep(interval).await;
        match beat_once(&http, &session_id, &mut heartbeats).await {
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
    }
}

/// One heartbeat. The connections are set up by the first, since most programs end before it.
async fn beat_once(
    http: &Client,
    session_id: &SessionId,
    heartbeats: &mut Option<Heartbeats>,
) -> tinker_http::Result<()> {
    let heartbeats = match heartbeats {
        Some(heartbeats) => heartbeats,
        None => heartbeats.insert(Heartbeats::new(http, session_id.clone())?),
    };
    heartbeats.beat().await
}

/// Looks, as often as the session is kept alive, whether the settings that may change are old.
async fn refresh(http: Client, interval: Duration) {
    loop {
        http.sleep(interval).await;
        http.refresh_dynamic_config().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use wiremock::matchers::path;
    use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};

    use super::*;

    async fn server(heartbeat: impl Respond + 'static) -> MockServer {
        let server = MockServer::start().await;
        let config = ResponseTemplate::new(200).set_body_json(serde_json::json!({}));
        Mock::given(path("/api/v1/client/config"))
            .respond_with(config)
            .mount(&server)
            .await;
        Mock::given(path("/api/v1/session_heartbeat"))
            .respond_with(heartbeat)
            .mount(&server)
            .await;
        server
    }

    /// A client, and a value that is shared for as long as the client exists.
    fn client(server: &MockServer) -> (Client, Arc<()>) {
        let witness = Arc::new(());
        let shared = Arc::clone(&witness);
        let builder = Client::builder(server.uri())
            .api_key("tml-x".parse().unwrap())
            .observer(move |_| {
                let _ = &shared;
            });
        (builder.build().unwrap(), witness)
    }

    #[tokio::test]
    async fn ends_when_the_session_is_over() {
        let server = server(ResponseTemplate::new(410)).await;
        let (http, _) = client(&server);

        beat(http, "S1".parse().unwrap(), Duration::from_millis(1)).await;
    }

    /// How many heartbeats a server has seen; it runs on a thread of its own.
    #[derive(Clone, Default)]
    struct Counter(Arc<AtomicU64>);

    impl Respond for Counter {
        fn respond(&self, _: &Request) -> ResponseTemplate {
            self.0.fetch_add(1, Ordering::SeqCst);
            ResponseTemplate::new(200)
        }
    }

    impl Counter {
        fn get(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn goes_on_while_the_runtime_of_the_program_is_busy() {
        let counter = Counter::default();
        let server = server(counter.clone()).await;
        let (http, _) = client(&server);
        let session = "S1".parse().unwrap();
        let interval = Duration::from_millis(1);
        let _heartbeat = Heartbeat::start(&Handle::current(), http, session, interval);

        // The only thread of this runtime does not come back before ten heartbeats have arrived.
        while counter.get() < 10 {
            std::thread::yield_now();
        }
    }

    #[tokio::test]
    async fn settings_are_refreshed_on_the_runtime_of_the_program() {
        let server = server(ResponseTemplate::new(200)).await;
        let refreshes = Counter::default();
        Mock::given(path("/api/v1/client/dynamic_config"))
            .respond_with(refreshes.clone())
            .mount(&server)
            .await;
        let (http, _) = client(&server);
        http.config().await.unwrap();
        assert_eq!(refreshes.get(), 1);
        // Time leaps for the tasks of this runtime only.
        tokio::time::pause();
        let session = "S1".parse().unwrap();
        let _heartbeat = Heartbeat::start(&Handle::current(), http, session, INTERVAL);
        tokio::task::yield_now().await;

        tokio::time::advance(Duration::from_secs(301)).await;

        // The bound is of real time.
        tokio::time::resume();
        let refreshed = async {
            while refreshes.get() < 2 {
                tokio::task::yield_now().await;
            }
        };
        let bound = Duration::from_secs(20);
        tokio::time::timeout(bound, refreshed).await.unwrap();
    }

    #[tokio::test]
    async fn ends_when_its_handle_is_dropped() {
        let counter = Counter::default();
        let server = server(counter.clone()).await;
        let (http, witness) = client(&server);
        let interval = Duration::from_millis(1);
        let session = "S1".parse().unwrap();
        let heartbeat = Heartbeat::start(&Handle::current(), http, session, interval);
        while counter.get() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(Arc::strong_count(&witness), 2);

        drop(heartbeat);

        // Its client goes with it.
        while Arc::strong_count(&witness) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
