//! Everything the server keeps in files goes through [`Disk`], so that tests can make it fail.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result};

/// A file system. Directories are listed through `std::fs`.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Opens a file to read it.
    ///
    /// # Errors
    /// As the operating system says.
    fn open(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }

    /// Creates a directory and its parents, private to the owner, and syncs the parents of those that
    /// were not there.
    ///
    /// # Errors
    /// As the operating system says.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Writes a new file, private to the owner, and syncs it.
    ///
    /// # Errors
    /// As the operating system says.
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Appends to an open file.
    ///
    /// # Errors
    /// As the operating system says; some bytes may have been written.
    fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was appended to a file durable.
    ///
    /// # Errors
    /// As the operating system says.
    fn sync(&self, file: &File, _path: &Path) -> io::Result<()> {
        file.sync_data()
    }

    /// Cuts a file back after an append that failed.
    ///
    /// # Errors
    /// As the operating system says.
    fn truncate(&self, file: &File, len: u64) -> io::Result<()>;

    /// Renames a file or directory and syncs the parent of the new name.
    ///
    /// # Errors
    /// As the operating system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
}

/// The real file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsDisk;

impl Disk for OsDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        let missing = missing_dirs(path);
        builder.create(path)?;
        // A file that is synced is lost with the directory it is in.
        missing
            .iter()
            .filter_map(|dir| dir.parent())
            .try_for_each(sync_dir)
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn append(&self, file: &mut File, _path: &Path, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn truncate(&self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        match to.parent() {
            Some(parent) => sync_dir(parent),
            None => Ok(()),
        }
    }
}

/// Those of a directory and its parents that are not there, outermost first.
fn missing_dirs(path: &Path) -> Vec<PathBuf> {
    // A relative path ends at its first name, whose parent has no name.
    let Ok(path) = std::path::absolute(path) else {
        return Vec::new();
    };
    let mut missing: Vec<PathBuf> = path
        .ancestors()
        .take_while(|dir| !dir.exists())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    missing
}

/// What tells that a file was replaced: when it was written and how long it is; `None` if it is not there.
pub(crate) type Stamp = Option<(SystemTime, u64)>;

/// The stamp of a file.
pub(crate) fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

/// Makes the entries of a directory durable. Windows has no such call and needs none.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    // The parent of a single relative name.
    let path = match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    };
    if cfg!(unix) {
        File::open(path)?.sync_all()
    } else {
        Ok(())
    }
}

/// Reads a whole file.
pub(crate) fn read_file(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    disk.open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces a small private file in one step.
pub(crate) fn write_private(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temp = path.as_os_str().to_owned();
    temp.push(".tmp");
    let temp = Path::new(&temp);
    disk.write_new(temp, bytes)
        .and_then(|()| disk.rename(temp, path))
        .map_err(|source| Error::io("write", path, source))
}

/// Takes a file or directory away from everybody but its owner. Windows inherits the access rights
/// of the user's profile instead.
pub(crate) fn set_private(path: &Path, mode: u32) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    #[cfg(not(unix))]
    let _ = (path, mode);
    Ok(())
}

/// Creates a file for its owner alone, unless it is there; one that is there is closed to others.
pub(crate) fn create_private_file(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?;
    set_private(path, 0o600)
}

/// Creates a directory and its parents.
pub(crate) fn create_dir(disk: &dyn Disk, path: &Path) -> Result<()> {
    disk.create_dir_all(path)
        .map_err(|source| Error::io("create", path, source))
}

/// Removes a directory tree; one that is not there is fine.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_of_a_single_name_is_the_working_directory() {
        let parent = Path::new("name").parent().unwrap();

        sync_dir(parent).unwrap();
    }

    #[test]
    fn the_directories_that_are_made_are_known_from_the_outermost_on() {
        let root = tempfile::tempdir().unwrap();
        let (a, ab) = (root.path().join("a"), root.path().join("a/b"));

        assert_eq!(missing_dirs(&ab), [a.clone(), ab.clone()]);
        OsDisk.create_dir_all(&a).unwrap();
        assert_eq!(missing_dirs(&ab), std::slice::from_ref(&ab));
        OsDisk.create_dir_all(&ab).unwrap();
        assert!(missing_dirs(&ab).is_empty());
        OsDisk.create_dir_all(&ab).unwrap();
    }
}
