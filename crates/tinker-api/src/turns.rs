//! The order of a training run's operations, and the sequence numbers that carry it.
//!
//! A turn is taken when a method is called, so the order is that of the calls. A number is given
//! out when the turn comes: an operation that the server refused, or that was never sent, leaves
//! its number to the next one. An operation that may have arrived ends the sequence instead, since
//! neither its number nor the next one could be used safely.

use std::sync::{Mutex, PoisonError};

use tinker_http::RequestType;
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The server took it.
    Accepted,
    /// The server refused it, or it was not sent: its number is free.
    Refused,
    /// The name of a save is taken, perhaps by an attempt of its own whose answer was lost. Its
    /// number is free: a server that numbers saves would have known the attempt by it, and any other
    /// does not look at it.
    MaybeSaved,
    /// It may have arrived, or the server is lost.
    Unknown(String),
}

impl Fate {
    /// The fate of a request for `operation` whose submission ended so.
    pub(crate) fn of<T>(operation: RequestType, outcome: &Result<T, tinker_http::Error>) -> Self {
        let Err(error) = outcome else {
            return Self::Accepted;
        };
        match error.status() {
            Some(409) if is_save(operation) && error.may_have_been_taken() => Self::MaybeSaved,
            // Its name is taken, and no attempt can have taken it.
            Some(409) if is_save(operation) => Self::Refused,
            // The last attempt was refused; an earlier one may not have been.
            _ if error.may_have_arrived() => Self::Unknown(error.to_string()),
            Some(_) => Self::Refused,
            None if error.attempts() == 0 => Self::Refused,
            // A server that was not reached at all: what comes next may count on this operation.
            None => Self::Unknown(error.to_string()),
        }
    }
}

/// Whether an operation stores weights under a name, which another may have taken.
pub(crate) fn is_save(operation: RequestType) -> bool {
    matches!(
        operation,
        RequestType::SaveWeights
            | RequestType::SaveWeightsForSampler
            | RequestType::SaveWeightsExternal
    )
}

/// What one turn leaves to the next.
#[derive(Debug)]
enum Sequence {
    Next(u64),
    Broken(String),
}

/// The line of turns of one training client.
#[derive(Debug)]
pub(crate) struct Turns {
    tail: Mutex<oneshot::Receiver<Sequence>>,
}

impl Turns {
    /// A line whose first operation gets this number.
    pub(crate) fn starting_at(first: u64) -> Self {
        let (sender, tail) = oneshot::channel();
        // The receiver is in hand, so this cannot fail.
        sender.send(Sequence::Next(first)).ok();
        Self {
            tail: Mutex::new(tail),
        }
    }

    /// Takes the next turn.
    pub(crate) fn take(&self) -> Turn {
        let (after, tail) = oneshot::channel();
        let mut slot = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *slot, tail);
        Turn { before, after }
    }
}

/// A place in the line. Dropped unused, it breaks the sequence.
#[derive(Debug)]
pub(crate) struct Turn {
    before: oneshot::Receiver<Sequence>,
    after: oneshot::Sender<Sequence>,
}

impl Turn {
    /// Waits until all earlier operations are submitted.
    pub(crate) async fn begin(self) -> Result<OpenTurn> {
        let reason = match self.before.await {
            Ok(Sequence::Next(seq_id)) => {
                return Ok(OpenTurn {
                    seq_id,
                    after: Some(self.after),
                });
            }
            Ok(Sequence::Broken(reason)) => reason,
            Err(_) => "an earlier operation was abandoned".to_owned(),
        };
        self.after.send(Sequence::Broken(reason.clone())).ok();
        Err(Error::Stopped(reason))
    }
}

/// The turn whose time has come. Dropped without a word, it breaks the sequence.
#[derive(Debug)]
pub(crate) struct OpenTurn {
    seq_id: u64,
    after: Option<oneshot::Sender<Sequence>>,
}

impl OpenTurn {
    /// The number of its first request.
    pub(crate) const fn seq_id(&self) -> u64 {
        self.seq_id
    }

    /// Ends the turn, told of the fate of its requests in the order of their numbers.
    ///
    /// The next operation continues after those accepted, unless one may have arrived or one was
    /// accepted behind a gap.
    pub(crate) fn settle(mut self, operation: RequestType, fates: &[Fate]) {
        let is_accepted = |fate: &&Fate| **fate == Fate::Accepted;
        let n_accepted = fates.iter().take_while(is_accepted).count();
        let unknown = fates.iter().find_map(|fate| match fate {
            Fate::Unknown(reason) => Some(reason.as_str()),
            _ => None,
        });
        let has_gap = fates.iter().skip(n_accepted).any(|fate| is_accepted(&fate));
        let reason = match unknown {
            Some(reason) => reason,
            None if has_gap => "a part of it was refused",
            None => {
                self.leave(Sequence::Next(self.seq_id + n_accepted as u64));
                return;
            }
        };
        self.leave(Sequence::Broken(format!(
            "{operation} (seq_id {}) was sent in vain or in part: {reason}",
            self.seq_id
        )));
    }

    fn leave(&mut self, sequence: Sequence) {
        if let Some(after) = self.after.take() {
            after.send(sequence).ok();
        }
    }
}

impl Drop for OpenTurn {
    fn drop(&mut self) {
        self.leave(Sequence::Broken(format!(
            "operation {} was interrupted while it was sent",
            self.seq_id
        )));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> Fate {
        Fate::Unknown("lost".into())
    }

    async fn begin(turns: &Turns) -> OpenTurn {
        turns.take().begin().await.unwrap()
    }

    #[tokio::test]
    async fn turns_come_in_the_order_they_were_taken() {
        let turns = Turns::starting_at(1);
        let (first, second) = (turns.take(), turns.take());
        let second = tokio::spawn(async move { second.begin().await.map(|turn| turn.seq_id()) });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());

        let first = first.begin().await.unwrap();
        first.settle(RequestType::Forward, &[Fate::Accepted, Fate::Accepted]);

        assert_eq!(second.await.unwrap().unwrap(), 3);
    }

    /// Settles a turn that begins at 7; the next number, or none if the sequence is broken.
    async fn check(fates: &[Fate], expected: Option<u64>) {
        let turns = Turns::starting_at(7);
        begin(&turns).await.settle(RequestType::OptimStep, fates);

        let next = turns.take().begin().await.map(|turn| turn.seq_id()).ok();
        assert_eq!(next, expected, "{fates:?}");
    }

    #[tokio::test]
    async fn numbers_of_refused_requests_are_given_out_again() {
        use Fate::{Accepted, Refused};

        check(&[Accepted], Some(8)).await;
        check(&[Refused], Some(7)).await;
        check(&[Accepted, Refused], Some(8)).await;
        check(&[Refused, Refused], Some(7)).await;
        check(&[], Some(7)).await;
    }

    #[tokio::test]
    async fn gaps_and_lost_requests_break_the_sequence() {
        use Fate::{Accepted, Refused};

        check(&[lost()], None).await;
        check(&[Accepted, lost()], None).await;
        check(&[Refused, Accepted], None).await;
    }

    #[tokio::test]
    async fn a_broken_sequence_stops_everything_after_it_with_the_reason() {
        let turns = Turns::starting_at(1);
        let open = begin(&turns).await;
        let later = [turns.take(), turns.take()];

        open.settle(RequestType::OptimStep, &[lost()]);

        for turn in later {
            let message = turn.begin().await.unwrap_err().to_string();
            assert!(message.contains("OptimStep (seq_id 1)"), "{message}");
        }
    }

    #[tokio::test]
    async fn an_abandoned_turn_breaks_the_sequence() {
        let turns = Turns::starting_at(1);
        drop(turns.take());
        assert!(turns.take().begin().await.is_err());

        let turns = Turns::starting_at(1);
        drop(begin(&turns).await);
        assert!(turns.take().begin().await.is_err());
    }
}
