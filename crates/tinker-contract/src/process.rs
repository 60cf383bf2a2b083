//! What Linux says of a process from outside, and what its files take.

use std::fs;
use std::path::{Path, PathBuf};

/// A process by its files under `/proc`.
#[derive(Debug)]
pub(crate) struct Process(PathBuf);

impl Process {
    /// This one.
    pub(crate) fn own() -> Self {
        Self("/proc/self".into())
    }

    /// The one with this number.
    pub(crate) fn of(pid: u32) -> Self {
        Self(Path::new("/proc").join(pid.to_string()))
    }

    /// A figure of its status that is a number of kilobytes, such as `VmRSS`, in bytes.
    ///
    /// # Errors
    /// Names the file, or the figure that it lacks.
    pub(crate) fn memory(&self, name: &str) -> Result<u64, String> {
        Ok(1024 * self.status(name)?)
    }

    /// How many threads it has.
    ///
    /// # Errors
    /// As [`Self::memory`].
    pub(crate) fn threads(&self) -> Result<u64, String> {
        self.status("Threads")
    }

    /// How many file descriptors it has open.
    ///
    /// # Errors
    /// Names the directory.
    pub(crate) fn open_files(&self) -> Result<u64, String> {
        let dir = self.0.join("fd");
        let entries = fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(entries.count() as u64)
    }

    /// Processor time so far, seconds.
    ///
    /// # Errors
    /// Names the file.
    pub(crate) fn cpu_seconds(&self) -> Result<f64, String> {
        cpu_seconds(&self.read("stat")?).ok_or_else(|| "no processor time".to_owned())
    }

    /// The highest figures of its status are counted anew from now on.
    pub(crate) fn forget_peak(&self) {
        // Only Linux knows this; elsewhere memory is not judged.
        let _ = fs::write(self.0.join("clear_refs"), "5");
    }

    fn status(&self, name: &str) -> Result<u64, String> {
        let status = self.read("status")?;
        number_after(&status, &format!("{name}:")).ok_or_else(|| format!("no {name}"))
    }

    fn read(&self, file: &str) -> Result<String, String> {
        let path = self.0.join(file);
        fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
    }
}

/// Bytes of all files of a directory. They come and go meanwhile.
pub(crate) fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Time in user and kernel mode: fields 14 and 15 of `/proc/PID/stat`, in ticks of 10 ms.
fn cpu_seconds(stat: &str) -> Option<f64> {
    // The second field may have spaces, and ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) as f64 / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 3";

        assert_eq!(cpu_seconds(stat), Some(2.0));
    }

    #[test]
    fn a_directory_has_the_bytes_of_all_files_in_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("inner")).unwrap();
        fs::write(dir.path().join("a"), "12").unwrap();
        fs::write(dir.path().join("inner/b"), "345").unwrap();

        assert_eq!(size_of(dir.path()), 5);
        assert_eq!(size_of(&dir.path().join("gone")), 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_memory_threads_and_files() {
        let process = Process::own();

        assert!(process.memory("VmRSS").unwrap() > 1 << 16);
        assert!(process.threads().unwrap() >= 1 && process.open_files().unwrap() >= 3);
        assert_eq!(process.memory("VmNone"), Err("no VmNone".to_owned()));
    }
}
