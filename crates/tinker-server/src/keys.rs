//! The keys of other people: a file of their digests, and what each key is good for.
//!
//! The file is `<home>/server/keys.json` (mode 0600). It holds no key: a key is 244 random bits, so that
//! its digest alone says nothing of it. A running server sees changes with the next request.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::caller::{Caller, Scope};
use crate::core::lock;
use crate::disk::{OsDisk, Stamp, stamp, write_private};
use crate::error::{Error, Result};
use crate::lock::{create_server_dir, server_dir};
use crate::token::ApiToken;

/// Longest name of a key.
const MAX_NAME: usize = 64;
/// How long a file that could not be read is left alone if it does not change.
const READ_AGAIN: Duration = Duration::from_secs(1);
/// Version of the file's format.
const FORMAT: u32 = 1;

/// What a key is called: letters, digits, `-`, `_` and `.`, at most 64 of them.
///
/// What was made with a key belongs to its name. A key that is added again under the name of one that
/// was removed has what that had.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyName(Arc<str>);

impl KeyName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KeyName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty() || text.len() > MAX_NAME || !text.chars().all(is_fine) {
            return Err(Error::Invalid(format!(
                "{text:?} is no name for a key: take 1 to {MAX_NAME} letters, digits, -, _ and ."
            )));
        }
        if text == "local" {
            return Err(Error::Invalid(
                "\"local\" stands for the data directory's own key: take another name".into(),
            ));
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for KeyName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<KeyName> for String {
    fn from(name: KeyName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How much of the server a key may take at a time. What goes beyond is refused with 429 and taken
/// later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyLimits {
    /// Operations and samples without a result.
    pub operations: usize,
    /// Bytes of their requests.
    pub bytes: u64,
    /// Sessions that are open: not ended by their client, and heard of in the last five minutes.
    pub sessions: usize,
    /// Training runs of open sessions.
    pub adapters: usize,
}

impl KeyLimits {
    /// Those of the data directory's own key.
    pub const UNLIMITED: Self = Self {
        operations: usize::MAX,
        bytes: u64::MAX,
        sessions: usize::MAX,
        adapters: usize::MAX,
    };
}

impl Default for KeyLimits {
    /// Enough for an experiment with thousands of samples in flight.
    fn default() -> Self {
        Self {
            operations: 32_768,
            bytes: 1 << 30,
            sessions: 256,
            adapters: 64,
        }
    }
}

/// A key as the file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredKey {
    /// What it is called.
    pub name: KeyName,
    /// BLAKE3 of the key, in hexadecimal digits.
    digest: String,
    /// What it is good for.
    pub scopes: BTreeSet<Scope>,
    /// How much it may take.
    #[serde(default)]
    pub limits: KeyLimits,
    /// When it was made, RFC 3339.
    pub created: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    format: u32,
    keys: Vec<StoredKey>,
}

/// What is read of a file first: the rest is understood only if it has the right format.
#[derive(Debug, Deserialize)]
struct Format {
    format: u32,
}

fn path_of(home: &Path) -> PathBuf {
    server_dir(home).join("keys.json")
}

fn read(path: &Path) -> Result<Vec<StoredKey>> {
    let corrupt = |message: String| Error::Corrupt {
        path: path.to_owned(),
        message: format!(
            "{message}; put it back from a backup, or delete it and add the keys again"
        ),
    };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::io("read", path, source)),
    };
    let Format { format } = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    if format != FORMAT {
        return Err(Error::Newer {
            path: path.to_owned(),
            message: format!(
                "it has format {format}, this program reads {FORMAT}: use the program that wrote it"
            ),
        });
    }
    let file: KeyFile = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    Ok(file.keys)
}

/// Changes the file. Two programs that do so wait for each other.
fn change<T>(home: &Path, edit: impl FnOnce(&mut Vec<StoredKey>) -> Result<T>) -> Result<T> {
    let path = path_of(home);
    create_server_dir(home)?;
    let _changing = hold(&path.with_extension("lock"))?;
    let mut keys = read(&path)?;
    let done = edit(&mut keys)?;
    let file = KeyFile {
        format: FORMAT,
        keys,
    };
    let bytes = serde_json::to_vec_pretty(&file).map_err(|e| Error::Invalid(e.to_string()))?;
    write_private(&OsDisk, &path, &bytes)?;
    Ok(done)
}

fn hold(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options
        .open(path)
        .map_err(|source| Error::io("write", path, source))?;
    file.lock()
        .map_err(|source| Error::io("lock", path, source))?;
    Ok(file)
}

/// Makes a key. It is nowhere but in what this returns.
///
/// # Errors
/// [`Error::Conflict`] if there is one of this name; or the data directory cannot be written.
pub fn add_key(
    home: &Path,
    name: KeyName,
    scopes: BTreeSet<Scope>,
    limits: KeyLimits,
) -> Result<ApiToken> {
    change(home, |keys| {
        if keys.iter().any(|key| key.name == name) {
            return Err(Error::Conflict(format!(
                "there is a key {name} already: remove it first, or take another name"
            )));
        }
        let token = ApiToken::random();
        keys.push(StoredKey {
            name,
            digest: digest_of(token.expose()).to_hex().to_string(),
            scopes,
            limits,
            created: jiff::Timestamp::now().to_string(),
        });
        Ok(token)
    })
}

/// The keys of a data directory, oldest first.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn list_keys(home: &Path) -> Result<Vec<StoredKey>> {
    read(&path_of(home))
}

/// Removes a key: requests with it are refused from now on.
///
/// # Errors
/// [`Error::NotFound`] with the names there are; or the data directory cannot be written.
pub fn remove_key(home: &Path, name: &KeyName) -> Result<()> {
    change(home, |keys| {
        let n_before = keys.len();
        keys.retain(|key| key.name != *name);
        if keys.len() < n_before {
            return Ok(());
        }
        let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
        let known = if names.is_empty() {
            "there are none".to_owned()
        } else {
            format!("there are {}", names.join(", "))
        };
        Err(Error::NotFound(format!("there is no key {name}: {known}")))
    })
}

fn digest_of(key: &str) -> blake3::Hash {
    blake3::hash(key.as_bytes())
}

impl StoredKey {
    /// Whether `presented` is this key. The time taken does not depend on where they differ.
    fn matches(&self, presented: blake3::Hash) -> bool {
        blake3::Hash::from_hex(&self.digest).is_ok_and(|digest| digest == presented)
    }

    fn caller(&self) -> Caller {
        Caller::of_key(self.name.clone(), self.scopes.clone(), self.limits)
            .with_digest(&self.digest)
    }
}

/// The keys of a running server.
#[derive(Debug)]
pub(crate) struct Keys {
    path: PathBuf,
    known: Mutex<Known>,
}

/// What was read last.
#[derive(Debug)]
struct Known {
    /// Of the file that the keys are from.
    stamp: Stamp,
    keys: Arc<Vec<StoredKey>>,
    /// When the file could last not be read, and its stamp then; none if it could.
    failed: Option<(Stamp, Instant)>,
}

impl Known {
    /// Reads the file if it is not the one that the keys are from. Until that succeeds it is tried again,
    /// since a key may have been removed, and the keys that are known stay.
    fn refresh(
        &mut self,
        stamp: Stamp,
        now: Instant,
        read: impl FnOnce() -> Result<Vec<StoredKey>>,
    ) {
        let is_due = match self.failed {
            None => self.stamp != stamp,
            Some((of, at)) => of != stamp || now.saturating_duration_since(at) >= READ_AGAIN,
        };
        if !is_due {
            return;
        }
        match read() {
            Ok(keys) => {
                *self = Self {
                    stamp,
                    keys: Arc::new(keys),
                    failed: None,
                }
            }
            Err(error) => {
                self.failed = Some((stamp, now));
                tracing::error!(
                    error = error.with_causes(),
                    "cannot read the keys; those that were known stay valid until the file can be read"
                );
            }
        }
    }
}

impl Keys {
    /// Reads the keys of a data directory.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged.
    pub(crate) fn open(home: &Path) -> Result<Self> {
        let path = path_of(home);
        let stamp = stamp(&path);
        let keys = Arc::new(read(&path)?);
        Ok(Self {
            path,
            known: Mutex::new(Known {
                stamp,
                keys,
                failed: None,
            }),
        })
    }

    /// The keys now. A file that cannot be read leaves those that were known.
    fn now(&self) -> Arc<Vec<StoredKey>> {
        let stamp = stamp(&self.path);
        let mut known = lock(&self.known);
        known.refresh(stamp, Instant::now(), || read(&self.path));
        Arc::clone(&known.keys)
    }

    /// Whose key this is.
    pub(crate) fn find(&self, presented: &str) -> Option<Caller> {
        let digest = digest_of(presented);
        let keys = self.now();
        let found = keys.iter().find(|key| key.matches(digest))?;
        Some(found.caller())
    }

    /// The key of a digest, if it was not removed.
    pub(crate) fn of_digest(&self, digest: &str) -> Option<Caller> {
        let keys = self.now();
        let found = keys.iter().find(|key| key.digest == digest)?;
        Some(found.caller())
    }

    /// The key of a name, if it was not removed.
    pub(crate) fn named(&self, name: &KeyName) -> Option<Caller> {
        let keys = self.now();
        let found = keys.iter().find(|key| key.name == *name)?;
        Some(found.caller())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> KeyName {
        text.parse().unwrap()
    }

    fn add(home: &Path, text: &str, scopes: &[Scope]) -> ApiToken {
        let scopes = scopes.iter().copied().collect();
        add_key(home, name(text), scopes, KeyLimits::default()).unwrap()
    }

    #[test]
    fn a_key_is_found_until_it_is_removed_and_is_not_in_the_file() {
        let home = tempfile::tempdir().unwrap();
        let ann = add(home.path(), "ann", &[Scope::Sample]);
        let keys = Keys::open(home.path()).unwrap();

        let found = keys.find(ann.expose()).unwrap();
        assert_eq!(found.key, Some(name("ann")));
        assert!(found.has(Scope::Sample) && !found.has(Scope::Train));
        assert_eq!(keys.find("tml-other"), None);
        let file = std::fs::read_to_string(path_of(home.path())).unwrap();
        assert!(!file.contains(ann.expose()), "{file}");

        // Without a restart.
        let ben = add(home.path(), "ben", &[]);
        assert!(keys.find(ben.expose()).is_some());
        remove_key(home.path(), &name("ann")).unwrap();
        assert_eq!(keys.find(ann.expose()), None);
        assert_eq!(keys.named(&name("ann")), None);
    }

    #[test]
    fn a_name_is_given_once_and_unknown_names_are_answered_with_the_known() {
        let home = tempfile::tempdir().unwrap();
        add(home.path(), "ann", &[]);

        let twice = add_key(
            home.path(),
            name("ann"),
            BTreeSet::new(),
            KeyLimits::default(),
        );
        let unknown = remove_key(home.path(), &name("eve")).unwrap_err();

        assert!(matches!(twice, Err(Error::Conflict(_))), "{twice:?}");
        assert_eq!(unknown.to_string(), "there is no key eve: there are ann");
        assert_eq!(list_keys(home.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_file_that_became_unreadable_locks_nobody_out_and_one_at_the_start_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let ann = add(home.path(), "ann", &[]);
        let keys = Keys::open(home.path()).unwrap();

        std::fs::write(path_of(home.path()), "{").unwrap();

        assert!(keys.find(ann.expose()).is_some());
        let error = Keys::open(home.path()).unwrap_err().to_string();
        assert!(error.contains("keys.json is damaged"), "{error}");
        assert!(
            error.ends_with("delete it and add the keys again"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_could_not_be_read_is_read_again_though_it_did_not_change() {
        let home = tempfile::tempdir().unwrap();
        add(home.path(), "ann", &[]);
        let path = path_of(home.path());
        let mut known = Known {
            stamp: stamp(&path),
            keys: Arc::new(read(&path).unwrap()),
            failed: None,
        };
        remove_key(home.path(), &name("ann")).unwrap();
        let (changed, start) = (stamp(&path), Instant::now());
        let fault = || {
            Err(Error::io(
                "read",
                &path,
                std::io::Error::other("too many files"),
            ))
        };

        known.refresh(changed, start, fault);
        assert_eq!(known.keys.len(), 1);
        // Not with every request meanwhile.
        known.refresh(changed, start, || panic!("read at once"));
        known.refresh(changed, start + READ_AGAIN, fault);
        known.refresh(changed, start + 2 * READ_AGAIN, || read(&path));

        assert_eq!(known.keys.len(), 0);
        known.refresh(changed, start + 4 * READ_AGAIN, || {
            panic!("it did not change")
        });
    }

    #[test]
    fn a_mistyped_field_is_refused_by_name_and_a_newer_file_as_newer() {
        let home = tempfile::tempdir().unwrap();
        add(home.path(), "ann", &[]);
        let path = path_of(home.path());
        let text = std::fs::read_to_string(&path).unwrap();

        for field in ["\"sessions\"", "\"scopes\"", "\"keys\""] {
            let other = format!("\"mistyped\": 1, {field}");
            std::fs::write(&path, text.replace(field, &other)).unwrap();
            let error = list_keys(home.path()).unwrap_err().to_string();
            assert!(error.contains("unknown field `mistyped`"), "{error}");
        }
        let newer = text.replace("\"format\": 1", "\"more\": 1, \"format\": 2");
        std::fs::write(&path, newer).unwrap();
        let error = list_keys(home.path());
        assert!(matches!(error, Err(Error::Newer { .. })), "{error:?}");
    }

    #[cfg(unix)]
    #[test]
    fn the_file_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let home = tempfile::tempdir().unwrap();
        add(home.path(), "ann", &[]);

        let mode = std::fs::metadata(path_of(home.path()))
            .unwrap()
            .permissions()
            .mode();

        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn names_are_short_and_plain() {
        for bad in ["", "two words", "a/b", "local", &"x".repeat(65)] {
            assert!(bad.parse::<KeyName>().is_err(), "{bad:?}");
        }
        assert!("Ann-B_2.c".parse::<KeyName>().is_ok());
    }
}
