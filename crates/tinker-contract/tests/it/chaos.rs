//! A run under every fault at once ends with the same bytes as one that is left alone.

use futures_util::{StreamExt as _, stream};
use tinker_contract::chaos::{Programs, disturbed, faults_of, undisturbed};

/// Steps of a run.
const N_STEPS: u32 = 200;

/// Runs at once for each processor: they wait more than they compute.
const AT_ONCE: usize = 4;

/// Seeds that are tried; `cargo xtask chaos` asks for others by `TINKER_CHAOS_SEEDS`, as `FIRST+N`.
const SEEDS: (u64, u64) = (1, 3);

#[expect(clippy::disallowed_methods, reason = "longer runs ask for more seeds")]
fn seeds() -> std::ops::Range<u64> {
    let parse = |text: String| {
        let (first, n) = text.split_once('+').expect("FIRST+N");
        (
            first.parse().expect("a number"),
            n.parse().expect("a number"),
        )
    };
    let (first, n) = std::env::var("TINKER_CHAOS_SEEDS").map_or(SEEDS, parse);
    first..first + n
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_survives_every_fault_at_once_with_the_same_bytes() {
    let programs = Programs::copy(
        env!("CARGO_BIN_EXE_contract-server").as_ref(),
        env!("CARGO_BIN_EXE_chaos-client").as_ref(),
    );
    let quiet = undisturbed(&programs, N_STEPS).await;
    println!(
        "undisturbed: {:.1?}, files {:?}",
        quiet.time, quiet.trace.files
    );
    assert_eq!(quiet.trace.report.losses.len(), N_STEPS as usize);
    assert_eq!(quiet.wire.numbers["optim_step"].len(), N_STEPS as usize);
    let mut failed = Vec::new();
    let at_once = AT_ONCE * std::thread::available_parallelism().unwrap().get();

    let mut runs = stream::iter(seeds())
        .map(|seed| {
            let programs = programs.clone();
            tokio::spawn(async move { (seed, disturbed(&programs, N_STEPS, seed).await) })
        })
        .buffer_unordered(at_once);
    while let Some(run) = runs.next().await {
        let (seed, run) = run.unwrap();
        let n_faults: u64 = run.wire.faults.values().sum();
        println!(
            "seed {seed}: {:.1?}, {n_faults} faults of {} requests {:?}, {} kills of the server, {} \
             of the client",
            run.time, run.wire.n_requests, run.wire.faults, run.n_server_kills, run.n_client_kills,
        );
        for fault in faults_of(&run, &quiet) {
            println!("seed {seed}: {fault}");
            failed.push(seed);
        }
        assert!(n_faults * 6 > run.wire.n_requests, "too few faults");
        assert_eq!(
            (run.n_server_kills, run.n_client_kills),
            (N_STEPS / 50, N_STEPS / 70)
        );
    }

    assert!(
        failed.is_empty(),
        "seeds {failed:?} differ from the undisturbed run"
    );
}
