//! The audit log and billing from the server's own counters.

use serde_json::{Value, json};

use crate::harness::Harness;

/// A day on which the tests run, and both its ends if they run over midnight.
fn span() -> String {
    let now = jiff::Timestamp::now().as_second();
    let hour = now - now.rem_euclid(3600);
    let text = |seconds: i64| jiff::Timestamp::from_second(seconds).unwrap().to_string();
    let (from, until) = (text(hour - 3600), text(hour + 7200));
    format!("starting_on={from}&ending_before={until}").replace(':', "%3A")
}

/// A run with two passes of three tokens, a checkpoint, and a sample of four tokens from five.
async fn used(server: &Harness) -> (String, String) {
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    for seq in 1..=2 {
        let id = server.forward_backward(&run, seq, &[1, 2, 3]).await;
        server.output(&id).await;
    }
    let body = json!({"model_id": run, "seq_id": 3, "path": "a"});
    let id = server.submit("/save_weights", body).await;
    server.result(&id).await;
    let body =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    server.post("/create_sampling_session", body).await;
    let body = json!({"sampling_session_id": format!("{session}:sample:0"), "seq_id": 0,
        "num_samples": 2, "sampling_params": {"max_tokens": 2, "stop": []},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4, 5]}]}});
    let id = server.submit("/asample", body).await;
    server.samples(&id).await;
    (session, run)
}

/// Amounts by kind, whatever the hour.
fn amounts(usage: &Value) -> std::collections::BTreeMap<String, u64> {
    let mut sums = std::collections::BTreeMap::new();
    for row in usage["data"].as_array().unwrap() {
        let info = &row["event_info"];
        let amount = info["token_count"].as_u64().or(info["count"].as_u64());
        let kind = info["type"].as_str().unwrap().to_owned();
        *sums.entry(kind).or_default() += amount.unwrap();
    }
    sums
}

#[tokio::test]
async fn what_was_used_is_counted_once_and_outlives_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let (session, _) = used(&server).await;
    let path = format!("/billing/usage/events?{}", span());
    let before = server.get(&path).await.json();
    drop(server);

    let again = Harness::open(home.path());
    let after = again.get(&path).await.json();

    let expected = [
        ("checkpoint", 1),
        ("sampling_prefill", 5),
        ("sampling_sample", 4),
        ("training", 6),
    ];
    let expected = expected.map(|(kind, n)| (kind.to_owned(), n)).into();
    assert_eq!(amounts(&before), expected);
    assert_eq!(before["data"], after["data"]);
    let row = &after["data"][0];
    assert_eq!(
        (&row["session_id"], &row["base_model"]),
        (&json!(session), &json!("tinker/nano"))
    );
    assert_eq!(
        (&row["project_id"], &row["estimated_cost_usd"]),
        (&json!("local"), &json!(0.0))
    );
    assert!(after["sessions"][&session].is_object());
}

#[tokio::test]
async fn stored_checkpoints_are_summed_by_project() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    used(&server).await;

    let all = server
        .get("/billing/usage/checkpoints/current")
        .await
        .json();
    let none = server
        .get("/billing/usage/checkpoints/current?project_id=p")
        .await
        .json();

    assert_eq!(all["data"][0]["checkpoint_count"], 1);
    assert!(all["data"][0]["size_bytes"].as_u64() > Some(0));
    assert_eq!(none["data"], json!([]));
}

#[tokio::test]
async fn the_audit_log_has_what_became_of_checkpoints_and_projects() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let (session, run) = used(&server).await;
    let checkpoint = format!("/training_runs/{run}/checkpoints/weights/a");
    server
        .post(&format!("{checkpoint}/publish"), json!({}))
        .await;
    server
        .put(&format!("{checkpoint}/ttl"), json!({"ttl_seconds": 7200}))
        .await;
    server.delete(&checkpoint).await;
    server
        .put(
            &format!("/sessions/{session}/project"),
            json!({"project_id": "p"}),
        )
        .await;

    let events = |log: &Value| -> Vec<String> {
        let rows = log["entries"].as_array().unwrap();
        rows.iter()
            .map(|row| row["event"].as_str().unwrap().to_owned())
            .collect()
    };
    let all = server.get("/audit").await.json();
    let projects = server.get("/audit?event_type=projects").await.json();
    let long_ago = server.get("/audit?day=2020-02-03").await.json();

    let expected = [
        "checkpoint_created",
        "checkpoint_published",
        "checkpoint_ttl_set",
        "checkpoint_deleted",
        "project_session_assigned",
    ];
    assert_eq!(events(&all), expected);
    assert_eq!(
        all["entries"][0]["event_details"]["tinker_path"],
        format!("tinker://{run}/weights/a")
    );
    assert_eq!(events(&projects), ["project_session_assigned"]);
    assert_eq!(events(&long_ago), [""; 0]);
}

#[tokio::test]
async fn questions_out_of_range_are_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let usage = "/billing/usage/events?starting_on=";
    let cases = [
        (
            format!("{usage}2026-01-01T00:30:00Z&ending_before=2026-01-02T00:00:00Z"),
            "starting_on",
        ),
        (
            format!("{usage}2026-01-01T00:00:00Z&ending_before=soon"),
            "ending_before",
        ),
        (
            format!("{usage}2026-01-01T00:00:00Z&ending_before=2026-02-01T00:00:00Z"),
            "14 days",
        ),
        (
            format!("{usage}2026-01-02T00:00:00Z&ending_before=2026-01-01T00:00:00Z"),
            "after",
        ),
        ("/audit?day=yesterday".to_owned(), "yesterday"),
        ("/audit?event_type=gossip".to_owned(), "gossip"),
    ];
    for (path, name) in cases {
        let answer = server.get(&path).await;
        assert_eq!(answer.status, 422, "{path}");
        assert!(answer.detail().contains(name), "{}", answer.detail());
    }
}
