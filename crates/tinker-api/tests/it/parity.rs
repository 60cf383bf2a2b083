//! What the official clients do beside training and sampling: sharing, search, traces, exports.

use std::time::Duration;

use serde_json::{Value, json};
use tinker_api::{
    AccessScope, AuditEventType, CheckpointSearchRequest, CopyOptions, CustomLossGraph,
    CustomLossInput, DimuonParams, Error, ErrorKind, ExportOptions, Loss, LossFn, ModelInput, Page,
    SampleOptions, SamplingParams, SamplingSource, SessionSearchRequest, StateOptions, TensorData,
    TensorValues, TinkerPath,
};
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

use crate::support::*;

fn training() -> TinkerPath {
    "tinker://S1:train:0/weights/0001".parse().unwrap()
}

fn external() -> TinkerPath {
    "tinker://S1:train:0/external_weights/x1".parse().unwrap()
}

async fn serve(server: &MockServer, verb: &str, route: &str, answer: ResponseTemplate) {
    Mock::given(method(verb))
        .and(path(format!("/api/v1/{route}")))
        .respond_with(answer)
        .with_priority(1)
        .mount(server)
        .await;
}

async fn only(server: &MockServer, route: &str) -> Request {
    let mut requests = requests(server, route).await;
    assert_eq!(requests.len(), 1, "{route}");
    requests.remove(0)
}

async fn n_requests(server: &MockServer) -> usize {
    server.received_requests().await.unwrap().len()
}

#[tokio::test]
async fn a_copy_goes_to_the_project_of_the_client() {
    let server = server().await;
    let copied = json!({"tinker_path": "tinker://S9:train:0/weights/0001"});
    serve(&server, "POST", "copy_weights", ok(copied)).await;
    let service = builder(&server)
        .project("p1".parse().unwrap())
        .build()
        .unwrap();
    let options = CopyOptions {
        ttl: Some(Duration::from_secs(3600)),
        weights_access_token: Some("geheim".into()),
    };
    assert!(!format!("{options:?}").contains("geheim"));

    let copy = service.copy_weights(&training(), options).await.unwrap();

    assert_eq!(copy.to_string(), "tinker://S9:train:0/weights/0001");
    let sent = only(&server, "copy_weights").await;
    let token = sent.headers.get("x-tinker-weights-access-token");
    assert_eq!(token.unwrap(), "geheim");
    assert_eq!(
        body(&sent),
        json!({
            "source_path": "tinker://S1:train:0/weights/0001",
            "destination_project_id": "p1",
            "ttl_seconds": 3600,
        })
    );
    assert!(requests(&server, "create_session").await.is_empty());
}

#[tokio::test]
async fn a_copy_without_a_project_is_refused_before_anything_is_sent() {
    let server = server().await;

    let error = service(&server)
        .copy_weights(&training(), CopyOptions::default())
        .await
        .unwrap_err();

    assert!(
        error.to_string().starts_with("no project to copy to"),
        "{error}"
    );
    assert_eq!(n_requests(&server).await, 0);
}

#[tokio::test]
async fn sharing_and_lives_of_checkpoints_are_changed() {
    let server = server().await;
    let base = "training_runs/S1:train:0/checkpoints/weights/0001";
    for (verb, about) in [("POST", "publish"), ("DELETE", "publish"), ("PUT", "ttl")] {
        serve(
            &server,
            verb,
            &format!("{base}/{about}"),
            ResponseTemplate::new(204),
        )
        .await;
    }
    let rest = service(&server).rest_client();
    let (path, day) = (training(), Duration::from_secs(86_400));

    rest.publish_checkpoint_from_tinker_path(&path)
        .await
        .unwrap();
    rest.unpublish_checkpoint_from_tinker_path(&path)
        .await
        .unwrap();
    rest.set_checkpoint_ttl_from_tinker_path(&path, Some(day))
        .await
        .unwrap();
    rest.set_checkpoint_ttl_from_tinker_path(&path, None)
        .await
        .unwrap();
    let short = Some(Duration::from_secs(60));
    let error = rest.set_checkpoint_ttl_from_tinker_path(&path, short).await;

    let published: Vec<String> = requests(&server, &format!("{base}/publish"))
        .await
        .iter()
        .map(|request| request.method.to_string())
        .collect();
    assert_eq!(published, ["POST", "DELETE"]);
    let lives: Vec<Value> = requests(&server, &format!("{base}/ttl"))
        .await
        .iter()
        .map(body)
        .collect();
    assert_eq!(
        lives,
        [json!({"ttl_seconds": 86_400}), json!({"ttl_seconds": null})]
    );
    assert!(error.unwrap_err().to_string().contains("ttl of 60 seconds"));
}

#[tokio::test]
async fn files_are_asked_for_external_checkpoints_only() {
    let server = server().await;
    let route = "training_runs/S1:train:0/checkpoints/external_weights/x1/external_weights_urls";
    let urls = json!({"urls": {"a": "https://store/a?s=1"}, "expires": "2030-01-01T00:00:00Z"});
    serve(&server, "GET", route, ok(urls)).await;
    let rest = service(&server).rest_client();

    let files = rest.get_external_weights_urls(&external()).await.unwrap();
    let error = rest
        .get_external_weights_urls(&training())
        .await
        .unwrap_err();

    assert_eq!(files.urls["a"].expose(), "https://store/a?s=1");
    assert!(matches!(error, Error::WrongCheckpointKind { .. }));
    assert!(!format!("{files:?}").contains("s=1"));
}

#[tokio::test]
async fn runs_and_sessions_of_others_are_asked_for_by_scope() {
    let server = server().await;
    let run = json!({
        "training_run_id": "S1:train:0",
        "base_model": "m",
        "model_owner": "u",
        "is_lora": true,
        "last_request_time": "2026-01-01T00:00:00Z",
    });
    let session = json!({"training_run_ids": [], "sampler_ids": []});
    serve(&server, "GET", "training_runs/S1:train:0", ok(run)).await;
    serve(&server, "GET", "sessions/S1", ok(session)).await;
    serve(&server, "GET", "sessions", ok(json!({"sessions": ["S1"]}))).await;
    let rest = service(&server).rest_client();
    let all = AccessScope::Accessible;

    let run = rest.get_training_run_by_tinker_path(&training(), all).await;
    rest.get_session_in(&"S1".parse().unwrap(), all)
        .await
        .unwrap();
    let ids = rest.list_sessions_in(Page::first(5), all).await.unwrap();

    assert_eq!((run.unwrap().base_model.as_str(), ids.len()), ("m", 1));
    for route in ["training_runs/S1:train:0", "sessions/S1", "sessions"] {
        let query = only(&server, route).await.url.query().unwrap().to_owned();
        assert!(query.ends_with("access_scope=accessible"), "{query}");
    }
}

#[tokio::test]
async fn searches_out_of_range_are_refused_before_they_are_sent() {
    let server = server().await;
    let rest = service(&server).rest_client();
    let request = SessionSearchRequest::default;
    for (request, part) in [
        (
            SessionSearchRequest {
                limit: 201,
                ..request()
            },
            "limit 201: it must be 1 to 200",
        ),
        (
            SessionSearchRequest {
                display_name: Some(String::new()),
                ..request()
            },
            "display_name is empty",
        ),
        (
            SessionSearchRequest {
                statuses: Some(vec![]),
                ..request()
            },
            "statuses is empty",
        ),
    ] {
        let message = rest
            .search_sessions(&request)
            .await
            .unwrap_err()
            .to_string();
        assert!(message.contains(part), "{message}");
    }
    let request = CheckpointSearchRequest {
        limit: 0,
        ..Default::default()
    };
    assert!(rest.search_checkpoints(&request).await.is_err());
    assert_eq!(n_requests(&server).await, 0);
}

#[tokio::test]
async fn a_search_goes_on_where_the_last_page_ended() {
    let server = server().await;
    let cursor = json!({"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "S1"});
    let page = json!({"sessions": [], "next_cursor": cursor});
    serve(&server, "POST", "sessions/search", ok(page)).await;
    let rest = service(&server).rest_client();

    let first = rest
        .search_sessions(&SessionSearchRequest::default())
        .await
        .unwrap();
    let next = SessionSearchRequest {
        cursor: first.next_cursor,
        ..Default::default()
    };
    rest.search_sessions(&next).await.unwrap();

    let sent = requests(&server, "sessions/search").await;
    assert_eq!(body(&sent[0]).get("cursor"), None);
    assert_eq!(body(&sent[1])["cursor"], cursor);
}

#[tokio::test]
async fn a_trace_is_waited_for_and_its_failure_told() {
    let server = server().await;
    let route = "sessions/S1/trace_export";
    Mock::given(path(format!("/api/v1/{route}")))
        .respond_with(ok(json!({"status": "pending"})))
        .with_priority(1)
        .up_to_n_times(2)
        .mount(&server)
        .await;
    let ready = json!({"status": "ready", "url": "https://store/t?s=1"});
    serve(&server, "GET", route, ok(ready)).await;
    let failed = json!({"status": "failed", "error": "too large"});
    serve(&server, "GET", "sessions/S2/trace_export", ok(failed)).await;
    let rest = service(&server).rest_client();

    let url = rest
        .export_session_trace(&"S1".parse().unwrap())
        .await
        .unwrap();
    let error = rest
        .export_session_trace(&"S2".parse().unwrap())
        .await
        .unwrap_err();

    assert_eq!(url.expose(), "https://store/t?s=1");
    assert_eq!(requests(&server, route).await.len(), 3);
    assert_eq!(
        error.to_string(),
        "the trace of session S2 has failed: too large"
    );
}

#[tokio::test]
async fn a_session_is_assigned_to_a_project() {
    let server = server().await;
    let route = "sessions/S1/project";
    serve(&server, "PUT", route, ResponseTemplate::new(200)).await;
    let rest = service(&server).rest_client();

    rest.assign_session_project(&"S1".parse().unwrap(), &"p2".parse().unwrap())
        .await
        .unwrap();

    assert_eq!(
        body(&only(&server, route).await),
        json!({"project_id": "p2"})
    );
}

#[tokio::test]
async fn days_and_hours_are_checked_before_an_administrator_asks() {
    let server = server().await;
    serve(&server, "GET", "audit", ok(json!({"entries": []}))).await;
    serve(
        &server,
        "GET",
        "billing/usage/events",
        ok(json!({"data": []})),
    )
    .await;
    let current = "billing/usage/checkpoints/current";
    serve(&server, "GET", current, ok(json!({"data": []}))).await;
    let admin = service(&server).admin_client();
    let day = |day| admin.get_audit_log(AuditEventType::Projects, day);
    let (from, to) = ("2026-11-20T00:00:00Z", "2026-11-20T04:00:00Z");

    day(Some("2026-11-20")).await.unwrap();
    admin.get_billing_usage(from, to).await.unwrap();
    admin
        .get_current_checkpoint_storage_usage(None)
        .await
        .unwrap();
    for error in [
        day(Some("yesterday")).await.unwrap_err(),
        admin.get_billing_usage("2026-11-20", to).await.unwrap_err(),
        admin
            .get_billing_usage(from, "2026-11-20T04:30:00Z")
            .await
            .unwrap_err(),
        admin.get_billing_usage(to, from).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::InvalidRequest(_)), "{error}");
    }

    let asked = only(&server, "audit").await;
    assert_eq!(
        asked.url.query(),
        Some("event_type=projects&day=2026-11-20")
    );
    only(&server, "billing/usage/events").await;
    assert!(requests(&server, "create_session").await.is_empty());
}

#[tokio::test]
async fn weights_are_exported_in_their_turn() {
    let server = server().await;
    answer_with(
        &server,
        "save_weights_external",
        None,
        ok(json!({"request_id": "export-1"})),
    )
    .await;
    let saved = json!({"path": external().to_string(), "size_bytes": 5});
    let is_export = |request: &Request| body(request)["request_id"] == "export-1";
    Mock::given(path("/api/v1/retrieve_future"))
        .and(is_export)
        .respond_with(ok(saved))
        .with_priority(1)
        .mount(&server)
        .await;
    let trainer = trainer(&server).await;
    let options = ExportOptions {
        ttl: Some(Duration::from_secs(3600)),
        age_encryption_recipients: vec!["age1abc".into()],
    };

    let step = trainer.optim_step(DimuonParams::new(0.5));
    let path = trainer.save_weights_external("x1", options).await.unwrap();
    step.await.unwrap();

    assert_eq!(path, external());
    assert_eq!(
        body(&only(&server, "save_weights_external").await),
        json!({
            "model_id": "S1:train:0",
            "path": "x1",
            "seq_id": 2,
            "ttl_seconds": 3600,
            "age_encryption_recipients": ["age1abc"],
            "type": "save_weights_external",
        })
    );
    let step = body(&only(&server, "optim_step").await);
    assert_eq!(step.get("adam_params"), None);
    assert_eq!(
        step["optimizer_params"],
        json!({"type": "dimuon", "learning_rate": 0.5, "grad_clip_norm": 0.0, "beta1": 0.9})
    );
}

#[tokio::test]
async fn recipients_that_are_no_public_keys_are_refused_and_not_shown() {
    let server = server().await;
    let trainer = trainer(&server).await;
    let export = |recipients: Vec<String>| {
        let options = ExportOptions {
            age_encryption_recipients: recipients,
            ..Default::default()
        };
        trainer.save_weights_external("x1", options)
    };

    let secret = export(vec!["AGE-SECRET-KEY-1X".into()]).await.unwrap_err();
    let many = export(vec!["age1x".into(); 11]).await.unwrap_err();

    assert!(!secret.to_string().contains("SECRET"), "{secret}");
    assert_eq!(
        many.to_string(),
        "11 age recipients: at most 10 are possible"
    );
    assert!(requests(&server, "save_weights_external").await.is_empty());
}

#[tokio::test]
async fn state_is_loaded_into_a_run_in_its_turn() {
    let server = server().await;
    let trainer = trainer(&server).await;

    trainer
        .load_state_with_optimizer(&training(), None)
        .await
        .unwrap();
    let sampler = "tinker://S1:train:0/sampler_weights/0001".parse().unwrap();
    let wrong = trainer.load_state(&sampler, None).await.unwrap_err();

    assert!(matches!(wrong, Error::WrongCheckpointKind { .. }));
    assert_eq!(
        body(&only(&server, "load_weights").await),
        json!({
            "model_id": "S1:train:0",
            "seq_id": 1,
            "path": "tinker://S1:train:0/weights/0001",
            "optimizer": true,
            "type": "load_weights",
        })
    );
}

#[tokio::test]
async fn an_access_token_goes_along_when_a_run_is_made_of_somebody_elses_weights() {
    let server = server().await;
    let options = StateOptions {
        weights_access_token: Some("geheim".into()),
        ..StateOptions::default()
    };
    assert!(!format!("{options:?}").contains("geheim"));

    service(&server)
        .create_training_client_from_state(&training(), options)
        .await
        .unwrap();

    let sent = body(&only(&server, "load_weights").await);
    assert_eq!(sent["weights_access_token"], "geheim");
    assert_eq!(sent["session_id"], "S1");
}

fn graph() -> (Vec<CustomLossInput>, CustomLossGraph) {
    let input = CustomLossInput {
        name: "logprobs".into(),
        rank: 1,
    };
    (
        vec![input],
        CustomLossGraph {
            format: 1,
            nodes: vec![],
        },
    )
}

#[tokio::test]
async fn an_uploaded_loss_is_named_by_the_passes_that_use_it() {
    let server = server().await;
    let flags = ok(json!({"custom_loss_server_side": true}));
    serve(&server, "POST", "client/config", flags).await;
    answer_with(
        &server,
        "create_custom_loss",
        None,
        ok(json!({"request_id": "loss-1"})),
    )
    .await;
    let is_loss = |request: &Request| body(request)["request_id"] == "loss-1";
    Mock::given(path("/api/v1/retrieve_future"))
        .and(is_loss)
        .respond_with(ok(json!({"loss_id": "L1"})))
        .with_priority(1)
        .mount(&server)
        .await;
    let service = service(&server);
    let (inputs, graph) = graph();

    let handle = service
        .create_custom_loss("f", inputs, graph)
        .await
        .unwrap();
    let loss = Loss::from(handle);

    let sent = body(&only(&server, "create_custom_loss").await);
    assert_eq!(
        (&sent["custom_loss_seq_id"], &sent["session_id"]),
        (&json!(0), &json!("S1"))
    );
    assert_eq!(loss.function, LossFn::Custom);
    assert_eq!(
        serde_json::to_value(&loss.config).unwrap(),
        json!({"loss_id": "L1"})
    );
}

#[tokio::test]
async fn a_server_that_computes_no_uploaded_losses_is_not_asked() {
    let server = server().await;
    let (inputs, graph) = graph();

    let error = service(&server)
        .create_custom_loss("f", inputs, graph)
        .await
        .unwrap_err();

    assert!(
        error.to_string().contains("forward_backward_custom"),
        "{error}"
    );
    assert!(requests(&server, "create_custom_loss").await.is_empty());
}

#[tokio::test]
async fn a_key_without_permission_is_told_so() {
    let server = server().await;
    let refusal =
        ResponseTemplate::new(403).set_body_json(json!({"detail": "administrators only"}));
    serve(&server, "GET", "audit", refusal).await;

    let error = service(&server)
        .admin_client()
        .get_audit_log(AuditEventType::All, None)
        .await
        .unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::PermissionDenied));
}

#[tokio::test]
async fn the_console_shows_the_session_once_there_is_one() {
    let server = server().await;
    let service = service(&server);
    let before = service.get_console_url();
    service.session_id().await.unwrap();

    assert_eq!(before, "https://tinker.thinkingmachines.ai/sessions");
    assert_eq!(
        service.get_console_url(),
        "https://tinker.thinkingmachines.ai/sessions/S1"
    );
}

#[tokio::test]
async fn whether_the_account_is_set_up_is_asked_once() {
    for (code, expected) in [
        (200, None),
        (401, Some(ErrorKind::Unauthenticated)),
        (402, Some(ErrorKind::BillingPaused)),
        (503, Some(ErrorKind::Server)),
    ] {
        let server = server().await;
        let route = "get_server_capabilities";
        let answer = ResponseTemplate::new(code).set_body_json(json!({"supported_models": []}));
        serve(&server, "GET", route, answer).await;

        let outcome = service(&server).check_accessible().await;

        assert_eq!(outcome.err().and_then(|e| e.kind().cloned()), expected);
        only(&server, route).await;
    }
}

#[tokio::test]
async fn every_chunk_and_option_of_a_sample_travels() {
    let server = server().await;
    answer_with(
        &server,
        "asample",
        None,
        ok(json!({"request_id": "sample-1"})),
    )
    .await;
    let service = service(&server);
    let source = SamplingSource::BaseModel("m".into());
    let sampler = service.create_sampling_client(source).await.unwrap();
    let image = |format: &str| json!({"type": "image", "data": "AQI=", "format": format});
    let prompt: ModelInput = serde_json::from_value(json!({"chunks": [
        {"type": "encoded_text", "tokens": [1, 2]},
        image("png"),
        {"type": "image_asset_pointer", "format": "jpeg", "location": "a/b.jpg", "expected_tokens": 3},
        {"type": "dmel", "dmel": "AQEC"},
    ]}))
    .unwrap();
    let options = SampleOptions {
        prompt_logprobs: true,
        topk_prompt_logprobs: 2,
        topk_sample_logprobs: 3,
        record_stability_info: true,
        ..SampleOptions::default()
    };

    let asked = sampler.sample(prompt, SamplingParams::default(), options);
    asked.await.unwrap();

    let sent = body(&requests(&server, "asample").await[0]);
    let kinds: Vec<&str> = sent["prompt"]["chunks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|chunk| chunk["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds,
        ["encoded_text", "image", "image_asset_pointer", "dmel"]
    );
    assert_eq!(sent["prompt"]["chunks"][2]["location"], "a/b.jpg");
    assert_eq!(sent["topk_prompt_logprobs"], 2);
    assert_eq!(sent["topk_sample_logprobs"], 3);
    assert_eq!(sent["record_stability_info"], true);
}

async fn sampler_of(server: &MockServer) -> tinker_api::SamplingClient {
    service(server)
        .create_sampling_client(SamplingSource::BaseModel("m".into()))
        .await
        .unwrap()
}

/// Lets every sample bring these log-probabilities of its prompt.
async fn bring_logprobs(server: &MockServer, rows: Value) {
    let sequence = json!({"stop_reason": "length", "tokens": [5], "logprobs": [-0.5]});
    let result = json!({"sequences": [sequence], "prompt_logprobs": rows});
    answer_with(
        server,
        "asample",
        None,
        ok(json!({"request_id": "sample-1"})),
    )
    .await;
    serve(server, "POST", "retrieve_future", ok(result)).await;
}

#[tokio::test]
async fn the_last_log_probabilities_alone_are_asked_for() {
    let server = server().await;
    bring_logprobs(&server, json!([null, null, -0.5])).await;
    let sampler = sampler_of(&server).await;

    let prompt = ModelInput::from_tokens(vec![1, 2, 3]);
    let rows = sampler.compute_last_logprobs(prompt, 1).await.unwrap();

    assert_eq!(rows, [None, None, Some(-0.5)]);
    let sent = body(&requests(&server, "asample").await[0]);
    assert_eq!(
        (&sent["prompt_logprobs"], &sent["prompt_logprobs_last_n"]),
        (&json!(true), &json!(1))
    );
    assert_eq!(sent["sampling_params"]["max_tokens"], 1);
}

#[tokio::test]
async fn a_server_that_does_not_heed_the_last_n_is_an_error() {
    let server = server().await;
    bring_logprobs(&server, json!([null, -0.25, -0.5])).await;
    let sampler = sampler_of(&server).await;

    let prompt = ModelInput::from_tokens(vec![1, 2, 3]);
    let error = sampler.compute_last_logprobs(prompt, 1).await.unwrap_err();

    assert!(
        error
            .to_string()
            .contains("does not heed prompt_logprobs_last_n"),
        "{error}"
    );
}

#[tokio::test]
async fn questions_about_a_prompt_that_cannot_be_right_are_not_sent() {
    let server = server().await;
    let sampler = sampler_of(&server).await;
    let ints = |shape: Vec<usize>| {
        let values = vec![1; shape.iter().product()];
        TensorData::dense(TensorValues::Int64(values), shape).unwrap()
    };
    let last = |n, prompt_logprobs| SampleOptions {
        prompt_logprobs,
        prompt_logprobs_last_n: Some(n),
        ..SampleOptions::default()
    };
    let targets = |tensor| SampleOptions {
        target_prompt_logprobs: Some(tensor),
        ..SampleOptions::default()
    };
    for (options, part) in [
        (last(1, false), "needs prompt_logprobs"),
        (last(0, true), "prompt_logprobs_last_n 0"),
        (last(3, true), "prompt_logprobs_last_n 3"),
        (targets(ints(vec![3, 2])), "[3, 2]: it must be int64"),
        (targets(ints(vec![2])), "[2]: it must be int64"),
        (targets(TensorData::floats(vec![1.0])), "must be int64"),
    ] {
        let prompt = ModelInput::from_tokens(vec![1, 2, 3]);
        let asked = sampler.sample(prompt, SamplingParams::default(), options);

        let message = asked.await.unwrap_err().to_string();

        assert!(message.contains(part), "{message}");
    }
    assert!(requests(&server, "asample").await.is_empty());
}

#[tokio::test]
async fn target_log_probabilities_of_a_prompt_are_asked_for_in_rows() {
    let server = server().await;
    bring_logprobs(&server, json!([null, -0.25, -0.5])).await;
    let sampler = sampler_of(&server).await;
    let targets = TensorData::dense(TensorValues::Int64(vec![4, -1, 5, 6]), vec![2, 2]).unwrap();
    let options = SampleOptions {
        target_prompt_logprobs: Some(targets),
        ..SampleOptions::default()
    };

    let prompt = ModelInput::from_tokens(vec![1, 2, 3]);
    sampler
        .sample(prompt, SamplingParams::default(), options)
        .await
        .unwrap();

    let sent = body(&requests(&server, "asample").await[0]);
    assert_eq!(
        sent["target_prompt_logprobs"],
        json!({"data": [4, -1, 5, 6], "dtype": "int64", "shape": [2, 2]})
    );
}
