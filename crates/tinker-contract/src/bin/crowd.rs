//! Queues requests on thousands of samplers at once: `crowd URL KEY MODEL SAMPLERS EACH`.
//!
//! Prints one JSON object: what went wrong, and seconds to the last result of the middle sampler and of
//! the slowest.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test program fails by panicking and reports by printing"
)]

use serde_json::json;
use tinker_contract::crowd::gather;
use tinker_contract::soak::Place;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| arguments.next().expect(what);
    let place = Place {
        base_url: next("a base URL"),
        api_key: next("a key"),
        base_model: next("a base model"),
        n_tokens: 0,
    };
    let n_samplers = next("samplers").parse().expect("a number");
    let n_each = next("requests of each").parse().expect("a number");
    let crowd = gather(&place, n_samplers, n_each).await;
    let report = json!({
        "n_errors": crowd.errors.len(),
        "errors": crowd.errors.iter().take(5).collect::<Vec<_>>(),
        "median": crowd.median().as_secs_f64(),
        "longest": crowd.longest().as_secs_f64(),
    });
    println!("{report}");
}
