//! Being asked to stop: Ctrl-C, and the signal to terminate where there is one.

use anyhow::Context as _;

use crate::failure::Result;

/// Requests to stop, in the order they come.
#[cfg(unix)]
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Interrupts {
    /// Watches from now on; the process is not ended by these signals any more.
    ///
    /// # Errors
    /// The system does not allow it.
    pub(crate) fn watch() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("cannot watch for Ctrl-C")?,
            terminate: signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?,
        })
    }

    /// Completes at the next request.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Requests to stop, in the order they come.
#[cfg(not(unix))]
#[derive(Debug)]
pub(crate) struct Interrupts {}

#[cfg(not(unix))]
impl Interrupts {
    /// Watches from now on.
    ///
    /// # Errors
    /// Never.
    pub(crate) fn watch() -> Result<Self> {
        Ok(Self {})
    }

    /// Completes at the next request.
    pub(crate) async fn next(&mut self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}
