//! The kinds of clients, and the way a round of each goes.

mod plain;
mod sampling;
mod training;

use std::fmt::Display;
use std::time::Duration;

use tinker_api::ServiceClient;

pub(super) use sampling::params;

use super::{Place, Tally};
use crate::chaos::weather::Draws;
use crate::target::service;

/// What a client is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Trains an adapter of a rank, saves it in every way there is, and samples from it.
    Trains(u32),
    /// Samples from the base model, with prompts that share a beginning and some that do not.
    Samples,
    /// Makes samplers and drops them.
    MakesSamplers,
    /// Gives samples up.
    Cancels,
    /// Goes away while it waits for a result, and comes back for it.
    Disconnects,
    /// Speaks as OpenAI's and Anthropic's clients.
    SpeaksOtherApis,
    /// Asks for what cannot be.
    Errs,
    /// Opens a session, looks around, and ends it or falls silent.
    Visits,
}

impl Kind {
    /// Every kind.
    #[must_use]
    pub fn all() -> Vec<Self> {
        vec![
            Self::Trains(4),
            Self::Trains(8),
            Self::Trains(16),
            Self::Samples,
            Self::MakesSamplers,
            Self::Cancels,
            Self::Disconnects,
            Self::SpeaksOtherApis,
            Self::Errs,
            Self::Visits,
        ]
    }

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Trains(_) => "trains",
            Self::Samples => "samples",
            Self::MakesSamplers => "makes samplers",
            Self::Cancels => "cancels",
            Self::Disconnects => "disconnects",
            Self::SpeaksOtherApis => "other APIs",
            Self::Errs => "errs",
            Self::Visits => "visits",
        }
    }

    /// From the beginning of a round to that of the next, at least.
    pub(super) const fn every(self) -> Duration {
        Duration::from_millis(match self {
            Self::Trains(rank) => 1000 + 250 * rank as u64,
            Self::Samples => 350,
            Self::Cancels | Self::Disconnects | Self::SpeaksOtherApis => 1500,
            Self::Errs => 2000,
            Self::MakesSamplers => 5000,
            Self::Visits => 10_000,
        })
    }
}

/// A client at work.
#[derive(Debug)]
pub(super) struct Client {
    kind: Kind,
    place: Place,
    draws: Draws,
    n_done: u64,
    trainer: Option<training::Trainer>,
    sampler: Option<sampling::Sampler>,
}

impl Client {
    pub(super) fn new(kind: Kind, place: Place, seed: u64) -> Self {
        Self {
            kind,
            place,
            draws: Draws::new(seed),
            n_done: 0,
            trainer: None,
            sampler: None,
        }
    }

    /// Does what its kind does once; what went wrong, for people.
    pub(super) async fn round(&mut self, tally: &Tally) -> Result<(), String> {
        self.n_done += 1;
        match self.kind {
            Kind::Trains(rank) => self.train(rank).await,
            Kind::Samples => self.sample(tally).await,
            Kind::MakesSamplers => self.make_samplers().await,
            Kind::Cancels => self.cancel().await,
            Kind::Disconnects => self.disconnect().await,
            Kind::SpeaksOtherApis => self.speak_other_apis().await,
            Kind::Errs => self.err().await,
            Kind::Visits => self.visit().await,
        }
    }

    /// A client library with a session of its own.
    fn service(&self) -> ServiceClient {
        service(&self.place.base_url, &self.place.api_key)
    }

    /// Tokens that are no special ones of any small vocabulary.
    fn tokens(&mut self, n: usize) -> Vec<u32> {
        let n_tokens = u64::from(self.place.n_tokens - 16);
        std::iter::repeat_with(|| 8 + self.draws.below(n_tokens) as u32)
            .take(n)
            .collect()
    }
}

/// An error as it is told.
fn text(error: impl Display) -> String {
    error.to_string()
}

/// Says what is not as it must be.
fn demand(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}
