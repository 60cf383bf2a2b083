//! The time: as the server decides by it, and in the two forms that it writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tinker_types::Timestamp;

/// Milliseconds since 1970, UTC.
pub(crate) type Millis = i64;

/// What sessions, gaps and idle weights are measured with. Tests put it forward instead of waiting.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    ahead_ms: Arc<AtomicU64>,
}

impl Clock {
    /// Makes it later by so much, for everybody who has this clock.
    pub fn put_forward(&self, by: Duration) {
        let by = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.ahead_ms.fetch_add(by, Ordering::SeqCst);
    }

    fn ahead_ms(&self) -> u64 {
        self.ahead_ms.load(Ordering::SeqCst)
    }

    /// The time of day.
    pub(crate) fn now(&self) -> Millis {
        now().saturating_add_unsigned(self.ahead_ms())
    }

    /// The time for measuring how long something took.
    pub(crate) fn instant(&self) -> Instant {
        Instant::now() + Duration::from_millis(self.ahead_ms())
    }
}

/// The current time.
pub(crate) fn now() -> Millis {
    jiff::Timestamp::now().as_millisecond()
}

/// Reads [`timestamp`]'s text back.
pub(crate) fn millis(text: &Timestamp) -> Option<Millis> {
    let moment: jiff::Timestamp = text.0.parse().ok()?;
    Some(moment.as_millisecond())
}

/// RFC 9110 text, as HTTP headers carry it.
pub(crate) fn http_date(at: Millis) -> String {
    let moment = jiff::Timestamp::from_millisecond(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
    printer
        .timestamp_to_rfc9110_string(&moment)
        .unwrap_or_default()
}

/// RFC 3339 text, as answers carry it.
pub(crate) fn timestamp(at: Millis) -> Timestamp {
    let moment = jiff::Timestamp::from_millisecond(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    Timestamp(moment.to_string())
}
