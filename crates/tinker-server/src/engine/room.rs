//! Memory for what begins: promised if it is there, made by giving up what is only kept for later, and waited for.
//!
//! Samples that wait have a line of their own, in which keys and their sessions take turns. Nobody overtakes: who asks
//! for much would wait as long as others ask for little. Operations rest in their queue; what they wait for is not
//! given to samples meanwhile.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use tinker_types::{RequestId, TrainingRunId};

use super::Worker;
use super::base::Base;
use crate::error::{Error, Result};
use crate::memory::{Ask, Promise, Purpose};
use crate::pending::session_of;
use crate::scheduler::{Line as _, Turns};

/// Samples that wait for memory. The time is the caller's.
#[derive(Debug, Default)]
pub(super) struct WaitingSamples {
    /// The one whose turn it is.
    first: Option<RequestId>,
    others: Turns<Turns<VecDeque<RequestId>>>,
    /// What was promised to work under way when it was tried last, and when it is tried again even if nothing ends.
    tried: Option<(u64, Instant)>,
}

impl WaitingSamples {
    /// Adds a sample of a key.
    pub(super) fn push(&mut self, id: RequestId, owner: &str) {
        let of_key = self.others.line(owner);
        of_key.line(session_of(id.as_str())).push_back(id);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none() && self.others.is_empty()
    }

    /// Takes the sample whose turn it is.
    fn take(&mut self) -> Option<RequestId> {
        self.first.take().or_else(|| self.others.take())
    }

    fn remove(&mut self, id: &RequestId) -> bool {
        if self.first.take_if(|first| first == id).is_some() {
            return true;
        }
        let mut was_there = false;
        self.others.keep(&mut |waiting| {
            was_there |= waiting == id;
            waiting != id
        });
        was_there
    }

    /// When it is tried again at the latest.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        let (_, at) = self.tried?;
        (!self.is_empty()).then_some(at)
    }

    /// Whether it is worth another try, with so much promised to work under way.
    fn is_due(&self, promised: u64, now: Instant) -> bool {
        self.tried
            .is_none_or(|(before, at)| before != promised || now >= at)
    }
}

impl Worker {
    /// Promises memory, if need be after giving up what is only kept for later.
    ///
    /// # Errors
    /// As [`crate::Memory`] says.
    pub(super) fn promise(&mut self, ask: &Ask<'_>) -> Result<Promise> {
        let memory = self.core.memory.clone();
        if let Ok(promise) = memory.promise(ask) {
            return Ok(promise);
        }
        self.note_held();
        let told = memory.promise(ask);
        // Others' caches do not go for what has no room without them either.
        if told.is_ok() || !memory.has_room(ask.purpose, ask.n_bytes) {
            return told;
        }
        let _freed = memory.freeing(|| self.free_kept());
        memory.promise(ask)
    }

    /// Says how much of what was promised is taken.
    pub(super) fn note_held(&self) {
        let samples: usize = self.bases.values().map(Base::sample_bytes).sum();
        let adapters = self.runs.values().filter_map(|active| {
            let base = self.bases.get(&active.base)?;
            Some(base.adapter_bytes(active.adapter))
        });
        let adapters: usize = adapters.sum();
        let kept: usize = self.bases.values().map(Base::kept_bytes).sum();
        let [samples, adapters, kept] = [samples, adapters, kept].map(|n_bytes| n_bytes as u64);
        self.core.memory.note_held(samples, adapters, kept);
    }

    /// Frees what would only save time later; returns how many bytes that were.
    fn free_kept(&mut self) -> u64 {
        let bases = self.bases.values_mut();
        bases.map(|base| base.free_kept() as u64).sum()
    }

    /// Keeps what an operation waits for from samples.
    pub(super) fn claim(&mut self, run: &TrainingRunId, why: &Error) {
        if let Error::AwaitsMemory { n_bytes, .. } = why {
            self.claims.insert(run.clone(), *n_bytes);
            self.note_claims();
        }
    }

    /// Gives up what was kept for an operation.
    pub(super) fn unclaim(&mut self, run: &TrainingRunId) {
        if self.claims.remove(run).is_some() {
            self.note_claims();
        }
    }

    fn note_claims(&self) {
        // They take it one after another.
        let largest = self.claims.values().max();
        let largest = largest.copied().unwrap_or(0);
        self.core.memory.note_claimed(largest);
    }

    /// Lines a sample up that there is no memory for now.
    pub(super) fn line_up(&mut self, id: &RequestId, why: String) {
        let owner = self.core.catalog.owner_of(session_of(id.as_str()));
        let owner = owner.as_ref().map_or("", |key| key.as_str());
        self.waiting.push(id.clone(), owner);
        self.tell_waiting(id, why);
    }

    fn tell_waiting(&self, id: &RequestId, why: String) {
        if self.core.held_samples().insert(id.clone(), why).is_none() {
            self.core.futures.nudge(id);
        }
    }

    /// Tries again what waits for memory, if some may have come free.
    pub(super) fn retry_waiting(&mut self, now: Instant) {
        if self.waiting.is_empty() && self.claims.is_empty() {
            return;
        }
        let promised = self.core.memory.promised_for_now();
        if !self.waiting.is_due(promised, now) {
            return;
        }
        self.note_held();
        for (run, n_bytes) in &self.claims {
            if self.core.memory.has_room(Purpose::Task, *n_bytes) {
                self.queue.rouse(run);
            }
        }
        while let Some(id) = self.waiting.take() {
            let started = self.guarded(|worker| worker.try_sample(&id));
            match started {
                Some(Err(Error::AwaitsMemory { message, .. })) => {
                    self.tell_waiting(&id, message);
                    self.waiting.first = Some(id);
                    break;
                }
                Some(outcome) => {
                    if !self.settle(&id, outcome) {
                        self.core.held_samples().remove(&id);
                    }
                }
                None => self.fail_sample(&id),
            }
        }
        let promised = self.core.memory.promised_for_now();
        let pause = self.core.limits.fault_pause;
        self.waiting.tried = Some((promised, now + pause));
    }

    /// Gives up a sample that waits for memory; false if it does not.
    pub(super) fn give_up_waiting(&mut self, id: &RequestId) -> bool {
        let was_there = self.waiting.remove(id);
        if was_there {
            self.core.held_samples().remove(id);
        }
        was_there
    }
}

/// The operations that wait for memory, and how many bytes each.
pub(super) type Claims = HashMap<TrainingRunId, u64>;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn line(samples: &[(&str, &str)]) -> WaitingSamples {
        let mut line = WaitingSamples::default();
        for (owner, id) in samples {
            line.push(id.parse().unwrap(), owner);
        }
        line
    }

    fn drained(mut line: WaitingSamples) -> Vec<String> {
        let ids = std::iter::from_fn(|| line.take());
        ids.map(|id| id.to_string()).collect()
    }

    #[test]
    fn keys_and_their_sessions_take_turns_however_much_each_asks_for() {
        let line = line(&[
            ("ann", "a:sample:0:op:0"),
            ("ann", "a:sample:0:op:1"),
            ("ann", "b:sample:0:op:0"),
            ("ben", "c:sample:0:op:0"),
            ("ben", "c:sample:0:op:1"),
        ]);

        let order = drained(line);

        let sessions: String = order.iter().map(|id| &id[..1]).collect();
        assert_eq!(sessions, "acbca");
    }

    #[test]
    fn one_that_was_given_up_is_not_taken() {
        let mut line = line(&[("", "a:sample:0:op:0"), ("", "a:sample:0:op:1")]);
        line.first = line.take();
        let ids = ["a:sample:0:op:0", "a:sample:0:op:1"].map(|id| id.parse().unwrap());

        for id in &ids {
            assert!(line.remove(id) && !line.remove(id));
        }

        assert!(line.is_empty() && line.take().is_none());
    }

    #[test]
    fn it_is_tried_again_when_something_ended_and_after_a_pause() {
        let (mut line, now) = (line(&[("", "a:sample:0:op:0")]), Instant::now());
        assert!(line.is_due(5, now) && line.next_wake().is_none());
        let pause = Duration::from_secs(1);

        line.tried = Some((5, now + pause));

        assert!(!line.is_due(5, now) && line.is_due(4, now) && line.is_due(5, now + pause));
        assert_eq!(line.next_wake(), Some(now + pause));
        line.take();
        assert_eq!(line.next_wake(), None, "nothing waits");
    }
}
