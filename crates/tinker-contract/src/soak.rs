//! Mixed traffic for hours, and whether the server that bears it stays as it is.
//!
//! [`traffic`] is what the clients do, one kind of client per file below it; [`gauge`] looks at the
//! server's process; [`verdict`] decides whether it grew. This file keeps the clients at work.

pub mod gauge;
pub mod traffic;
pub mod verdict;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tinker_api::{ModelInput, SampleOptions, SamplingSource};
use tokio::task::JoinSet;

use traffic::{Client, Kind};

/// Errors that are kept with their text.
const MAX_TEXTS: usize = 20;

/// Where a server is, how to enter it, and what it has.
#[derive(Debug, Clone)]
pub struct Place {
    /// Without a trailing slash.
    pub base_url: String,
    /// The key it asks for.
    pub api_key: String,
    /// A base model with a chat format.
    pub base_model: String,
    /// Size of its vocabulary.
    pub n_tokens: u32,
}

/// What the clients have done so far.
#[derive(Debug, Default)]
pub struct Tally(Mutex<Counts>);

/// What was counted.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Rounds that ended well, by kind of client.
    pub rounds: BTreeMap<&'static str, u64>,
    /// What went wrong, the first of it, with its kind of client.
    pub errors: Vec<String>,
    /// How much went wrong.
    pub n_errors: u64,
    /// Times of single samples since they were taken last.
    pub latencies: Vec<Duration>,
}

impl Tally {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the time of a sample.
    pub(crate) fn took(&self, time: Duration) {
        self.lock().latencies.push(time);
    }

    fn note(&self, kind: Kind, ended: Result<(), String>) {
        let mut counts = self.lock();
        match ended {
            Ok(()) => *counts.rounds.entry(kind.name()).or_default() += 1,
            Err(text) => {
                counts.n_errors += 1;
                if counts.errors.len() < MAX_TEXTS {
                    counts.errors.push(format!("{}: {text}", kind.name()));
                }
            }
        }
    }

    /// What was counted, with the times since this was called last.
    #[must_use]
    pub fn take(&self) -> Counts {
        let mut counts = self.lock();
        let latencies = std::mem::take(&mut counts.latencies);
        Counts {
            latencies,
            ..counts.clone()
        }
    }
}

/// Lets every kind of client do `n_rounds` at once, without a pause. What they do follows from `seed`.
///
/// # Panics
/// If a client panics.
pub async fn rounds(place: &Place, seed: u64, n_rounds: u32) -> Counts {
    let tally = Arc::<Tally>::default();
    let mut clients = JoinSet::new();
    for (kind, seed) in Kind::all().into_iter().zip(seed..) {
        let tally = Arc::clone(&tally);
        let mut client = Client::new(kind, place.clone(), seed);
        clients.spawn(async move {
            for _ in 0..n_rounds {
                let ended = client.round(&tally).await;
                tally.note(kind, ended);
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.expect("a client that does not panic");
    }
    tally.take()
}

/// Prompts and tokens of each that fill the cache of prompts of a small model (256 MiB).
const FILL: (u32, usize) = (200, 900);

/// Fills the caches, so that what grows later is no cache.
///
/// # Errors
/// If a sample fails.
pub async fn fill_caches(place: &Place) -> Result<(), tinker_api::Error> {
    let service = crate::target::service(&place.base_url, &place.api_key);
    let source = SamplingSource::BaseModel(place.base_model.clone());
    let sampler = service.create_sampling_client(source).await?;
    for number in 0..FILL.0 {
        let prompt = ModelInput::from_tokens(crate::suite::tokens(number, FILL.1));
        let params = traffic::params(1);
        sampler
            .sample(prompt, params, SampleOptions::default())
            .await?;
    }
    Ok(())
}

/// Keeps every kind of client at work until the end, each at its pace. What they do follows from
/// `seed`; the tasks end when the set is dropped.
#[must_use]
pub fn keep_busy(place: &Place, seed: u64, until: Instant, tally: &Arc<Tally>) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for (kind, seed) in Kind::all().into_iter().zip(seed..) {
        let tally = Arc::clone(tally);
        let mut client = Client::new(kind, place.clone(), seed);
        clients.spawn(async move {
            while Instant::now() < until {
                let begun = Instant::now();
                let ended = client.round(&tally).await;
                tally.note(kind, ended);
                // As much rest at least as work: a slow machine is not driven to its limit.
                let rest = kind.every().saturating_sub(begun.elapsed());
                tokio::time::sleep(rest.max(begun.elapsed())).await;
            }
        });
    }
    clients
}
