//! The runtime of the blocking clients, on a thread of its own.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::sync::mpsc;
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::submissions::Submissions;

/// Longest wait, after the last handle was dropped, for operations that are not sent yet.
const PATIENCE: Duration = Duration::from_secs(30);

thread_local! {
    /// Whether this thread belongs to the runtime of blocking clients.
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// A running runtime; it ends with its last user, once all that was submitted is sent.
#[derive(Debug)]
pub(super) struct Background {
    handle: Handle,
    thread_id: ThreadId,
    /// Taken when the last user is gone. The runtime is dropped by its thread: nowhere else may it
    /// be.
    running: Option<(oneshot::Sender<Submissions>, JoinHandle<()>)>,
    submissions: Submissions,
}

impl Background {
    /// Starts it. Before it ends, it waits for `submissions`.
    pub(super) fn start(submissions: Submissions) -> Result<Self> {
        Self::with_patience(submissions, PATIENCE)
    }

    fn with_patience(submissions: Submissions, patience: Duration) -> Result<Self> {
        let failed =
            |error: io::Error| Error::Abandoned(format!("no runtime could be started ({error})"));
        let (running, ended) = oneshot::channel();
        let (sender, started) = mpsc::channel();
        // Made and dropped there: within a runtime, such as the caller's, another one must not be
        // dropped.
        let work = move || match build() {
            Ok(runtime) => {
                sender.send(Ok(runtime.handle().clone())).ok();
                run(runtime, ended, patience);
            }
            Err(error) => {
                sender.send(Err(error)).ok();
            }
        };
        let thread = std::thread::Builder::new().name("tinker-api".to_owned());
        let thread = thread.spawn(work).map_err(failed)?;
        let handle = started
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("its thread ended at once")))
            .map_err(failed)?;
        Ok(Self {
            handle,
            thread_id: thread.thread().id(),
            running: Some((running, thread)),
            submissions,
        })
    }

    /// Blocks until the future ends.
    ///
    /// # Errors
    /// Those of the future; [`Error::InvalidRequest`] on the thread that has to run it.
    pub(super) fn wait_for<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        if std::thread::current().id() == self.thread_id {
            return Err(Error::InvalidRequest(
                "waiting in an observer of the client would never end, since its thread brings the \
                 results: hand the work to another thread"
                    .into(),
            ));
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        self.handle.spawn(async move {
            // Nobody waits any more if this fails.
            sender.send(future.await).ok();
        });
        let ended = |_| Err(Error::Abandoned("the future has panicked".into()));
        receiver.recv().unwrap_or_else(ended)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let Some((running, thread)) = self.running.take() else {
            return;
        };
        running.send(self.submissions.clone()).ok();
        // A thread of the runtime cannot wait for its end; that comes all the same.
        if !IS_OURS.get() && thread.join().is_err() {
            tracing::error!("the thread of the blocking clients panicked");
        }
    }
}

fn build() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .on_thread_start(|| IS_OURS.set(true))
        .build()
}

/// Runs tasks until the last user is gone and everything is sent, or has taken too long.
fn run(runtime: Runtime, ended: oneshot::Receiver<Submissions>, patience: Duration) {
    IS_OURS.set(true);
    runtime.block_on(async {
        let Ok(submissions) = ended.await else {
            return;
        };
        if tokio::time::timeout(patience, submissions.finished())
            .await
            .is_err()
        {
            tracing::error!(
                ?patience,
                "operations were not sent before the client ended: the server takes none"
            );
        }
    });
    // A loss that is still being computed is not waited for.
    runtime.shutdown_background();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_end_does_not_wait_for_ever() {
        let submissions = Submissions::default();
        let _never_sent = submissions.begin();
        let background = Background::with_patience(submissions, Duration::from_millis(1)).unwrap();

        drop(background);
    }

    #[test]
    fn it_can_end_on_its_own_thread() {
        let background = Background::start(Submissions::default()).unwrap();
        let (sender, receiver) = mpsc::channel();

        let handle = background.handle.clone();
        handle.spawn(async move {
            drop(background);
            sender.send(()).ok();
        });

        receiver.recv().unwrap();
    }
}
