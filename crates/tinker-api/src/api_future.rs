//! The result of an operation that is already under way.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tinker_http::RequestType;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::error::{Error, Result};

/// A result to come. The operation runs whether or not this is awaited.
///
/// Dropping it: a training operation is still submitted, since later ones count on its place, and
/// its result is not asked for; a sample is given up.
#[derive(Debug)]
#[must_use = "the operation runs, but its result and its errors are lost"]
pub struct ApiFuture<T> {
    operation: RequestType,
    result: oneshot::Receiver<Result<T>>,
    abort_on_drop: Option<AbortHandle>,
}

/// Where the result is put.
pub(crate) type Promise<T> = oneshot::Sender<Result<T>>;

impl<T> ApiFuture<T> {
    pub(crate) fn new(operation: RequestType) -> (Promise<T>, Self) {
        let (promise, result) = oneshot::channel();
        let future = Self {
            operation,
            result,
            abort_on_drop: None,
        };
        (promise, future)
    }

    /// An operation that was refused before it began.
    pub(crate) fn refused(operation: RequestType, error: Error) -> Self {
        let (promise, future) = Self::new(operation);
        // The receiver is in hand, so this cannot fail.
        promise.send(Err(error)).ok();
        future
    }

    pub(crate) fn aborting(mut self, task: AbortHandle) -> Self {
        self.abort_on_drop = Some(task);
        self
    }

    /// The operation.
    #[must_use]
    pub const fn operation(&self) -> RequestType {
        self.operation
    }

    /// Waits for the result, but no longer than `time`.
    ///
    /// # Errors
    /// The operation's errors, or [`Error::TimedOut`]; [`Error::InvalidRequest`] outside of a tokio
    /// runtime.
    pub async fn timeout(self, time: Duration) -> Result<T> {
        // There is no clock without one.
        if Handle::try_current().is_err() {
            return Err(Error::InvalidRequest(
                "waiting for some time needs a tokio runtime: await it from within one".into(),
            ));
        }
        let operation = self.operation;
        match tokio::time::timeout(time, self).await {
            Ok(result) => result,
            Err(_) => Err(Error::TimedOut {
                operation,
                after: time,
            }),
        }
    }
}

impl<T> Future for ApiFuture<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let operation = self.operation;
        Pin::new(&mut self.result).poll(cx).map(|received| {
            received.unwrap_or_else(|_| {
                Err(Error::Abandoned(format!(
                    "nothing brings the result of {operation} any more: its task has ended without \
                     one, or with its runtime"
                )))
            })
        })
    }
}

impl<T> Drop for ApiFuture<T> {
    fn drop(&mut self) {
        if let Some(task) = &self.abort_on_drop {
            task.abort();
        }
    }
}
