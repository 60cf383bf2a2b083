//! What a client has under way, for programs that show it: calls being sent and results awaited.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tinker_types::{QueueState, RequestId};

/// One thing under way.
#[derive(Debug, Clone, PartialEq)]
pub struct InFlight {
    /// The future that is waited for; none while a call is being sent.
    pub request_id: Option<RequestId>,
    /// Name of the operation, or the path of the call.
    pub operation: Cow<'static, str>,
    /// Time since it began.
    pub age: Duration,
    /// What it is doing.
    pub state: FlightState,
    /// How often it was sent or asked for again after a failure.
    pub retries: u32,
    /// Bytes of the request being sent, or of the result that was announced.
    pub bytes: u64,
}

/// What something under way is doing.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum FlightState {
    /// A call waits for its answer.
    Sending,
    /// A call failed and waits to be sent again.
    Retrying {
        /// Why.
        reason: String,
    },
    /// A result is awaited.
    Waiting {
        /// The state of its queue, if the server said.
        queue: Option<QueueState>,
        /// Its reason.
        reason: Option<String>,
    },
    /// A result is ready and being fetched.
    Fetching,
}

/// All that one client has under way.
#[derive(Debug, Clone, Default)]
pub(crate) struct FlightTable(Arc<Mutex<Rows>>);

#[derive(Debug, Default)]
struct Rows {
    next: u64,
    rows: BTreeMap<u64, Row>,
}

#[derive(Debug)]
struct Row {
    request_id: Option<RequestId>,
    operation: Cow<'static, str>,
    since: Duration,
    state: FlightState,
    retries: u32,
    bytes: u64,
}

impl FlightTable {
    /// Enters a call of so many bytes.
    pub(crate) fn call(&self, now: Duration, path: &str, bytes: usize) -> Flight {
        self.enter(Row {
            request_id: None,
            operation: Cow::Owned(path.to_owned()),
            since: now,
            state: FlightState::Sending,
            retries: 0,
            bytes: bytes as u64,
        })
    }

    /// Enters the wait for a future.
    pub(crate) fn wait(
        &self,
        now: Duration,
        operation: &'static str,
        request_id: &RequestId,
    ) -> Flight {
        self.enter(Row {
            request_id: Some(request_id.clone()),
            operation: Cow::Borrowed(operation),
            since: now,
            state: FlightState::Waiting {
                queue: None,
                reason: None,
            },
            retries: 0,
            bytes: 0,
        })
    }

    fn enter(&self, row: Row) -> Flight {
        let mut table = self.lock();
        let key = table.next;
        table.next += 1;
        table.rows.insert(key, row);
        drop(table);
        Flight {
            table: self.clone(),
            key,
        }
    }

    /// Everything under way, oldest first.
    pub(crate) fn rows(&self, now: Duration) -> Vec<InFlight> {
        let table = self.lock();
        let show = |row: &Row| InFlight {
            request_id: row.request_id.clone(),
            operation: row.operation.clone(),
            age: now.saturating_sub(row.since),
            state: row.state.clone(),
            retries: row.retries,
            bytes: row.bytes,
        };
        table.rows.values().map(show).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A row of the table, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Flight {
    table: FlightTable,
    key: u64,
}

impl Flight {
    /// Notes a new state.
    pub(crate) fn state(&self, state: FlightState) {
        self.update(|row| row.state = state);
    }

    /// Notes one more repetition.
    pub(crate) fn retry(&self) {
        self.update(|row| row.retries = row.retries.saturating_add(1));
    }

    /// Notes the size of the result.
    pub(crate) fn bytes(&self, bytes: u64) {
        self.update(|row| row.bytes = bytes);
    }

    fn update(&self, change: impl FnOnce(&mut Row)) {
        if let Some(row) = self.table.lock().rows.get_mut(&self.key) {
            change(row);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.table.lock().rows.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn shows_what_is_under_way_oldest_first_and_forgets_what_ended() {
        let table = FlightTable::default();
        let id: RequestId = "r7".parse().unwrap();
        let call = table.call(at(1), "/api/v1/asample", 400);
        let wait = table.wait(at(2), "Sample", &id);
        call.retry();
        call.state(FlightState::Retrying {
            reason: "503".into(),
        });
        wait.bytes(9);
        wait.state(FlightState::Fetching);

        let rows = table.rows(at(5));

        let shown: Vec<_> = rows
            .iter()
            .map(|r| (r.operation.as_ref(), r.age, r.retries, r.bytes))
            .collect();
        assert_eq!(
            shown,
            [("/api/v1/asample", at(4), 1, 400), ("Sample", at(3), 0, 9)]
        );
        assert_eq!(rows[1].request_id, Some(id));
        assert_eq!(rows[1].state, FlightState::Fetching);
        drop(call);
        assert_eq!(table.rows(at(5)).len(), 1);
        drop(wait);
        assert!(table.rows(at(5)).is_empty());
    }
}
