//! A client of the double that waits milliseconds where a real one waits seconds.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tinker_api::{
    Datum, LoraConfig, ModelInput, ServiceClient, ServiceClientBuilder, TrainingClient,
};
use tinker_contract::mock::Mock;
use tinker_http::machine::Backoff;
use tinker_http::{Client, ClientBuilder, Event, PollPolicy, RetryPolicy};

/// A key that is nobody's.
pub(crate) const KEY: &str = "tml-contract-test";

pub(crate) const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const fn backoff() -> Backoff {
    Backoff {
        base_delay: ms(1),
        max_delay: ms(4),
        jitter: 0.25,
    }
}

/// Retries of a few milliseconds, within five seconds.
pub(crate) fn retry_policy() -> RetryPolicy {
    RetryPolicy {
        max_attempts: 6,
        backoff: backoff(),
        total_timeout: Duration::from_secs(5),
        reconnect_timeout: Duration::from_secs(5),
        billing_pause: Duration::ZERO,
    }
}

/// Polls of a few milliseconds, within five seconds.
pub(crate) fn poll_policy() -> PollPolicy {
    PollPolicy {
        min_interval: ms(1),
        backoff: backoff(),
        outage_timeout: Duration::from_secs(5),
        billing_pause: Duration::ZERO,
        ..PollPolicy::default()
    }
}

/// A builder with those policies.
pub(crate) fn builder(base_url: &str) -> ClientBuilder {
    Client::builder(base_url)
        .api_key(KEY.parse().unwrap())
        .retry_policy(retry_policy())
        .poll_policy(poll_policy())
}

/// What the client told its observer.
#[derive(Clone, Default)]
pub(crate) struct Events(Arc<Mutex<Vec<Event>>>);

impl Events {
    pub(crate) fn observe(&self) -> impl Fn(&Event) + Send + Sync + 'static {
        let events = Arc::clone(&self.0);
        move |event| events.lock().unwrap().push(event.clone())
    }

    pub(crate) fn all(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }
}

/// A double, a client that has started up, and what the client tells.
pub(crate) struct Rig {
    pub(crate) mock: Mock,
    pub(crate) client: Client,
    pub(crate) events: Events,
}

impl Rig {
    pub(crate) async fn start() -> Self {
        Self::with(|builder| builder).await
    }

    pub(crate) async fn with(change: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Self {
        let mock = Mock::start().await;
        let events = Events::default();
        let builder = builder(&mock.base_url()).observer(events.observe());
        let client = change(builder).build().unwrap();
        client.config().await.unwrap();
        mock.forget();
        Self {
            mock,
            client,
            events,
        }
    }
}

/// A service client of a server, with those policies.
pub(crate) fn service(base_url: &str, api_key: &str) -> ServiceClientBuilder {
    ServiceClient::builder(base_url)
        .api_key(api_key.parse().unwrap())
        .retry_policy(retry_policy())
        .poll_policy(poll_policy())
}

/// A training client of the double; what it took to create it is forgotten.
pub(crate) async fn trainer(mock: &Mock) -> TrainingClient {
    let service = service(&mock.base_url(), KEY).build().unwrap();
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();
    mock.forget();
    trainer
}

/// An example of `n` tokens that starts with `first`; it counts 16 bytes a token.
pub(crate) fn datum(first: u32, n: usize) -> Datum {
    let mut tokens = vec![1; n];
    tokens[0] = first;
    Datum::cross_entropy(ModelInput::from_tokens(tokens), vec![2; n], vec![1.0; n]).unwrap()
}

/// Lets other tasks run until something has happened.
pub(crate) async fn until(happened: impl Fn() -> bool) {
    let waiting = async {
        while !happened() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waiting)
        .await
        .expect("it never happened");
}
