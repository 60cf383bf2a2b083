//! A record of the promises a server made on the wire: what it acknowledged, and what it handed out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::faults::{FaultServer, Seen};

/// What was seen between clients and server.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// Futures whose acknowledgement reached the client.
    pub(super) acknowledged: BTreeSet<String>,
    /// Futures whose result reached the client.
    delivered: BTreeSet<String>,
    /// What the server said instead of a result that it owed.
    pub(super) refused: BTreeMap<String, String>,
}

/// Keeps a record of everything that passes through `proxy`.
pub(super) fn keep(proxy: &FaultServer) -> Arc<Mutex<Record>> {
    let record = Arc::<Mutex<Record>>::default();
    let noted = Arc::clone(&record);
    proxy.observe(move |seen| {
        if let Seen::Answered(path, request, answer) = seen {
            lock(&noted).note(path.trim_start_matches("/api/v1/"), request, answer);
        }
    });
    record
}

/// Locks a record.
pub(super) fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    /// What was acknowledged and not handed out.
    pub(super) fn owed(&self) -> Vec<String> {
        self.acknowledged
            .difference(&self.delivered)
            .cloned()
            .collect()
    }

    fn note(&mut self, route: &str, request: &[u8], answer: &[u8]) {
        // Results may be protobuf, which is no JSON and no refusal.
        let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
        if route != "retrieve_future" {
            let id = answer["request_id"].as_str().map(str::to_owned);
            self.acknowledged.extend(id);
            return;
        }
        let request: Value = serde_json::from_slice(request).unwrap_or_default();
        let Some(id) = request["request_id"].as_str().map(str::to_owned) else {
            return;
        };
        if answer["type"] == "try_again" {
            return;
        }
        let refusal = ["detail", "error"]
            .iter()
            .find_map(|field| answer[field].as_str());
        match refusal {
            Some(text) => drop(self.refused.insert(id, text.to_owned())),
            None => drop(self.delivered.insert(id)),
        }
    }
}
