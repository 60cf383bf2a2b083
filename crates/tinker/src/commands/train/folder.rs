//! Which run folder a training command means.

use std::path::{Path, PathBuf};

use jiff::Zoned;
use tinker_runs::{RunFolder, Runs};

use crate::context::Ctx;
use crate::failure::{Failure, Result};

/// The flags that name a run folder.
#[derive(Debug, Default, clap::Args)]
#[group(skip)]
pub(super) struct Flags {
    /// Name of the run, and of its folder [default: the data's name and the time]
    #[arg(long, value_name = "NAME", conflicts_with = "log_path")]
    run: Option<String>,
    /// Folder of the run, instead of one named by --run in the data directory
    #[arg(long, value_name = "DIR")]
    log_path: Option<PathBuf>,
}

impl Flags {
    /// The folder of a new run on `data`.
    ///
    /// # Errors
    /// The name is not one.
    pub(super) fn new_path(&self, ctx: &Ctx, data: &Path) -> Result<PathBuf> {
        match (&self.log_path, &self.run) {
            (Some(path), _) => Ok(path.clone()),
            (None, Some(name)) => Ok(runs(ctx).path_of(checked(name)?)),
            (None, None) => Ok(free_path(&runs(ctx), &default_name(data))),
        }
    }

    /// The folder to go on with, if it holds a run; the last written one if none is named.
    ///
    /// # Errors
    /// None is named and there are no runs.
    pub(super) fn existing(&self, ctx: &Ctx) -> Result<Option<RunFolder>> {
        let path = match (&self.log_path, &self.run) {
            (Some(path), _) => path.clone(),
            (None, Some(name)) => runs(ctx).path_of(checked(name)?),
            (None, None) => return Ok(Some(runs(ctx).find("@last")?.folder)),
        };
        Ok(RunFolder::open(path).ok())
    }
}

/// The run folders of the data directory.
pub(crate) fn runs(ctx: &Ctx) -> Runs {
    Runs::new(ctx.settings.home.join("runs"))
}

fn checked(name: &str) -> Result<&str> {
    let is_plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(is_plain) {
        return Err(Failure::usage(format!("run name `{name}` is not usable"))
            .hint("use letters, digits, `-`, `_` and `.`; --log-path takes any folder"));
    }
    Ok(name)
}

/// The folder `name`, or with a number after it if two runs begin in the same second.
fn free_path(runs: &Runs, name: &str) -> PathBuf {
    let mut path = runs.path_of(name);
    let mut n = 1;
    while path.exists() {
        n += 1;
        path = runs.path_of(&format!("{name}-{n}"));
    }
    path
}

/// As in `pirate-20261121-094512`.
fn default_name(data: &Path) -> String {
    let stem = data.file_stem().unwrap_or_default().to_string_lossy();
    let plain: String = stem
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || "-_".contains(c) {
                c
            } else {
                '-'
            }
        })
        .collect();
    format!("{plain}-{}", Zoned::now().strftime("%Y%m%d-%H%M%S"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_directory() {
        for bad in ["", "..", "../x", "a/b", ".hidden", "a b"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
        assert_eq!(checked("pirate-2.1_b").unwrap(), "pirate-2.1_b");
    }

    #[test]
    fn a_name_that_is_taken_gets_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::new(dir.path());
        let name = |n: &str| dir.path().join(n);

        assert_eq!(free_path(&runs, "a"), name("a"));
        std::fs::create_dir(name("a")).unwrap();
        std::fs::create_dir(name("a-2")).unwrap();
        assert_eq!(free_path(&runs, "a"), name("a-3"));
    }

    #[test]
    fn the_default_name_begins_with_the_data() {
        assert!(default_name(Path::new("a/my data.jsonl")).starts_with("my-data-2"));
    }
}
