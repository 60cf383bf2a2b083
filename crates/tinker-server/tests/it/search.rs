//! Finding sessions and checkpoints, projects as labels, and the timeline of a session.

use serde_json::{Value, json};

use crate::harness::{Harness, create_body};

async fn session(server: &Harness, body: Value) -> String {
    let mut request = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
    let fields = body.as_object().unwrap().clone();
    request.as_object_mut().unwrap().extend(fields);
    let answer = server.post("/create_session", request).await.json();
    answer["session_id"].as_str().unwrap().to_owned()
}

async fn found(server: &Harness, query: Value) -> Vec<String> {
    let answer = server.post("/sessions/search", query).await.json();
    let rows = answer["sessions"]
        .as_array()
        .unwrap_or_else(|| panic!("{answer}"));
    let id = |row: &Value| row["session_id"].as_str().unwrap().to_owned();
    rows.iter().map(id).collect()
}

#[tokio::test]
async fn sessions_are_found_by_what_was_said_of_them() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let named = session(
        &server,
        json!({"display_name": "a", "user_metadata": {"x": 1, "y": 2}}),
    )
    .await;
    let filed = session(&server, json!({"project_id": "p"})).await;
    let over = session(&server, json!({})).await;
    let finish = json!({"reason": {"type": "errored"}, "detail": "boom"});
    server
        .post(&format!("/sessions/{over}/finish"), finish)
        .await;

    let cases = [
        (json!({}), vec![&over, &filed, &named]),
        (json!({"display_name": "a"}), vec![&named]),
        (json!({"user_metadata": {"x": 1}}), vec![&named]),
        (json!({"user_metadata": {"x": 2}}), vec![]),
        (json!({"project_ids": ["p", "q"]}), vec![&filed]),
        (json!({"session_id": filed}), vec![&filed]),
        (
            json!({"statuses": [{"type": "active"}]}),
            vec![&filed, &named],
        ),
        (
            json!({"statuses": [{"type": "client_finished"}]}),
            vec![&over],
        ),
        (
            json!({"statuses": [{"type": "client_finished", "reasons": ["success"]}]}),
            vec![],
        ),
        (
            json!({"statuses": [{"type": "failed"}, {"type": "cancelled"}]}),
            vec![],
        ),
        (
            json!({"owner": {"type": "user", "owner_urns": ["tml:user:other"]}}),
            vec![],
        ),
    ];
    for (query, expected) in cases {
        let ids = found(&server, query.clone()).await;
        assert_eq!(ids.iter().collect::<Vec<_>>(), expected, "{query}");
    }
    let row = &server
        .post("/sessions/search", json!({"session_id": over}))
        .await
        .json()["sessions"][0];
    assert_eq!(
        row["status"],
        json!({"type": "client_finished", "reason": {"type": "errored"}, "detail": "boom"})
    );
    assert_eq!(row["project_id"], "local");
}

#[tokio::test]
async fn pages_of_a_search_join_without_gap_or_repetition() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let mut expected = Vec::new();
    for _ in 0..5 {
        expected.insert(0, session(&server, json!({})).await);
    }

    let (mut seen, mut cursor) = (Vec::new(), Value::Null);
    loop {
        let query = json!({"limit": 2, "cursor": cursor});
        seen.extend(found(&server, query.clone()).await);
        let page = server.post("/sessions/search", query).await.json();
        cursor = page["next_cursor"].clone();
        if cursor.is_null() {
            break;
        }
    }

    assert_eq!(seen, expected);
}

#[tokio::test]
async fn searches_out_of_range_are_refused_by_name() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let cases = [
        (json!({"limit": 0}), "limit 0"),
        (json!({"limit": 201}), "limit 201"),
        (json!({"display_name": ""}), "display_name"),
        (json!({"statuses": []}), "statuses"),
        (
            json!({"owner": {"type": "user", "owner_urns": []}}),
            "owner_urns",
        ),
        (
            json!({"cursor": {"last_created_at": "soon", "last_session_id": "s"}}),
            "soon",
        ),
    ];
    for (query, name) in cases {
        let answer = server.post("/sessions/search", query).await;
        assert_eq!(answer.status, 422, "{name}");
        assert!(answer.detail().contains(name), "{}", answer.detail());
    }
}

#[tokio::test]
async fn a_session_moves_to_another_project_with_all_that_is_its_own() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let body = json!({"model_id": run, "seq_id": 1, "path": "a"});
    let id = server.submit("/save_weights", body).await;
    server.result(&id).await;

    let moved = server
        .put(
            &format!("/sessions/{session}/project"),
            json!({"project_id": "q"}),
        )
        .await;
    assert_eq!(moved.status, 204);
    drop(server);
    let again = Harness::open(home.path());

    assert_eq!(
        found(&again, json!({"project_ids": ["q"]})).await,
        [session]
    );
    let runs = again.get("/training_runs?project_id=q").await.json();
    assert_eq!(runs["training_runs"][0]["training_run_id"], run);
    assert_eq!(
        again.get("/training_runs?project_id=z").await.json()["cursor"]["total_count"],
        0
    );
    let search = json!({"project_ids": ["q"], "checkpoint_type": "training", "base_models": ["tinker/nano"]});
    let saved = again.post("/checkpoints/search", search).await.json();
    assert_eq!(saved["checkpoints"][0]["checkpoint_id"], "weights/a");
    let none = again
        .post("/checkpoints/search", json!({"base_models": []}))
        .await
        .json();
    assert_eq!(none["checkpoints"], json!([]));
    let unknown = again
        .put("/sessions/nobody/project", json!({"project_id": "q"}))
        .await;
    assert_eq!(unknown.status, 404);
}

#[tokio::test]
async fn a_trace_shows_when_each_operation_came_and_ended() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let session = server.session().await;
    let run = server.run(&session, 0).await;
    let id = server.forward_backward(&run, 1, &[1, 2]).await;
    server.output(&id).await;

    let export = server
        .get(&format!("/sessions/{session}/trace_export"))
        .await
        .json();
    assert_eq!(export["status"], "ready");
    let trace = server
        .follow(export["url"].as_str().unwrap(), &[])
        .await
        .json();

    let events = trace["traceEvents"].as_array().unwrap();
    assert_eq!(events[0]["args"]["name"], run);
    let names: Vec<_> = events[1..]
        .iter()
        .map(|e| e["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["create_model", "forward_backward"]);
    for event in &events[1..] {
        assert_eq!(event["args"]["state"], "finished");
        assert!(
            event["ts"].as_i64() > Some(1_700_000_000_000_000) && event["dur"].as_i64() >= Some(0)
        );
    }
    assert_eq!(
        server.get("/sessions/nobody/trace_export").await.status,
        404
    );
}

#[tokio::test]
async fn a_short_lived_token_opens_the_server_and_says_who_one_is() {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    let jwt = server.post("/auth/token", json!({})).await.json()["jwt"]
        .as_str()
        .unwrap()
        .to_owned();

    let url = "/api/v1/sessions";
    let with = server.follow(url, &[("x-api-key", &jwt)]).await;
    let forged = server
        .follow(url, &[("x-api-key", &format!("{jwt}x"))])
        .await;
    let wrong_key = server.follow(url, &[("x-api-key", "tml-no")]).await;

    assert_eq!(with.status, 200);
    assert_eq!(forged.status, 401);
    assert!(
        forged
            .header("www-authenticate")
            .contains("error=\"invalid_token\"")
    );
    assert_eq!(
        (wrong_key.status, wrong_key.header("www-authenticate")),
        (401, "")
    );
    let me = server.get("/auth/apikey/me").await.json();
    assert_eq!(me["details"]["org_details"]["name"], "local");
    let kept = server.delete("/auth/apikey/me").await;
    assert_eq!(kept.status, 403);
    assert!(kept.detail().contains("cannot be deleted here"));
    // The key still works.
    let session = server.session().await;
    assert_eq!(
        server
            .post("/create_model", create_body(&session, 0))
            .await
            .status,
        200
    );
}
