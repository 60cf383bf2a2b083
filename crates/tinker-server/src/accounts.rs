//! The server's own counters, hour by hour, and its audit log.
//!
//! Counters are kept in memory and written every half minute and when they are asked for: a crash loses
//! what was counted since. Events of the audit log are written at once.

use std::collections::BTreeMap;
use std::sync::Mutex;

use rusqlite::{Connection, params};
use serde_json::{Map, Value};
use tinker_types::{AuditEntry, SessionId, UsageInfo};

use crate::caller;
use crate::clock::{Millis, now, timestamp};
use crate::core::lock;
use crate::db::Db;
use crate::error::Result;

/// Milliseconds of an hour.
pub(crate) const HOUR: Millis = 60 * 60 * 1000;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Counter {
    /// Tokens trained on or scored in a training run.
    Training,
    /// Prompt tokens of samples.
    Prefill,
    /// Sampled tokens.
    Sample,
    /// Checkpoints saved.
    Checkpoint,
}

impl Counter {
    const ALL: [Self; 4] = [
        Self::Training,
        Self::Prefill,
        Self::Sample,
        Self::Checkpoint,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Prefill => "sampling_prefill",
            Self::Sample => "sampling_sample",
            Self::Checkpoint => "checkpoint",
        }
    }

    /// An amount in the form that clients read.
    pub(crate) const fn info(self, amount: u64) -> UsageInfo {
        match self {
            Self::Training => UsageInfo::Training {
                token_count: amount,
            },
            Self::Prefill => UsageInfo::SamplingPrefill {
                cached: false,
                token_count: amount,
            },
            Self::Sample => UsageInfo::SamplingSample {
                token_count: amount,
            },
            Self::Checkpoint => UsageInfo::Checkpoint { count: amount },
        }
    }
}

/// What an amount belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct UsageKey {
    /// Start of the hour.
    pub(crate) hour: Millis,
    pub(crate) session: SessionId,
    pub(crate) base_model: String,
    pub(crate) counter: Counter,
}

/// Counters and audit log.
#[derive(Debug)]
pub(crate) struct Accounts {
    db: Db,
    /// Not written yet.
    pending: Mutex<BTreeMap<UsageKey, u64>>,
}

impl Accounts {
    pub(crate) fn new(db: Db) -> Self {
        Self {
            db,
            pending: Mutex::default(),
        }
    }

    /// Adds to a counter of this hour.
    pub(crate) fn count(
        &self,
        session: &SessionId,
        base_model: &str,
        counter: Counter,
        amount: usize,
    ) {
        if amount == 0 {
            return;
        }
        let at = now();
        let key = UsageKey {
            hour: at - at.rem_euclid(HOUR),
            session: session.clone(),
            base_model: base_model.to_owned(),
            counter,
        };
        *lock(&self.pending).entry(key).or_default() += amount as u64;
    }

    /// Writes the counters.
    ///
    /// # Errors
    /// If the database refuses; nothing is lost then.
    pub(crate) fn flush(&self) -> Result<()> {
        let mut pending = lock(&self.pending);
        if pending.is_empty() {
            return Ok(());
        }
        let rows = pending.clone();
        self.db.call(move |c| put_usage(c, &rows))?;
        pending.clear();
        Ok(())
    }

    /// The amounts of the hours from `from` to before `until`, oldest first.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) fn usage(&self, from: Millis, until: Millis) -> Result<Vec<(UsageKey, u64)>> {
        self.flush()?;
        self.db.call(move |c| usage(c, from, until))
    }

    /// Notes an event, `<resource>_<action>`, and the key by which it happened. What happened is not
    /// undone if it cannot be written.
    pub(crate) fn note(&self, event: &'static str, mut details: Value) {
        if let (Some(key), Some(details)) = (caller::current_key(), details.as_object_mut()) {
            details.insert("api_key".into(), key.as_str().into());
        }
        let (at, details) = (now(), details.to_string());
        let written = self.db.call(move |c| {
            c.prepare_cached("INSERT INTO audit VALUES (?1, ?2, ?3)")?
                .execute(params![at, event, details])
        });
        if let Err(error) = written {
            tracing::error!(
                event,
                error = error.with_causes(),
                "cannot write the audit log"
            );
        }
    }

    /// The events from `from` to before `until` whose names begin with `resource`, oldest first.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) fn events(
        &self,
        from: Millis,
        until: Millis,
        resource: &'static str,
    ) -> Result<Vec<AuditEntry>> {
        self.db.call(move |c| events(c, from, until, resource))
    }
}

fn put_usage(c: &mut Connection, rows: &BTreeMap<UsageKey, u64>) -> rusqlite::Result<()> {
    let transaction = c.transaction()?;
    for (key, amount) in rows {
        transaction
            .prepare_cached(
                "INSERT INTO usage VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT DO UPDATE SET amount = amount + excluded.amount",
            )?
            .execute(params![
                key.hour,
                key.session.as_str(),
                key.base_model,
                key.counter.name(),
                *amount as i64
            ])?;
    }
    transaction.commit()
}

fn usage(c: &Connection, from: Millis, until: Millis) -> rusqlite::Result<Vec<(UsageKey, u64)>> {
    let mut statement = c.prepare_cached(
        "SELECT hour, session_id, base_model, kind, amount FROM usage
         WHERE hour >= ?1 AND hour < ?2 ORDER BY hour, session_id, base_model, kind",
    )?;
    let rows = statement.query_map(params![from, until], |row| {
        let (session, kind): (String, String) = (row.get(1)?, row.get(3)?);
        let counter = Counter::ALL.into_iter().find(|c| c.name() == kind);
        // Rows of a newer program are left out.
        let Some((session, counter)) = session.parse().ok().zip(counter) else {
            return Ok(None);
        };
        let key = UsageKey {
            hour: row.get(0)?,
            session,
            base_model: row.get(2)?,
            counter,
        };
        Ok(Some((key, row.get::<_, i64>(4)? as u64)))
    })?;
    rows.filter_map(Result::transpose).collect()
}

fn events(
    c: &Connection,
    from: Millis,
    until: Millis,
    resource: &str,
) -> rusqlite::Result<Vec<AuditEntry>> {
    let mut statement = c.prepare_cached(
        "SELECT at, event, details FROM audit WHERE at >= ?1 AND at < ?2 ORDER BY at, rowid",
    )?;
    let rows = statement.query_map(params![from, until], |row| {
        let details: String = row.get(2)?;
        Ok(AuditEntry {
            timestamp: timestamp(row.get(0)?),
            event: row.get(1)?,
            event_details: serde_json::from_str(&details).unwrap_or_else(|_| Map::new()),
            model_id: None,
            tinker_path: None,
            purpose: None,
        })
    })?;
    let is_asked = |entry: &rusqlite::Result<AuditEntry>| {
        entry
            .as_ref()
            .map_or(true, |e| e.event.starts_with(resource))
    };
    rows.filter(is_asked).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_up_over_writes_and_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tinker.db");
        let session: SessionId = "s".parse().unwrap();
        for _ in 0..2 {
            let accounts = Accounts::new(Db::open(&path).unwrap());
            for _ in 0..2 {
                accounts.count(&session, "m", Counter::Sample, 3);
                accounts.flush().unwrap();
            }
            accounts.count(&session, "m", Counter::Training, 0);
        }

        let accounts = Accounts::new(Db::open(&path).unwrap());
        let rows = accounts.usage(0, Millis::MAX).unwrap();

        // The clock may have passed a full hour in between.
        let total: u64 = rows.iter().map(|(_, amount)| amount).sum();
        assert_eq!(total, 12);
        assert!(
            rows.iter()
                .all(|(key, _)| key.counter == Counter::Sample && key.hour % HOUR == 0)
        );
        assert!(accounts.usage(0, HOUR).unwrap().is_empty());
    }
}
