//! Keeps the embedded server there while a long command needs it.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use tinker_server::LockInfo;

use crate::failure::{Failure, FailureKind, Result};
use crate::local;
use crate::ui::Ui;

/// How often a server that keeps dying is started again within one command.
const MAX_RESTARTS: u32 = 5;
/// A server that was started again and answers after this long has stayed: one that dies of the
/// work it finds is gone by then.
const STAYS_AFTER: Duration = Duration::from_secs(1);

/// Looks after the embedded server.
///
/// A server that died is started again on its old port, with its old token: to the client it looks
/// like an outage, which its retries bridge. One that was told to leave is let go, and one that
/// took its place elsewhere with the same token is followed: the data directory has all that was
/// acknowledged.
#[derive(Debug)]
pub(crate) struct Keeper {
    home: PathBuf,
    server: LockInfo,
    ui: Ui,
    child: Option<Child>,
    restarts: Restarts,
}

impl Keeper {
    /// A keeper of `server`, the embedded server of `home`.
    pub(crate) fn new(home: &Path, server: &LockInfo, ui: &Ui) -> Self {
        Self {
            home: home.to_owned(),
            server: server.clone(),
            ui: ui.clone(),
            child: None,
            restarts: Restarts::default(),
        }
    }

    /// Starts the server again if it died, without waiting for it; returns the server if it has
    /// another address now.
    ///
    /// # Errors
    /// It was told to leave, another one with another token took its place, or it was started a few
    /// times and did not stay.
    pub(crate) fn look(&mut self) -> Result<Option<&LockInfo>> {
        if tinker_server::is_running(&self.home)? {
            return self.look_at_sign();
        }
        let was_told_to_leave = match &mut self.child {
            Some(child) => match child.try_wait() {
                Ok(None) => return Ok(None),
                Ok(Some(status)) => status.success(),
                Err(_) => false,
            },
            // A server that leaves takes its sign down; one that dies cannot.
            None => tinker_server::read_lock(&self.home)?.is_none(),
        };
        if was_told_to_leave {
            let what = "the embedded server was stopped while it was needed";
            return Err(Failure::new(FailureKind::General, what));
        }
        self.start_again()?;
        Ok(None)
    }

    /// Looks whether the server that runs is the one that is needed, and has stayed.
    fn look_at_sign(&mut self) -> Result<Option<&LockInfo>> {
        // One that starts has not put up its sign yet.
        let Some(sign) = tinker_server::read_lock(&self.home)? else {
            return Ok(None);
        };
        if sign.token != self.server.token {
            return Err(local::another_key(&sign));
        }
        if sign.base_url() != self.server.base_url() {
            return Ok(Some(self.follow(sign)));
        }
        if self.restarts.are_counted() && local::answers(&sign) {
            self.restarts.note_answer(Instant::now());
        }
        Ok(None)
    }

    /// Goes on with a server that somebody else started.
    fn follow(&mut self, sign: LockInfo) -> &LockInfo {
        self.ui.warn(format_args!(
            "the embedded server has moved to {}; going on there, nothing is lost",
            sign.base_url()
        ));
        self.child = None;
        self.restarts = Restarts::default();
        self.server = sign;
        &self.server
    }

    fn start_again(&mut self) -> Result<()> {
        if !self.restarts.may_start(Instant::now()) {
            let what = format!("the embedded server ended {MAX_RESTARTS} times in a row");
            let failure = Failure::new(FailureKind::General, what);
            return Err(local::with_log(failure, &self.home));
        }
        self.ui
            .warn("the embedded server has ended; starting it again, nothing is lost");
        self.child = Some(local::start(&self.home, Some(&self.server))?);
        Ok(())
    }
}

/// The starts since the server last stayed.
#[derive(Debug, Default)]
struct Restarts {
    n: u32,
    last: Option<Instant>,
}

impl Restarts {
    /// Counts a start at `now`, unless there were too many.
    fn may_start(&mut self, now: Instant) -> bool {
        if self.n == MAX_RESTARTS {
            return false;
        }
        self.n += 1;
        self.last = Some(now);
        true
    }

    fn are_counted(&self) -> bool {
        self.n > 0
    }

    /// Forgets the starts if the server, which answers at `now`, has stayed.
    fn note_answer(&mut self, now: Instant) {
        let has_stayed = |last| now.saturating_duration_since(last) > STAYS_AFTER;
        if self.last.is_some_and(has_stayed) {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Starts at `now` until no more are allowed; returns how many.
    fn start_all(restarts: &mut Restarts, now: Instant) -> u32 {
        let mut n = 0;
        while restarts.may_start(now) {
            n += 1;
        }
        n
    }

    #[test]
    fn a_server_that_stayed_is_started_as_often_again() {
        let began = Instant::now();
        let mut restarts = Restarts::default();
        assert_eq!(start_all(&mut restarts, began), MAX_RESTARTS);

        restarts.note_answer(began + STAYS_AFTER + Duration::from_millis(1));

        assert!(!restarts.are_counted());
        assert_eq!(start_all(&mut restarts, began), MAX_RESTARTS);
    }

    #[test]
    fn an_answer_before_it_stayed_changes_nothing() {
        let began = Instant::now();
        let mut restarts = Restarts::default();
        start_all(&mut restarts, began);

        restarts.note_answer(began + STAYS_AFTER);

        assert!(!restarts.may_start(began));
    }
}
