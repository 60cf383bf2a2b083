//! The file in which the official command line stores keys, read and written in its format.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tinker_types::ApiKeyDetails;

use crate::error::{Error, ErrorKind, Result};

/// The version of the format.
const VERSION: u32 = 1;

/// Keys by id, one of which is the default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredCredentials {
    version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    default: Option<String>,
    #[serde(default)]
    keys: BTreeMap<String, StoredKey>,
}

impl Default for StoredCredentials {
    fn default() -> Self {
        Self {
            version: VERSION,
            default: None,
            keys: BTreeMap::new(),
        }
    }
}

/// Who made a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyOrigin {
    /// A person, who pasted it.
    Manual,
    /// A program, for this machine alone: it is deleted on the server when it is removed here.
    Generated,
}

/// A stored key. `Debug` leaves the key itself out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredKey {
    /// Who made it.
    #[serde(rename = "type")]
    pub origin: KeyOrigin,
    /// The key.
    pub key: String,
    /// Its name.
    pub name: String,
    /// What it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<ApiKeyDetails>,
}

impl fmt::Debug for StoredKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredKey")
            .field("origin", &self.origin)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl StoredCredentials {
    /// Reads a file; one that is not there holds no keys.
    ///
    /// # Errors
    /// If it cannot be read, or is not of this format.
    pub fn load(path: &Path) -> Result<Self> {
        let fault = |what: &str| {
            Error::new(
                ErrorKind::File,
                format!("stored credentials {} {what}", path.display()),
            )
        };
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(fault("cannot be read").with_source(error)),
        };
        // The parser's message could quote a key.
        let stored: Self =
            serde_json::from_slice(&text).map_err(|_| fault("are malformed: log in again"))?;
        if stored.version != VERSION {
            return Err(fault(&format!(
                "are of version {}, not {VERSION}",
                stored.version
            )));
        }
        Ok(stored)
    }

    /// Writes the file, for its owner alone (0600, in a folder made with 0700), all or nothing.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let fault = |error: std::io::Error| {
            let text = format!("stored credentials {} cannot be written", path.display());
            Error::new(ErrorKind::File, text).with_source(error)
        };
        write_private(path, self).map_err(fault)
    }

    /// The default key, if there is one and it is still stored.
    #[must_use]
    pub fn default_key(&self) -> Option<&StoredKey> {
        self.keys.get(self.default.as_ref()?)
    }

    /// The id of the default key, if that is still stored.
    #[must_use]
    pub fn default_id(&self) -> Option<&str> {
        self.default
            .as_deref()
            .filter(|id| self.keys.contains_key(*id))
    }

    /// A key by its id.
    #[must_use]
    pub fn key(&self, id: &str) -> Option<&StoredKey> {
        self.keys.get(id)
    }

    /// Stores a key, in place of one of that id.
    pub fn add(&mut self, id: impl Into<String>, key: StoredKey) {
        self.keys.insert(id.into(), key);
    }

    /// Removes a key; if it was the default, there is none then.
    pub fn remove(&mut self, id: &str) -> Option<StoredKey> {
        if self.default.as_deref() == Some(id) {
            self.default = None;
        }
        self.keys.remove(id)
    }

    /// Makes a stored key the default, or none.
    ///
    /// # Errors
    /// If there is no key of that id.
    pub fn set_default(&mut self, id: Option<&str>) -> Result<()> {
        if let Some(id) = id.filter(|id| !self.keys.contains_key(*id)) {
            let text = format!("no key {id:?} is stored");
            return Err(Error::new(ErrorKind::InvalidRequest, text));
        }
        self.default = id.map(str::to_owned);
        Ok(())
    }
}

fn write_private(path: &Path, stored: &StoredCredentials) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    if !folder.is_dir() {
        make_private_folder(folder)?;
    }
    let aside = aside(path);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&aside).and_then(|mut file| {
        file.write_all(&serde_json::to_vec_pretty(stored)?)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| std::fs::rename(&aside, path));
    if renamed.is_err() {
        // What is left may hold a key.
        std::fs::remove_file(&aside).ok();
    }
    renamed
}

fn make_private_folder(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// A name beside `path` that nobody else uses.
fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}", uuid::Uuid::new_v4()))
}
