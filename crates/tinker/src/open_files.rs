//! How many files this process may have open: as many as the system allows without special rights.
//!
//! A shell gives its programs 1,024 or fewer, for the sake of old ones that count no further. Every
//! poll that a server holds takes one.

/// Raises the limit to the most that the system allows; leaves it where that fails.
#[cfg(unix)]
pub(crate) fn raise_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // macOS says that there is none and takes no more than this.
    let most = limit.maximum.unwrap_or(10_240);
    if limit.current.is_some_and(|current| current < most) {
        let raised = Rlimit {
            current: Some(most),
            ..limit
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, most, "cannot raise the limit of open files");
        }
    }
}

/// Other systems have no such limit.
#[cfg(not(unix))]
pub(crate) fn raise_limit() {}
