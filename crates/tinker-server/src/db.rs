//! The metadata database: one connection on one thread, migrated on opening.

use std::path::Path;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use rusqlite::Connection;

use crate::disk::create_private_file;
use crate::error::{Error, Result};

/// Schema versions in order; entry `i` takes a database from version `i` to `i + 1`.
const MIGRATIONS: &[&str] = &[
    include_str!("../migrations/0001_init.sql"),
    include_str!("../migrations/0002_sampler_clients.sql"),
    include_str!("../migrations/0003_optimizer.sql"),
    include_str!("../migrations/0004_accounts.sql"),
    include_str!("../migrations/0005_owner.sql"),
    include_str!("../migrations/0006_inflight_samplers.sql"),
];

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// A handle on the database thread.
#[derive(Debug, Clone)]
pub(crate) struct Db {
    jobs: Sender<Job>,
}

impl Db {
    /// Opens or creates a database and brings its schema up to date.
    ///
    /// # Errors
    /// If the file cannot be used or was written by a newer version.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        // SQLite gives the mode of the database to the files beside it.
        create_private_file(path).map_err(|e| Error::io("write", path, e))?;
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_secs(10))?;
        // Rows are few and promised for good: a commit is on the disk before it is answered.
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        migrate(&mut connection, path)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("metadata".into())
            .spawn(move || {
                for job in queue {
                    job(&mut connection);
                }
            })
            .map_err(|e| Error::io("start a thread for", path, e))?;
        Ok(Self { jobs })
    }

    /// Runs `work` on the database thread and waits for it.
    ///
    /// # Errors
    /// What `work` returns, or [`Error::Stopping`].
    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = mpsc::channel();
        let job: Job = Box::new(move |connection| {
            // The caller may have gone away; then nobody wants the answer.
            let _ = reply.send(work(connection));
        });
        self.jobs.send(job).map_err(|_| Error::Stopping)?;
        Ok(answer.recv().map_err(|_| Error::Stopping)??)
    }
}

impl Db {
    /// Writes the database as it is now to a new file.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn copy_to(&self, path: &Path) -> Result<()> {
        create_private_file(path).map_err(|e| Error::io("write", path, e))?;
        let name = path.display().to_string();
        self.call(move |connection| connection.execute("VACUUM INTO ?1", [name]))?;
        Ok(())
    }
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<()> {
    let version: usize = connection.query_row("PRAGMA user_version", [], |row| {
        row.get::<_, i64>(0).map(|v| v as usize)
    })?;
    if version > MIGRATIONS.len() {
        return Err(Error::Corrupt {
            path: path.to_owned(),
            message: format!(
                "its schema version {version} is newer than this program's {}: use a newer tinker",
                MIGRATIONS.len()
            ),
        });
    }
    for (i, script) in MIGRATIONS.iter().enumerate().skip(version) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(script)?;
        transaction.pragma_update(None, "user_version", (i + 1) as i64)?;
        transaction.commit()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_database_has_the_newest_schema_and_opens_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tinker.db");

        for _ in 0..2 {
            let db = Db::open(&path).unwrap();
            let version: i64 = db
                .call(|c| c.query_row("PRAGMA user_version", [], |row| row.get(0)))
                .unwrap();
            assert_eq!(version, MIGRATIONS.len() as i64);
        }
    }

    #[cfg(unix)]
    #[test]
    fn nobody_else_can_read_the_database() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();

        let _db = Db::open(&dir.path().join("tinker.db")).unwrap();

        for name in ["tinker.db", "tinker.db-wal", "tinker.db-shm"] {
            let file = std::fs::metadata(dir.path().join(name)).unwrap();
            assert_eq!(file.permissions().mode() & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tinker.db");
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);

        let error = Db::open(&path).unwrap_err();

        assert!(
            error.to_string().contains("newer than this program's"),
            "{error}"
        );
    }
}
