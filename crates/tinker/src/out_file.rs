//! A file that a command writes its result to.

use std::path::Path;

use anyhow::Context as _;

use crate::failure::{Failure, Result};

/// Makes the directories above `file`, and finds out that it cannot be written, before a server is
/// asked for what it shall hold.
///
/// # Errors
/// It is a directory, or its own cannot be made.
pub(crate) fn prepare(file: &Path) -> Result<()> {
    let what = || format!("cannot write {}", file.display());
    if file.is_dir() {
        let what = format!("{}: it is a directory", what());
        return Err(Failure::usage(what).hint("name a file in it"));
    }
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).with_context(what)?;
    }
    Ok(())
}

/// Writes `text` to `file`.
///
/// # Errors
/// As the operating system says.
pub(crate) fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(())
}
