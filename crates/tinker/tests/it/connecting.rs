//! Which server is asked, with which credential, and what is said when it refuses.

use std::process::Command;

use serde_json::json;

use crate::double::{Answers, Double, answers};
use crate::support::{Finished, Home, finish};

const CONFIG: &str = "POST /api/v1/client/config";
const RUNS: &str = "GET /api/v1/training_runs";
const SECRET: &str = "geheim";

/// A file of stored keys as the official client writes it, with a default key.
fn store(home: &Home, key: &str) -> String {
    std::fs::create_dir_all(home.path(".tinker")).unwrap();
    let record = json!({"type": "manual", "key": key, "name": "laptop"});
    let stored = json!({"version": 1, "default": "7", "keys": {"7": record}});
    home.file(".tinker/credentials.json", &stored.to_string())
}

/// `tinker run list` against the server in the environment.
fn list(home: &Home, url: &str, variables: &[(&str, &str)]) -> Finished {
    finish(list_command(home, url, variables))
}

fn list_command(home: &Home, url: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = home.command(&["run", "list"]);
    command.env("TINKER_BASE_URL", url);
    command.env("PATH", "/usr/bin:/bin");
    command.envs(variables.iter().copied());
    command
}

#[test]
fn credentials_are_taken_in_the_official_order() {
    let home = Home::new();
    store(&home, "tml-stored");
    let key = ("TINKER_API_KEY", "tml-environment");
    let command = ("TINKER_CREDENTIAL_CMD", "echo tml-command");
    let empty = ("TINKER_API_KEY", "");
    let malformed = ("TINKER_API_KEY", "sk-other");
    for (variables, expected) in [
        (&[key, command][..], "tml-environment"),
        (&[empty, command], "tml-command"),
        (&[malformed, command], "tml-command"),
        (&[], "tml-stored"),
    ] {
        let server = Double::start(answers());

        list(&home, &server.url, variables).ok();

        let carried = server.asked();
        assert!(!server.asked_for(RUNS).is_empty());
        assert!(
            carried
                .iter()
                .all(|asked| asked.header("x-api-key") == Some(expected)),
            "{variables:?}: {carried:?}"
        );
    }
}

#[test]
fn a_server_that_insists_is_shown_what_the_command_prints() {
    let mut answers = answers();
    let flags = json!({"pjwt_auth_enabled": true, "credential_default_source": "credential_cmd"});
    answers.insert(CONFIG, (200, flags.to_string()));
    answers.insert(
        "POST /api/v1/auth/token",
        (200, json!({"jwt": "eyJtoken"}).to_string()),
    );
    let server = Double::start(answers);
    let variables = [
        ("TINKER_API_KEY", "tml-environment"),
        ("TINKER_CREDENTIAL_CMD", "echo tml-command"),
    ];

    list(&Home::new(), &server.url, &variables).ok();

    let exchange = server.asked_for("POST /api/v1/auth/token");
    assert_eq!(exchange[0].header("x-api-key"), Some("tml-command"));
    assert_eq!(
        server.asked_for(RUNS)[0].header("x-api-key"),
        Some("eyJtoken")
    );
}

#[test]
fn a_refused_credential_is_named_by_where_it_came_from() {
    let home = Home::new();
    let file = store(&home, &format!("tml-{SECRET}"));
    let key = ("TINKER_API_KEY", "tml-geheim");
    let command = ("TINKER_CREDENTIAL_CMD", "echo tml-geheim");
    let stored = format!("the stored key \"laptop\" in {file}");
    let store_another = format!("store another key in {file}, set TINKER_API_KEY, or use --local");
    for (variables, origin, hint) in [
        (
            &[key][..],
            "TINKER_API_KEY",
            "check TINKER_API_KEY, or use --local",
        ),
        (
            &[command],
            "TINKER_CREDENTIAL_CMD",
            "see what TINKER_CREDENTIAL_CMD prints, or use --local",
        ),
        (&[], &stored, &store_another),
    ] {
        for (status, hint) in [(401, hint), (403, "ask the owner for access, or use a key")] {
            let mut answers = answers();
            answers.insert(CONFIG, (status, json!({"detail": "go away"}).to_string()));
            let server = Double::start(answers);

            let finished = list(&home, &server.url, variables);

            assert!(!finished.stderr.contains(SECRET), "{finished:#?}");
            let said = format!("{status}, credential from {origin}");
            assert!(finished.stderr.contains(&said), "{finished:#?}");
            finished.failed(3, "go away", &format!("hint: {hint}"));
        }
    }
}

#[test]
fn a_credential_that_cannot_be_used_is_named_by_where_it_came_from() {
    let home = Home::new();
    let server = Double::start(answers());
    // {"exp":1600,"iat":1000}
    let expired = "eyJh.eyJleHAiOjE2MDAsImlhdCI6MTAwMH0.geheim";
    let check = |variables: &[(&str, &str)], message: &str, hint: &str| {
        let finished = list(&home, &server.url, variables);
        assert!(!finished.stderr.contains(SECRET), "{finished:#?}");
        finished.failed(3, message, &format!("hint: {hint}"));
    };

    check(
        &[("TINKER_API_KEY", "sk-geheim")],
        "TINKER_API_KEY: API key must start with the tml- prefix",
        "check TINKER_API_KEY, or use --local",
    );
    check(
        &[("TINKER_API_KEY", expired)],
        "TINKER_API_KEY is a token that has expired: give a fresh one",
        "check TINKER_API_KEY, or use --local",
    );
    check(
        &[("TINKER_CREDENTIAL_CMD", "echo geheim")],
        "the credential command printed what is neither a key nor a token",
        "see what TINKER_CREDENTIAL_CMD prints",
    );
    let file = store(&home, "sk-geheim");
    check(
        &[],
        &format!("the stored key \"laptop\" in {file}: API key must start with the tml- prefix"),
        &format!("store another key in {file}"),
    );
    std::fs::write(&file, "{geheim").unwrap();
    check(
        &[],
        &format!("stored credentials {file} are malformed"),
        "mend or remove the file, set TINKER_API_KEY, or use --local",
    );
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    check(
        &[],
        &format!("stored credentials {file} cannot be read: Is a directory"),
        "mend or remove the file, set TINKER_API_KEY, or use --local",
    );
    assert!(server.asked().is_empty());
}

#[test]
fn a_broken_file_of_keys_matters_only_where_one_is_needed() {
    let home = Home::new();
    store(&home, "sk-other");

    home.run(&["run", "list", "--local"]).ok();
    home.run(&["serve", "status"]).ok();
}

#[test]
fn a_gateway_gets_its_headers_and_the_embedded_server_does_not() {
    let home = Home::new();
    let server = Double::start(answers());
    let variables = [
        ("TINKER_API_KEY", "tml-k"),
        ("CLOUDFLARE_ACCESS_CLIENT_ID", "the-id"),
        ("CLOUDFLARE_ACCESS_CLIENT_SECRET", "geheim"),
    ];

    list(&home, &server.url, &variables).ok();

    for asked in server.asked() {
        assert_eq!(
            asked.header("cf-access-client-id"),
            Some("the-id"),
            "{asked:?}"
        );
        assert_eq!(
            asked.header("cf-access-client-secret"),
            Some("geheim"),
            "{asked:?}"
        );
    }
    // A header that cannot be sent matters only where it would be.
    let malformed = [
        ("TINKER_API_KEY", "tml-k"),
        ("CLOUDFLARE_ACCESS_CLIENT_SECRET", "geheim\u{7f}"),
    ];
    let refused = list(&home, &server.url, &malformed);
    assert!(!refused.stderr.contains(SECRET), "{refused:#?}");
    refused.failed(
        2,
        "header \"CF-Access-Client-Secret\" is malformed",
        "hint: ",
    );
    let mut local = home.command(&["run", "list", "--local"]);
    local.envs(malformed);
    finish(local).ok();
}

#[test]
fn sessions_carry_the_project_and_the_labels_of_the_environment() {
    let mut answers = answers();
    let sampler = "POST /api/v1/create_sampling_session";
    answers.insert(
        sampler,
        (400, json!({"detail": "that was enough"}).to_string()),
    );
    let server = Double::start(answers);
    let home = Home::new();
    let mut command = home.command(&["sample", "-p", "hi", "-m", "tinker/nano"]);
    command.envs([
        ("TINKER_API_KEY", "tml-k"),
        ("TINKER_BASE_URL", server.url.as_str()),
        ("TINKER_PROJECT_ID", "project-1"),
        ("TINKER_TAGS", "b, a,b,"),
    ]);

    finish(command).failed(2, "that was enough", "hint: correct the request");

    let sessions = server.asked_for("POST /api/v1/create_session");
    assert_eq!(sessions.len(), 1);
    assert_eq!(sessions[0].body["project_id"], "project-1");
    assert_eq!(sessions[0].body["tags"], json!(["a", "b"]));
    assert!(server.asked_for("POST /api/v1/telemetry").is_empty());
}

#[test]
fn a_malformed_project_is_refused() {
    let home = Home::new();
    let server = Double::start(answers());

    let finished = list(&home, &server.url, &[("TINKER_PROJECT_ID", "a b")]);

    finished.failed(
        2,
        "TINKER_PROJECT_ID=a b: project id \"a b\" holds white space",
        "",
    );
    assert!(server.asked().is_empty());
}

#[test]
fn the_official_words_choose_what_is_logged() {
    let home = Home::new();
    let log_of = |variables: &[(&str, &str)]| {
        let server = Double::start(answers());
        let variables = [&[("TINKER_API_KEY", "tml-geheim")], variables].concat();
        list(&home, &server.url, &variables).ok().stderr
    };

    let debug = log_of(&[("TINKER_LOG", "debug")]);

    assert!(debug.contains("DEBUG"), "{debug}");
    assert!(!debug.contains(SECRET), "{debug}");
    for quiet in [
        &[("TINKER_LOG", "loud")][..],
        &[("TINKER_LOG", "debug"), ("RUST_LOG", "off")],
    ] {
        assert!(!log_of(quiet).contains("DEBUG"), "{quiet:?}");
    }
}

/// `tinker run list` on a server that answers the list so.
fn answered(status: u16, body: &str) -> Finished {
    let mut answers: Answers = answers();
    answers.insert(RUNS, (status, body.to_owned()));
    let server = Double::start(answers);
    list(&Home::new(), &server.url, &[("TINKER_API_KEY", "tml-k")])
}

#[test]
fn every_refusal_of_a_server_has_its_exit_code_and_its_hint() {
    for (status, code, hint) in [
        (400, 2, "correct the request as the message says"),
        (401, 3, "check TINKER_API_KEY"),
        (402, 7, "settle the account's bill"),
        (403, 3, "ask the owner for access"),
        (404, 5, "list what exists and check the name"),
        (405, 6, "use a server that has it"),
        (408, 1, "wait longer"),
        (409, 4, "see what took the name"),
        (410, 1, "submit again"),
        (413, 2, "correct the request"),
        (418, 2, "correct the request"),
        (422, 2, "correct the request"),
        (429, 7, "wait a little"),
        (500, 1, "try again later"),
        (501, 6, "use a server that has it"),
        (503, 1, "try again later"),
    ] {
        let finished = answered(status, r#"{"detail": "no"}"#);

        assert!(
            finished.stderr.contains(&format!(": {status}")),
            "{finished:#?}"
        );
        finished.failed(code, "", &format!("\nhint: {hint}"));
    }
    let missing = answered(404, r#"{"detail": "Not Found"}"#);
    missing.failed(6, "this server cannot", "hint: use a server that has it");
    let nonsense = answered(200, "<html>");
    nonsense.failed(
        1,
        "the answer",
        "hint: check that the address is of such a server",
    );
}
