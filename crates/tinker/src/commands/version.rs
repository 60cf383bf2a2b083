//! `tinker version`: answers before anything else of the program is set up.

use serde_json::json;

use crate::output::Output;

/// Git commit of the build, or `unknown`.
const COMMIT: &str = env!("TINKER_COMMIT");
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Show the version and the commit it was built from
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Version and commit, as in `0.1.0 (3ef9ca1b752e)`.
pub(crate) const fn long() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("TINKER_COMMIT"), ")")
}

pub(crate) fn run() -> Output {
    let json = json!({ "version": VERSION, "commit": COMMIT });
    Output::text(format!("tinker {}", long()), json)
}
