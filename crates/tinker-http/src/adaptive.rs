//! The limit on samples in flight that all samplers of a process share, one per server and key.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use crate::credentials::Credentials;
use crate::machine::{AimdLimit, AimdPolicy};

/// The gates of this process by server and key.
static GATES: Mutex<Vec<(String, Credentials, Weak<Shared>)>> = Mutex::new(Vec::new());

/// A concurrency limit that tasks wait for; it follows what the server refuses.
#[derive(Debug, Clone)]
pub struct AdaptiveGate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: Mutex<AimdLimit>,
    freed: Notify,
}

impl AdaptiveGate {
    /// A gate of its own.
    #[must_use]
    pub fn new(policy: AimdPolicy) -> Self {
        Self {
            shared: Arc::new(Shared {
                limit: Mutex::new(AimdLimit::new(policy)),
                freed: Notify::new(),
            }),
        }
    }

    /// The gate that all clients of this process with this server and key share.
    pub(crate) fn of_process(server: &str, credentials: &Credentials) -> Self {
        let mut gates = GATES.lock().unwrap_or_else(PoisonError::into_inner);
        gates.retain(|(_, _, gate)| gate.strong_count() > 0);
        let known = gates
            .iter()
            .filter(|(url, of, _)| url == server && of == credentials)
            .find_map(|(_, _, gate)| gate.upgrade());
        if let Some(shared) = known {
            return Self { shared };
        }
        let gate = Self::new(AimdPolicy::default());
        gates.push((
            server.to_owned(),
            credentials.clone(),
            Arc::downgrade(&gate.shared),
        ));
        gate
    }

    /// Waits for a place and takes it.
    pub async fn enter(&self) -> Place {
        loop {
            let freed = self.shared.freed.notified();
            tokio::pin!(freed);
            // Registered before the look, so that a place given back in between is noticed.
            freed.as_mut().enable();
            if self.shared.lock().try_enter() {
                return Place {
                    shared: Arc::clone(&self.shared),
                    is_left: false,
                };
            }
            freed.await;
        }
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
        self.shared.freed.notify_waiters();
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
        let gate = AdaptiveGate::new(AimdPolicy {
            max: 1,
            min: 1,
            ..AimdPolicy::default()
        });
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
        let of = |url, text| AdaptiveGate::of_process(url, &key(text));
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
}
