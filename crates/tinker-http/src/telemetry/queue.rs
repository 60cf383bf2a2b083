//! Events that wait to be reported, numbered and bounded. Pure.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use tinker_types::{EventHead, Severity, TelemetryEvent, Timestamp};
use uuid::Uuid;

/// Most events of a report.
pub(super) const MAX_BATCH: usize = 100;
/// Most events that wait; further ones are dropped.
const MAX_WAITING: usize = 10_000;

/// The events of one session.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: VecDeque<TelemetryEvent>,
    next_index: u64,
}

impl Queue {
    pub(super) const fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            next_index: 0,
        }
    }

    /// Adds the event that `make` makes of a head; false if too many wait.
    pub(super) fn push(
        &mut self,
        severity: Severity,
        now: SystemTime,
        make: impl FnOnce(EventHead) -> TelemetryEvent,
    ) -> bool {
        if self.waiting.len() >= MAX_WAITING {
            return false;
        }
        let head = EventHead {
            event_id: Uuid::new_v4().to_string(),
            event_session_index: self.next_index,
            severity,
            timestamp: timestamp(now),
        };
        self.next_index += 1;
        self.waiting.push_back(make(head));
        true
    }

    /// Takes the oldest events, at most a report's.
    pub(super) fn take(&mut self) -> Vec<TelemetryEvent> {
        let n = self.waiting.len().min(MAX_BATCH);
        self.waiting.drain(..n).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// RFC 3339, in UTC.
fn timestamp(time: SystemTime) -> Timestamp {
    let time = jiff::Timestamp::try_from(time).unwrap_or_default();
    Timestamp(time.to_string())
}

/// A time as the official client writes it: `H:MM:SS.ffffff`.
pub(super) fn duration(time: Duration) -> String {
    let secs = time.as_secs();
    let (hours, minutes, seconds) = (secs / 3600, secs / 60 % 60, secs % 60);
    format!(
        "{hours}:{minutes:02}:{seconds:02}.{:06}",
        time.subsec_micros()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(queue: &mut Queue) -> bool {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_500);
        queue.push(Severity::Info, now, |head| TelemetryEvent::SessionStart {
            head,
        })
    }

    fn indexes(events: &[TelemetryEvent]) -> Vec<u64> {
        events
            .iter()
            .map(|event| match event {
                TelemetryEvent::SessionStart { head } => head.event_session_index,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn events_are_numbered_and_taken_in_reports() {
        let mut queue = Queue::new();
        for _ in 0..150 {
            push(&mut queue);
        }

        let (first, second) = (queue.take(), queue.take());

        assert_eq!(indexes(&first), (0..100).collect::<Vec<_>>());
        assert_eq!(indexes(&second), (100..150).collect::<Vec<_>>());
        assert!(queue.is_empty() && queue.take().is_empty());
        let TelemetryEvent::SessionStart { head } = &first[0] else {
            panic!("{first:?}");
        };
        assert_eq!(head.timestamp.0, "1970-01-01T00:00:01.5Z");
    }

    #[test]
    fn too_many_events_are_dropped() {
        let mut queue = Queue::new();

        let n_kept = (0..MAX_WAITING + 7).filter(|_| push(&mut queue)).count();

        assert_eq!((n_kept, queue.waiting.len()), (MAX_WAITING, MAX_WAITING));
    }

    #[test]
    fn durations_are_spelled_as_the_official_client_does() {
        // str(datetime.timedelta(hours=26, minutes=3, seconds=4, microseconds=5)) has days, which
        // the service reads as well as hours.
        for (micros, expected) in [
            (5, "0:00:00.000005"),
            (3_723_000_000, "1:02:03.000000"),
            (93_784_000_005, "26:03:04.000005"),
        ] {
            assert_eq!(duration(Duration::from_micros(micros)), expected);
        }
    }
}
