//! What is reported, and sending it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tinker_types::{
    ErrorCategory, EventHead, FailedFuture, RequestId, Severity, TelemetryEvent, TelemetryRequest,
};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use uuid::Uuid;

use super::queue::{Queue, duration};
use crate::builder::PROTOCOL_VERSION;
use crate::cassette::Secrets;
use crate::client::{Client, Inner};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::future_driver::Resolved;
use crate::request_type::RequestType;

/// Time between two reports, unless something fails.
const INTERVAL: Duration = Duration::from_secs(10);
/// Longest wait for the last reports.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Most characters of a text in a report.
const MAX_TEXT: usize = 500;

/// The reports of one client.
#[derive(Debug)]
pub(crate) struct Telemetry {
    state: Mutex<State>,
    wake: Notify,
    process_uuid: String,
}

#[derive(Debug)]
struct State {
    queue: Queue,
    session_id: String,
    /// In the client's time; none before there is a session.
    session_began: Option<Duration>,
    is_running: bool,
    /// Reports under way.
    n_sending: u32,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                queue: Queue::new(),
                session_id: format!("sessionless-{}", Uuid::new_v4()),
                session_began: None,
                is_running: false,
                n_sending: 0,
            }),
            wake: Notify::new(),
            process_uuid: Uuid::new_v4().to_string(),
        }
    }
}

impl Telemetry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_idle(&self) -> bool {
        let state = self.state();
        state.queue.is_empty() && state.n_sending == 0
    }
}

impl Client {
    /// Whether the program agreed to reports.
    #[must_use]
    pub fn reports(&self) -> bool {
        self.inner().telemetry.is_some()
    }

    /// Says in which session reports are made from now on, if any are, and that it began.
    pub fn note_session(&self, session_id: &str) {
        let Some(telemetry) = &self.inner().telemetry else {
            return;
        };
        let mut state = telemetry.state();
        session_id.clone_into(&mut state.session_id);
        state.session_began = Some(self.now());
        drop(state);
        self.push(Severity::Info, |head| TelemetryEvent::SessionStart { head });
    }

    /// Reports something, if the program agreed to reports: `data` is cleaned of secrets, and is
    /// read by strangers all the same.
    pub fn report(&self, severity: Severity, name: &str, data: Map<String, Value>) {
        self.push(severity, |head| TelemetryEvent::GenericEvent {
            head,
            event_name: name.to_owned(),
            event_data: data,
        });
    }

    /// Reports that an operation of a training run, or its creation, ends with this error, as the
    /// official client does: as the end of the session, if there is one, since few programs go on.
    /// Calls that only look something up are not reported so.
    pub fn report_fatal(&self, error_type: &str, message: &str, is_user_error: bool) {
        let Some(telemetry) = &self.inner().telemetry else {
            return;
        };
        let message = short(message);
        if is_user_error {
            let data = json!({"error_type": error_type, "message": message});
            self.report(Severity::Warning, "user_error", object(data));
        } else {
            let error_type = error_type.to_owned();
            self.push(Severity::Error, |head| TelemetryEvent::UnhandledException {
                head,
                error_type,
                error_message: message,
                traceback: None,
            });
        }
        let began = telemetry.state().session_began;
        if let Some(began) = began {
            let age = duration(self.now().saturating_sub(began));
            self.push(Severity::Info, |head| TelemetryEvent::SessionEnd {
                head,
                duration: Some(age),
            });
        }
        telemetry.wake.notify_one();
    }

    /// Waits until all reports are sent, at most half a minute.
    pub async fn drain_reports(&self) {
        let Some(telemetry) = &self.inner().telemetry else {
            return;
        };
        let all = async {
            while !telemetry.is_idle() {
                self.send_reports(telemetry).await;
                // Somebody else may be sending the last one.
                if !telemetry.is_idle() {
                    self.sleep(Duration::from_millis(5)).await;
                }
            }
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, all).await.is_err() {
            tracing::debug!("the last reports were not sent in time");
        }
    }

    /// Reports a call that was given up.
    pub(crate) fn report_call(&self, error: &Error) {
        if self.inner().telemetry.is_some() {
            let name = "InternalClientHolder.execute_with_retries.exception";
            self.report(Severity::Error, name, particulars(error));
        }
    }

    /// Reports an operation that failed.
    pub(crate) fn report_future<T>(
        &self,
        request_id: &RequestId,
        request_type: RequestType,
        result: &Result<Resolved<T>>,
    ) {
        if self.inner().telemetry.is_none() {
            return;
        }
        let (what, mut data) = match result {
            Ok(Resolved::Ready(_)) => return,
            Ok(Resolved::Failed(failure)) => ("application_error", failed(failure)),
            Err(error) => (name_of(error), particulars(error)),
        };
        data.insert("request_id".to_owned(), json!(request_id.as_str()));
        data.insert("request_type".to_owned(), json!(request_type.as_str()));
        let name = format!("APIFuture.result_async.{what}");
        self.report(Severity::Error, &name, data);
    }

    fn push(&self, severity: Severity, make: impl FnOnce(EventHead) -> TelemetryEvent) {
        let Some(telemetry) = &self.inner().telemetry else {
            return;
        };
        let is_urgent = matches!(severity, Severity::Error | Severity::Critical);
        let must_start = {
            let mut state = telemetry.state();
            if !state.queue.push(severity, Clock::wall(), make) {
                tracing::debug!("too many reports wait; one is dropped");
            }
            !state.is_running
        };
        // The next event may come from within a runtime if this one does not.
        if must_start && let Ok(runtime) = Handle::try_current() {
            let running = Running::new(Arc::clone(telemetry));
            runtime.spawn(send_while_used(self.downgrade(), running));
        }
        if is_urgent {
            telemetry.wake.notify_one();
        }
    }

    /// Sends what is waiting; what is refused is dropped.
    async fn send_reports(&self, telemetry: &Telemetry) {
        // A report must not be what connects to the server first.
        while self.inner().setup.initialized() {
            let mut request = {
                let mut state = telemetry.state();
                let events = state.queue.take();
                if events.is_empty() {
                    return;
                }
                state.n_sending += 1;
                TelemetryRequest {
                    events,
                    platform: platform().to_owned(),
                    sdk_version: PROTOCOL_VERSION.to_owned(),
                    session_id: state.session_id.clone(),
                    process_uuid: telemetry.process_uuid.clone(),
                }
            };
            let sending = Sending(telemetry);
            self.clean(&mut request);
            if let Err(error) = self.send_telemetry(&request).await {
                let n_events = request.events.len();
                tracing::debug!(%error, n_events, "a report was not sent");
            }
            drop(sending);
        }
    }

    /// Takes secrets out of all texts.
    fn clean(&self, request: &mut TelemetryRequest) {
        let mut secrets = Secrets::default();
        let inner = self.inner();
        if let Some(key) = inner.credentials.key() {
            secrets.learn(key.expose());
        }
        for value in inner
            .headers
            .values()
            .filter_map(|value| value.to_str().ok())
        {
            secrets.learn(value);
        }
        for event in &mut request.events {
            let Ok(mut value) = serde_json::to_value(&*event) else {
                continue;
            };
            if secrets.value(&mut value) {
                *event =
                    serde_json::from_value(value).unwrap_or(TelemetryEvent::Unknown(Value::Null));
            }
        }
    }
}

/// Counts a report as under way until it is dropped.
struct Sending<'a>(&'a Telemetry);

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.n_sending = state.n_sending.saturating_sub(1);
    }
}

/// Notes that somebody sends reports, until it is dropped: with its task, or with its runtime.
struct Running(Arc<Telemetry>);

impl Running {
    fn new(telemetry: Arc<Telemetry>) -> Self {
        telemetry.state().is_running = true;
        Self(telemetry)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.state().is_running = false;
    }
}

/// Reports until nobody uses the client. Does not keep it alive while it waits.
async fn send_while_used(client: Weak<Inner>, running: Running) {
    while let Some(used) = Client::upgrade(&client) {
        used.send_reports(&running.0).await;
        drop(used);
        // Whether there is something to say or the time has come.
        let _ = tokio::time::timeout(INTERVAL, running.0.wake.notified()).await;
    }
}

/// The last part of the official client's name of a failed wait.
fn name_of(error: &Error) -> &'static str {
    match (error.kind(), error.status()) {
        (_, Some(_)) => "api_status_error",
        (ErrorKind::Timeout, None) => "timeout",
        (ErrorKind::Decode, None) => "validation_error",
        _ => "connection_error",
    }
}

fn particulars(error: &Error) -> Map<String, Value> {
    let kind = format!("{:?}", error.kind());
    let data = json!({
        "exception": kind.split([' ', '{']).next().unwrap_or_default(),
        "message": short(&error.to_string()),
        "status_code": error.status(),
        "attempts": error.attempts(),
        "is_user_error": error.category().map(|category| *category == ErrorCategory::User),
        "client": concat!("tinker-rust/", env!("CARGO_PKG_VERSION")),
    });
    object(data)
}

fn failed(failure: &FailedFuture) -> Map<String, Value> {
    object(json!({
        "exception": "RequestFailedError",
        "message": short(&failure.error),
        "error_category": failure.category.to_string(),
        "client": concat!("tinker-rust/", env!("CARGO_PKG_VERSION")),
    }))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(mut fields) => {
            fields.retain(|_, value| !value.is_null());
            fields
        }
        _ => Map::new(),
    }
}

fn short(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

/// The system as Python's `platform.system()` calls it.
const fn platform() -> &'static str {
    if cfg!(target_os = "linux") {
        "Linux"
    } else if cfg!(target_os = "macos") {
        "Darwin"
    } else if cfg!(windows) {
        "Windows"
    } else {
        "Unknown"
    }
}
