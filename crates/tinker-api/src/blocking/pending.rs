//! The result of an operation that is already under way, to be waited for.

use std::sync::Arc;
use std::time::Duration;

use tinker_http::RequestType;

use super::Background;
use crate::api_future::ApiFuture;
use crate::error::Result;

/// A result to come; the blocking form of [`ApiFuture`], and dropped with the same effect.
#[derive(Debug)]
#[must_use = "the operation runs, but its result and its errors are lost"]
pub struct Pending<T> {
    future: ApiFuture<T>,
    background: Arc<Background>,
}

impl<T: Send + 'static> Pending<T> {
    pub(super) fn new(background: &Arc<Background>, future: ApiFuture<T>) -> Self {
        Self {
            future,
            background: Arc::clone(background),
        }
    }

    /// The operation.
    #[must_use]
    pub const fn operation(&self) -> RequestType {
        self.future.operation()
    }

    /// Blocks until the result is there.
    ///
    /// # Errors
    /// The operation's errors, and those of
    /// [`ServiceClient::wait_for`](super::ServiceClient::wait_for).
    pub fn wait(self) -> Result<T> {
        self.background.wait_for(self.future)
    }

    /// Blocks until the result is there, but no longer than `time`.
    ///
    /// # Errors
    /// The operation's errors, [`Error::TimedOut`](crate::Error::TimedOut), and those of
    /// [`ServiceClient::wait_for`](super::ServiceClient::wait_for).
    pub fn timeout(self, time: Duration) -> Result<T> {
        self.background.wait_for(self.future.timeout(time))
    }
}
