//! One poll for all samples of a sampler: does what [`CompletionPoll`] says and wakes those who wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tinker_types::{
    Completion, CompletionsTarget, RequestId, RetrieveFuturesRequest, RetrieveFuturesResponse,
};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};

use crate::client::Client;
use crate::clock::Clock;
use crate::completion_table::{CompletionTable, Entry, Overdue};
use crate::error::{Error, ErrorKind};
use crate::machine::{CompletionEvent, CompletionPoll, CompletionStep, Missed};

/// Samples asked for by themselves at once, beside the poll.
const QUESTIONS: usize = 16;

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
    client: Client,
    state: Mutex<State>,
    /// There is something new to wait for or to report.
    news: Notify,
    /// A sample may have to be asked for sooner than was known.
    overdue: Notify,
}

#[derive(Debug)]
struct State {
    machine: CompletionPoll,
    table: CompletionTable,
    has_ended: bool,
}

impl CompletionPoller {
    /// Starts the poll on a runtime. It sends nothing until somebody waits.
    #[must_use]
    pub fn start(runtime: &Handle, client: Client, target: CompletionsTarget) -> Self {
        let policy = client.poll_policy();
        let state = State {
            machine: CompletionPoll::new(policy.clone()),
            table: CompletionTable::new(policy.unheard_interval),
            has_ended: false,
        };
        let shared = Arc::new(Shared {
            client,
            state: Mutex::new(state),
            news: Notify::new(),
            overdue: Notify::new(),
        });
        let task = runtime.spawn(run(target, Arc::clone(&shared)));
        Self {
            shared,
            task: task.abort_handle(),
        }
    }

    /// Waits until a sample is done. Dropped before, it gives the sample up.
    pub async fn completed(&self, request_id: &RequestId) -> Completed {
        let done = {
            let mut state = self.shared.lock();
            if state.has_ended {
                return Completed::AskSingly;
            }
            match state.table.wait(self.shared.client.now(), request_id) {
                Entry::Done(completed) => return completed,
                Entry::Waits(done) => {
                    // Beside others one is due after the table is looked at again.
                    if state.table.n_waiting() == 1 {
                        self.shared.overdue.notify_one();
                    }
                    done
                }
            }
        };
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
        self.shared.lock().table.abandon(request_id);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sorts an answer: wakes those whose samples are done.
    fn answered(&self, answer: RetrieveFuturesResponse) -> CompletionEvent {
        let mut state = self.lock();
        let missed = state.machine.missed(answer.cursor);
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
        match missed {
            Missed::Nothing => {}
            // What it told of just now was not missed.
            Missed::Perhaps => {
                state.table.suspect_all(self.client.now());
                self.overdue.notify_one();
            }
            Missed::Surely => {
                tracing::warn!("the server forgot which samples are done; asking for each");
                state.table.wake_all();
            }
        }
        CompletionEvent::Answered {
            cursor: answer.cursor,
            n_completions,
        }
    }

    /// The next step, with everybody told to ask singly if it is the last one.
    fn on(&self, event: CompletionEvent) -> CompletionStep {
        let mut state = self.lock();
        let (now, n_waiting) = (self.client.now(), state.table.n_waiting());
        let step = state.machine.on(now, n_waiting, event, Clock::draw());
        if step == CompletionStep::Finish {
            state.has_ended = true;
            state.table.wake_all();
        }
        step
    }

    /// Asks once for each of these samples by itself; those that have an outcome are told so.
    async fn ask(&self, samples: Vec<(RequestId, Duration)>) {
        let question = |request_id: RequestId, patience| {
            let client = self.client.clone();
            async move { client.has_outcome(&request_id, patience).await }
        };
        self.ask_by(question, samples).await;
    }

    /// The same, by questions that tell whether a sample has an outcome.
    async fn ask_by<F>(
        &self,
        question: impl Fn(RequestId, Duration) -> F,
        samples: Vec<(RequestId, Duration)>,
    ) where
        F: Future<Output = bool> + Send + 'static,
    {
        let (mut questions, mut asked) = (JoinSet::new(), HashMap::new());
        for (request_id, patience) in samples {
            let task = questions.spawn(question(request_id.clone(), patience));
            asked.insert(task.id(), request_id);
        }
        while let Some(answer) = questions.join_next_with_id().await {
            // A question that panicked has no answer.
            let (task, has_outcome) = answer.unwrap_or_else(|error| (error.id(), false));
            let Some(request_id) = asked.remove(&task) else {
                continue;
            };
            let mut state = self.lock();
            if has_outcome {
                tracing::debug!(request.id = %request_id, "no poll told that this sample is done");
                state.table.found(&request_id);
            } else {
                state.table.left_open(self.client.now(), &request_id);
            }
        }
    }
}

impl State {
    fn complete(&mut self, request_id: RequestId, completed: Completed) {
        if self.table.complete(&request_id, completed) {
            self.machine.fetched(request_id);
        }
    }
}

async fn run(target: CompletionsTarget, shared: Arc<Shared>) {
    tokio::select! {
        () = poll(target, &shared) => {}
        () = ask_overdue(&shared) => {}
    }
}

/// Asks for those samples by themselves of which the poll tells nothing; never ends.
async fn ask_overdue(shared: &Shared) {
    loop {
        let overdue = shared.lock().table.overdue(shared.client.now(), QUESTIONS);
        match overdue {
            Overdue::Ask(samples) => shared.ask(samples).await,
            Overdue::Nothing => shared.overdue.notified().await,
            Overdue::In(time) => tokio::select! {
                () = shared.client.sleep(time) => {}
                () = shared.overdue.notified() => {}
            },
        }
    }
}

async fn poll(target: CompletionsTarget, shared: &Shared) {
    let client = &shared.client;
    let mut event = CompletionEvent::Look;
    loop {
        event = match shared.on(event) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_question_that_panics_is_not_asked_again_at_once() {
        let client = Client::builder("http://127.0.0.1:9").api_key("tml-x".parse().unwrap());
        let client = client.build().unwrap();
        let mut table = CompletionTable::new(Duration::from_secs(60));
        let request_id: RequestId = "a".parse().unwrap();
        let Entry::Waits(_done) = table.wait(client.now(), &request_id) else {
            panic!("it is done");
        };
        table.suspect_all(client.now());
        let Overdue::Ask(samples) = table.overdue(client.now(), QUESTIONS) else {
            panic!("it is not due");
        };
        let state = State {
            machine: CompletionPoll::new(client.poll_policy().clone()),
            table,
            has_ended: false,
        };
        let shared = Shared {
            client,
            state: Mutex::new(state),
            news: Notify::new(),
            overdue: Notify::new(),
        };

        let panics = |_, _| async { panic!("a question that fails") };
        shared.ask_by(panics, samples).await;

        let next = shared.lock().table.overdue(shared.client.now(), QUESTIONS);
        assert!(matches!(next, Overdue::In(_)), "{next:?}");
    }
}
