//! Budgets that tasks wait for.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::machine::ByteBudget;

/// A soft byte budget shared by tasks: waits while it is overdrawn, so one large item always passes.
#[derive(Debug, Clone)]
pub struct ByteGate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    budget: Mutex<ByteBudget>,
    freed: Notify,
}

impl ByteGate {
    /// A gate for this many bytes.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        Self {
            shared: Arc::new(Shared {
                budget: Mutex::new(ByteBudget::new(capacity)),
                freed: Notify::new(),
            }),
        }
    }

    /// Waits for the budget and takes `n` bytes until the permit is dropped.
    pub async fn acquire(&self, n: u64) -> BytePermit {
        loop {
            let freed = self.shared.freed.notified();
            tokio::pin!(freed);
            // Registered before the look, so that a permit dropped in between is noticed.
            freed.as_mut().enable();
            if self.shared.lock().try_take(n) {
                return BytePermit {
                    shared: Arc::clone(&self.shared),
                    n,
                };
            }
            freed.await;
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, ByteBudget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes taken from a [`ByteGate`]; returned on drop.
#[derive(Debug)]
#[must_use = "the bytes are returned when the permit is dropped"]
pub struct BytePermit {
    shared: Arc<Shared>,
    n: u64,
}

impl Drop for BytePermit {
    fn drop(&mut self) {
        self.shared.lock().give_back(self.n);
        self.shared.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_waiting_task_proceeds_when_bytes_are_returned() {
        let gate = ByteGate::new(10);
        let first = gate.acquire(100).await;
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.acquire(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());

        drop(first);

        drop(waiting.await.unwrap());
        assert_eq!(gate.shared.lock().in_use(), 0);
    }

    #[tokio::test]
    async fn a_cancelled_task_returns_its_bytes() {
        let gate = ByteGate::new(10);
        let task = tokio::spawn({
            let gate = gate.clone();
            async move {
                let _permit = gate.acquire(100).await;
                std::future::pending::<()>().await;
            }
        });
        tokio::task::yield_now().await;

        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());

        assert_eq!(gate.shared.lock().in_use(), 0);
    }
}
