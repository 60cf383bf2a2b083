//! One server per data directory: an advisory file lock, and a private file that says where it is.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tinker_engine::Precision;

use crate::disk::{Disk, OsDisk, create_dir, set_private, write_private};
use crate::error::{Error, Result};
use crate::tls::TlsFiles;

/// How often the lock is tried, and how far apart: a look whether a server runs holds it for a
/// moment, and must not pass for one.
const TRIES: u32 = 5;
const BETWEEN_TRIES: Duration = Duration::from_millis(25);

/// What a running server says about itself in `<home>/server/server.json` (mode 0600).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockInfo {
    /// Its process.
    pub pid: u32,
    /// The address it is bound to.
    pub host: IpAddr,
    /// The port it listens on.
    pub port: u16,
    /// The token it asks for.
    pub token: String,
    /// Its version.
    pub version: String,
    /// When it started, RFC 3339.
    pub started: String,
    /// Model directories it was told to offer: whoever starts it again passes them on.
    #[serde(default)]
    pub models: Vec<PathBuf>,
    /// Those it was told to offer under names, likewise.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub named_models: BTreeMap<String, PathBuf>,
    /// Bytes it was told to take for the activations of training; absent if it was to choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_memory: Option<u64>,
    /// What it was told to turn the weights of base models into, by name; absent for those of the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// What it was told to compute on; absent in signs of servers that knew the CPU alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// What it was told to compute with, by name.
    #[serde(default = "default_precision")]
    pub precision: String,
    /// Threads its engine was told to take; 0 is one per core.
    #[serde(default)]
    pub threads: usize,
    /// Most bytes of files that it may keep; absent if there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_disk_bytes: Option<u64>,
    /// Where other machines reach it; absent if it is for this one alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside: Option<Outside>,
}

/// How a server is open to other machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// The address it was told to listen on, with the port it got.
    pub addr: SocketAddr,
    /// Its certificate; absent if it serves them without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
}

/// Of servers that could not be told.
fn default_precision() -> String {
    Precision::F32.name().to_owned()
}

impl LockInfo {
    /// Where a client on this machine reaches it, such as `http://127.0.0.1:8642`.
    #[must_use]
    pub fn base_url(&self) -> String {
        base_url(self.host, self.port)
    }
}

impl std::fmt::Debug for LockInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LockInfo")
            .field("pid", &self.pid)
            .field("host", &self.host)
            .field("port", &self.port)
            .field("version", &self.version)
            .field("started", &self.started)
            .field("models", &self.models)
            .field("named_models", &self.named_models)
            .field("training_memory", &self.training_memory)
            .field("weights", &self.weights)
            .field("device", &self.device)
            .field("precision", &self.precision)
            .field("threads", &self.threads)
            .field("max_disk_bytes", &self.max_disk_bytes)
            .field("outside", &self.outside)
            .finish_non_exhaustive()
    }
}

/// The address for a client on the same machine: the unspecified address becomes loopback.
pub(crate) fn base_url(host: IpAddr, port: u16) -> String {
    match host {
        IpAddr::V4(ip) if ip.is_unspecified() => format!("http://127.0.0.1:{port}"),
        IpAddr::V6(ip) if ip.is_unspecified() => format!("http://[::1]:{port}"),
        IpAddr::V4(ip) => format!("http://{ip}:{port}"),
        IpAddr::V6(ip) => format!("http://[{ip}]:{port}"),
    }
}

/// The directory of the server's files within a data directory.
#[must_use]
pub fn server_dir(home: &Path) -> PathBuf {
    home.join("server")
}

/// Creates [`server_dir`] for its owner alone; one that others could read is closed to them.
///
/// # Errors
/// If the data directory cannot be written.
pub fn create_server_dir(home: &Path) -> Result<PathBuf> {
    create_private_dir(&OsDisk, &server_dir(home))
}

fn create_private_dir(disk: &dyn Disk, dir: &Path) -> Result<PathBuf> {
    create_dir(disk, dir)?;
    set_private(dir, 0o700).map_err(|source| Error::io("protect", dir, source))?;
    Ok(dir.to_owned())
}

fn info_path(home: &Path) -> PathBuf {
    server_dir(home).join("server.json")
}

fn lock_path(home: &Path) -> PathBuf {
    server_dir(home).join("lock")
}

/// Reads what the last server of a data directory said about itself; `None` if it left or never ran.
///
/// A server that was killed leaves its file behind: ask [`is_running`] too.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn read_lock(home: &Path) -> Result<Option<LockInfo>> {
    let path = info_path(home);
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::Corrupt {
                path,
                message: error.to_string(),
            }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::io("read", &path, source)),
    }
}

/// Whether a server holds the data directory now.
///
/// # Errors
/// If the lock cannot be tried.
pub fn is_running(home: &Path) -> Result<bool> {
    let path = lock_path(home);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(Error::io("read", &path, source)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(source)) => Err(Error::io("lock", &path, source)),
    }
}

/// Takes a file's lock, trying again a few times with `pause` in between.
fn try_lock(file: &File, mut pause: impl FnMut()) -> Result<(), TryLockError> {
    for _ in 1..TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => pause(),
            done => return done,
        }
    }
    file.try_lock()
}

/// The lock, held until dropped. The operating system releases it when the process dies.
#[derive(Debug)]
pub(crate) struct HomeLock {
    home: PathBuf,
    _file: File,
}

impl HomeLock {
    /// Takes the lock of a data directory, and down the sign of a server that was killed.
    pub(crate) fn take(disk: &dyn Disk, home: &Path) -> Result<Self> {
        create_private_dir(disk, &server_dir(home))?;
        let path = lock_path(home);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options
            .open(&path)
            .map_err(|source| Error::io("write", &path, source))?;
        match try_lock(&file, || std::thread::park_timeout(BETWEEN_TRIES)) {
            Ok(()) => {
                let lock = Self {
                    home: home.to_owned(),
                    _file: file,
                };
                // Of a server that was killed: whoever reads it would take this one for that.
                lock.withdraw();
                Ok(lock)
            }
            Err(TryLockError::WouldBlock) => Err(Error::AlreadyRunning {
                home: home.to_owned(),
                pid: read_lock(home)?.map_or_else(|| "unknown".into(), |i| i.pid.to_string()),
            }),
            Err(TryLockError::Error(source)) => Err(Error::io("lock", &path, source)),
        }
    }

    /// Says where the server is.
    pub(crate) fn publish(&self, disk: &dyn Disk, info: &LockInfo) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(info).map_err(|e| Error::Invalid(e.to_string()))?;
        write_private(disk, &info_path(&self.home), &bytes)
    }

    /// Takes the sign down. A missing file is fine: the server is leaving anyway.
    pub(crate) fn withdraw(&self) {
        let _ = std::fs::remove_file(info_path(&self.home));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_server_is_refused_and_told_the_process() {
        let home = tempfile::tempdir().unwrap();
        let lock = HomeLock::take(&OsDisk, home.path()).unwrap();
        let info = LockInfo {
            pid: 4321,
            host: IpAddr::from([127, 0, 0, 1]),
            port: 1,
            token: "tml-x".into(),
            version: "0".into(),
            started: "now".into(),
            models: Vec::new(),
            named_models: BTreeMap::new(),
            training_memory: None,
            weights: None,
            device: None,
            precision: default_precision(),
            threads: 0,
            max_disk_bytes: None,
            outside: None,
        };
        lock.publish(&OsDisk, &info).unwrap();

        let error = HomeLock::take(&OsDisk, home.path()).unwrap_err();

        assert!(
            error.to_string().contains("served by process 4321"),
            "{error}"
        );
        assert!(is_running(home.path()).unwrap());
        drop(lock);
        assert!(!is_running(home.path()).unwrap());
    }

    #[test]
    fn a_look_at_the_lock_does_not_pass_for_a_server() {
        let home = tempfile::tempdir().unwrap();
        drop(HomeLock::take(&OsDisk, home.path()).unwrap());
        let open = || File::open(lock_path(home.path())).unwrap();
        let (ours, probe) = (open(), open());
        probe.try_lock_shared().unwrap();
        let (mut probe, mut n_pauses) = (Some(probe), 0);

        let taken = try_lock(&ours, || {
            n_pauses += 1;
            drop(probe.take());
        });

        assert!(taken.is_ok());
        assert_eq!(n_pauses, 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_server_directory_open_to_others_is_closed() {
        use std::os::unix::fs::PermissionsExt as _;
        let home = tempfile::tempdir().unwrap();
        let dir = server_dir(home.path());
        let mode = || std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777;
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();

        drop(HomeLock::take(&OsDisk, home.path()).unwrap());
        assert_eq!(mode(), 0o700);

        std::fs::remove_dir_all(&dir).unwrap();
        create_server_dir(home.path()).unwrap();
        assert_eq!(mode(), 0o700);
    }

    #[test]
    fn the_sign_of_a_killed_server_is_gone_once_the_next_has_the_lock() {
        let home = tempfile::tempdir().unwrap();
        create_dir(&OsDisk, &server_dir(home.path())).unwrap();
        std::fs::write(info_path(home.path()), "{}").unwrap();

        let _lock = HomeLock::take(&OsDisk, home.path()).unwrap();

        assert_eq!(read_lock(home.path()).unwrap(), None);
    }

    #[test]
    fn a_directory_without_a_server_is_free() {
        let home = tempfile::tempdir().unwrap();

        assert!(!is_running(home.path()).unwrap());
        assert_eq!(read_lock(home.path()).unwrap(), None);
    }
}
