//! A download from its first question to the folder under its name.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tinker_types::TinkerPath;

use super::event::DownloadEvent;
use super::manifest::{Manifest, ManifestEntry, file_error, sha256_of};
use super::names::safe_path;
use super::options::DownloadOptions;
use super::source::{SignedFiles, Source};
use super::transfer::Transfer;
use super::unpack::unpack;
use crate::client::Client;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};

/// Name of an archive before it is unpacked.
const ARCHIVE: &str = "archive";

/// Downloads of a client; see [`Client::download`].
#[derive(Clone)]
pub struct Download {
    client: Client,
    options: DownloadOptions,
    observer: Arc<dyn Fn(&DownloadEvent) + Send + Sync>,
}

impl fmt::Debug for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Downloads with the default options.
    #[must_use]
    pub fn download(&self) -> Download {
        Download {
            client: self.clone(),
            options: DownloadOptions::default(),
            observer: Arc::new(|_| {}),
        }
    }
}

impl Download {
    /// Sets how downloads are made.
    #[must_use]
    pub fn options(mut self, options: DownloadOptions) -> Self {
        self.options = options;
        self
    }

    /// Is told how downloads go. Called from their tasks: must not block.
    #[must_use]
    pub fn observer(mut self, observer: impl Fn(&DownloadEvent) + Send + Sync + 'static) -> Self {
        self.observer = Arc::new(observer);
        self
    }

    /// Downloads the files of an external checkpoint into a new folder, with their SHA-256 sums in
    /// [`MANIFEST`](super::MANIFEST). What an interrupted download left beside the folder is used.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints/{checkpoint}/external_weights_urls`.
    ///
    /// # Errors
    /// As [`files`](Self::files).
    pub async fn external_weights(&self, path: &TinkerPath, folder: &Path) -> Result<Manifest> {
        let (client, checkpoint) = (self.client.clone(), path.clone());
        let source = Source::new(move || {
            let (client, checkpoint) = (client.clone(), checkpoint.clone());
            async move {
                let answer = client.get_external_weights_urls(&checkpoint).await?;
                Ok(SignedFiles::of_external_weights(answer, Clock::wall()))
            }
        });
        self.files(&path.to_string(), source, folder).await
    }

    /// Downloads the archive of a checkpoint and unpacks it into a new folder, with the SHA-256
    /// sums of its files in [`MANIFEST`](super::MANIFEST).
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints/{checkpoint}/archive`.
    ///
    /// # Errors
    /// As [`archive`](Self::archive).
    pub async fn checkpoint_archive(&self, path: &TinkerPath, folder: &Path) -> Result<Manifest> {
        let (client, checkpoint) = (self.client.clone(), path.clone());
        let source = Source::new(move || {
            let (client, checkpoint) = (client.clone(), checkpoint.clone());
            async move {
                let answer = client.get_checkpoint_archive(&checkpoint).await?;
                Ok(SignedFiles::of_archive(ARCHIVE, answer, Clock::wall()))
            }
        });
        self.archive(&path.to_string(), source, folder).await
    }

    /// Downloads the files of a source into a new folder. `label` names what they are: an
    /// interrupted download is gone on with only under the same label and with the same names.
    ///
    /// # Errors
    /// If the folder exists and may not be replaced, or is being downloaded by another process; if
    /// the source fails; of kind `Untrusted` if a name or an address is not safe, two names stand
    /// for one file (case does not count) or one for the [manifest](super::MANIFEST), a limit is
    /// exceeded or a known sum does not fit; or as the storage's last refusal says. What has come
    /// is kept for the next attempt.
    pub async fn files(&self, label: &str, source: Source, folder: &Path) -> Result<Manifest> {
        let place = Place::take(folder, self.options.overwrite)?;
        let files = place.work.join("files");
        let manifest = Manifest {
            files: self.fetch(label, source, &place, &files).await?,
        };
        place.publish(&files, &manifest)?;
        Ok(manifest)
    }

    /// Downloads a source's one file, a tar archive, and unpacks it into a new folder.
    ///
    /// # Errors
    /// As [`files`](Self::files) and [`unpack`].
    pub async fn archive(&self, label: &str, source: Source, folder: &Path) -> Result<Manifest> {
        let place = Place::take(folder, self.options.overwrite)?;
        let packed = place.work.join("packed");
        let fetched = self.fetch(label, source, &place, &packed).await?;
        let [archive] = fetched.as_slice() else {
            let text = format!("{} archives are offered where there is one", fetched.len());
            return Err(Error::new(ErrorKind::Decode, text));
        };
        let archive = packed.join(safe_path(&archive.name)?);
        let files = place.work.join("files");
        let (manifest, n_bytes) = self.unpack(archive, files.clone()).await?;
        (self.observer)(&DownloadEvent::Unpacked {
            n_files: manifest.files.len() as u64,
            n_bytes,
        });
        place.publish(&files, &manifest)?;
        Ok(manifest)
    }

    async fn fetch(
        &self,
        label: &str,
        source: Source,
        place: &Place,
        folder: &Path,
    ) -> Result<Vec<ManifestEntry>> {
        let transfer = Transfer::start(
            self.client
                .inner()
                .pools
                .storage(self.options.stall_timeout)?,
            source,
            self.options.clone(),
            Arc::clone(&self.observer),
            !self.client.base_url().is_encrypted(),
        );
        let transfer = transfer.await?;
        let names = transfer.names().await;
        place.claim(label, &names)?;
        make(folder)?;
        let journals = place.work.join("parts");
        transfer.run(&names, folder, &journals).await
    }

    async fn unpack(&self, archive: PathBuf, files: PathBuf) -> Result<(Manifest, u64)> {
        let limits = self.options.limits;
        let unpacking = tokio::task::spawn_blocking(move || {
            // An earlier attempt may have been cut off.
            remove(&files)?;
            make(&files)?;
            let unpacked = match unpack(&archive, &files, &limits) {
                Ok(unpacked) => unpacked,
                Err(error) => {
                    remove(&files)?;
                    return Err(error);
                }
            };
            let mut names = unpacked.files;
            names.sort();
            let entries = names.into_iter().map(|name| {
                let sha256 = sha256_of(&files.join(&name))?;
                Ok(ManifestEntry { name, sha256 })
            });
            let files = entries.collect::<Result<Vec<_>>>()?;
            Ok((Manifest { files }, unpacked.n_bytes))
        });
        unpacking.await.map_err(|error| {
            Error::new(ErrorKind::File, "the unpacking was ended").with_source(error)
        })?
    }
}

/// The folder to be, and the one beside it where it grows.
struct Place {
    folder: PathBuf,
    work: PathBuf,
    overwrite: bool,
    /// Locked while it is open.
    _lock: File,
}

impl Place {
    fn take(folder: &Path, overwrite: bool) -> Result<Self> {
        if !overwrite && folder.symlink_metadata().is_ok() {
            let text = format!("{} exists already", folder.display());
            return Err(Error::new(ErrorKind::File, text));
        }
        let Some(name) = folder.file_name() else {
            let text = format!("{} is no name for a folder", folder.display());
            return Err(Error::new(ErrorKind::InvalidRequest, text));
        };
        let work = folder.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        make(&work)?;
        let lock = work.join("lock");
        let file = File::create(&lock).map_err(|error| file_error("make", &lock, error))?;
        file.try_lock().map_err(|error| {
            let text = format!("{} is being downloaded by another", folder.display());
            Error::new(ErrorKind::Conflict, text).with_source(error)
        })?;
        Ok(Self {
            folder: folder.to_owned(),
            work,
            overwrite,
            _lock: file,
        })
    }

    /// Drops what is there of something else, such as of files that are no longer offered.
    fn claim(&self, label: &str, names: &[String]) -> Result<()> {
        let path = self.work.join("label");
        // No name holds a line break: one that does is refused before a file is made for it.
        let label = format!("{label}\n{}", names.join("\n"));
        if std::fs::read_to_string(&path).is_ok_and(|found| found == label) {
            return Ok(());
        }
        for part in ["files", "packed", "parts"] {
            remove(&self.work.join(part))?;
        }
        std::fs::write(&path, label).map_err(|error| file_error("write", &path, error))
    }

    /// Gives the files their place under the folder's name.
    fn publish(&self, files: &Path, manifest: &Manifest) -> Result<()> {
        manifest.write(files)?;
        let old = self.work.join("old");
        remove(&old)?;
        if self.overwrite && self.folder.symlink_metadata().is_ok() {
            rename(&self.folder, &old)?;
        }
        rename(files, &self.folder)?;
        sync_parent(&self.folder)?;
        // The download is complete; what is left beside it does no harm.
        if let Err(error) = remove(&self.work) {
            tracing::warn!(%error, "what a download worked with was not removed");
        }
        Ok(())
    }
}

fn make(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| file_error("make", folder, error))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|error| file_error("make", to, error))
}

/// Removes a folder, or a file that is in its place.
fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(data) if data.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
    };
    removed.map_err(|error| file_error("remove", path, error))
}

/// Makes a new name survive a power cut, where folders can be synced.
fn sync_parent(path: &Path) -> Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    if cfg!(unix) {
        let synced = File::open(parent).and_then(|folder| folder.sync_all());
        synced.map_err(|error| file_error("write", parent, error))?;
    }
    Ok(())
}
