//! Sharing, copying, exporting and bringing in checkpoints: the calls as the official SDK makes them.

use serde_json::{Value, json};
use tinker_http::{Client, ErrorKind};
use tinker_types::{
    CopyWeightsRequest, LoraConfig, SaveWeightsExternalRequest, SaveWeightsExternalTag,
    StartUploadRequest, TinkerPath,
};
use wiremock::MockServer;

use crate::support::*;

const BASE: &str = "/api/v1/training_runs/S1:train:0/checkpoints";

fn training() -> TinkerPath {
    "tinker://S1:train:0/weights/0001".parse().unwrap()
}

fn external() -> TinkerPath {
    "tinker://S1:train:0/external_weights/x1".parse().unwrap()
}

/// A server that answers one route, and a client of it.
async fn serving(
    verb: &str,
    route: &str,
    answers: impl IntoIterator<Item = wiremock::ResponseTemplate>,
) -> (MockServer, Client) {
    let server = server().await;
    script(&server, verb, route, answers).await;
    let client = client(&server);
    (server, client)
}

/// Method and body of the only request to a route.
async fn sent(server: &MockServer, route: &str) -> (String, Value) {
    let requests = requests(server, route).await;
    assert_eq!(requests.len(), 1, "{route}");
    let body = match requests[0].body.is_empty() {
        true => Value::Null,
        false => requests[0].body_json().unwrap(),
    };
    (requests[0].method.to_string(), body)
}

#[tokio::test]
async fn checkpoints_are_published_and_unpublished_without_a_body() {
    let route = format!("{BASE}/weights/0001/publish");
    let (server, client) = serving("POST", &route, [status(204)]).await;
    client.publish_checkpoint(&training()).await.unwrap();
    assert_eq!(sent(&server, &route).await, ("POST".into(), Value::Null));

    let (server, client) = serving("DELETE", &route, [status(200)]).await;
    client.unpublish_checkpoint(&training()).await.unwrap();
    assert_eq!(sent(&server, &route).await, ("DELETE".into(), Value::Null));
}

#[tokio::test]
async fn a_checkpoint_that_is_public_already_is_no_error_and_is_not_asked_for_again() {
    let route = format!("{BASE}/weights/0001/publish");
    let conflict = answer(409, json!({"detail": "already public"}));
    let (server, client) = serving("POST", &route, [conflict]).await;

    client.publish_checkpoint(&training()).await.unwrap();

    assert_eq!(requests(&server, &route).await.len(), 1);
}

#[tokio::test]
async fn publishing_what_is_not_there_is_an_error() {
    let route = format!("{BASE}/weights/0001/publish");
    let missing = answer(404, json!({"detail": "checkpoint 0001 does not exist"}));
    let (_server, client) = serving("POST", &route, [missing]).await;

    let error = client.publish_checkpoint(&training()).await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn the_life_of_a_checkpoint_is_set_and_its_end_removed_with_null() {
    let route = format!("{BASE}/weights/0001/ttl");
    for (ttl, expected) in [
        (Some(86_400), json!({"ttl_seconds": 86_400})),
        (None, json!({"ttl_seconds": null})),
    ] {
        let (server, client) = serving("PUT", &route, [status(204)]).await;

        client.set_checkpoint_ttl(&training(), ttl).await.unwrap();

        assert_eq!(sent(&server, &route).await, ("PUT".into(), expected));
    }
}

fn copy() -> CopyWeightsRequest {
    CopyWeightsRequest {
        source_path: training(),
        destination_project_id: Some("proj-2".parse().unwrap()),
        session_id: None,
        model_seq_id: None,
        ttl_seconds: Some(3600),
    }
}

#[tokio::test]
async fn a_copy_is_made_once_over_all_attempts_and_carries_its_permission() {
    let route = "/api/v1/copy_weights";
    let copied = ok(json!({"tinker_path": "tinker://S9:train:0/weights/0001"}));
    let (server, client) = serving("POST", route, [status(503), copied]).await;

    let path = client.copy_weights(&copy(), Some("tok")).await.unwrap();

    assert_eq!(path.to_string(), "tinker://S9:train:0/weights/0001");
    let all = requests(&server, route).await;
    let keys: Vec<_> = all.iter().map(|r| header(r, "x-idempotency-key")).collect();
    assert!(
        keys.len() == 2 && keys[0].is_some() && keys[0] == keys[1],
        "{keys:?}"
    );
    assert_eq!(
        header(&all[1], "x-tinker-weights-access-token"),
        Some("tok")
    );
    assert_eq!(
        all[1].body_json::<Value>().unwrap(),
        json!({
            "source_path": "tinker://S1:train:0/weights/0001",
            "destination_project_id": "proj-2",
            "ttl_seconds": 3600,
        })
    );
}

#[tokio::test]
async fn a_permission_that_cannot_stand_in_a_header_is_refused_and_not_shown() {
    let server = server().await;

    let error = client(&server)
        .copy_weights(&copy(), Some("geheim\n"))
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::InvalidRequest);
    assert!(!format!("{error:?}").contains("geheim"));
}

#[tokio::test]
async fn weights_are_exported_and_their_files_named() {
    let server = server().await;
    let saved = json!({
        "type": "save_weights_external",
        "path": external().to_string(),
        "size_bytes": 5,
    });
    let urls = json!({
        "urls": {"sub/adapter_model.safetensors": "https://store/b?sig=s"},
        "expires": "2030-01-01T00:00:00Z",
    });
    let urls_route = format!("{BASE}/external_weights/x1/external_weights_urls");
    for (verb, route, body) in [
        (
            "POST",
            "/api/v1/save_weights_external",
            json!({"request_id": "r1"}),
        ),
        ("POST", "/api/v1/retrieve_future", saved),
        ("GET", urls_route.as_str(), urls),
    ] {
        script(&server, verb, route, [ok(body)]).await;
    }
    let client = client(&server);
    let request = SaveWeightsExternalRequest {
        model_id: "S1:train:0".parse().unwrap(),
        path: "x1".into(),
        seq_id: 8,
        ttl_seconds: None,
        age_encryption_recipients: Some(vec!["age1abc".into()]),
        tag: SaveWeightsExternalTag,
    };

    let future = client.save_weights_external(&request).await.unwrap();
    let saved = client.retrieve_save_weights_external(&future.request_id, None);
    let tinker_http::Resolved::Ready(saved) = saved.await.unwrap() else {
        panic!("the save failed");
    };
    let files = client.get_external_weights_urls(&external()).await.unwrap();

    assert_eq!(saved.path, Some(external()));
    let (_, body) = sent(&server, "/api/v1/save_weights_external").await;
    assert_eq!(
        body,
        json!({
            "model_id": "S1:train:0",
            "path": "x1",
            "seq_id": 8,
            "age_encryption_recipients": ["age1abc"],
            "type": "save_weights_external",
        })
    );
    let polls = requests(&server, "/api/v1/retrieve_future").await;
    let kind = header(&polls[0], "x-tinker-request-type");
    assert_eq!(kind, Some("SaveWeightsExternal"));
    let file = &files.urls["sub/adapter_model.safetensors"];
    assert_eq!(file.expose(), "https://store/b?sig=s");
}

#[tokio::test]
async fn an_archive_is_an_answer_or_a_redirect_that_is_not_followed() {
    let route = format!("{BASE}/weights/0001/archive");
    let body = json!({"url": "https://store/a.tar?sig=s", "expires": "2030-01-01T00:00:00Z"});
    let moved = status(302).insert_header("location", "https://store/a.tar?sig=s");
    for answers in [vec![status(503), ok(body)], vec![moved]] {
        let (_server, client) = serving("GET", &route, answers).await;

        let archive = client.get_checkpoint_archive(&training()).await.unwrap();

        assert_eq!(archive.url.expose(), "https://store/a.tar?sig=s");
    }
}

#[tokio::test]
async fn weights_from_outside_are_begun_and_finished() {
    let server = server().await;
    let begun = json!({
        "upload_id": "u1",
        "urls": {"adapter_config.json": "https://store/c?sig=s"},
        "expires": "2030-01-01T00:00:00Z",
    });
    let finished = json!({"tinker_path": external().to_string()});
    let (start, finish) = (
        "/api/v1/external_weights_upload_start",
        "/api/v1/external_weights_upload_finish",
    );
    script(&server, "POST", start, [ok(begun)]).await;
    script(&server, "POST", finish, [ok(finished)]).await;
    let client = client(&server);
    let request = StartUploadRequest {
        base_model: "m".into(),
        lora_config: LoraConfig::default(),
        destination_project_id: None,
    };

    let upload = client
        .external_weights_upload_start(&request)
        .await
        .unwrap();
    let path = client.external_weights_upload_finish(&upload.upload_id);

    assert_eq!(path.await.unwrap(), external());
    let (_, body) = sent(&server, finish).await;
    assert_eq!(body, json!({"upload_id": "u1"}));
}

#[tokio::test]
async fn a_server_without_exports_is_named_as_such() {
    let route = format!("{BASE}/external_weights/x1/external_weights_urls");
    let missing = answer(404, json!({"detail": "Not Found"}));
    let (_server, client) = serving("GET", &route, [missing]).await;

    let error = client
        .get_external_weights_urls(&external())
        .await
        .unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Unsupported);
    assert!(
        error
            .to_string()
            .contains("this server cannot hand out exported weights"),
        "{error}"
    );
}
