//! The limit on samples in flight that all samplers of a process share, one per server and key, and the
//! connections that they may take.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit};

use crate::credentials::Credentials;
use crate::machine::{AimdLimit, AimdPolicy};

/// The gates of this process by server and key.
static GATES: Mutex<Vec<(String, Credentials, Weak<Shared>)>> = Mutex::new(Vec::new());

/// Polls of single samples where each takes a connection of its own: as many as an official sampler has
/// samples in flight.
const MAX_POLLS: u64 = 2000;
/// Connections for submissions, and for announced results, where each call takes one of its own. Such
/// calls are answered at once, so that more would only cost memory.
const MAX_CALLS: usize = 64;

/// How much of everything samples may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// Polls of single samples.
    polls: usize,
    /// Submissions under way, and results being fetched beside their polls.
    calls: usize,
}

impl Room {
    /// Room for calls that share connections.
    pub(crate) fn of_encrypted() -> Self {
        Self {
            polls: Semaphore::MAX_PERMITS,
            calls: Semaphore::MAX_PERMITS,
        }
    }

    /// Room for calls each of which takes a connection: unencrypted servers speak HTTP/1.1. Polls take a
    /// quarter of the files that this process may open: connections that rest, and the heartbeats of
    /// many sessions, take some too, and the rest is the program's.
    pub(crate) fn of_plain(max_open_files: Option<u64>) -> Self {
        let quarter = max_open_files.map_or(MAX_POLLS, |n| n / 4);
        let polls = quarter.clamp(u64::from(AimdPolicy::default().min), MAX_POLLS);
        Self {
            polls: usize::try_from(polls).unwrap_or(usize::MAX),
            calls: MAX_CALLS,
        }
    }
}

/// Most files that this process may have open, where there is a limit.
#[cfg(unix)]
pub(crate) fn max_open_files() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

/// Other systems have no such limit.
#[cfg(not(unix))]
pub(crate) fn max_open_files() -> Option<u64> {
    None
}

/// A concurrency limit that tasks wait for; it follows what the server refuses.
#[derive(Debug, Clone)]
pub struct AdaptiveGate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: Mutex<AimdLimit>,
    freed: Notify,
    polls: Semaphore,
    submissions: Semaphore,
    fetches: Semaphore,
}

impl AdaptiveGate {
    /// A gate of its own.
    fn new(policy: AimdPolicy, room: Room) -> Self {
        Self {
            shared: Arc::new(Shared {
                limit: Mutex::new(AimdLimit::new(policy)),
                freed: Notify::new(),
                polls: Semaphore::new(room.polls),
                submissions: Semaphore::new(room.calls),
                fetches: Semaphore::new(room.calls),
            }),
        }
    }

    /// The gate that all clients of this process with this server and key share; the first one says how
    /// much room there is.
    pub(crate) fn of_process(server: &str, credentials: &Credentials, room: Room) -> Self {
        let mut gates = GATES.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|(_, _, gate)| gate.strong_count() > 0);
        let known = gates
            .iter()
            .filter(|(url, of, _)| url == server && of == credentials)
            .find_map(|(_, _, gate)| gate.upgrade());
        if let Some(shared) = known {
            return Self { shared };
        }
        let gate = Self::new(AimdPolicy::default(), room);
        gates.push((
            server.to_owned(),
            credentials.clone(),
            Arc::downgrade(&gate.shared),
        ));
        gate
    }

    /// Waits for a place and takes it; first come, first served.
    pub async fn enter(&self) -> Place {
        loop {
            let freed = self.shared.freed.notified();
            tokio::pin!(freed);
            // Registered before the look, so that a place given back in between is noticed.
            freed.as_mut().enable();
            let (is_in, is_room_left) = self.shared.try_enter();
            if is_room_left {
                // The limit has grown: one who leaves wakes one only.
                self.shared.freed.notify_one();
            }
            if is_in {
                return Place {
                    shared: Arc::clone(&self.shared),
                    is_left: false,
                };
            }
            freed.await;
        }
    }

    /// Waits for a connection to poll a single sample on; `None` never comes.
    pub async fn poll(&self) -> Option<SemaphorePermit<'_>> {
        self.shared.polls.acquire().await.ok()
    }

    /// Waits for a connection to submit a sample on; `None` never comes.
    pub async fn submission(&self) -> Option<SemaphorePermit<'_>> {
        self.shared.submissions.acquire().await.ok()
    }

    /// Waits for a connection to fetch a result on that is announced; `None` never comes.
    pub async fn fetch(&self) -> Option<SemaphorePermit<'_>> {
        self.shared.fetches.acquire().await.ok()
    }

    /// Notes that the server refused a sample; the new limit if it shrank.
    pub fn refuse(&self, now: Duration) -> Option<u32> {
        self.shared.lock().refuse(now)
    }

    /// Most samples at once, now.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.shared.lock().limit()
    }

    /// Samples in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.shared.lock().in_flight()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, AimdLimit> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place if there is one; whether it did, and whether there is another.
    fn try_enter(&self) -> (bool, bool) {
        let mut limit = self.lock();
        let is_in = limit.try_enter();
        (is_in, is_in && limit.in_flight() < limit.limit())
    }
}

/// A place under an [`AdaptiveGate`]; given back on drop.
#[derive(Debug)]
#[must_use = "the place is given back when this is dropped"]
pub struct Place {
    shared: Arc<Shared>,
    is_left: bool,
}

impl Place {
    /// Gives the place back after a result, from which the limit learns; the new limit if it has
    /// grown enough to tell.
    pub fn succeed(mut self) -> Option<u32> {
        self.is_left = true;
        self.shared.lock().succeed()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_left {
            self.shared.lock().leave();
        }
        self.shared.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Credentials {
        let key: crate::ApiKey = text.parse().unwrap();
        key.into()
    }

    #[tokio::test]
    async fn a_waiting_task_enters_when_a_place_is_given_back() {
        let gate = AdaptiveGate::new(
            AimdPolicy {
                max: 1,
                min: 1,
                ..AimdPolicy::default()
            },
            Room::of_encrypted(),
        );
        let first = gate.enter().await;
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter().await.succeed() }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());

        drop(first);

        waiting.await.unwrap();
        assert_eq!(gate.in_flight(), 0);
    }

    #[tokio::test]
    async fn clients_of_one_server_and_key_share_a_limit() {
        let of = |url, text| AdaptiveGate::of_process(url, &key(text), Room::of_encrypted());
        let (a, b) = (of("http://gate", "tml-a"), of("http://gate", "tml-a"));
        let others = [of("http://gate", "tml-b"), of("http://other", "tml-a")];

        let _place = a.enter().await;
        assert_eq!(b.in_flight(), 1);
        assert_eq!(b.refuse(Duration::ZERO), Some(4));
        assert_eq!(a.limit(), 4);

        for other in others {
            assert_eq!((other.in_flight(), other.limit()), (0, 10_000));
        }
    }

    #[test]
    fn polls_take_a_quarter_of_the_files() {
        let polls = |files| Room::of_plain(files).polls;

        assert_eq!(polls(Some(256)), 64);
        assert_eq!(polls(Some(1024)), 256);
        assert_eq!(polls(Some(1 << 40)), 2000);
        assert_eq!(polls(Some(0)), 4);
        assert_eq!(polls(None), 2000);
    }

    #[tokio::test]
    async fn all_who_wait_enter_one_after_another() {
        let policy = AimdPolicy {
            max: 2,
            min: 1,
            ..AimdPolicy::default()
        };
        let gate = AdaptiveGate::new(policy, Room::of_encrypted());
        let held = (gate.enter().await, gate.enter().await);
        let waiting: Vec<_> = (0..100)
            .map(|_| {
                let gate = gate.clone();
                tokio::spawn(async move { drop(gate.enter().await) })
            })
            .collect();
        tokio::task::yield_now().await;

        drop(held);

        for entered in waiting {
            entered.await.unwrap();
        }
        assert_eq!(gate.in_flight(), 0);
    }
}
