//! Samplers: what they sample from, what comes back, and that it comes back the same.

use serde_json::{Value, json};
use tinker_types::{SampleResponse, StopReason};

use crate::harness::Harness;

async fn sampler(server: &Harness, session: &str, number: u64, of: Value) -> String {
    let mut body = json!({"session_id": session, "sampling_session_seq_id": number});
    body.as_object_mut()
        .unwrap()
        .extend(of.as_object().unwrap().clone());
    let answer = server.post("/create_sampling_session", body).await;
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );
    answer.json()["sampling_session_id"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn request(sampler: &str, seq: u64, params: Value) -> Value {
    json!({"sampling_session_id": sampler, "seq_id": seq, "num_samples": 2,
           "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5]}]},
           "sampling_params": params, "prompt_logprobs": true})
}

fn eight_tokens() -> Value {
    json!({"max_tokens": 8, "stop": []})
}

async fn sampled(server: &Harness, sampler: &str, seq: u64, params: Value) -> SampleResponse {
    let id = server
        .submit("/asample", request(sampler, seq, params))
        .await;
    server.samples(&id).await
}

async fn save_sampler(server: &Harness, run: &str, seq: u64, name: &str) -> String {
    let body = json!({"model_id": run, "seq_id": seq, "path": name});
    let id = server.submit("/save_weights_for_sampler", body).await;
    server.result(&id).await.json()["path"]
        .as_str()
        .unwrap()
        .to_owned()
}

async fn train(server: &Harness, run: &str, seq: u64) {
    server.forward_backward(run, seq, &[1, 2, 3]).await;
    let step = server.optim_step(run, seq + 1).await;
    server.result(&step).await;
}

#[tokio::test]
async fn a_sample_has_tokens_logprobs_and_named_sequences() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let sampler = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    assert_eq!(sampler, format!("{session}:sample:0"));
    let info = server.get(&format!("/samplers/{sampler}")).await.json();
    assert_eq!(info["base_model"], "tinker/nano");

    let answer = server
        .post("/asample", request(&sampler, 0, eight_tokens()))
        .await
        .json();
    assert_eq!(answer["sample_sequence_ids"].as_array().unwrap().len(), 2);
    let response = server.samples(answer["request_id"].as_str().unwrap()).await;

    assert_eq!(response.sequences.len(), 2);
    for sequence in &response.sequences {
        assert_eq!(
            (sequence.tokens.len(), &sequence.stop_reason),
            (8, &StopReason::Length)
        );
        assert!(
            sequence
                .logprobs
                .as_ref()
                .unwrap()
                .iter()
                .all(|&l| l <= 0.0)
        );
    }
    assert_ne!(response.sequences[0].tokens, response.sequences[1].tokens);
    let prompt = response.prompt_logprobs.unwrap();
    assert_eq!((prompt.len(), prompt[0]), (3, None));
    assert!(prompt[1].is_some() && prompt[2].is_some());
}

#[tokio::test]
async fn a_seed_repeats_a_sample_and_its_absence_does_not() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let sampler = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let seeded = || json!({"max_tokens": 8, "stop": [], "seed": 11});

    let a = sampled(&server, &sampler, 0, seeded()).await;
    let b = sampled(&server, &sampler, 1, seeded()).await;
    let c = sampled(&server, &sampler, 2, eight_tokens()).await;
    let d = sampled(&server, &sampler, 3, eight_tokens()).await;

    assert_eq!(a, b);
    assert_ne!(c, d);
}

#[tokio::test]
async fn a_saved_sampler_stays_what_it_was_while_training_goes_on() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    train(&server, &run, 1).await;
    let path = save_sampler(&server, &run, 3, "early").await;
    let early = sampler(&server, &session, 0, json!({"model_path": path})).await;
    let greedy = || json!({"max_tokens": 8, "stop": [], "temperature": 0.0});
    let before = sampled(&server, &early, 0, greedy()).await;

    train(&server, &run, 4).await;
    let late = save_sampler(&server, &run, 6, "late").await;
    let late = sampler(&server, &session, 1, json!({"model_path": late})).await;

    assert_eq!(sampled(&server, &early, 1, greedy()).await, before);
    assert_ne!(sampled(&server, &late, 0, greedy()).await, before);
}

#[tokio::test]
async fn sampling_an_old_checkpoint_leaves_training_alone() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let (run, twin) = (server.run(&session, 0).await, server.run(&session, 1).await);
    train(&server, &run, 1).await;
    train(&server, &twin, 1).await;
    let path = save_sampler(&server, &run, 3, "old").await;
    train(&server, &run, 4).await;
    train(&server, &twin, 3).await;

    let old = sampler(&server, &session, 0, json!({"model_path": path})).await;
    sampled(&server, &old, 0, eight_tokens()).await;

    let a = server.forward_backward(&run, 6, &[7, 8, 9]).await;
    let b = server.forward_backward(&twin, 5, &[7, 8, 9]).await;
    assert_eq!(server.output(&a).await, server.output(&b).await);
}

#[tokio::test]
async fn an_unnamed_sampler_keeps_its_weights_over_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    train(&server, &run, 1).await;
    let body =
        json!({"model_id": run, "seq_id": 3, "sampling_session_seq_id": 5, "kind": "snapshot"});
    let id = server.submit("/save_weights_for_sampler", body).await;
    let saved = server.result(&id).await.json();
    let sampler = saved["sampling_session_id"].as_str().unwrap();
    assert_eq!(sampler, format!("{session}:sample:5"));
    let greedy = || json!({"max_tokens": 8, "stop": [], "temperature": 0.0});
    let before = sampled(&server, sampler, 0, greedy()).await;
    train(&server, &run, 4).await;
    drop(server);

    let again = Harness::open(home.path());

    assert_eq!(sampled(&again, sampler, 1, greedy()).await, before);
    let info = again.get(&format!("/samplers/{sampler}")).await.json();
    assert_eq!(info["base_model"], "tinker/nano");
}

/// Saves weights without a name; the sampler's id.
async fn save_unnamed(server: &Harness, run: &str, seq: u64) -> String {
    save_for(server, run, seq, "snapshot").await
}

async fn save_for(server: &Harness, run: &str, seq: u64, kind: &str) -> String {
    let body =
        json!({"model_id": run, "seq_id": seq, "sampling_session_seq_id": seq, "kind": kind});
    let id = server.submit("/save_weights_for_sampler", body).await;
    server.result(&id).await.json()["sampling_session_id"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn n_sampler_dirs(home: &std::path::Path) -> usize {
    std::fs::read_dir(home.join("server/samplers"))
        .unwrap()
        .count()
}

#[tokio::test]
async fn the_last_unnamed_samplers_of_a_run_are_kept_and_others_say_so() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let mut samplers = Vec::new();
    for seq in 1..=6 {
        samplers.push(save_unnamed(&server, &run, seq).await);
    }

    assert_eq!(n_sampler_dirs(home.path()), 4);
    for kept in &samplers[2..] {
        sampled(&server, kept, 0, eight_tokens()).await;
    }
    let id = server
        .submit("/asample", request(&samplers[1], 0, eight_tokens()))
        .await;
    let failure = server.failure(&id).await;
    assert!(
        failure.starts_with(&format!("sampler {} is no longer kept", samplers[1])),
        "{failure}"
    );
}

#[tokio::test]
async fn inflight_samplers_follow_their_run_and_a_snapshot_does_not() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let (run, other) = (server.run(&session, 0).await, server.run(&session, 1).await);
    let greedy = || json!({"max_tokens": 8, "stop": [], "temperature": 0.0});
    train(&server, &run, 1).await;
    let first = save_for(&server, &run, 3, "inflight").await;
    let snapshot = save_unnamed(&server, &run, 4).await;
    let elsewhere = save_for(&server, &other, 1, "inflight").await;
    let old = sampled(&server, &first, 0, greedy()).await.sequences;
    let others = sampled(&server, &elsewhere, 0, greedy()).await.sequences;
    assert_eq!(
        sampled(&server, &snapshot, 0, greedy()).await.sequences,
        old
    );

    train(&server, &run, 5).await;
    assert_eq!(sampled(&server, &first, 1, greedy()).await.sequences, old);
    let second = save_for(&server, &run, 7, "inflight").await;
    let new = sampled(&server, &second, 0, greedy()).await.sequences;

    assert_ne!(new, old);
    assert_eq!(sampled(&server, &first, 2, greedy()).await.sequences, new);
    assert_eq!(
        sampled(&server, &snapshot, 1, greedy()).await.sequences,
        old
    );
    let still = sampled(&server, &elsewhere, 1, greedy()).await.sequences;
    assert_eq!(still, others);
    drop(server);
    let again = Harness::open(home.path());
    assert_eq!(sampled(&again, &first, 3, greedy()).await.sequences, new);
    assert_eq!(sampled(&again, &second, 1, greedy()).await.sequences, new);
}

#[tokio::test]
async fn inflight_samplers_share_their_weights_and_end_with_their_session() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let mut last = String::new();
    for seq in 1..=6 {
        last = save_for(&server, &run, seq, "inflight").await;
    }
    assert_eq!(n_sampler_dirs(home.path()), 1);
    let mut named = json!({"model_id": run, "seq_id": 7, "path": "x", "kind": "inflight"});
    let id = server
        .submit("/save_weights_for_sampler", named.clone())
        .await;
    let failure = server.failure(&id).await;
    assert!(failure.contains("samplers without a name"), "{failure}");
    (named["kind"], named["seq_id"]) = (json!("sideways"), json!(8));
    let id = server.submit("/save_weights_for_sampler", named).await;
    let failure = server.failure(&id).await;
    assert!(failure.starts_with("kind \"sideways\""), "{failure}");

    let path = format!("/sessions/{session}/finish");
    let reason = json!({"reason": {"type": "success"}, "detail": null});
    assert_eq!(server.post(&path, reason).await.status, 204);

    assert_eq!(n_sampler_dirs(home.path()), 0);
    let id = server
        .submit("/asample", request(&last, 0, eight_tokens()))
        .await;
    assert!(server.failure(&id).await.contains("no longer kept"));
}

#[tokio::test]
async fn unnamed_samplers_end_with_their_session() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let sampler = save_unnamed(&server, &run, 1).await;
    sampled(&server, &sampler, 0, eight_tokens()).await;

    let path = format!("/sessions/{session}/finish");
    let finished = server
        .post(
            &path,
            json!({"reason": {"type": "success"}, "detail": null}),
        )
        .await;
    assert_eq!(finished.status, 204, "{finished:?}");

    assert_eq!(n_sampler_dirs(home.path()), 0);
    let id = server
        .submit("/asample", request(&sampler, 1, eight_tokens()))
        .await;
    assert!(server.failure(&id).await.contains("no longer kept"));
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let sampler = save_unnamed(&server, &run, 1).await;
    let mut body = request(&sampler, 0, eight_tokens());
    body["record_stability_info"] = json!(true);
    let id = server.submit("/asample", body).await;
    assert_eq!(
        server.failure(&id).await,
        "record_stability_info is not supported by this server"
    );
}

#[tokio::test]
async fn an_accepted_sample_is_answered_after_a_restart_and_is_the_same() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let sampler = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let mut ids = Vec::new();
    for seq in 0..6 {
        ids.push(
            server
                .submit("/asample", request(&sampler, seq, eight_tokens()))
                .await,
        );
    }
    let mut expected = Vec::new();
    for id in &ids[..3] {
        expected.push(server.samples(id).await);
    }
    drop(server);

    let again = Harness::open(home.path());

    for id in &ids {
        let response = again.samples(id).await;
        assert_eq!(response.sequences.len(), 2, "{id}");
    }
    for (seq, (id, before)) in ids.iter().zip(expected).enumerate() {
        assert_eq!(again.samples(id).await, before);
        let repeated = request(&sampler, seq as u64, eight_tokens());
        assert_eq!(again.submit("/asample", repeated).await, *id);
    }
}

#[tokio::test]
async fn another_sample_under_a_used_number_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let base = || json!({"base_model": "tinker/nano"});
    let name = sampler(&server, &session, 0, base()).await;
    assert_eq!(sampler(&server, &session, 0, base()).await, name);
    server
        .submit("/asample", request(&name, 0, eight_tokens()))
        .await;

    let other = server
        .post("/asample", request(&name, 0, json!({"max_tokens": 1})))
        .await;

    assert_eq!(other.status, 422);
    assert!(
        other.detail().contains(&format!("{name}:op:0")),
        "{}",
        other.detail()
    );
}

#[tokio::test]
async fn a_training_path_is_refused_with_the_name_of_its_twin() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let body = json!({"model_id": run, "seq_id": 1, "path": "x"});
    let id = server.submit("/save_weights", body).await;
    server.result(&id).await;
    let ask = || {
        let path = format!("tinker://{run}/weights/x");
        let body = json!({"session_id": session, "sampling_session_seq_id": 0, "model_path": path});
        server.post("/create_sampling_session", body)
    };

    let alone = ask().await;
    assert_eq!(alone.status, 400);
    assert!(
        alone.detail().contains("save_weights_for_sampler makes it"),
        "{}",
        alone.detail()
    );
    let twin = save_sampler(&server, &run, 2, "x").await;
    let both = ask().await;
    assert!(
        both.detail().ends_with(&format!("use its twin {twin}")),
        "{}",
        both.detail()
    );
    let load = json!({"session_id": session, "model_seq_id": 1, "path": twin, "optimizer": false});
    let reverse = server.post("/load_weights", load).await;
    assert_eq!(reverse.status, 400);
    assert!(
        reverse.detail().contains("use its twin"),
        "{}",
        reverse.detail()
    );
}

#[tokio::test]
async fn a_deleted_checkpoint_can_no_longer_be_sampled() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let path = save_sampler(&server, &run, 1, "x").await;
    let name = sampler(&server, &session, 0, json!({"model_path": path})).await;
    sampled(&server, &name, 0, eight_tokens()).await;

    let url = format!("/training_runs/{run}/checkpoints/sampler_weights/x");
    assert_eq!(server.delete(&url).await.status, 204);

    let refused = server
        .post("/asample", request(&name, 1, eight_tokens()))
        .await;
    assert_eq!(refused.status, 404);
    assert!(
        refused.detail().contains("has no checkpoints"),
        "{}",
        refused.detail()
    );
}

#[tokio::test]
async fn a_sample_may_name_weights_instead_of_a_sampler() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let pass = server.forward_backward(&run, 1, &[1, 2, 3]).await;
    server.output(&pass).await;
    server.optim_step(&run, 2).await;
    let body = json!({"model_id": run, "seq_id": 3, "path": "a"});
    let id = server.submit("/save_weights_for_sampler", body).await;
    let path = server.result(&id).await.json()["path"].clone();
    let of_base = json!({"base_model": "tinker/nano"});
    let of_path = json!({"model_path": path});
    let of_both = json!({"model_path": path, "base_model": "tinker/nano"});
    let params = json!({"max_tokens": 8, "stop": [], "seed": 5});
    let by_weights = |weights: &Value| {
        let mut body = request("", 0, params.clone());
        let fields = body.as_object_mut().unwrap();
        fields.remove("sampling_session_id");
        fields.remove("seq_id");
        fields.extend(weights.as_object().unwrap().clone());
        body
    };

    let mut drawn = Vec::new();
    for (number, weights) in [&of_base, &of_path, &of_both].into_iter().enumerate() {
        let name = sampler(&server, &session, number as u64, weights.clone()).await;
        let expected = sampled(&server, &name, 0, params.clone()).await;
        let id = server.submit("/asample", by_weights(weights)).await;
        assert_eq!(server.samples(&id).await.sequences, expected.sequences);
        drawn.push(expected.sequences);
    }

    assert!(drawn[0] != drawn[1] && drawn[1] == drawn[2]);
    let neither = server.post("/asample", by_weights(&json!({}))).await;
    assert_eq!(neither.status, 400);
    assert!(
        neither.detail().contains("base_model"),
        "{}",
        neither.detail()
    );
    let unknown = by_weights(&json!({"base_model": "no/such"}));
    assert_eq!(server.post("/asample", unknown).await.status, 404);
}

#[tokio::test]
async fn bad_sampling_requests_name_parameter_and_value() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let name = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let cases = [
        (
            json!({"temperature": -1.0}),
            "temperature -1 must be at least 0",
        ),
        (json!({"top_p": 0.0}), "top_p 0 must be above 0"),
        (json!({"top_k": 0}), "top_k 0 must be at least 1"),
        (json!({"stop": ["a", ""]}), "stop string 1 is empty"),
        (json!({"stop": [77]}), "token 77"),
    ];

    for (seq, (params, expected)) in cases.into_iter().enumerate() {
        let id = server
            .submit("/asample", request(&name, seq as u64, params))
            .await;
        let failure = server.failure(&id).await;
        assert!(failure.contains(expected), "{failure}");
    }
    let mut outside = request(&name, 20, eight_tokens());
    outside["prompt"]["chunks"][0]["tokens"] = json!([1, 32]);
    let id = server.submit("/asample", outside).await;
    let failure = server.failure(&id).await;
    assert_eq!(
        failure,
        "prompt: token 32 at position 1 is outside the vocabulary of 32 tokens"
    );
    let mut many = request(&name, 21, eight_tokens());
    many["num_samples"] = json!(0);
    let refused = server.post("/asample", many).await;
    assert_eq!(
        (refused.status, refused.detail().as_str()),
        (400, "num_samples 0 must be between 1 and 1024")
    );
}

#[tokio::test]
async fn the_context_ends_a_sample_as_max_tokens_does() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let name = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;

    let response = sampled(&server, &name, 0, json!({"max_tokens": 5000, "stop": []})).await;

    assert_eq!(response.sequences[0].tokens.len(), 64 - 3);
    assert_eq!(response.sequences[0].stop_reason, StopReason::Length);
}

#[tokio::test]
async fn stop_tokens_end_a_sample_and_are_part_of_it() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let name = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let free = sampled(
        &server,
        &name,
        0,
        json!({"max_tokens": 8, "stop": [], "seed": 1}),
    )
    .await;
    let stop = free.sequences[0].tokens[4];
    let first = free.sequences[0]
        .tokens
        .iter()
        .position(|&t| t == stop)
        .unwrap();

    let stopped = sampled(
        &server,
        &name,
        1,
        json!({"max_tokens": 8, "stop": [stop], "seed": 1}),
    )
    .await;

    assert_eq!(
        stopped.sequences[0].tokens,
        free.sequences[0].tokens[..=first]
    );
    assert_eq!(stopped.sequences[0].stop_reason, StopReason::Stop);
}

#[tokio::test]
async fn only_the_last_prompt_logprobs_are_shown_if_asked_for() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let name = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let mut body = request(&name, 0, json!({"max_tokens": 1}));
    body["prompt_logprobs_last_n"] = json!(1);
    body["topk_prompt_logprobs"] = json!(2);
    body["topk_sample_logprobs"] = json!(3);

    let id = server.submit("/asample", body).await;
    let response = server.samples(&id).await;

    let shown: Vec<bool> = response
        .prompt_logprobs
        .unwrap()
        .iter()
        .map(Option::is_some)
        .collect();
    assert_eq!(shown, [false, false, true]);
    let top = response.topk_prompt_logprobs.unwrap();
    assert!(top[0].is_none() && top[1].is_none());
    assert_eq!(top[2].as_ref().unwrap().len(), 2);
    let sampled = response.sequences[0].topk_logprobs.as_ref().unwrap();
    assert_eq!(sampled[0].as_ref().unwrap().len(), 3);
}

#[tokio::test]
async fn a_cancelled_sample_ends_and_others_go_on() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let name = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let long = server
        .submit("/asample", request(&name, 0, json!({"stop": []})))
        .await;

    let cancelled = server
        .post("/cancel_future", json!({"request_id": long}))
        .await;
    assert_eq!(cancelled.status, 204);

    // It may have been quicker than the cancellation; either way it has an end.
    let answer = server.result(&long).await;
    assert!(answer.content_type == "application/x-protobuf" || answer.json()["category"] == "user");
    sampled(&server, &name, 1, eight_tokens()).await;
}

#[tokio::test]
async fn training_and_sampling_share_the_engine() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let name = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let mut ids = Vec::new();
    for i in 0..20 {
        ids.push(
            server
                .submit("/asample", request(&name, i, json!({"stop": []})))
                .await,
        );
        server.optim_step(&run, i + 1).await;
    }

    let last = format!("{run}:op:20");
    assert_eq!(server.result(&last).await.json()["metrics"]["step"], 20.0);
    for id in ids {
        assert_eq!(server.samples(&id).await.sequences.len(), 2);
    }
}

/// Continues `tokens` with a seed, as the first sample of a sampler of a session of its own.
async fn continued(server: &Harness, tokens: &[u32]) -> SampleResponse {
    let session = server.session().await;
    let name = sampler(server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let mut body = request(&name, 0, json!({"max_tokens": 8, "stop": [], "seed": 5}));
    body["prompt"]["chunks"][0]["tokens"] = json!(tokens);
    body["prompt_logprobs"] = json!(false);
    let id = server.submit("/asample", body).await;
    server.samples(&id).await
}

#[tokio::test]
async fn a_prompt_that_another_session_sent_is_taken_from_the_cache_and_says_so() {
    let (home, alone) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = Harness::open(home.path());
    let first: Vec<u32> = (0..30).map(|i| 3 + i % 7).collect();
    let turn = [&first[..], &[20, 21, 22]].concat();

    let anew = continued(&server, &first).await;
    let again = continued(&server, &first).await;
    let longer = continued(&server, &turn).await;

    // The last token goes through the model for what follows it.
    let hits = [&anew, &again, &longer].map(|r| r.prompt_cache_hit_tokens);
    assert_eq!(hits, [0, 29, 30]);
    assert_eq!(again.sequences, anew.sequences);
    let elsewhere = Harness::open(alone.path());
    let uncached = continued(&elsewhere, &turn).await;
    assert_eq!(uncached.prompt_cache_hit_tokens, 0);
    assert_eq!(uncached.sequences, longer.sequences);
}

#[tokio::test]
async fn a_stop_string_that_spans_tokens_ends_a_sample_and_is_part_of_it() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let name = sampler(&server, &session, 0, json!({"base_model": "tinker/nano"})).await;
    let params = |stop: Value| json!({"max_tokens": 30, "stop": stop, "seed": 1, "top_p": 0.999});
    let free = sampled(&server, &name, 0, params(json!([]))).await;
    let tokens = &free.sequences[0].tokens;
    let is_text = |pair: &[u32]| pair.iter().all(|token| *token > 2);
    let at = tokens.windows(2).rposition(is_text).unwrap();
    let first = tokens
        .windows(2)
        .position(|w| *w == tokens[at..at + 2])
        .unwrap();
    let nano = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    let tokenizer = tinker_chat::Tokenizer::from_dir(&nano).unwrap();
    let text = tokenizer.decode(&tokens[at..at + 2]).unwrap();
    assert_eq!(text.chars().count(), 2);

    let stopped = sampled(&server, &name, 1, params(json!([text]))).await;

    assert_eq!(stopped.sequences[0].tokens, tokens[..first + 2]);
    assert_eq!(stopped.sequences[0].stop_reason, StopReason::Stop);
}
