//! The program that the chaos suite kills: trains, saves and samples, with a ledger.
//!
//! Arguments: base URL, key, base model, ledger, steps. Prints a line for every step that is done
//! and, at the end, what came of the run. Ends with its standard input.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test program fails by panicking and reports by printing"
)]

use std::path::Path;

use tinker_contract::chaos::program;
use tinker_contract::target::end_with_parent;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    end_with_parent();
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().expect(what);
    let (base_url, api_key) = (next("a base URL"), next("a key"));
    let (model, ledger) = (next("a base model"), next("a ledger"));
    let n_steps = next("a number of steps").parse().expect("a number");
    let service = program::service(&base_url, &api_key, Path::new(&ledger));
    let report = program::train(&service, &model, n_steps, |step| println!("step {step}")).await;
    println!(
        "done {}",
        serde_json::to_string(&report).expect("plain data")
    );
}
