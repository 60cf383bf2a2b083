//! Keys of other people: what each may do, what it sees, and how much it may take.

use std::path::Path;

use axum::body::Body;
use axum::http::{Method, Request};
use serde_json::{Value, json};
use tempfile::TempDir;
use tinker_server::{KeyLimits, KeyName, Scope, add_key, remove_key};

use crate::harness::{Answer, Harness, TOKEN, create_body, optim};

const WORK: [Scope; 3] = [Scope::Read, Scope::Sample, Scope::Train];

/// A server as one key sees it.
struct As<'a> {
    server: &'a Harness,
    key: String,
}

impl As<'_> {
    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let is_whole = ["/oai", "/anthropic", "/metrics"];
        let path = if is_whole.iter().any(|start| path.starts_with(start)) {
            path.to_owned()
        } else {
            format!("/api/v1{path}")
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "127.0.0.1")
            .header("x-api-key", &self.key)
            .header("content-type", "application/json");
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        self.server.send(request.body(body).unwrap()).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, Some(body)).await
    }

    async fn session(&self) -> String {
        let body = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});
        let answer = self.post("/create_session", body).await;
        assert_eq!(answer.status, 200, "{}", answer.json());
        answer.json()["session_id"].as_str().unwrap().to_owned()
    }

    /// The result of an accepted request.
    async fn result(&self, accepted: Answer) -> Value {
        assert_eq!(accepted.status, 200, "{}", accepted.json());
        let id = accepted.json()["request_id"].clone();
        loop {
            let answer = self
                .post("/retrieve_future", json!({"request_id": id}))
                .await;
            if answer.status != 408 {
                assert_eq!(answer.status, 200, "{}", answer.json());
                return answer.json();
            }
        }
    }

    async fn run(&self, session: &str) -> String {
        let accepted = self.post("/create_model", create_body(session, 0)).await;
        let created = self.result(accepted).await;
        created["model_id"].as_str().unwrap().to_owned()
    }

    /// Saves a checkpoint of a run as its first operation; its path.
    async fn save(&self, run: &str) -> String {
        let body = json!({"model_id": run, "seq_id": 1, "path": "x"});
        let saved = self.result(self.post("/save_weights", body).await).await;
        saved["path"].as_str().unwrap().to_owned()
    }
}

fn name(text: &str) -> KeyName {
    text.parse().unwrap()
}

/// A server that has no other keys yet.
fn open() -> (TempDir, Harness) {
    let home = tempfile::tempdir().unwrap();
    let server = Harness::open(home.path());
    (home, server)
}

fn new_key<'a>(
    server: &'a Harness,
    home: &Path,
    who: &str,
    scopes: &[Scope],
    limits: KeyLimits,
) -> As<'a> {
    let scopes = scopes.iter().copied().collect();
    let key = add_key(home, name(who), scopes, limits).unwrap();
    As {
        server,
        key: key.expose().to_owned(),
    }
}

fn with_key<'a>(server: &'a Harness, home: &Path, who: &str, scopes: &[Scope]) -> As<'a> {
    new_key(server, home, who, scopes, KeyLimits::default())
}

fn with_limits<'a>(server: &'a Harness, home: &Path, limits: KeyLimits) -> As<'a> {
    new_key(server, home, "ann", &WORK, limits)
}

/// Two who may work and have nothing to do with each other.
fn people<'a>(server: &'a Harness, home: &Path) -> [As<'a>; 2] {
    ["ann", "ben"].map(|who| with_key(server, home, who, &WORK))
}

#[tokio::test]
async fn a_key_works_until_it_is_removed_and_so_does_its_token() {
    let (home, server) = open();
    let ann = with_key(&server, home.path(), "ann", &WORK);

    let jwt = ann.post("/auth/token", json!({})).await.json()["jwt"].clone();
    let by_token = As {
        server: &server,
        key: jwt.as_str().unwrap().to_owned(),
    };
    let session = by_token.session().await;
    assert_eq!(ann.get(&format!("/sessions/{session}")).await.status, 200);
    assert_eq!(ann.get("/auth/apikey/me").await.json()["name"], "ann");

    remove_key(home.path(), &name("ann")).unwrap();

    for gone in [&ann, &by_token] {
        assert_eq!(gone.get("/sessions").await.status, 401);
    }

    // Another key of the same name: the old one's token is not for it, and is not renewed.
    let again = with_key(&server, home.path(), "ann", &WORK);
    assert_eq!(again.get("/sessions").await.status, 200);
    for gone in [&ann, &by_token] {
        assert_eq!(gone.get("/sessions").await.status, 401);
        assert_eq!(gone.post("/auth/token", json!({})).await.status, 401);
    }
}

#[tokio::test]
async fn each_scope_opens_its_routes_and_no_others() {
    let (home, server) = open();
    let sample = ("/create_sampling_session", json!({}), Scope::Sample);
    let chat = ("/oai/api/v1/chat/completions", json!({}), Scope::Sample);
    let train = ("/optim_step", json!({}), Scope::Train);
    let copy = ("/copy_weights", json!({}), Scope::Train);

    for own in Scope::ALL {
        let caller = with_key(&server, home.path(), own.as_str(), &[own]);
        assert_eq!(caller.get("/training_runs").await.status, 200, "{own}");
        for (path, body, needed) in [&sample, &chat, &train, &copy] {
            let answer = caller.post(path, body.clone()).await;
            let is_open = own == *needed || own == Scope::Admin;
            assert_eq!(answer.status != 403, is_open, "{own} {path}");
            if !is_open && !path.starts_with("/oai") {
                let text = answer.detail();
                assert!(
                    text.contains(&format!("lacks the scope {needed}")),
                    "{text}"
                );
            }
        }
        for path in ["/metrics", "/audit"] {
            let is_refused = caller.get(path).await.status == 403;
            assert_eq!(is_refused, own != Scope::Admin, "{own}");
        }
        let backup = caller.send(Method::POST, "/backup", None).await;
        let expected = if own == Scope::Admin { 200 } else { 403 };
        assert_eq!(backup.status, expected, "{own}");
    }
}

#[tokio::test]
async fn what_belongs_to_a_key_does_not_exist_for_another() {
    let (home, server) = open();
    let [ann, ben] = people(&server, home.path());
    let session = ann.session().await;
    let run = ann.run(&session).await;
    let path = ann.save(&run).await;
    let own = ben.session().await;
    let bens_run = ben.run(&own).await;
    let sampler =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    let sampler =
        ann.post("/create_sampling_session", sampler).await.json()["sampling_session_id"].clone();
    let checkpoint = format!("/training_runs/{run}/checkpoints/weights/x");

    let lists = [
        ("/training_runs", "training_runs"),
        ("/checkpoints", "checkpoints"),
        ("/sessions", "sessions"),
    ];
    for (list, field) in lists {
        let of = |answer: Answer| answer.json()[field].to_string();
        let (anns, bens) = (of(ann.get(list).await), of(ben.get(list).await));
        assert!(
            anns.contains(&session) && !bens.contains(&session),
            "{list}"
        );
        let all = of(server.get(list).await);
        assert!(
            all.contains(&session),
            "the data directory's own key sees all"
        );
    }
    for hidden in [
        format!("/sessions/{session}"),
        format!("/training_runs/{run}"),
        format!("/training_runs/{run}/checkpoints"),
        format!("{checkpoint}/archive"),
        format!("/samplers/{}", sampler.as_str().unwrap()),
    ] {
        assert_eq!(ben.get(&hidden).await.status, 404, "{hidden}");
    }
    let sample = json!({"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1,
        "sampling_params": {"max_tokens": 1}, "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}});
    for (to, body) in [
        ("/session_heartbeat", json!({"session_id": session})),
        ("/create_model", create_body(&session, 1)),
        ("/optim_step", optim(&run, 2)),
        ("/unload_model", json!({"model_id": run})),
        ("/get_info", json!({"model_id": run})),
        (
            "/retrieve_future",
            json!({"request_id": format!("{run}:op:1")}),
        ),
        (
            "/cancel_future",
            json!({"request_id": format!("{run}:op:1")}),
        ),
        ("/weights_info", json!({"tinker_path": path})),
        ("/asample", sample),
        (
            "/load_weights",
            json!({"session_id": own, "model_seq_id": 3, "path": path, "optimizer": false}),
        ),
    ] {
        let answer = ben.post(to, body).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 404, "{to}: {text}");
    }
    // What a run loads is looked up when its turn comes.
    let load = json!({"model_id": bens_run, "seq_id": 1, "path": path, "optimizer": false});
    let failed = ben.result(ben.post("/load_weights", load).await).await;
    assert!(
        failed["error"]
            .as_str()
            .unwrap()
            .contains("unknown to this server"),
        "{failed}"
    );
    assert_eq!(
        ben.send(Method::DELETE, &checkpoint, None).await.status,
        404
    );
    assert_eq!(ann.get(&format!("{checkpoint}/archive")).await.status, 302);
}

/// Requests that name what belongs to one key; `own_path` is a checkpoint of whoever sends them.
fn naming(of: &Named, own_path: &str) -> Vec<(Method, String, Value)> {
    let Named {
        session,
        run,
        path,
        sampler,
        ..
    } = of;
    let sampled_from = format!("tinker://{run}/sampler_weights/y");
    let chat = json!({"model": sampled_from, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]});
    let futures = json!({"target": {"type": "sampling_session", "sampling_session_id": sampler,
        "cloned_sampler_id": 0}, "prev_cursor": 0, "timeout": 0.0, "retrieved_request_ids": []});
    let post = |path: &str, body| (Method::POST, path.to_owned(), body);
    let of_session = |action: &str| format!("/sessions/{session}/{action}");
    let urls = format!("/training_runs/{run}/checkpoints/external_weights/z/external_weights_urls");
    vec![
        post(
            "/external_weights_upload_finish",
            json!({"upload_id": of.upload}),
        ),
        post("/retrieve_futures", futures),
        post(
            "/join_sampling_session",
            json!({"sampling_session_id": sampler}),
        ),
        post(
            "/copy_weights",
            json!({"source_path": path, "destination_project_id": "p"}),
        ),
        post(
            "/copy_weights",
            json!({"source_path": own_path, "session_id": session, "model_seq_id": 7}),
        ),
        (Method::GET, urls, Value::Null),
        (Method::GET, of_session("trace_export"), Value::Null),
        (
            Method::PUT,
            of_session("project"),
            json!({"project_id": "p"}),
        ),
        post(
            "/oai/api/v1/completions",
            json!({"model": sampled_from, "prompt": "a", "max_tokens": 1}),
        ),
        post("/oai/api/v1/chat/completions", chat.clone()),
        post("/anthropic/api/v1/messages", chat),
        post(
            &of_session("finish"),
            json!({"reason": {"type": "success"}, "detail": null}),
        ),
    ]
}

/// What belongs to a key.
struct Named {
    session: String,
    run: String,
    path: String,
    sampler: Value,
    upload: Value,
}

impl As<'_> {
    async fn named(&self) -> Named {
        let session = self.session().await;
        let run = self.run(&session).await;
        let path = self.save(&run).await;
        let saved = json!({"model_id": run, "seq_id": 2, "path": "y"});
        self.result(self.post("/save_weights_for_sampler", saved).await)
            .await;
        let saved = json!({"model_id": run, "seq_id": 3, "path": "z"});
        self.result(self.post("/save_weights_external", saved).await)
            .await;
        let sampler = json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
        let sampler = self.post("/create_sampling_session", sampler).await.json();
        let upload = json!({"base_model": "tinker/nano", "lora_config": {"rank": 2}});
        let upload = self.post("/external_weights_upload_start", upload).await;
        Named {
            session,
            run,
            path,
            sampler: sampler["sampling_session_id"].clone(),
            upload: upload.json()["upload_id"].clone(),
        }
    }
}

#[tokio::test]
async fn every_route_that_names_a_thing_denies_it_to_a_foreign_key() {
    let (home, server) = open();
    let [ann, ben] = people(&server, home.path());
    let (anns, bens) = (ann.named().await, ben.named().await);

    for (method, path, body) in naming(&anns, &bens.path) {
        let answer = ben.send(method, &path, Some(body)).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 404, "{path}: {text}");
    }
    for (method, path, body) in naming(&anns, &anns.path) {
        let answer = ann.send(method, &path, Some(body)).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_ne!(answer.status, 404, "{path}: {text}");
    }
}

#[tokio::test]
async fn searches_do_not_find_what_belongs_to_another_key() {
    let (home, server) = open();
    let [ann, ben] = people(&server, home.path());
    let named = ann.named().await;

    for owner in [
        json!({"type": "own"}),
        json!({"type": "accessible"}),
        json!({"type": "user", "owner_urns": ["tml:user:ann"]}),
    ] {
        for search in ["/sessions/search", "/checkpoints/search"] {
            let query = json!({"owner": owner});
            let (by_ann, by_ben) = (
                ann.post(search, query.clone()).await,
                ben.post(search, query).await,
            );
            assert_eq!((by_ann.status, by_ben.status), (200, 200), "{search}");
            let is_found = |answer: Answer| answer.json().to_string().contains(&named.session);
            assert!(is_found(by_ann), "{search} {owner}");
            assert!(!is_found(by_ben), "{search} {owner}");
        }
    }
}

#[tokio::test]
async fn a_published_checkpoint_can_be_loaded_with_every_key_and_changed_with_one() {
    let (home, server) = open();
    let [ann, ben] = people(&server, home.path());
    let run = ann.run(&ann.session().await).await;
    let path = ann.save(&run).await;
    let checkpoint = format!("/training_runs/{run}/checkpoints/weights/x");
    let load = |run: &str, seq: u64| json!({"model_id": run, "seq_id": seq, "path": path, "optimizer": false});
    let bens_run = ben.run(&ben.session().await).await;

    let publish = format!("{checkpoint}/publish");
    assert_eq!(ben.send(Method::POST, &publish, None).await.status, 404);
    assert_eq!(ann.send(Method::POST, &publish, None).await.status, 204);

    let loaded = ben
        .result(ben.post("/load_weights", load(&bens_run, 1)).await)
        .await;
    assert_eq!(loaded.get("error"), None, "{loaded}");
    for (method, path) in [
        (Method::DELETE, checkpoint.clone()),
        (Method::DELETE, publish.clone()),
    ] {
        assert_eq!(ben.send(method, &path, None).await.status, 404);
    }
    let ttl = Some(json!({"ttl_seconds": 1}));
    let refused = ben
        .send(Method::PUT, &format!("{checkpoint}/ttl"), ttl)
        .await;
    assert_eq!(refused.status, 404);
    assert!(
        !ben.get("/checkpoints")
            .await
            .json()
            .to_string()
            .contains(&run)
    );
    assert_eq!(ann.send(Method::DELETE, &publish, None).await.status, 204);
    let hidden = ben
        .result(ben.post("/load_weights", load(&bens_run, 2)).await)
        .await;
    assert!(hidden["error"].is_string(), "{hidden}");
}

#[tokio::test]
async fn whose_things_are_outlives_a_restart_and_the_key() {
    let (home, server) = open();
    let ann = with_key(&server, home.path(), "ann", &WORK);
    let run = ann.run(&ann.session().await).await;
    drop(server);
    remove_key(home.path(), &name("ann")).unwrap();

    let server = Harness::open(home.path());
    let ann = with_key(&server, home.path(), "ann", &[Scope::Read]);
    let ben = with_key(&server, home.path(), "ben", &[Scope::Read]);

    let of_run = format!("/training_runs/{run}");
    let owner = ann.get(&of_run).await.json()["model_owner"].clone();
    assert_eq!(owner, "tml:user:ann", "another key of the same name");
    assert_eq!(ben.get(&of_run).await.status, 404);
}

#[tokio::test]
async fn how_much_of_a_prompt_is_cached_tells_nothing_of_another_keys_prompts() {
    let (home, server) = open();
    let [ann, ben] = people(&server, home.path());
    let tokens: Vec<u32> = (0..30).map(|i| 3 + i % 7).collect();
    let mut hits = Vec::new();

    for (number, asker) in [&ann, &ben, &ann, &ben].into_iter().enumerate() {
        let body = json!({"session_id": asker.session().await,
            "sampling_session_seq_id": number, "base_model": "tinker/nano"});
        let sampler = asker.post("/create_sampling_session", body).await.json();
        let body = json!({"sampling_session_id": sampler["sampling_session_id"], "seq_id": 0,
            "num_samples": 1, "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
            "sampling_params": {"max_tokens": 2, "stop": []}});
        let sampled = asker.result(asker.post("/asample", body).await).await;
        hits.push(sampled["prompt_cache_hit_tokens"].as_u64().unwrap_or(0));
    }

    assert_eq!(hits, [0, 0, 29, 29]);
}

#[tokio::test]
async fn the_audit_log_names_the_key() {
    let (home, server) = open();
    let ann = with_key(&server, home.path(), "ann", &WORK);
    let run = ann.run(&ann.session().await).await;
    ann.save(&run).await;
    let publish = format!("/training_runs/{run}/checkpoints/weights/x/publish");
    ann.send(Method::POST, &publish, None).await;

    let entries = server.get("/audit").await.json();

    let entries = entries["entries"].as_array().unwrap().clone();
    for event in ["checkpoint_created", "checkpoint_published"] {
        let found = entries.iter().find(|e| e["event"] == event).unwrap();
        assert_eq!(found["event_details"]["api_key"], "ann", "{event}");
    }
}

#[tokio::test]
async fn what_a_key_queues_beyond_its_limit_is_taken_later() {
    let (home, server) = open();
    let limits = KeyLimits {
        operations: 2,
        ..KeyLimits::default()
    };
    let ann = with_limits(&server, home.path(), limits);
    let run = ann.run(&ann.session().await).await;
    // They wait for operation 1.
    for seq in [2, 3] {
        assert_eq!(ann.post("/optim_step", optim(&run, seq)).await.status, 200);
    }

    let refused = ann.post("/optim_step", optim(&run, 4)).await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, "1"));
    let text = refused.detail();
    assert!(
        text.contains("key ann has 2 unfinished operations, and its limit is 2"),
        "{text}"
    );
    let repeated = ann.post("/optim_step", optim(&run, 3)).await;
    assert_eq!(repeated.status, 200, "it is in the queue already");
    let others = server.run(&server.session().await, 0).await;
    server.result(&server.optim_step(&others, 1).await).await;

    // What everything waits for is taken although the queue is full.
    let accepted = ann.post("/optim_step", optim(&run, 1)).await;
    ann.result(accepted).await;
    let last = json!({"request_id": format!("{run}:op:3")});
    while ann.post("/retrieve_future", last.clone()).await.status == 408 {}
    let accepted = ann.post("/optim_step", optim(&run, 4)).await;
    ann.result(accepted).await;
}

#[tokio::test]
async fn the_bytes_of_a_key_are_bounded() {
    let (home, server) = open();
    let limits = KeyLimits {
        bytes: 10,
        ..KeyLimits::default()
    };
    let ann = with_limits(&server, home.path(), limits);
    // One above the limit is taken where there is nothing else.
    let run = ann.run(&ann.session().await).await;
    assert_eq!(ann.post("/optim_step", optim(&run, 2)).await.status, 200);

    let refused = ann.post("/optim_step", optim(&run, 3)).await;

    assert_eq!(refused.status, 429);
    assert!(
        refused.detail().contains("its limit is 10"),
        "{}",
        refused.detail()
    );
}

#[tokio::test]
async fn sessions_and_adapters_of_a_key_are_bounded() {
    let (home, server) = open();
    let limits = KeyLimits {
        sessions: 2,
        adapters: 1,
        ..KeyLimits::default()
    };
    let ann = with_limits(&server, home.path(), limits);
    let session = ann.session().await;
    let second = ann.session().await;
    let body = json!({"tags": [], "user_metadata": {}, "sdk_version": "t"});

    let third = ann.post("/create_session", body).await;
    assert_eq!((third.status, third.header("retry-after")), (429, "1"));
    assert!(
        third
            .detail()
            .contains("2 open sessions, and its limit is 2")
    );

    let first = ann.run(&session).await;
    assert_eq!(ann.post("/optim_step", optim(&first, 1)).await.status, 200);
    let other = ann.post("/create_model", create_body(&session, 1)).await;
    assert_eq!(other.status, 429, "{}", other.json());
    let repeated = ann.post("/create_model", create_body(&session, 0)).await;
    assert_eq!(repeated.status, 200, "the run that is there");

    let finish = format!("/sessions/{session}/finish");
    let how = json!({"reason": {"type": "success"}, "detail": null});
    assert_eq!(ann.post(&finish, how.clone()).await.status, 204);
    let third = ann.session().await;
    ann.run(&second).await;
    // What was ended does not count, and is not worked with beside what does.
    let sampler =
        json!({"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinker/nano"});
    for (to, body) in [
        ("/optim_step", optim(&first, 2)),
        ("/create_model", create_body(&session, 1)),
        ("/create_sampling_session", sampler),
    ] {
        let refused = ann.post(to, body).await;
        assert_eq!(refused.status, 429, "{to}: {}", refused.json());
        assert!(
            refused.detail().contains("its limit is 2"),
            "{}",
            refused.detail()
        );
    }
    let repeated = ann.post("/optim_step", optim(&first, 1)).await;
    assert_eq!(repeated.status, 200, "it was accepted before the end");
    // Once there is room it is taken up again, and counts.
    ann.post(&format!("/sessions/{third}/finish"), how.clone())
        .await;
    let refused = ann.post("/optim_step", optim(&first, 2)).await;
    assert!(
        refused.detail().contains("1 training runs in open"),
        "{}",
        refused.detail()
    );
    ann.post(&format!("/sessions/{second}/finish"), how.clone())
        .await;
    assert_eq!(ann.post("/optim_step", optim(&first, 2)).await.status, 200);
    let other = ann.post("/create_model", create_body(&second, 1)).await;
    assert_eq!(other.status, 429, "{}", other.json());
    assert_eq!(ann.post(&finish, how).await.status, 204);
    ann.session().await;
    ann.session().await;
    let own = As {
        server: &server,
        key: TOKEN.to_owned(),
    };
    for _ in 0..4 {
        own.session().await;
    }
}
