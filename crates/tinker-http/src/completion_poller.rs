//! One poll for all samples of a sampler: does what [`CompletionPoll`] says and wakes those who wait.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tinker_types::{
    Completion, CompletionsTarget, RequestId, RetrieveFuturesRequest, RetrieveFuturesResponse,
};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;

use crate::client::Client;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind};
use crate::machine::{CompletionEvent, CompletionPoll, CompletionStep};

/// What a poll says of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completed {
    /// Its result is ready and this large, 0 if the server does not say.
    Finished {
        /// Size in bytes.
        n_bytes: u64,
    },
    /// It failed, or the poll does not know: ask for it by itself.
    AskSingly,
}

/// The poll of one client of a sampler; it ends when this is dropped.
#[derive(Debug)]
pub struct CompletionPoller {
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something new to wait for or to report.
    news: Notify,
}

#[derive(Debug)]
struct State {
    machine: CompletionPoll,
    waiting: HashMap<RequestId, oneshot::Sender<Completed>>,
    /// Completions that came before their submission was answered here.
    early: HashMap<RequestId, Completed>,
    /// Samples given up before they were done.
    abandoned: HashSet<RequestId>,
    has_ended: bool,
}

impl CompletionPoller {
    /// Starts the poll on a runtime. It sends nothing until somebody waits.
    #[must_use]
    pub fn start(runtime: &Handle, client: Client, target: CompletionsTarget) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                machine: CompletionPoll::new(client.poll_policy().clone()),
                waiting: HashMap::new(),
                early: HashMap::new(),
                abandoned: HashSet::new(),
                has_ended: false,
            }),
            news: Notify::new(),
        });
        let task = runtime.spawn(poll(client, target, Arc::clone(&shared)));
        Self {
            shared,
            task: task.abort_handle(),
        }
    }

    /// Waits until a sample is done. Dropped before, it gives the sample up.
    pub async fn completed(&self, request_id: &RequestId) -> Completed {
        let (sender, done) = oneshot::channel();
        {
            let mut state = self.shared.lock();
            if state.has_ended {
                return Completed::AskSingly;
            }
            if let Some(completed) = state.early.remove(request_id) {
                return completed;
            }
            state.waiting.insert(request_id.clone(), sender);
        }
        self.shared.news.notify_one();
        let mut interest = Interest {
            shared: &self.shared,
            request_id: Some(request_id),
        };
        let completed = done.await.unwrap_or(Completed::AskSingly);
        interest.request_id = None;
        completed
    }

    /// Notes that a result was fetched, so that the server may delete it.
    pub fn fetched(&self, request_id: &RequestId) {
        self.shared.lock().machine.fetched(request_id.clone());
        self.shared.news.notify_one();
    }
}

impl Drop for CompletionPoller {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Somebody waits for a sample, for as long as this lives.
struct Interest<'a> {
    shared: &'a Shared,
    request_id: Option<&'a RequestId>,
}

impl Drop for Interest<'_> {
    fn drop(&mut self) {
        let Some(request_id) = self.request_id else {
            return;
        };
        let mut state = self.shared.lock();
        if state.waiting.remove(request_id).is_some() {
            state.abandoned.insert(request_id.clone());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sorts an answer: wakes those whose samples are done.
    fn answered(&self, answer: RetrieveFuturesResponse) -> CompletionEvent {
        let mut state = self.lock();
        if state.machine.is_restart(answer.cursor) {
            tracing::warn!("the server forgot which samples are done; asking for each");
            state.wake_all();
        }
        let n_completions = answer.completions.len();
        for completion in answer.completions {
            match completion {
                Completion::Finished {
                    request_id,
                    response_payload_uncompressed_size: size,
                } => {
                    let n_bytes = size.unwrap_or(0);
                    state.complete(request_id, Completed::Finished { n_bytes });
                }
                Completion::Failed { request_id } => {
                    state.complete(request_id, Completed::AskSingly);
                }
                // However it ended, its future tells.
                Completion::Unknown(value) => {
                    tracing::debug!(%value, "a completion was not understood");
                    let request_id = value
                        .get("request_id")
                        .and_then(|id| id.as_str()?.parse().ok());
                    if let Some(request_id) = request_id {
                        state.complete(request_id, Completed::AskSingly);
                    }
                }
                other => tracing::debug!(?other, "a completion was not understood"),
            }
        }
        CompletionEvent::Answered {
            cursor: answer.cursor,
            n_completions,
        }
    }

    /// The next step, with everybody told to ask singly if it is the last one.
    fn on(&self, client: &Client, event: CompletionEvent) -> CompletionStep {
        let mut state = self.lock();
        let n_waiting = state.waiting.len();
        let step = state
            .machine
            .on(client.now(), n_waiting, event, Clock::draw());
        if step == CompletionStep::Finish {
            state.has_ended = true;
            state.wake_all();
        }
        step
    }
}

impl State {
    fn complete(&mut self, request_id: RequestId, completed: Completed) {
        if self.abandoned.remove(&request_id) {
            // Nobody will fetch it.
            self.machine.fetched(request_id);
        } else if let Some(waiting) = self.waiting.remove(&request_id) {
            // Whoever waited may have gone in this moment; the result then stays with the server.
            waiting.send(completed).ok();
        } else {
            self.early.insert(request_id, completed);
        }
    }

    fn wake_all(&mut self) {
        for (_, waiting) in self.waiting.drain() {
            waiting.send(Completed::AskSingly).ok();
        }
    }
}

async fn poll(client: Client, target: CompletionsTarget, shared: Arc<Shared>) {
    let mut event = CompletionEvent::Look;
    loop {
        event = match shared.on(&client, event) {
            CompletionStep::Poll {
                prev_cursor,
                hold,
                fetched,
            } => {
                let request = RetrieveFuturesRequest {
                    target: target.clone(),
                    prev_cursor,
                    timeout: (!hold).then_some(0.0),
                    retrieved_request_ids: fetched,
                };
                match client.retrieve_futures(&request).await {
                    Ok(answer) => shared.answered(answer),
                    Err(error) => event_of(&error),
                }
            }
            CompletionStep::Wait(time) => {
                client.sleep(time).await;
                CompletionEvent::Look
            }
            CompletionStep::Rest => {
                shared.news.notified().await;
                CompletionEvent::Look
            }
            CompletionStep::Finish => {
                tracing::warn!("the server does not tell which samples are done; asking for each");
                return;
            }
        };
    }
}

fn event_of(error: &Error) -> CompletionEvent {
    let retry_after = match error.kind() {
        ErrorKind::RateLimited { retry_after } => *retry_after,
        _ => None,
    };
    match (error.status(), error.kind()) {
        (Some(code), _) => CompletionEvent::Status { code, retry_after },
        (None, ErrorKind::Timeout) => CompletionEvent::TimedOut,
        (None, ErrorKind::Connect) => CompletionEvent::ConnectionLost,
        // What cannot be sent or understood will not be the next time.
        (None, _) => CompletionEvent::Unusable,
    }
}
