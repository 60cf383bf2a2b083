//! Sends mutated requests to a server in this process: `fuzz SEED cases N` or `fuzz SEED minutes N`.
//!
//! Prints what was wrong with the case that showed it, and ends with a failure then.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test program fails by panicking and reports by printing"
)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use tinker_contract::fuzz::{Until, run, watch_for_panics};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().expect(what);
    let seed = next("a seed").parse().expect("a number");
    let (unit, number) = (next("cases or minutes"), next("how many"));
    let until = if unit == "cases" {
        Until::Cases(number.parse().expect("a number"))
    } else {
        let minutes: f64 = number.parse().expect("a number");
        Until::Time(Duration::from_secs_f64(60.0 * minutes))
    };
    watch_for_panics();
    let begun = Instant::now();
    let outcome = run(seed, until).await;
    for finding in &outcome.findings {
        println!("{finding}\n");
    }
    println!(
        "seed {seed}: {} cases, {:.0} per second, the most memory of one {} MB, answers {:?}",
        outcome.n_cases,
        outcome.n_cases as f64 / begun.elapsed().as_secs_f64(),
        outcome.most_growth >> 20,
        outcome.statuses
    );
    if outcome.findings.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
