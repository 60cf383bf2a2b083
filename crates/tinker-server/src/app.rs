//! The state that all requests share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::token::ApiToken;

/// Everything a handler needs.
#[derive(Debug)]
pub(crate) struct App {
    token: ApiToken,
    born: Instant,
    last_request_ms: AtomicU64,
}

impl App {
    pub(crate) fn new(token: ApiToken) -> Self {
        Self {
            token,
            born: Instant::now(),
            last_request_ms: AtomicU64::new(0),
        }
    }

    pub(crate) const fn token(&self) -> &ApiToken {
        &self.token
    }

    /// Notes that somebody is there.
    pub(crate) fn touch(&self) {
        let now = self.born.elapsed().as_millis() as u64;
        self.last_request_ms.fetch_max(now, Ordering::Relaxed);
    }

    /// Time since the last request.
    pub(crate) fn idle_for(&self) -> std::time::Duration {
        let last = std::time::Duration::from_millis(self.last_request_ms.load(Ordering::Relaxed));
        self.born.elapsed().saturating_sub(last)
    }
}
