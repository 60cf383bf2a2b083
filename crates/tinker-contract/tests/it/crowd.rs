//! Many samplers with requests in the queue: all are served.

use tinker_contract::crowd::gather;
use tinker_contract::soak::Place;
use tinker_contract::target::Target;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_samplers_with_ten_requests_each_are_served() {
    const N_SAMPLERS: usize = 200;
    let target = Target::start().await;
    let place = Place {
        base_url: target.base_url.clone(),
        api_key: target.api_key.clone(),
        base_model: target.base_model.clone(),
        n_tokens: 320,
    };

    let crowd = gather(&place, N_SAMPLERS, 10).await;

    assert_eq!(crowd.errors, Vec::<String>::new());
    assert_eq!(crowd.times.len(), N_SAMPLERS);
    println!("median {:?}, longest {:?}", crowd.median(), crowd.longest());
    target.stop().await;
}
