-- What was used within each hour (milliseconds since 1970 at its start), and who did what when.

CREATE TABLE usage (
    hour       INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    base_model TEXT NOT NULL,
    kind       TEXT NOT NULL,
    amount     INTEGER NOT NULL,
    PRIMARY KEY (hour, session_id, base_model, kind)
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
    at      INTEGER NOT NULL,
    event   TEXT NOT NULL,
    details TEXT NOT NULL
) STRICT;

CREATE INDEX audit_at ON audit (at);
