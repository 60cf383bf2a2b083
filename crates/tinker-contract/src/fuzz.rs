//! Mutated requests, in this process: the server's router must answer each one, and stay as it is.
//!
//! `seeds` are the valid requests that it begins with, `mutate` changes them, `arena` is the server
//! that they are sent to. Everything follows from a seed.

mod arena;
mod decoders;
mod mutate;
mod seeds;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::chaos::weather::Draws;
use crate::process::Process;
use arena::Arena;
use mutate::mutated;
use seeds::{Seed, seeds};

/// Cases that a server takes before the next one starts with an empty data directory.
const CASES_PER_ARENA: u64 = 1500;
/// Longest that an answer may take; all polls are held for less.
const PATIENCE: Duration = Duration::from_secs(30);
/// Memory that one case may take. The largest body has 16 MiB here.
const MAX_GROWTH: u64 = 400 << 20;

/// How long to go on.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// So many cases.
    Cases(u64),
    /// So long.
    Time(Duration),
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Cases that were tried.
    pub n_cases: u64,
    /// Answers by their status.
    pub statuses: std::collections::BTreeMap<u16, u64>,
    /// What was wrong, with the case that showed it.
    pub findings: Vec<String>,
    /// The most memory that a case took, bytes; 0 where the system does not say.
    pub most_growth: u64,
}

/// Panics of this process, with their places.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes panics of all threads from now on instead of printing them.
pub fn watch_for_panics() {
    std::panic::set_hook(Box::new(|info| {
        let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
        panics.push(info.to_string());
    }));
}

fn take_panics() -> Vec<String> {
    std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Sends mutations that follow from `seed`. Stops at the tenth finding.
///
/// # Panics
/// If the valid requests cannot be made.
pub async fn run(seed: u64, until: Until) -> Outcome {
    let mut draws = Draws::new(seed);
    let mut outcome = Outcome::default();
    mutate::prepare();
    let begun = Instant::now();
    let goes_on = |outcome: &Outcome| {
        outcome.findings.len() < 10
            && match until {
                Until::Cases(n) => outcome.n_cases < n,
                Until::Time(time) => begun.elapsed() < time,
            }
    };
    while goes_on(&outcome) {
        let mut arena = Arena::open().await;
        let seeds = seeds(&arena);
        for _ in 0..CASES_PER_ARENA {
            if !goes_on(&outcome) {
                break;
            }
            case(&mut arena, &seeds, &mut draws, &mut outcome).await;
        }
        arena.close().await;
    }
    outcome
}

async fn case(arena: &mut Arena, seeds: &[Vec<Seed>], draws: &mut Draws, outcome: &mut Outcome) {
    outcome.n_cases += 1;
    let number = outcome.n_cases;
    let before = memory("VmRSS");
    Process::own().forget_peak();
    let route = &seeds[draws.below(seeds.len() as u64) as usize];
    let seed = &route[draws.below(route.len() as u64) as usize];
    let request = mutated(seed, arena, draws);
    let told = request.to_string();
    let mut find = |what: String| {
        outcome
            .findings
            .push(format!("case {number}: {what}\n{told}"))
    };
    decoders::decode(&request);
    match tokio::time::timeout(PATIENCE, arena.send(request)).await {
        Err(_) => find("no answer in time".to_owned()),
        Ok(None) => {}
        Ok(Some(answer)) => {
            if answer.is_fault() {
                find(format!("{} {}", answer.status, answer.text()));
            }
            *outcome.statuses.entry(answer.status).or_default() += 1;
        }
    }
    let mut find = |what: String| {
        outcome
            .findings
            .push(format!("case {number}: {what}\n{told}"))
    };
    for panic in take_panics() {
        find(format!("panic: {panic}"));
    }
    let growth = memory("VmHWM").saturating_sub(before);
    outcome.most_growth = outcome.most_growth.max(growth);
    if growth > MAX_GROWTH {
        let text = format!("case {number}: it took {} MB\n{told}", growth >> 20);
        outcome.findings.push(text);
    }
}

/// A figure of this process in bytes, 0 where the system does not say.
fn memory(name: &str) -> u64 {
    Process::own().memory(name).unwrap_or(0)
}
