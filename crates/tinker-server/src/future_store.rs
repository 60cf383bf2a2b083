//! Results by request id, and waking those who wait for them.
//!
//! A result stays in memory until it was handed out once or a while has passed; after that it is read
//! from its log again if somebody asks (an answer may have been lost on the way).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tinker_types::{RequestId, TrainingRunId};
use tokio::sync::Notify;

use crate::operation::{Form, Outcome};
use crate::segment_log::Location;

/// How long a result that is in memory alone can be asked for, again if an answer was lost.
const KEEP_IN_MEMORY: Duration = Duration::from_secs(10 * 60);

/// Which log an operation is in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Scope {
    /// A training run's own.
    Run(TrainingRunId),
    /// The one of all samples.
    Samples,
    /// None: the result is kept in memory alone.
    Memory,
}

#[derive(Debug)]
enum State {
    Pending,
    Ready {
        outcome: Outcome,
        location: Option<Location>,
    },
    OnDisk {
        form: Form,
        location: Location,
    },
}

#[derive(Debug)]
struct Entry {
    scope: Scope,
    state: State,
    delivered: bool,
    notify: Arc<Notify>,
    /// When it became what it is.
    since: Instant,
}

impl Entry {
    fn new(scope: Scope, state: State) -> Self {
        Self {
            scope,
            state,
            delivered: false,
            notify: Arc::default(),
            since: Instant::now(),
        }
    }

    /// Whether it is a result in memory alone that came longer ago than `limit`.
    fn is_forgettable(&self, limit: Duration) -> bool {
        self.scope == Scope::Memory
            && !matches!(self.state, State::Pending)
            && self.since.elapsed() >= limit
    }
}

/// What there is to say about a future.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// Never heard of, or forgotten.
    Unknown,
    /// Not finished.
    Pending(Scope),
    /// The result.
    Ready(Outcome),
    /// The result is in a log.
    OnDisk(Scope, Form),
}

/// All futures that can be asked for.
#[derive(Debug, Default)]
pub(crate) struct FutureStore {
    entries: Mutex<HashMap<RequestId, Entry>>,
}

impl FutureStore {
    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are known.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Adds an unfinished future; one that is known stays as it is.
    pub(crate) fn insert_pending(&self, id: RequestId, scope: Scope) {
        self.lock()
            .entry(id)
            .or_insert_with(|| Entry::new(scope, State::Pending));
    }

    /// Adds an unfinished future whose result no log will have, and forgets the old ones of those.
    pub(crate) fn insert_in_memory(&self, id: RequestId) {
        self.forget_in_memory(KEEP_IN_MEMORY);
        self.insert_pending(id, Scope::Memory);
    }

    fn forget_in_memory(&self, limit: Duration) {
        self.lock().retain(|_, entry| !entry.is_forgettable(limit));
    }

    /// Adds a finished future whose result is in a log.
    pub(crate) fn insert_on_disk(
        &self,
        id: RequestId,
        scope: Scope,
        form: Form,
        location: Location,
    ) {
        let entry = Entry::new(scope, State::OnDisk { form, location });
        self.lock().insert(id, entry);
    }

    /// Finishes a future and wakes all who wait for it.
    pub(crate) fn complete(&self, id: &RequestId, outcome: Outcome, location: Option<Location>) {
        if let Some(entry) = self.lock().get_mut(id) {
            entry.state = State::Ready { outcome, location };
            entry.since = Instant::now();
            entry.notify.notify_waiters();
        }
    }

    /// Wakes all who wait for a future: there is news, if no result.
    pub(crate) fn nudge(&self, id: &RequestId) {
        if let Some(entry) = self.lock().get(id) {
            entry.notify.notify_waiters();
        }
    }

    /// Follows a result that was copied to another place in its log.
    pub(crate) fn moved(&self, id: &RequestId, to: Location) {
        match self.lock().get_mut(id).map(|entry| &mut entry.state) {
            Some(State::Ready { location, .. }) => *location = Some(to),
            Some(State::OnDisk { location, .. }) => *location = to,
            Some(State::Pending) | None => {}
        }
    }

    /// Leaves results that came longer than `limit` ago to the log: whoever asked for them may be gone
    /// for good.
    pub(crate) fn leave_to_log(&self, limit: Duration) {
        for entry in self.lock().values_mut() {
            if let State::Ready {
                outcome,
                location: Some(location),
            } = &entry.state
                && entry.since.elapsed() >= limit
            {
                entry.state = State::OnDisk {
                    form: outcome.form,
                    location: *location,
                };
            }
        }
    }

    /// Forgets results that have been in the logs of training runs for longer than `limit`, of the runs
    /// that are not `in_use`: whoever asks for one opens the log, and it is known again.
    pub(crate) fn forget_unused(&self, limit: Duration, in_use: impl Fn(&TrainingRunId) -> bool) {
        self.lock()
            .retain(|_, entry| match (&entry.scope, &entry.state) {
                (Scope::Run(run), State::OnDisk { .. }) => {
                    entry.since.elapsed() < limit || in_use(run)
                }
                _ => true,
            });
    }

    /// Notes that somebody got a result that was read from a log.
    pub(crate) fn note_delivered(&self, id: &RequestId) {
        if let Some(entry) = self.lock().get_mut(id) {
            entry.delivered = true;
        }
    }

    /// Where a result is in its log. It moves while the log is pruned.
    pub(crate) fn location(&self, id: &RequestId) -> Option<Location> {
        match self.lock().get(id)?.state {
            State::Ready { location, .. } => location,
            State::OnDisk { location, .. } => Some(location),
            State::Pending => None,
        }
    }

    /// Drops a future.
    pub(crate) fn forget(&self, id: &RequestId) {
        self.lock().remove(id);
    }

    /// Whether somebody got the result.
    pub(crate) fn was_delivered(&self, id: &RequestId) -> bool {
        self.lock().get(id).is_none_or(|entry| entry.delivered)
    }

    /// Looks a future up and counts its result as handed out. One in a log is to be read first.
    fn take(&self, id: &RequestId) -> Lookup {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(id) else {
            return Lookup::Unknown;
        };
        let scope = entry.scope.clone();
        match &entry.state {
            State::Pending => Lookup::Pending(scope),
            State::OnDisk { form, .. } => Lookup::OnDisk(scope, *form),
            State::Ready { outcome, location } => {
                let outcome = outcome.clone();
                if let Some(location) = *location {
                    entry.state = State::OnDisk {
                        form: outcome.form,
                        location,
                    };
                }
                entry.delivered = true;
                Lookup::Ready(outcome)
            }
        }
    }

    /// Waits up to `hold` for a result, or until `stop` is notified.
    pub(crate) async fn wait(&self, id: &RequestId, hold: Duration, stop: &Notify) -> Lookup {
        let Some(notify) = self.lock().get(id).map(|entry| Arc::clone(&entry.notify)) else {
            return Lookup::Unknown;
        };
        // Registered before looking, so that a result that comes in between is not missed.
        let finished = notify.notified();
        let stopped = stop.notified();
        tokio::pin!(finished, stopped);
        finished.as_mut().enable();
        stopped.as_mut().enable();
        let first = self.take(id);
        if !matches!(first, Lookup::Pending(_)) {
            return first;
        }
        tokio::select! {
            () = finished => {}
            () = stopped => {}
            () = tokio::time::sleep(hold) => {}
        }
        self.take(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> RequestId {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_is_woken_by_the_result() {
        let store = Arc::new(FutureStore::default());
        store.insert_pending(id("a"), Scope::Memory);
        let waiting = {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let stop = Notify::new();
                store.wait(&id("a"), Duration::from_secs(3600), &stop).await
            })
        };
        tokio::task::yield_now().await;

        store.complete(&id("a"), Outcome::json(&1), None);

        assert!(matches!(waiting.await.unwrap(), Lookup::Ready(o) if &o.body[..] == b"1"));
        assert!(store.was_delivered(&id("a")));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unfinished_future_is_pending_after_the_hold() {
        let store = FutureStore::default();
        store.insert_pending(id("a"), Scope::Memory);
        let started = tokio::time::Instant::now();

        let seen = store
            .wait(&id("a"), Duration::from_secs(40), &Notify::new())
            .await;

        assert!(matches!(seen, Lookup::Pending(Scope::Memory)));
        assert_eq!(started.elapsed(), Duration::from_secs(40));
        assert!(!store.was_delivered(&id("a")));
    }

    #[tokio::test]
    async fn results_in_memory_alone_are_forgotten_in_time() {
        let store = FutureStore::default();
        for name in ["done", "pending"] {
            store.insert_in_memory(id(name));
        }
        store.insert_pending(id("logged"), Scope::Samples);
        for name in ["done", "logged"] {
            store.complete(&id(name), Outcome::json(&1), None);
        }

        store.forget_in_memory(Duration::from_secs(60));
        assert!(matches!(store.take(&id("done")), Lookup::Ready(_)));
        store.forget_in_memory(Duration::ZERO);

        assert!(matches!(store.take(&id("done")), Lookup::Unknown));
        assert!(matches!(store.take(&id("pending")), Lookup::Pending(_)));
        assert!(matches!(store.take(&id("logged")), Lookup::Ready(_)));
    }

    #[test]
    fn an_old_result_is_left_to_its_log_and_counts_as_handed_out_once_it_is_read() {
        let store = FutureStore::default();
        let location = Location::new(1, 0);
        for name in ["logged", "unlogged"] {
            store.insert_pending(id(name), Scope::Samples);
        }
        store.complete(&id("logged"), Outcome::json(&1), Some(location));
        store.complete(&id("unlogged"), Outcome::json(&1), None);

        store.leave_to_log(Duration::from_secs(60));
        assert!(matches!(
            store.lock()[&id("logged")].state,
            State::Ready { .. }
        ));
        store.leave_to_log(Duration::ZERO);

        assert!(matches!(store.take(&id("logged")), Lookup::OnDisk(..)));
        assert_eq!(store.location(&id("logged")), Some(location));
        assert!(!store.was_delivered(&id("logged")), "it may be unreadable");
        store.note_delivered(&id("logged"));
        assert!(store.was_delivered(&id("logged")));
        assert!(matches!(store.take(&id("unlogged")), Lookup::Ready(_)));
    }

    #[tokio::test]
    async fn an_unknown_future_is_unknown_at_once() {
        let store = FutureStore::default();

        let seen = store
            .wait(&id("a"), Duration::from_secs(3600), &Notify::new())
            .await;

        assert!(matches!(seen, Lookup::Unknown));
    }
}
