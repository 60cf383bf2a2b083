//! The runtime of the blocking clients, on a thread of its own.

use std::future::Future;
use std::sync::mpsc;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// A running runtime; it ends with its last user.
#[derive(Debug)]
pub(super) struct Background {
    handle: Handle,
    /// Dropped, it lets the thread end. The runtime is dropped there: nowhere else may it be.
    _running: oneshot::Sender<()>,
}

impl Background {
    pub(super) fn start() -> Result<Self> {
        let failed = |error| Error::Stopped(format!("no runtime could be started ({error})"));
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let handle = runtime.handle().clone();
        let (running, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("tinker-api".to_owned())
            // An error says that the sender is gone.
            .spawn(move || runtime.block_on(ended).ok())
            .map_err(failed)?;
        Ok(Self {
            handle,
            _running: running,
        })
    }

    /// Calls `f` where tasks can be spawned.
    pub(super) fn enter<T>(&self, f: impl FnOnce() -> T) -> T {
        let _entered = self.handle.enter();
        f()
    }

    /// Blocks until the future ends.
    pub(super) fn wait_for<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.handle.spawn(async move {
            // Nobody waits any more if this fails.
            sender.send(future.await).ok();
        });
        let ended = |_| Err(Error::Stopped("the task has ended without a result".into()));
        receiver.recv().unwrap_or_else(ended)
    }
}
