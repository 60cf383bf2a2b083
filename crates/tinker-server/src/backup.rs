//! Copies of a data directory from which a server starts, made while another serves it.
//!
//! A backup is made in two steps. [`Core::stage_backup`] takes an image of the server's files into its
//! temporary directory: hard links for what never changes once it is there, logs up to where they are,
//! the database by itself. Meanwhile no log grows and no checkpoint changes, which takes moments.
//! [`place_backup`] copies the image to where the backup is to be, while the server goes on.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::bundle;
use crate::core::{Core, lock};
use crate::db::Db;
use crate::disk::{Disk, OsDisk, create_dir, remove_dir, sync_dir};
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::lock::{HomeLock, server_dir};
use crate::paths::Paths;

/// What images are called, before a number.
const IMAGE: &str = "backup-";
/// A file in each image that is locked while the image is made or copied.
const HELD: &str = "held";
/// How long an image waits for somebody to copy it.
const TIME_TO_BEGIN: Duration = Duration::from_secs(10 * 60);
/// How often an image is begun again when something was replaced under its feet.
const TRIES: u32 = 10;

/// What is in a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// Files that were copied.
    pub n_files: u64,
    /// Their bytes.
    pub n_bytes: u64,
    /// Saved weights that were damaged before they were copied: which file and how.
    pub damaged: Vec<String>,
}

impl Core {
    /// Takes an image of the server's files; the directory that it is in, which is the caller's to
    /// remove. It holds what was acknowledged before, and nothing half done. Those that were left are
    /// removed.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn stage_backup(&self) -> Result<PathBuf> {
        self.catalog.flush_times()?;
        self.accounts.flush()?;
        self.discard_stale_images();
        self.with_everything_still(|db| stage(&self.paths, db))
            .and_then(finish_image)
    }

    /// Removes images that nobody copies: they keep what was deleted since on the disk.
    pub(crate) fn discard_stale_images(&self) {
        let Ok(entries) = fs::read_dir(self.paths.temp()) else {
            return;
        };
        for entry in entries.flatten() {
            let is_image = entry.file_name().to_string_lossy().starts_with(IMAGE);
            if is_image
                && is_stale(&entry.path())
                && let Err(error) = remove_dir(&entry.path())
            {
                tracing::warn!(error = error.with_causes(), "cannot remove an old image");
            }
        }
    }

    /// Does something while no log grows or shrinks and no checkpoint comes or goes.
    fn with_everything_still<T>(&self, work: impl FnOnce(&Db) -> T) -> T {
        let _checkpoints = self.change_checkpoints();
        // Nobody opens a log meanwhile.
        let open = self.open_journals();
        let journals: Vec<Arc<Mutex<Journal>>> = open.values().cloned().collect();
        let _logs: Vec<_> = journals.iter().map(|journal| lock(journal)).collect();
        let _samples = self.samples();
        work(self.db())
    }
}

/// Copies a data directory that no server holds to `target`, as [`place_backup`] does. No server
/// starts on it meanwhile.
///
/// # Errors
/// [`Error::AlreadyRunning`] if one does, [`Error::NotFound`] if none ever did, [`Error::Conflict`] if
/// there is something at `target`; or the disk refuses.
pub fn back_up(home: &Path, target: &Path) -> Result<Backup> {
    let paths = Paths::new(home);
    if !paths.database().is_file() {
        let home = home.display();
        return Err(Error::NotFound(format!(
            "no server ever kept anything in {home}"
        )));
    }
    let _lock = HomeLock::take(&OsDisk, home)?;
    let image = stage(&paths, &Db::open(&paths.database())?).and_then(finish_image)?;
    place_backup(&image, target)
}

/// Whether an image was left: it is old, and nobody holds it.
fn is_stale(image: &Path) -> bool {
    let modified = fs::metadata(image).and_then(|metadata| metadata.modified());
    let is_old = modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > TIME_TO_BEGIN));
    // Without the file it is half removed.
    let is_held = match File::open(image.join(HELD)) {
        Ok(file) => file.try_lock().is_err(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    is_old && !is_held
}

/// An image whose logs are still those of the server, each with its length then.
struct Image {
    dir: PathBuf,
    /// While it is locked, nobody takes the image for one that was left.
    _held: File,
    logs: Vec<(PathBuf, u64)>,
}

/// Links everything into a new image.
fn stage(paths: &Paths, db: &Db) -> Result<Image> {
    let mut tries = 1;
    loop {
        match stage_once(paths, db) {
            // A snapshot or a sampler was replaced while it was looked at.
            Err(Error::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && tries < TRIES =>
            {
                tries += 1;
            }
            staged => return staged,
        }
    }
}

fn stage_once(paths: &Paths, db: &Db) -> Result<Image> {
    let dir = paths
        .temp()
        .join(format!("{IMAGE}{}", uuid::Uuid::now_v7()));
    let staged = hold_new(&dir).and_then(|held| Ok((held, link_all(paths, db, &dir)?)));
    if staged.is_err() {
        // The error that was first is the one to report.
        let _ = remove_dir(&dir);
    }
    staged.map(|(held, logs)| Image {
        dir,
        _held: held,
        logs,
    })
}

/// Makes the directory of an image and holds it.
fn hold_new(image: &Path) -> Result<File> {
    create_dir(&OsDisk, image)?;
    let path = image.join(HELD);
    create_private(&path).map_err(|e| Error::io("write", &path, e))?;
    hold(image)
}

/// Holds an image, with others who copy it.
fn hold(image: &Path) -> Result<File> {
    let path = image.join(HELD);
    let held = File::open(&path).and_then(|file| file.lock_shared().map(|()| file));
    held.map_err(|e| Error::io("lock", &path, e))
}

/// The logs among what was linked, each with its length.
fn link_all(paths: &Paths, db: &Db, image: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let to = server_dir(image);
    create_dir(&OsDisk, &to)?;
    let mut logs = Vec::new();
    for entry in list(paths.root())? {
        if is_of_the_process(paths, &entry) {
            continue;
        }
        link_tree(
            &entry,
            &to.join(entry.file_name().unwrap_or_default()),
            &mut logs,
        )?;
    }
    // Last: whatever the logs name is in it.
    let copy = Paths::new(image).database();
    db.copy_to(&copy)?;
    Ok(logs)
}

/// What belongs to a process and not to the data: its lock and sign, what it writes aside, its own log.
/// The database is copied by itself.
fn is_of_the_process(paths: &Paths, entry: &Path) -> bool {
    let name = entry.file_name().unwrap_or_default().to_string_lossy();
    entry == paths.temp()
        || matches!(&*name, "lock" | "server.json")
        || name.starts_with("server.log")
        || name.starts_with("tinker.db")
        || name.ends_with(".tmp")
}

fn link_tree(from: &Path, to: &Path, logs: &mut Vec<(PathBuf, u64)>) -> Result<()> {
    let fault = |e| Error::io("read", from, e);
    let metadata = fs::symlink_metadata(from).map_err(fault)?;
    if metadata.is_dir() {
        create_dir(&OsDisk, to)?;
        for entry in list(from)? {
            link_tree(
                &entry,
                &to.join(entry.file_name().unwrap_or_default()),
                logs,
            )?;
        }
    } else if metadata.is_file() {
        if to.extension().is_some_and(|extension| extension == "seg") {
            logs.push((to.to_owned(), metadata.len()));
        }
        link(from, to)?;
    }
    Ok(())
}

/// Links a file, or copies it where the file system has no links.
fn link(from: &Path, to: &Path) -> Result<()> {
    let linked = match fs::hard_link(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => fs::copy(from, to).map(drop),
        linked => linked,
    };
    linked.map_err(|e| Error::io("read", from, e))
}

/// Makes the logs of an image its own, as long as they were when it was taken.
fn finish_image(image: Image) -> Result<PathBuf> {
    let own = image
        .logs
        .iter()
        .try_for_each(|(path, len)| make_own(path, *len));
    if let Err(error) = own {
        // The error that was first is the one to report.
        let _ = remove_dir(&image.dir);
        return Err(error);
    }
    Ok(image.dir)
}

fn make_own(path: &Path, len: u64) -> Result<()> {
    let copy = path.with_extension("copy");
    let copied = File::open(path).and_then(|file| {
        let mut to = create_private(&copy)?;
        io::copy(&mut io::Read::take(file, len), &mut to)
    });
    copied
        .and_then(|_| fs::rename(&copy, path))
        .map_err(|e| Error::io("write", &copy, e))
}

/// Copies an image to `target`, which must not be there or be empty, and removes the image. What can
/// be seen under this name is whole and on the disk.
///
/// # Errors
/// [`Error::Conflict`] if there is something; or the disk refuses.
pub fn place_backup(image: &Path, target: &Path) -> Result<Backup> {
    let placed = place(image, target);
    // Without the image the server is as it was; the next start removes what is left of it.
    let _ = remove_dir(image);
    placed
}

fn place(image: &Path, target: &Path) -> Result<Backup> {
    check_free(target)?;
    let _held = hold(image)?;
    let (target, partial) = whole_and_partial(target)?;
    let (target, partial) = (target.as_path(), partial.as_path());
    let mut backup = Backup {
        n_files: 0,
        n_bytes: 0,
        damaged: Vec::new(),
    };
    let copied = copy_image(image, partial, &mut backup).and_then(|()| {
        // There may be an empty directory, which not every system renames over.
        let _ = fs::remove_dir(target);
        let renamed = OsDisk.rename(partial, target);
        renamed.map_err(|e| Error::io("write", target, e))
    });
    if copied.is_err() {
        // The error that was first is the one to report.
        let _ = remove_dir(partial);
    }
    copied.map(|()| backup)
}

/// The absolute path of a target, and beside it one that nobody has.
fn whole_and_partial(target: &Path) -> Result<(PathBuf, PathBuf)> {
    let absolute = std::path::absolute(target).map_err(|e| Error::io("find", target, e))?;
    // Without a slash at its end, behind which the partial one would be within the target.
    let whole: PathBuf = absolute.components().collect();
    let Some(name) = whole.file_name() else {
        return Err(Error::Invalid(format!(
            "{} does not end with a name: a backup takes a new directory",
            target.display()
        )));
    };
    let mut partial = name.to_owned();
    partial.push(format!(".{}.partial", uuid::Uuid::now_v7()));
    let partial = whole.with_file_name(partial);
    Ok((whole, partial))
}

/// Refuses to write a backup over something.
///
/// # Errors
/// [`Error::Conflict`] if `target` is there and not an empty directory.
pub fn check_free(target: &Path) -> Result<()> {
    let is_free = match fs::read_dir(target) {
        Ok(entries) => entries.count() == 0,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    if is_free {
        return Ok(());
    }
    Err(Error::Conflict(format!(
        "{} is there already: a backup takes a new directory",
        target.display()
    )))
}

fn copy_image(image: &Path, to: &Path, backup: &mut Backup) -> Result<()> {
    create_dir(&OsDisk, to)?;
    copy_tree(&server_dir(image), &server_dir(to), backup)?;
    sync_dir(to).map_err(|e| Error::io("write", to, e))
}

fn copy_tree(from: &Path, to: &Path, backup: &mut Backup) -> Result<()> {
    create_dir(&OsDisk, to)?;
    for entry in list(from)? {
        let target = to.join(entry.file_name().unwrap_or_default());
        if entry.is_dir() {
            copy_tree(&entry, &target, backup)?;
        } else {
            backup.n_bytes += copy_file(&entry, &target)?;
            backup.n_files += 1;
        }
    }
    if let Err(damage) = bundle::verify(&OsDisk, to) {
        backup.damaged.push(damage.to_string());
    }
    sync_dir(to).map_err(|e| Error::io("write", to, e))
}

fn copy_file(from: &Path, to: &Path) -> Result<u64> {
    let copied = create_private(to).and_then(|mut file| {
        let n_bytes = io::copy(&mut File::open(from)?, &mut file)?;
        file.sync_all()?;
        Ok(n_bytes)
    });
    copied.map_err(|e| Error::io("write", to, e))
}

fn create_private(path: &Path) -> io::Result<File> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// What is in a directory.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let fault = |e| Error::io("read", dir, e);
    fs::read_dir(dir)
        .map_err(fault)?
        .map(|entry| entry.map(|entry| entry.path()).map_err(fault))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_absolute_and_their_partials_are_beside_them() {
        let here = std::env::current_dir().unwrap();
        for target in ["mine", "./mine/", "mine//"] {
            let (whole, partial) = whole_and_partial(Path::new(target)).unwrap();

            assert_eq!(whole, here.join("mine"), "{target}");
            assert_eq!(partial.parent().unwrap(), here, "{target}");
            let (_, another) = whole_and_partial(Path::new(target)).unwrap();
            assert_ne!(partial, another, "{target}");
        }
        assert!(whole_and_partial(Path::new("..")).is_err());
    }
}
