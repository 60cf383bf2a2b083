//! Keys, commands, stored keys, and the tokens that they are exchanged for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tinker_http::{
    Client, CredentialSources, Credentials, ErrorKind, KeyOrigin, StoredCredentials, StoredKey,
};
use wiremock::MockServer;

use crate::support::*;

const CAPABILITIES: &str = "/api/v1/get_server_capabilities";
const TOKEN: &str = "/api/v1/auth/token";

/// Claims as a token's middle part, unpadded.
fn token(claims: &serde_json::Value) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for part in claims.to_string().as_bytes().chunks(3) {
        let word = part
            .iter()
            .fold(0_u32, |word, b| (word << 8) | u32::from(*b));
        let word = word << (8 * (3 - part.len()));
        for i in 0..=part.len() {
            text.push(DIGITS[(word >> (18 - 6 * i)) as usize & 63].into());
        }
    }
    format!("eyJh.{text}.x")
}

/// A token that expires this many seconds after 1970; the year 2100 is 4102444800.
fn expiring(exp: u64) -> String {
    token(&json!({"exp": exp, "iat": exp - 600}))
}

const FAR: u64 = 4_102_444_800;

fn folder() -> PathBuf {
    let name = format!("tinker-credentials-{}", uuid::Uuid::new_v4());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir(&folder).unwrap();
    folder
}

fn stored(key: &str) -> StoredCredentials {
    let mut stored = StoredCredentials::default();
    let record = StoredKey {
        origin: KeyOrigin::Manual,
        key: key.into(),
        name: "k".into(),
        note: None,
        details: None,
    };
    stored.add("7", record);
    stored.set_default(Some("7")).unwrap();
    stored
}

/// A server that takes capabilities calls.
async fn taking(config: serde_json::Value) -> MockServer {
    let server = server_with(config).await;
    let models = ok(json!({"supported_models": []}));
    script(&server, "GET", CAPABILITIES, [models]).await;
    server
}

fn client_with(server: &MockServer, credentials: Credentials) -> Client {
    builder(&server.uri())
        .credentials(credentials)
        .build()
        .unwrap()
}

/// The credentials that the requests to a route carried.
async fn carried(server: &MockServer, route: &str) -> Vec<String> {
    let all = requests(server, route).await;
    let key = |r: &wiremock::Request| header(r, "x-api-key").unwrap().to_owned();
    all.iter().map(key).collect()
}

/// What the settings call of a client with these sources carries.
async fn used(sources: &CredentialSources) -> Result<String, tinker_http::Error> {
    let server = server().await;
    client_with(&server, sources.resolve()?).config().await?;
    Ok(carried(&server, "/api/v1/client/config").await.remove(0))
}

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[tokio::test]
async fn sources_are_asked_in_the_official_order() {
    let folder = folder();
    let file = folder.join("credentials.json");
    stored("tml-stored").save(&file).unwrap();
    let mut sources = CredentialSources {
        api_key: text("tml-given"),
        environment_key: text("tml-environment"),
        command: text("echo tml-command"),
        stored: Some(file),
    };

    assert_eq!(used(&sources).await.unwrap(), "tml-given");
    sources.api_key = text("");
    assert_eq!(used(&sources).await.unwrap(), "tml-environment");
    sources.environment_key = None;
    assert_eq!(used(&sources).await.unwrap(), "tml-command");
    sources.command = text("");
    assert_eq!(used(&sources).await.unwrap(), "tml-stored");
    sources.stored = None;
    let error = used(&sources).await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Unauthenticated);
    assert!(
        error.to_string().contains("TINKER_CREDENTIAL_CMD"),
        "{error}"
    );
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_malformed_key_gives_way_to_the_command_and_to_nothing_else() {
    let folder = folder();
    let file = folder.join("credentials.json");
    stored("tml-stored").save(&file).unwrap();
    let mut sources = CredentialSources {
        environment_key: text("sk-other"),
        command: text("echo tml-command"),
        stored: Some(file),
        ..CredentialSources::default()
    };

    assert_eq!(used(&sources).await.unwrap(), "tml-command");
    sources.command = None;
    let error = used(&sources).await.unwrap_err();

    assert_eq!(
        error.to_string(),
        "TINKER_API_KEY: API key must start with the tml- prefix"
    );
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_refusal_says_where_the_credential_came_from_and_not_what_it_is() {
    let folder = folder();
    let file = folder.join("credentials.json");
    stored("tml-geheim").save(&file).unwrap();
    let in_file = format!("the stored key \"k\" in {}", file.display());
    let sources = |api_key, environment_key, command, stored| CredentialSources {
        api_key,
        environment_key,
        command,
        stored,
    };
    let key = || text("tml-geheim");
    for (sources, origin, said) in [
        (sources(key(), None, None, None), "the API key", None),
        (
            sources(None, key(), None, None),
            "TINKER_API_KEY",
            Some("TINKER_API_KEY"),
        ),
        (
            sources(None, None, text("echo tml-geheim"), None),
            "TINKER_CREDENTIAL_CMD",
            Some("TINKER_CREDENTIAL_CMD"),
        ),
        (
            sources(None, None, None, Some(file.clone())),
            &in_file,
            Some(&in_file),
        ),
    ] {
        for (status_code, kind) in [
            (401, ErrorKind::Unauthenticated),
            (403, ErrorKind::PermissionDenied),
        ] {
            let server = MockServer::start().await;
            script(
                &server,
                "POST",
                "/api/v1/client/config",
                [status(status_code)],
            )
            .await;
            let client = client_with(&server, sources.resolve().unwrap());

            let error = client.config().await.unwrap_err();

            assert_eq!(*error.kind(), kind);
            assert_eq!(error.credential_origin().unwrap().to_string(), origin);
            let shown = error.to_string();
            let said = said.map(|origin| format!("{status_code}, credential from {origin}"));
            assert_eq!(
                shown.contains(", credential from "),
                said.is_some(),
                "{shown}"
            );
            assert!(said.is_none_or(|said| shown.contains(&said)), "{shown}");
            assert!(
                !format!("{shown} {error:?}").contains("geheim"),
                "{error:?}"
            );
        }
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn a_server_that_insists_refuses_what_the_command_printed() {
    let flags = json!({"pjwt_auth_enabled": true, "credential_default_source": "credential_cmd"});
    let server = taking(flags).await;
    script(&server, "POST", TOKEN, [status(401)]).await;
    let sources = CredentialSources {
        environment_key: text("tml-k"),
        ..commanded("echo tml-command")
    };

    let client = client_with(&server, sources.resolve().unwrap());
    let error = client.get_server_capabilities().await.unwrap_err();

    let origin = error.credential_origin().unwrap().to_string();
    assert_eq!(origin, "TINKER_CREDENTIAL_CMD", "{error}");
}

#[tokio::test]
async fn nothing_is_found_where_nothing_is_and_a_broken_file_is_no_absence() {
    let folder = folder();
    let file = folder.join("credentials.json");
    let sources = CredentialSources {
        stored: Some(file.clone()),
        ..CredentialSources::default()
    };

    assert_eq!(sources.find().unwrap(), None);
    std::fs::write(&file, "{").unwrap();
    let error = sources.find().unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::File);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn an_expired_token_fails_before_anything_is_sent() {
    let server = server().await;
    let sources = CredentialSources {
        api_key: text(&expiring(1_000_000)),
        ..CredentialSources::default()
    };

    let client = client_with(&server, sources.resolve().unwrap());
    let error = client.config().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Unauthenticated);
    assert!(error.to_string().contains("has expired"), "{error}");
    assert!(server.received_requests().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_token_that_is_still_good_is_sent_as_it_is() {
    let jwt = expiring(FAR);
    let sources = CredentialSources {
        api_key: text(&jwt),
        ..CredentialSources::default()
    };

    assert_eq!(used(&sources).await.unwrap(), jwt);
}

fn commanded(command: &str) -> CredentialSources {
    CredentialSources {
        command: text(command),
        ..CredentialSources::default()
    }
}

#[tokio::test]
async fn what_a_command_prints_must_be_a_credential_and_is_never_shown() {
    let expired = format!("echo {}", expiring(1_000_000));
    for (command, part) in [
        ("true", "printed nothing"),
        (
            "echo geheim >&2; exit 3",
            "printed nothing (exit status: 3)",
        ),
        ("echo geheim", "printed what is neither a key nor a token"),
        (expired.as_str(), "printed a token that has expired"),
        ("yes geheim", "printed more than 64 KiB"),
    ] {
        let sources = commanded(command);
        assert!(!format!("{sources:?} {:?}", sources.resolve()).contains("geheim"));

        let error = used(&sources).await.unwrap_err();

        assert_eq!(*error.kind(), ErrorKind::Unauthenticated, "{command}");
        let shown = format!("{error} {error:?}");
        assert!(shown.contains(part) && !shown.contains("geheim"), "{shown}");
    }
}

#[tokio::test]
async fn the_command_runs_for_every_exchange() {
    let folder = folder();
    let count = folder.join("n");
    let command = format!(
        "echo x >> {0}; echo tml-$(wc -l < {0} | tr -d ' ')",
        count.display()
    );
    let server = taking(json!({"pjwt_auth_enabled": true})).await;
    let tokens = ["a", "b"].map(|name| ok(json!({"jwt": token(&json!({"sub": name}))})));
    script(&server, "POST", TOKEN, tokens).await;

    let client = client_with(&server, commanded(&command).resolve().unwrap());
    client.get_server_capabilities().await.unwrap();

    assert_eq!(carried(&server, "/api/v1/client/config").await, ["tml-1"]);
    assert_eq!(carried(&server, TOKEN).await, ["tml-2"]);
    std::fs::remove_dir_all(folder).unwrap();
}

/// A server that takes nothing but short-lived credentials.
async fn insisting() -> MockServer {
    let flags = json!({"pjwt_auth_enabled": true, "credential_default_source": "credential_cmd"});
    let server = taking(flags).await;
    script(&server, "POST", TOKEN, [ok(json!({"jwt": expiring(FAR)}))]).await;
    server
}

#[tokio::test]
async fn a_server_may_insist_on_the_command_unless_the_key_is_a_token() {
    let jwt = expiring(FAR);
    for (key, expected) in [("tml-k", "tml-command"), (jwt.as_str(), jwt.as_str())] {
        let server = insisting().await;
        let sources = CredentialSources {
            api_key: text(key),
            ..commanded("echo tml-command")
        };

        let client = client_with(&server, sources.resolve().unwrap());
        client.get_server_capabilities().await.unwrap();

        assert_eq!(carried(&server, TOKEN).await, [expected]);
    }
}

#[tokio::test]
async fn a_key_alone_does_not_satisfy_a_server_that_insists() {
    let server = insisting().await;

    let error = client(&server).get_server_capabilities().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Unauthenticated);
    assert!(
        error.to_string().contains("TINKER_CREDENTIAL_CMD"),
        "{error}"
    );
    assert!(requests(&server, TOKEN).await.is_empty());
}

#[tokio::test]
async fn many_calls_at_once_cost_one_exchange() {
    let server = taking(json!({"pjwt_auth_enabled": true})).await;
    script(&server, "POST", TOKEN, [ok(json!({"jwt": expiring(FAR)}))]).await;
    let client = client(&server);

    let calls = (0..20).map(|_| client.get_server_capabilities());
    for outcome in futures_util::future::join_all(calls).await {
        outcome.unwrap();
    }

    assert_eq!(requests(&server, TOKEN).await.len(), 1);
}

#[tokio::test]
async fn many_refusals_of_one_token_cost_one_exchange_and_one_replay_each() {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let (old, new) = (expiring(FAR), expiring(FAR + 1));
    let tokens = [&old, &new].map(|jwt| ok(json!({"jwt": jwt})));
    script(&server, "POST", TOKEN, tokens).await;
    let refused = status(401).insert_header("www-authenticate", "Bearer error=\"invalid_token\"");
    let is_old = old.clone();
    wiremock::Mock::given(wiremock::matchers::path(CAPABILITIES))
        .respond_with(move |request: &wiremock::Request| {
            match header(request, "x-api-key") == Some(is_old.as_str()) {
                true => refused.clone(),
                false => ok(json!({"supported_models": []})),
            }
        })
        .mount(&server)
        .await;
    let client = client(&server);

    let calls = (0..5).map(|_| client.get_server_capabilities());
    for outcome in futures_util::future::join_all(calls).await {
        outcome.unwrap();
    }

    assert_eq!(requests(&server, TOKEN).await.len(), 2);
    let carried = carried(&server, CAPABILITIES).await;
    let n_old = carried.iter().filter(|jwt| **jwt == old).count();
    assert_eq!((carried.len(), n_old), (10, 5));
}

#[tokio::test]
async fn a_token_that_is_refused_twice_is_an_error() {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    script(&server, "POST", TOKEN, [ok(json!({"jwt": expiring(FAR)}))]).await;
    let refused = status(401).insert_header("www-authenticate", "Bearer error=\"invalid_token\"");
    script(&server, "GET", CAPABILITIES, [refused]).await;

    let error = client(&server).get_server_capabilities().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Unauthenticated);
    assert_eq!(requests(&server, CAPABILITIES).await.len(), 2);
}

#[tokio::test]
async fn a_401_that_does_not_name_the_token_is_not_replayed() {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    script(&server, "POST", TOKEN, [ok(json!({"jwt": expiring(FAR)}))]).await;
    script(&server, "GET", CAPABILITIES, [status(401)]).await;

    client(&server).get_server_capabilities().await.unwrap_err();

    assert_eq!(requests(&server, CAPABILITIES).await.len(), 1);
}

#[tokio::test]
async fn a_token_is_replaced_beside_the_calls_half_way_through_its_life() {
    let server = taking(json!({"pjwt_auth_enabled": true})).await;
    // A fifth of a second: replaced after a tenth.
    let short = token(&json!({"exp": 1000.2, "iat": 1000.0}));
    let tokens = [short, expiring(FAR)].map(|jwt| ok(json!({"jwt": jwt})));
    script(&server, "POST", TOKEN, tokens).await;
    let client = client(&server);
    client.get_server_capabilities().await.unwrap();

    // No call is made: the keeper alone asks.
    let renewed = async {
        while requests(&server, TOKEN).await.len() < 2 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), renewed)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_keeper_ends_with_the_client() {
    let server = taking(json!({"pjwt_auth_enabled": true})).await;
    let short = token(&json!({"exp": 1000.2, "iat": 1000.0}));
    script(&server, "POST", TOKEN, [ok(json!({"jwt": short}))]).await;
    let client = client(&server);
    client.get_server_capabilities().await.unwrap();
    let n_tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let with_keeper = n_tasks();

    drop(client);

    let ended = async {
        while n_tasks() >= with_keeper {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended)
        .await
        .unwrap();
}

#[tokio::test]
async fn whoami_reads_the_token_and_asks_no_endpoint() {
    let server = server_with(json!({"pjwt_auth_enabled": true})).await;
    let claims = json!({"exp": FAR, "iat": FAR - 600, "sub": "u1", "org_id": "o1", "email": ""});
    script(&server, "POST", TOKEN, [ok(json!({"jwt": token(&claims)}))]).await;

    let who = client(&server).whoami().await.unwrap();

    assert_eq!(
        (who.user_urn.as_str(), who.org_urn.as_str()),
        ("u1", "tml:organization:o1")
    );
    assert_eq!(who.email, None);
    let paths: Vec<String> = server
        .received_requests()
        .await
        .unwrap()
        .iter()
        .map(|request| request.url.path().to_owned())
        .collect();
    let setup = [
        "/api/v1/client/config",
        TOKEN,
        "/api/v1/client/dynamic_config",
    ];
    assert_eq!(paths, setup);
}

#[tokio::test]
async fn whoami_without_tokens_needs_a_credential_that_says() {
    let user = json!({"exp": FAR, "sub": "u1", "org_id": "o1", "iss": "passport-x"});
    let other = json!({"exp": FAR, "sub": "u1", "org_id": "o1", "iss": "elsewhere"});
    for (key, expected) in [
        (token(&user), Ok("u1".to_owned())),
        (token(&other), Err(ErrorKind::Unsupported)),
        ("tml-k".to_owned(), Err(ErrorKind::Unsupported)),
    ] {
        let sources = CredentialSources {
            api_key: Some(key),
            ..CredentialSources::default()
        };
        let client = client_with(&server().await, sources.resolve().unwrap());

        let who = client.whoami().await;

        let who = who.map(|who| who.user_urn).map_err(|e| e.kind().clone());
        assert_eq!(who, expected);
    }
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn stored_keys_are_for_their_owner_alone_and_written_whole() {
    let folder = folder();
    let file = folder.join("new").join("credentials.json");

    stored("tml-a").save(&file).unwrap();
    stored("tml-b").save(&file).unwrap();

    assert_eq!((mode(file.parent().unwrap()), mode(&file)), (0o700, 0o600));
    let read = StoredCredentials::load(&file).unwrap();
    assert_eq!(read.default_key().unwrap().key, "tml-b");
    assert!(!format!("{read:?}").contains("tml-b"));
    let left: Vec<_> = std::fs::read_dir(file.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_official_file_is_read_and_written_alike() {
    let folder = folder();
    let file = folder.join("credentials.json");
    let details = json!({"org_details": {"name": "Org"}, "user_details": {"email": "a@b"}});
    let official = json!({
        "version": 1,
        "default": "7",
        "keys": {
            "7": {"type": "manual", "key": "tml-a", "name": "k", "note": "n", "details": details},
            "8": {"type": "generated", "key": "tml-b", "name": "l", "details": details},
        },
    });
    std::fs::write(&file, official.to_string()).unwrap();

    let mut stored = StoredCredentials::load(&file).unwrap();
    assert_eq!(stored.key("8").unwrap().origin, KeyOrigin::Generated);
    stored.save(&file).unwrap();
    let again: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();

    assert_eq!(again, official);
    assert_eq!(stored.default_id(), Some("7"));
    stored.remove("7").unwrap();
    assert!(stored.default_key().is_none() && stored.default_id().is_none());
    assert!(stored.set_default(Some("7")).is_err());
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn damaged_and_foreign_files_are_refused_without_their_content() {
    let folder = folder();
    let file = folder.join("credentials.json");
    for (content, part) in [
        ("{\"keys\": \"tml-geheim\"", "are malformed"),
        (
            "{\"version\": 1, \"keys\": {\"7\": \"tml-geheim\"}}",
            "are malformed",
        ),
        ("{\"version\": 2, \"keys\": {}}", "are of version 2, not 1"),
    ] {
        std::fs::write(&file, content).unwrap();

        let error = StoredCredentials::load(&file).unwrap_err();

        let shown = format!("{error} {error:?}");
        assert!(shown.contains(part) && !shown.contains("geheim"), "{shown}");
    }
    assert_eq!(
        StoredCredentials::load(&folder.join("absent")).unwrap(),
        StoredCredentials::default()
    );
    std::fs::remove_dir_all(folder).unwrap();
}
