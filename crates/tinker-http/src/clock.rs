//! The one place where time and chance enter: everything else is told.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Time since a client was built. Follows the runtime's clock, so tests can pause it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    origin: Instant,
}

#[expect(
    clippy::disallowed_methods,
    reason = "this is the file that reads the clock"
)]
impl Clock {
    /// A clock that starts now.
    pub(crate) fn start() -> Self {
        Self {
            origin: Instant::now(),
        }
    }

    /// Time since the start.
    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Waits.
    pub(crate) async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// The time of day, to read dates in headers.
    pub(crate) fn wall() -> SystemTime {
        SystemTime::now()
    }

    /// A random number in `[0, 1)`.
    pub(crate) fn draw() -> f64 {
        let (high, _) = uuid::Uuid::new_v4().as_u64_pair();
        // Version bits sit low in the first half; its top 32 bits are random.
        (high >> 32) as f64 / (1_u64 << 32) as f64
    }
}
