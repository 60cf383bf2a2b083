//! Every kind of client of the soak, a few rounds of each at once, and none of them finds anything wrong.

use tinker_contract::soak::traffic::Kind;
use tinker_contract::soak::{Place, rounds};
use tinker_contract::target::Target;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mixed_traffic_finds_nothing_wrong() {
    const N_ROUNDS: u32 = 16;
    let target = Target::start().await;
    let place = Place {
        base_url: target.base_url.clone(),
        api_key: target.api_key.clone(),
        base_model: "tinker/nano".to_owned(),
        n_tokens: 1024,
    };

    let counts = rounds(&place, 1, N_ROUNDS).await;

    assert_eq!(counts.errors, Vec::<String>::new());
    let n: u64 = counts.rounds.values().sum();
    assert_eq!(n, u64::from(N_ROUNDS) * Kind::all().len() as u64);
    target.stop().await;
}
