//! Runs, checkpoints and sessions through the library: creating, saving, loading and listing.

use std::time::Duration;

use serde_json::{Value, json};
use tinker_api::{
    AdamParams, Error, FinishReason, LoraConfig, Page, SamplerKind, SaveOptions, ServiceClient,
    StateOptions, TinkerPath,
};
use tinker_contract::mock::{Mock, failed, json as reply, try_again};
use tinker_types::{
    CREATE_MODEL, CREATE_SAMPLING_SESSION, CREATE_SESSION, LOAD_WEIGHTS, RETRIEVE_FUTURE,
    SAVE_WEIGHTS, SAVE_WEIGHTS_FOR_SAMPLER, TRAINING_RUNS,
};

use crate::support::{KEY, service, trainer};

fn client(mock: &Mock) -> ServiceClient {
    service(&mock.base_url(), KEY).build().unwrap()
}

#[tokio::test]
async fn a_run_is_waited_for_until_it_exists() {
    let mock = Mock::start().await;
    mock.script(RETRIEVE_FUTURE, vec![try_again(408, json!({})); 3]);

    let trainer = client(&mock)
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();

    assert_eq!(trainer.training_run_id().as_str(), "S1:train:0");
    assert_eq!(trainer.base_model(), Some("test/base"));
    let request = mock.seen_at(CREATE_MODEL)[0].json();
    assert_eq!(request["optimizer_config"], json!({ "type": "adamw" }));
    assert_eq!(
        request["lora_config"],
        json!({ "rank": 32, "train_unembed": true, "train_mlp": true, "train_attn": true })
    );
    assert_eq!(mock.seen_at(RETRIEVE_FUTURE).len(), 4);
}

#[tokio::test]
async fn a_run_that_cannot_be_created_says_why() {
    let mock = Mock::start().await;
    mock.script(
        RETRIEVE_FUTURE,
        [failed("base model \"no/such\" is unknown", "user")],
    );

    let error = client(&mock)
        .create_lora_training_client("no/such", LoraConfig::default())
        .await
        .unwrap_err();

    assert!(error.is_user_error());
    assert!(
        error
            .to_string()
            .contains("base model \"no/such\" is unknown"),
        "{error}"
    );
}

#[tokio::test]
async fn an_adapter_that_trains_nothing_is_refused_here() {
    let mock = Mock::start().await;
    let nothing = LoraConfig {
        train_attn: false,
        train_mlp: false,
        train_unembed: false,
        ..LoraConfig::default()
    };

    for lora in [
        nothing,
        LoraConfig {
            rank: 0,
            ..LoraConfig::default()
        },
    ] {
        let error = client(&mock)
            .create_lora_training_client("test/base", lora)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::InvalidRequest(_)), "{error}");
    }

    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn one_session_is_opened_for_everything_and_runs_are_numbered() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let path: TinkerPath = "tinker://S0:train:0/weights/a".parse().unwrap();

    let (a, b, c) = tokio::join!(
        service.create_lora_training_client("test/base", LoraConfig::default()),
        service.create_lora_training_client("test/base", LoraConfig::default()),
        service.create_training_client_from_state(&path, StateOptions::default()),
    );

    let mut ids = [a, b, c].map(|client| client.unwrap().training_run_id().to_string());
    ids.sort();
    assert_eq!(ids, ["S1:train:0", "S1:train:1", "S1:train:2"]);
    assert_eq!(mock.seen_at(CREATE_SESSION).len(), 1);
}

#[tokio::test]
async fn state_is_loaded_with_or_without_its_optimizer() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let path: TinkerPath = "tinker://S0:train:0/weights/a".parse().unwrap();

    let options = StateOptions::default;
    service
        .create_training_client_from_state(&path, options())
        .await
        .unwrap();
    service
        .create_training_client_from_state_with_optimizer(&path, options())
        .await
        .unwrap();

    let seen = mock.seen_at(LOAD_WEIGHTS);
    let fields = |i: usize| {
        let body = seen[i].json();
        [
            &body["optimizer"],
            &body["session_id"],
            &body["model_seq_id"],
            &body["model_id"],
        ]
        .map(Value::clone)
    };
    assert_eq!(
        fields(0),
        [json!(false), json!("S1"), json!(0), Value::Null]
    );
    assert_eq!(fields(1), [json!(true), json!("S1"), json!(1), Value::Null]);
    assert_eq!(seen[1].json()["path"], "tinker://S0:train:0/weights/a");
}

#[tokio::test]
async fn a_path_of_the_wrong_kind_names_its_twin_and_sends_nothing() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let state: TinkerPath = "tinker://r/weights/a".parse().unwrap();
    let sampler: TinkerPath = "tinker://r/sampler_weights/a".parse().unwrap();

    let of_sampler = service.create_sampling_client(&state).await.unwrap_err();
    let of_state = service
        .create_training_client_from_state(&sampler, StateOptions::default())
        .await
        .unwrap_err();

    assert!(
        of_sampler
            .to_string()
            .contains("did you mean tinker://r/sampler_weights/a?")
    );
    assert!(
        of_state
            .to_string()
            .contains("did you mean tinker://r/weights/a?")
    );
    assert!(
        mock.seen_at(CREATE_SAMPLING_SESSION).is_empty() && mock.seen_at(LOAD_WEIGHTS).is_empty()
    );
}

#[tokio::test]
async fn saving_is_an_operation_among_the_others() {
    let mock = Mock::start().await;
    let trainer = trainer(&mock).await;

    let step = trainer.optim_step(AdamParams::default());
    let options = SaveOptions {
        ttl: Some(Duration::from_secs(7200)),
        overwrite: true,
        user_metadata: Some([("note".to_owned(), "mine".to_owned())].into()),
    };
    let state = trainer.save_state("0001", options);
    let sampler = trainer.save_weights_for_sampler("final", SaveOptions::default());
    step.await.unwrap();

    assert_eq!(
        state.await.unwrap().to_string(),
        "tinker://S1:train:0/weights/0001"
    );
    assert_eq!(
        sampler.await.unwrap().to_string(),
        "tinker://S1:train:0/sampler_weights/final"
    );
    let body = mock.seen_at(SAVE_WEIGHTS)[0].json();
    assert_eq!(
        body,
        json!({
            "model_id": "S1:train:0", "path": "0001", "seq_id": 2, "ttl_seconds": 7200,
            "overwrite": true, "user_metadata": { "note": "mine" }, "type": "save_weights",
        })
    );
    let body = mock.seen_at(SAVE_WEIGHTS_FOR_SAMPLER)[0].json();
    assert_eq!(body["kind"], "snapshot");
    assert_eq!(
        (body["seq_id"].clone(), body.get("ttl_seconds")),
        (json!(3), None)
    );
}

#[tokio::test]
async fn samplers_of_one_session_have_different_numbers() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();
    let path: TinkerPath = "tinker://S0:train:0/sampler_weights/a".parse().unwrap();

    service.create_sampling_client(&path).await.unwrap();
    trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .await
        .unwrap();
    trainer.create_sampling_client(&path).await.unwrap();

    let number =
        |path: &str, i: usize| mock.seen_at(path)[i].json()["sampling_session_seq_id"].clone();
    assert_eq!(number(CREATE_SAMPLING_SESSION, 0), 0);
    assert_eq!(number(SAVE_WEIGHTS_FOR_SAMPLER, 0), 1);
    assert_eq!(number(CREATE_SAMPLING_SESSION, 1), 2);
    let save = mock.seen_at(SAVE_WEIGHTS_FOR_SAMPLER)[0].json();
    assert_eq!(save.get("path"), None, "an unnamed save has no path");
}

#[tokio::test]
async fn a_save_that_does_not_say_where_is_an_error() {
    let mock = Mock::start().await;
    let trainer = trainer(&mock).await;
    mock.script(RETRIEVE_FUTURE, [reply(200, &json!({ "path": null }))]);

    let error = trainer
        .save_weights_for_sampler("a", SaveOptions::default())
        .await
        .unwrap_err();

    assert!(matches!(error, Error::Protocol(_)), "{error}");
}

// Sessions and lists.

#[tokio::test]
async fn a_session_is_described_and_finished_once() {
    let mock = Mock::start().await;
    let service = service(&mock.base_url(), KEY)
        .display_name("demo")
        .project("proj-1".parse().unwrap())
        .tags(["b".into(), "a".into(), "b".into()])
        .user_metadata([("exp".to_owned(), json!(1))].into())
        .build()
        .unwrap();
    assert!(
        mock.seen().is_empty(),
        "nothing is sent before it is needed"
    );

    assert_eq!(service.session_id().await.unwrap().as_str(), "S1");
    service.close(FinishReason::Success, None).await.unwrap();
    service.close(FinishReason::Errored, None).await.unwrap();

    let body = mock.seen_at(CREATE_SESSION)[0].json();
    assert_eq!(
        body,
        json!({
            "tags": ["a", "b"], "user_metadata": { "exp": 1 }, "sdk_version": "0.38.0",
            "project_id": "proj-1", "display_name": "demo", "type": "create_session",
        })
    );
    let finished = mock.seen_at("/api/v1/sessions/S1/finish");
    assert_eq!(finished.len(), 1);
    assert_eq!(
        finished[0].json(),
        json!({ "reason": { "type": "success" }, "detail": null })
    );
}

#[tokio::test]
async fn closing_an_unused_client_sends_nothing() {
    let mock = Mock::start().await;

    client(&mock)
        .close(FinishReason::Success, None)
        .await
        .unwrap();

    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn looking_around_needs_no_session() {
    let mock = Mock::start().await;

    let page = Page {
        limit: 5,
        offset: 10,
    };
    client(&mock)
        .rest_client()
        .list_training_runs(page)
        .await
        .unwrap();

    assert!(mock.seen_at(CREATE_SESSION).is_empty());
    let seen = &mock.seen_at(TRAINING_RUNS)[0];
    assert_eq!(seen.query, "limit=5&offset=10&access_scope=owned");
}

/// A server with this many runs, asked for up to `limit`, is asked for these offsets and limits.
async fn check_pages(n_runs: u64, limit: Option<u64>, expected: &[&str]) {
    let mock = Mock::start().await;
    mock.answer(TRAINING_RUNS, move |seen| {
        let number = |name: &str| {
            let pair = seen.query.split('&').find_map(|p| p.strip_prefix(name));
            pair.unwrap().parse::<u64>().unwrap()
        };
        let (limit, offset) = (number("limit="), number("offset="));
        let rows: Vec<Value> = (offset..n_runs.min(offset + limit))
            .map(|i| {
                json!({
                    "training_run_id": format!("S1:train:{i}"), "base_model": "m",
                    "model_owner": "me", "is_lora": true, "last_request_time": "2026-01-01T00:00:00Z",
                })
            })
            .collect();
        let cursor = json!({ "offset": offset, "limit": limit, "total_count": n_runs });
        Some(reply(200, &json!({ "training_runs": rows, "cursor": cursor })))
    });

    let runs = client(&mock)
        .rest_client()
        .list_all_training_runs(limit)
        .await
        .unwrap();

    assert_eq!(runs.len() as u64, limit.unwrap_or(n_runs).min(n_runs));
    let asked: Vec<String> = mock
        .seen_at(TRAINING_RUNS)
        .into_iter()
        .map(|s| s.query)
        .collect();
    let expected: Vec<String> = expected
        .iter()
        .map(|page| format!("{page}&access_scope=owned"))
        .collect();
    assert_eq!(asked, expected);
}

#[tokio::test]
async fn lists_are_read_page_by_page() {
    check_pages(0, None, &["limit=100&offset=0"]).await;
    check_pages(130, None, &["limit=100&offset=0", "limit=100&offset=100"]).await;
    check_pages(130, Some(20), &["limit=20&offset=0"]).await;
    check_pages(
        300,
        Some(120),
        &["limit=100&offset=0", "limit=20&offset=100"],
    )
    .await;
}
