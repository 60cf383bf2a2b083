//! The rows behind the catalog.

use rusqlite::types::Type;
use rusqlite::{Connection, Row, params};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tinker_types::{SamplingSessionId, SessionId, TinkerPath, TrainingRunId};

use super::{Run, Sampler, SavedCheckpoint, Session, Tables, checkpoint_path};
use crate::clock::Millis;
use crate::error::Error;
use crate::keys::KeyName;

/// Reads all tables.
pub(super) fn load(c: &mut Connection) -> rusqlite::Result<Tables> {
    let mut tables = Tables::default();
    let sql = "SELECT id, idempotency_key, request, created_at, last_seen_at, finish, owner FROM sessions";
    for session in rows(c, sql, session)? {
        tables.sessions.insert(session.id.clone(), session);
    }
    let sql = "SELECT id, session_id, base_model, lora, user_metadata, created_at, last_request_at, corrupted, optimizer FROM training_runs";
    for run in rows(c, sql, run)? {
        tables.runs.insert(run.id.clone(), run);
    }
    let sql = "SELECT id, session_id, base_model, model_path, request_id, created_at, n_clients, inflight FROM samplers";
    for sampler in rows(c, sql, sampler)? {
        tables.samplers.insert(sampler.id.clone(), sampler);
    }
    let sql = "SELECT run_id, kind, name, base_model, lora, size_bytes, user_metadata, public, created_at, expires_at FROM checkpoints";
    for checkpoint in rows(c, sql, checkpoint)? {
        tables
            .checkpoints
            .insert(checkpoint.path.clone(), checkpoint);
    }
    Ok(tables)
}

fn rows<T>(
    c: &Connection,
    sql: &str,
    read: fn(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    c.prepare(sql)?.query_map([], read)?.collect()
}

fn session(row: &Row<'_>) -> rusqlite::Result<Session> {
    Ok(Session {
        id: parsed(row, 0)?,
        idempotency_key: row.get(1)?,
        request: json(row, 2)?,
        created_at: row.get(3)?,
        last_seen_at: row.get(4)?,
        finish: optional_json(row, 5)?,
        owner: optional_parsed(row, 6)?,
    })
}

fn run(row: &Row<'_>) -> rusqlite::Result<Run> {
    Ok(Run {
        id: parsed(row, 0)?,
        session_id: parsed(row, 1)?,
        base_model: row.get(2)?,
        lora: json(row, 3)?,
        user_metadata: optional_json(row, 4)?,
        created_at: row.get(5)?,
        last_request_at: row.get(6)?,
        corrupted: row.get(7)?,
        optimizer: optional_json(row, 8)?.unwrap_or_default(),
    })
}

fn sampler(row: &Row<'_>) -> rusqlite::Result<Sampler> {
    let path: Option<String> = row.get(3)?;
    Ok(Sampler {
        id: parsed(row, 0)?,
        session_id: parsed(row, 1)?,
        base_model: row.get(2)?,
        model_path: path.map(|p| p.parse().map_err(|e| bad(3, e))).transpose()?,
        request_id: row.get(4)?,
        created_at: row.get(5)?,
        n_clients: row.get::<_, i64>(6)? as u64,
        inflight: row.get(7)?,
    })
}

fn checkpoint(row: &Row<'_>) -> rusqlite::Result<SavedCheckpoint> {
    let (run, kind, name): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
    Ok(SavedCheckpoint {
        path: checkpoint_path(&run, &kind, &name).map_err(|e| bad(2, e))?,
        base_model: row.get(3)?,
        lora: json(row, 4)?,
        size_bytes: row.get::<_, i64>(5)? as u64,
        user_metadata: optional_json(row, 6)?,
        public: row.get(7)?,
        created_at: row.get(8)?,
        expires_at: row.get(9)?,
    })
}

pub(super) fn put_session(c: &Connection, s: &Session) -> rusqlite::Result<()> {
    let finish = s.finish.as_ref().map(text).transpose()?;
    c.prepare_cached("INSERT OR REPLACE INTO sessions VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
        .execute(params![
            s.id.as_str(),
            s.idempotency_key,
            text(&s.request)?,
            s.created_at,
            s.last_seen_at,
            finish,
            s.owner.as_ref().map(KeyName::as_str)
        ])
        .map(drop)
}

pub(super) fn put_run(c: &Connection, r: &Run) -> rusqlite::Result<()> {
    let metadata = r.user_metadata.as_ref().map(text).transpose()?;
    c.prepare_cached(
        "INSERT OR REPLACE INTO training_runs VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![
        r.id.as_str(),
        r.session_id.as_str(),
        r.base_model,
        text(&r.lora)?,
        metadata,
        r.created_at,
        r.last_request_at,
        r.corrupted,
        text(&r.optimizer)?
    ])
    .map(drop)
}

pub(super) fn put_sampler(c: &Connection, s: &Sampler) -> rusqlite::Result<()> {
    c.prepare_cached("INSERT OR REPLACE INTO samplers VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
        .execute(params![
            s.id.as_str(),
            s.session_id.as_str(),
            s.base_model,
            s.model_path.as_ref().map(ToString::to_string),
            s.request_id,
            s.created_at,
            s.n_clients as i64,
            s.inflight
        ])
        .map(drop)
}

pub(super) fn remove_sampler(c: &Connection, id: &SamplingSessionId) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM samplers WHERE id = ?1")?
        .execute(params![id.as_str()])
        .map(drop)
}

pub(super) fn put_checkpoint(c: &Connection, p: &SavedCheckpoint) -> rusqlite::Result<()> {
    let metadata = p.user_metadata.as_ref().map(text).transpose()?;
    c.prepare_cached(
        "INSERT OR REPLACE INTO checkpoints VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?
    .execute(params![
        p.path.run.as_str(),
        p.path.checkpoint.kind.segment(),
        p.path.checkpoint.name(),
        p.base_model,
        text(&p.lora)?,
        p.size_bytes as i64,
        metadata,
        p.public,
        p.created_at,
        p.expires_at
    ])
    .map(drop)
}

pub(super) fn remove_checkpoint(c: &Connection, path: &TinkerPath) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM checkpoints WHERE run_id = ?1 AND kind = ?2 AND name = ?3")?
        .execute(params![
            path.run.as_str(),
            path.checkpoint.kind.segment(),
            path.checkpoint.name()
        ])
        .map(drop)
}

pub(super) fn put_times(
    c: &mut Connection,
    sessions: &[(SessionId, Millis)],
    runs: &[(TrainingRunId, Millis)],
) -> rusqlite::Result<()> {
    let transaction = c.transaction()?;
    for (id, at) in sessions {
        transaction
            .prepare_cached(
                "UPDATE sessions SET last_seen_at = ?2 WHERE id = ?1 AND last_seen_at <> ?2",
            )?
            .execute(params![id.as_str(), at])?;
    }
    for (id, at) in runs {
        transaction
            .prepare_cached("UPDATE training_runs SET last_request_at = ?2 WHERE id = ?1 AND last_request_at <> ?2")?
            .execute(params![id.as_str(), at])?;
    }
    transaction.commit()
}

fn text<T: Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))
}

fn json<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    let value: String = row.get(column)?;
    serde_json::from_str(&value).map_err(|e| bad(column, e))
}

fn optional_json<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<T>> {
    let value: Option<String> = row.get(column)?;
    value
        .map(|v| serde_json::from_str(&v).map_err(|e| bad(column, e)))
        .transpose()
}

fn parsed<T: std::str::FromStr<Err = tinker_types::TypeError>>(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<T> {
    let value: String = row.get(column)?;
    value.parse().map_err(|e| bad(column, e))
}

fn optional_parsed<T: std::str::FromStr<Err = Error>>(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<Option<T>> {
    let value: Option<String> = row.get(column)?;
    value
        .map(|v| v.parse().map_err(|e| bad(column, e)))
        .transpose()
}

fn bad(column: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
}
