-- Metadata only: bodies are in the segment logs, weights in checkpoint directories.
-- Times are milliseconds since 1970, UTC. JSON columns hold what the client sent.

CREATE TABLE sessions (
    id              TEXT PRIMARY KEY,
    idempotency_key TEXT UNIQUE,
    request         TEXT NOT NULL,
    created_at      INTEGER NOT NULL,
    last_seen_at    INTEGER NOT NULL,
    finish          TEXT
) STRICT, WITHOUT ROWID;

CREATE TABLE training_runs (
    id              TEXT PRIMARY KEY,
    session_id      TEXT NOT NULL,
    base_model      TEXT NOT NULL,
    lora            TEXT NOT NULL,
    user_metadata   TEXT,
    created_at      INTEGER NOT NULL,
    last_request_at INTEGER NOT NULL,
    corrupted       TEXT
) STRICT, WITHOUT ROWID;

CREATE TABLE samplers (
    id         TEXT PRIMARY KEY,
    session_id TEXT NOT NULL,
    base_model TEXT NOT NULL,
    model_path TEXT,
    -- The operation that made a sampler which lives with its session.
    request_id TEXT,
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE checkpoints (
    run_id        TEXT NOT NULL,
    kind          TEXT NOT NULL,
    name          TEXT NOT NULL,
    base_model    TEXT NOT NULL,
    lora          TEXT NOT NULL,
    size_bytes    INTEGER NOT NULL,
    user_metadata TEXT,
    public        INTEGER NOT NULL DEFAULT 0,
    created_at    INTEGER NOT NULL,
    expires_at    INTEGER,
    PRIMARY KEY (run_id, kind, name)
) STRICT, WITHOUT ROWID;
