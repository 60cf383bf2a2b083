//! Lists that span pages, and look-ups.

use serde_json::{Value, json};
use tinker_api::ErrorKind;
use wiremock::matchers::{method, path};
use wiremock::{Mock, Request};

use crate::support::*;

fn checkpoint(n: u64) -> Value {
    json!({
        "checkpoint_id": format!("weights/{n:04}"),
        "checkpoint_type": "training",
        "time": "2026-01-01T00:00:00Z",
        "tinker_path": format!("tinker://S1:train:0/weights/{n:04}"),
    })
}

/// Serves 130 checkpoints page by page.
fn page(request: &Request) -> wiremock::ResponseTemplate {
    let number = |name: &str| -> u64 {
        let pairs: Vec<(String, String)> = request.url.query_pairs().into_owned().collect();
        pairs
            .iter()
            .find(|(k, _)| k == name)
            .unwrap()
            .1
            .parse()
            .unwrap()
    };
    let (limit, offset) = (number("limit"), number("offset"));
    let rows: Vec<Value> = (offset..130.min(offset + limit)).map(checkpoint).collect();
    ok(json!({"checkpoints": rows}))
}

#[tokio::test]
async fn lists_are_read_to_the_end_or_to_the_limit() {
    let server = server().await;
    Mock::given(method("GET"))
        .and(path("/api/v1/checkpoints"))
        .respond_with(page)
        .mount(&server)
        .await;
    let rest = service(&server).rest_client();

    let all = rest.list_all_user_checkpoints(None).await.unwrap();
    let some = rest.list_all_user_checkpoints(Some(105)).await.unwrap();

    assert_eq!((all.len(), some.len()), (130, 105));
    assert_eq!(all[129].checkpoint_id.name(), "0129");
    assert_eq!(requests(&server, "checkpoints").await.len(), 4);
    assert!(requests(&server, "create_session").await.is_empty());
}

/// The same, never more than 50 rows and with the total.
fn capped_page(request: &Request) -> wiremock::ResponseTemplate {
    let query: std::collections::HashMap<_, _> = request.url.query_pairs().collect();
    let offset: u64 = query["offset"].parse().unwrap();
    let rows: Vec<Value> = (offset..130.min(offset + 50)).map(checkpoint).collect();
    let cursor = json!({"offset": offset, "limit": 50, "total_count": 130});
    ok(json!({"checkpoints": rows, "cursor": cursor}))
}

#[tokio::test]
async fn lists_of_a_server_that_caps_its_pages_are_read_to_the_end() {
    let server = server().await;
    Mock::given(method("GET"))
        .and(path("/api/v1/checkpoints"))
        .respond_with(capped_page)
        .mount(&server)
        .await;

    let rest = service(&server).rest_client();
    let all = rest.list_all_user_checkpoints(None).await.unwrap();

    assert_eq!(all.len(), 130);
    assert_eq!(requests(&server, "checkpoints").await.len(), 3);
}

#[tokio::test]
async fn a_checkpoint_is_found_in_its_run_or_is_none() {
    let server = server().await;
    Mock::given(method("GET"))
        .and(path("/api/v1/training_runs/S1:train:0/checkpoints"))
        .respond_with(ok(json!({"checkpoints": [checkpoint(1), checkpoint(2)]})))
        .mount(&server)
        .await;
    let rest = service(&server).rest_client();
    let get = async |text: &str| rest.get_checkpoint(&text.parse().unwrap()).await;

    let found = get("tinker://S1:train:0/weights/0002").await.unwrap();
    let none = get("tinker://S1:train:0/weights/0003").await.unwrap();
    let error = get("tinker://S9:train:0/weights/0001").await.unwrap_err();

    assert!(found.is_some() && none.is_none());
    assert_eq!(error.kind(), Some(&ErrorKind::NotFound));
}

/// The same; every tenth is of a kind that this client does not know.
fn page_of_tomorrow(request: &Request) -> wiremock::ResponseTemplate {
    let query: std::collections::HashMap<_, _> = request.url.query_pairs().collect();
    let (offset, limit): (u64, u64) = (
        query["offset"].parse().unwrap(),
        query["limit"].parse().unwrap(),
    );
    let row = |n| match n % 10 {
        0 => json!({"checkpoint_id": "merged/a", "checkpoint_type": "merged"}),
        _ => checkpoint(n),
    };
    let rows: Vec<Value> = (offset..130.min(offset + limit)).map(row).collect();
    ok(json!({"checkpoints": rows}))
}

#[tokio::test]
async fn checkpoints_of_unknown_kinds_do_not_end_a_list() {
    let server = server().await;
    Mock::given(method("GET"))
        .and(path("/api/v1/checkpoints"))
        .respond_with(page_of_tomorrow)
        .mount(&server)
        .await;

    let rest = service(&server).rest_client();
    let all = rest.list_all_user_checkpoints(None).await.unwrap();

    assert_eq!(all.len(), 117);
    assert_eq!(requests(&server, "checkpoints").await.len(), 2);
}
