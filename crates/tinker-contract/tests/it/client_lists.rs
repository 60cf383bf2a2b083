//! Looking at runs, checkpoints, sessions and samplers, as far as servers of today and tomorrow
//! describe them.

use serde_json::{Value, json};
use tinker_api::{ErrorKind, Page, RestClient, SamplingSource};
use tinker_contract::mock::{Mock, json as reply, refusal};
use tinker_http::AccessScope;
use tinker_types::{CHECKPOINTS, CREATE_SAMPLING_SESSION, SAMPLERS, SESSIONS, TRAINING_RUNS};

use crate::support::{KEY, service};

async fn rest() -> (Mock, RestClient) {
    let mock = Mock::start().await;
    let service = service(&mock.base_url(), KEY).build().unwrap();
    service.get_server_capabilities().await.unwrap();
    mock.forget();
    (mock, service.rest_client())
}

fn run(id: &str) -> Value {
    json!({
        "training_run_id": id, "base_model": "test/base", "model_owner": "me", "is_lora": true,
        "last_request_time": "2026-01-01T00:00:00Z",
    })
}

fn checkpoint(kind: &str) -> Value {
    json!({
        "checkpoint_id": "weights/a", "checkpoint_type": kind, "time": "2026-01-01T00:00:00Z",
        "tinker_path": "tinker://S1:train:0/weights/a",
    })
}

const PAGE: Page = Page {
    limit: 20,
    offset: 0,
};

#[tokio::test]
async fn a_run_of_few_words_is_described() {
    let (mock, rest) = rest().await;
    let path = format!("{TRAINING_RUNS}/S1:train:0");
    mock.script(&path, [reply(200, &run("S1:train:0"))]);

    let found = rest
        .get_training_run(&"S1:train:0".parse().unwrap())
        .await
        .unwrap();

    assert_eq!(found.base_model, "test/base");
    assert!(!found.corrupted && found.lora_rank.is_none());
    assert_eq!(mock.seen_at(&path).len(), 1, "colons are not escaped");
}

#[tokio::test]
async fn fields_of_tomorrow_are_ignored_in_lists() {
    let (mock, rest) = rest().await;
    let mut row = run("S1:train:0");
    row["hologram"] = json!({ "x": [1, null] });
    let page = json!({
        "training_runs": [row], "next": "abc",
        "cursor": { "offset": 0, "limit": 20, "total_count": 1, "opaque": true },
    });
    mock.script(TRAINING_RUNS, [reply(200, &page)]);

    let runs = rest.list_training_runs(PAGE).await.unwrap();

    assert_eq!(runs.training_runs.len(), 1);
}

#[tokio::test]
async fn a_list_that_lacks_its_rows_is_a_decode_error() {
    let (mock, rest) = rest().await;
    mock.script(TRAINING_RUNS, [reply(200, &json!({ "runs": [] }))]);

    let error = rest.list_training_runs(PAGE).await.unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::Decode), "{error}");
}

#[tokio::test]
async fn the_scope_and_the_project_of_a_list_are_asked_for() {
    let (mock, rest) = rest().await;
    let project = "proj-1".parse().unwrap();

    rest.list_training_runs(PAGE).await.unwrap();
    rest.list_training_runs_in(PAGE, AccessScope::Accessible, Some(&project))
        .await
        .unwrap();

    let seen = mock.seen_at(TRAINING_RUNS);
    assert!(
        seen[0].query.contains("access_scope=owned"),
        "{:?}",
        seen[0].query
    );
    assert!(!seen[0].query.contains("project_id"));
    assert!(seen[1].query.contains("access_scope=accessible"));
    assert!(seen[1].query.contains("project_id=proj-1"));
    assert!(
        seen.iter()
            .all(|seen| seen.query.contains("limit=20&offset=0"))
    );
}

#[tokio::test]
async fn a_list_of_checkpoints_needs_no_cursor() {
    let (mock, rest) = rest().await;
    let path = format!("{TRAINING_RUNS}/S1:train:0/checkpoints");
    let page = json!({ "checkpoints": [checkpoint("training")] });
    mock.script(&path, [reply(200, &page)]);

    let rows = rest
        .list_checkpoints(&"S1:train:0".parse().unwrap())
        .await
        .unwrap();

    assert_eq!(
        rows[0].tinker_path.to_string(),
        "tinker://S1:train:0/weights/a"
    );
}

#[tokio::test]
async fn a_checkpoint_is_deleted_by_its_path() {
    let (mock, rest) = rest().await;

    rest.delete_checkpoint(&"tinker://S1:train:0/sampler_weights/0001".parse().unwrap())
        .await
        .unwrap();

    let path = format!("{TRAINING_RUNS}/S1:train:0/checkpoints/sampler_weights/0001");
    assert_eq!(mock.seen_at(&path)[0].method, "DELETE");
}

#[tokio::test]
async fn what_is_not_there_is_told_with_its_name() {
    let (mock, rest) = rest().await;
    let missing = |path: &str| {
        let text = format!("there is no {path}");
        mock.script(path, [refusal(404, &text)]);
    };
    for path in [
        format!("{TRAINING_RUNS}/S9:train:0"),
        format!("{SESSIONS}/S9"),
        format!("{SAMPLERS}/S9:sample:0"),
    ] {
        missing(&path);
    }

    let errors = [
        rest.get_training_run(&"S9:train:0".parse().unwrap())
            .await
            .unwrap_err(),
        rest.get_session(&"S9".parse().unwrap()).await.unwrap_err(),
        rest.get_sampler(&"S9:sample:0".parse().unwrap())
            .await
            .unwrap_err(),
    ];

    for error in errors {
        assert_eq!(error.kind(), Some(&ErrorKind::NotFound), "{error}");
        assert!(error.to_string().contains("there is no"), "{error}");
    }
}

#[tokio::test]
async fn the_id_of_a_sampler_is_escaped_but_for_its_colons() {
    let (mock, rest) = rest().await;
    let path = format!("{SAMPLERS}/a:sample:0%2Fb%3Fc");
    let answer = json!({ "sampler_id": "x", "base_model": "test/base", "model_path": null });
    mock.script(&path, [reply(200, &answer)]);

    let sampler = rest
        .get_sampler(&"a:sample:0/b?c".parse().unwrap())
        .await
        .unwrap();

    assert_eq!(sampler.base_model, "test/base");
    assert_eq!(mock.seen_at(&path).len(), 1, "{:?}", mock.seen());
}

#[tokio::test]
async fn weights_are_described_in_full_or_in_brief() {
    let (mock, rest) = rest().await;
    let path = "tinker://S1:train:0/weights/a".parse().unwrap();
    let full = json!({
        "base_model": "test/base", "is_lora": true, "lora_rank": 8, "train_unembed": false,
        "train_mlp": true, "train_attn": true,
    });
    let brief = json!({ "base_model": "test/base", "is_lora": false });
    mock.script(
        tinker_types::WEIGHTS_INFO,
        [reply(200, &full), reply(200, &brief)],
    );

    let (full, brief) = (
        rest.get_weights_info_by_tinker_path(&path).await.unwrap(),
        rest.get_weights_info_by_tinker_path(&path).await.unwrap(),
    );

    assert_eq!((full.lora_rank, full.train_unembed), (Some(8), Some(false)));
    assert_eq!((brief.lora_rank, brief.train_unembed), (None, None));
    assert_eq!(
        mock.seen_at(tinker_types::WEIGHTS_INFO)[0].json(),
        json!({ "tinker_path": "tinker://S1:train:0/weights/a" })
    );
}

#[tokio::test]
async fn a_session_without_names_is_described() {
    let (mock, rest) = rest().await;
    let answer = json!({ "training_run_ids": ["S1:train:0"], "sampler_ids": [] });
    mock.script(&format!("{SESSIONS}/S1"), [reply(200, &answer)]);

    let session = rest.get_session(&"S1".parse().unwrap()).await.unwrap();

    assert_eq!(session.training_run_ids.len(), 1);
}

#[tokio::test]
async fn models_with_gaps_in_their_description_are_listed() {
    let (mock, rest) = rest().await;
    let answer = json!({ "supported_models": [
        {}, { "model_name": "a/b", "max_context_length": null, "trainable": false, "new": 1 },
    ] });
    mock.script(tinker_types::CAPABILITIES, [reply(200, &answer)]);

    let models = rest.get_server_capabilities().await.unwrap();

    assert_eq!(models.supported_models.len(), 2);
}

#[tokio::test]
async fn a_list_of_nothing_is_no_error() {
    let (mock, rest) = rest().await;

    assert!(rest.list_all_training_runs(None).await.unwrap().is_empty());
    assert!(
        rest.list_all_user_checkpoints(None)
            .await
            .unwrap()
            .is_empty()
    );

    assert_eq!(mock.seen_at(TRAINING_RUNS).len(), 1);
    assert_eq!(mock.seen_at(CHECKPOINTS).len(), 1);
}

#[tokio::test]
async fn a_list_to_a_limit_of_zero_asks_nothing() {
    let (mock, rest) = rest().await;

    assert!(
        rest.list_all_training_runs(Some(0))
            .await
            .unwrap()
            .is_empty()
    );

    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn a_total_that_lies_does_not_list_for_ever() {
    let (mock, rest) = rest().await;
    let page = json!({
        "training_runs": [], "cursor": { "offset": 0, "limit": 100, "total_count": 1_000_000 },
    });
    mock.answer(TRAINING_RUNS, move |_| Some(reply(200, &page)));

    assert!(rest.list_all_training_runs(None).await.unwrap().is_empty());

    assert_eq!(mock.seen_at(TRAINING_RUNS).len(), 1);
}

#[tokio::test]
async fn a_sampler_of_a_base_model_and_one_of_a_checkpoint_ask_for_one_of_both() {
    let mock = Mock::start().await;
    let service = service(&mock.base_url(), KEY).build().unwrap();
    let path: tinker_api::TinkerPath = "tinker://S0:train:0/sampler_weights/a".parse().unwrap();

    let base = SamplingSource::BaseModel("test/base".into());
    service.create_sampling_client(base).await.unwrap();
    service.create_sampling_client(&path).await.unwrap();

    let seen = mock.seen_at(CREATE_SAMPLING_SESSION);
    let body = |i: usize| seen[i].json();
    assert_eq!(body(0)["base_model"], "test/base");
    assert_eq!(body(0).get("model_path"), None);
    assert_eq!(body(1)["model_path"], path.to_string());
    assert_eq!(body(1).get("base_model"), None);
}
