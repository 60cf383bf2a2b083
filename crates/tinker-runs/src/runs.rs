//! Finding run folders under a directory: by name, by unique prefix, or the newest.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::folder::{CHECKPOINTS, CONFIG, METRICS, RunFolder};
use crate::writer::is_locked;

/// Names the run that was written last.
const LAST: &str = "@last";
/// How many runs an error message lists.
const N_LISTED: usize = 5;

/// The run folders directly under one directory.
#[derive(Debug, Clone)]
pub struct Runs {
    root: PathBuf,
}

/// One run folder.
#[derive(Debug, Clone)]
pub struct RunEntry {
    /// The folder.
    pub folder: RunFolder,
    /// When one of its files was last written.
    pub modified_at: SystemTime,
    /// Whether a process writes it now.
    pub is_active: bool,
}

impl Runs {
    /// The runs under `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where the runs are.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder that a run called `name` would have.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Every run, last written first; none if the directory does not exist.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<RunEntry>> {
        let entries = match std::fs::read_dir(&self.root) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(Error::io("read", &self.root))?,
        };
        let mut runs = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &self.root))?;
            let folder = RunFolder::unchecked(entry.path());
            if folder.holds_run() {
                let modified_at = modified_at(&folder);
                let is_active = is_locked(folder.path());
                runs.push(RunEntry {
                    folder,
                    modified_at,
                    is_active,
                });
            }
        }
        runs.sort_by(|a, b| {
            b.modified_at
                .cmp(&a.modified_at)
                .then_with(|| b.folder.name().cmp(&a.folder.name()))
        });
        Ok(runs)
    }

    /// The run that `name` means: its exact name, `@last`, or a prefix that only it has.
    ///
    /// # Errors
    /// [`Error::UnknownRun`] if there is none, [`Error::AmbiguousRun`] if there are several.
    pub fn find(&self, name: &str) -> Result<RunEntry> {
        let mut runs = self.list()?;
        let exact = match name {
            LAST => (!runs.is_empty()).then_some(0),
            _ => runs.iter().position(|run| run.folder.name() == name),
        };
        if let Some(at) = exact {
            return Ok(runs.swap_remove(at));
        }
        let known = match runs.len() {
            0 => "there are no runs yet".to_owned(),
            _ => format!("newest: {}", names(&runs)),
        };
        let is_match = |run: &RunEntry| !name.is_empty() && run.folder.name().starts_with(name);
        runs.retain(is_match);
        match runs.len() {
            1 => Ok(runs.swap_remove(0)),
            0 => Err(Error::UnknownRun {
                name: name.to_owned(),
                root: self.root.clone(),
                known,
            }),
            _ => {
                let (root, matches) = (self.root.clone(), names(&runs));
                Err(Error::AmbiguousRun {
                    name: name.to_owned(),
                    root,
                    matches,
                })
            }
        }
    }
}

fn names(runs: &[RunEntry]) -> String {
    let mut names: Vec<String> = runs
        .iter()
        .take(N_LISTED)
        .map(|run| format!("`{}`", run.folder.name()))
        .collect();
    if runs.len() > N_LISTED {
        names.push(format!("and {} more", runs.len() - N_LISTED));
    }
    names.join(", ")
}

fn modified_at(folder: &RunFolder) -> SystemTime {
    [CONFIG, METRICS, CHECKPOINTS]
        .iter()
        .filter_map(|name| folder.path().join(name).metadata().ok()?.modified().ok())
        .max()
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
