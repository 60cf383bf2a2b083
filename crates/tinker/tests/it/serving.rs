//! `tinker serve`: the lines it prints, the key it asks for, its status and its end.

use std::net::TcpListener;
use std::process::Command;

use serde_json::Value;

use crate::support::{Home, Running, pirate};

/// Starts `tinker serve` on any port and reads its two lines.
fn serve(home: &Home, flags: &[&str]) -> (Running, String, String) {
    let mut server = home.start(&[&["serve", "--port", "0"], flags].concat());
    let url = server.stdout_line();
    let key = server.stdout_line();
    let value = |line: &str, name: &str| {
        let value = line.trim_end().strip_prefix(&format!("export {name}="));
        value.unwrap_or_else(|| panic!("{line}")).to_owned()
    };
    (
        server,
        value(&url, "TINKER_BASE_URL"),
        value(&key, "TINKER_API_KEY"),
    )
}

#[test]
fn serve_prints_what_a_client_needs_and_stops_when_asked() {
    let home = Home::new();

    let (server, url, key) = serve(&home, &[]);
    let mut command = home.command(&["model", "list", "--json"]);
    command
        .env("TINKER_BASE_URL", &url)
        .env("TINKER_API_KEY", &key);
    let models = crate::support::finish(command).ok().json();
    let stopped = home.run(&["serve", "stop"]).ok().stdout;

    assert_eq!(models["models"][0]["model_name"], "tinker/nano");
    assert!(stopped.starts_with("stopped the server"), "{stopped}");
    assert_eq!(server.finish().code, 0);
    assert_eq!(home.status()["running"], false);
}

#[test]
fn a_model_directory_is_offered_and_trained_under_the_name_it_is_given() {
    let home = Home::new();
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano");
    let offer = format!("Qwen/Qwen3-8B={dir}");

    let twice = home.run(&["serve", "--model", &offer, "--model", &offer]);
    let (server, url, key) = serve(&home, &["--model", &offer]);
    let mut command = home.command(&["model", "list", "--json"]);
    command
        .env("TINKER_BASE_URL", &url)
        .env("TINKER_API_KEY", &key);
    let models = crate::support::finish(command).ok().json();
    let (data, model) = (pirate(), ["--local", "--model", "Qwen/Qwen3-8B"]);
    let flags = ["--max-steps", "1", "--lr", "1e-3", "--eval-every", "0"];
    let train = ["train", "sft", &data, "--json"];
    let trained = home.run(&[train.as_slice(), &model, &flags].concat());
    home.run(&["serve", "stop"]).ok();

    assert_eq!(twice.code, 2, "{twice:?}");
    assert!(
        twice
            .stderr
            .contains("two models are named `Qwen/Qwen3-8B`"),
        "{twice:?}"
    );
    assert_eq!(models["models"][1]["model_name"], "Qwen/Qwen3-8B");
    assert!(trained.ok().json()["sampler_path"].is_string());
    assert_eq!(server.finish().code, 0);
}

#[test]
fn a_backup_is_a_data_directory_that_a_server_starts_from() {
    let (home, place) = (Home::new(), tempfile::TempDir::new().unwrap());
    // Relative, and with a slash at the end.
    let dirs = ["while it runs", "after it left/"];
    let back_up = |i: usize| {
        let mut command = home.command(&["serve", "backup", dirs[i], "--json"]);
        command.current_dir(place.path());
        crate::support::finish(command)
    };
    let (server, _url, key) = serve(&home, &["--max-disk", "20GB"]);
    let backed_up = back_up(0).ok().json();
    home.run(&["serve", "stop"]).ok();
    assert_eq!(server.finish().code, 0);
    back_up(1).ok();
    let again = back_up(1);

    assert!(backed_up["files"].as_u64().unwrap() > 1, "{backed_up}");
    assert_eq!(backed_up["damaged"], serde_json::json!([]));
    assert_eq!(again.code, 4, "{again:?}");
    assert!(again.stderr.contains("is there already"), "{again:?}");
    for dir in &dirs {
        let mut command = home.command(&["serve", "--port", "0"]);
        command.env("TINKER_HOME", place.path().join(dir));
        let mut server = Running::new(command);
        server.stdout_line();
        let expected = format!("export TINKER_API_KEY={key}");
        assert_eq!(server.stdout_line().trim_end(), expected);
        server.interrupt();
        assert_eq!(server.finish().code, 0);
    }
}

#[test]
fn a_second_interrupt_ends_the_server_at_once() {
    use std::io::Write as _;
    let home = Home::new();
    let (mut server, url, key) = serve(&home, &[]);
    let addr = url.strip_prefix("http://").unwrap();
    // A request whose body never comes holds up the orderly end.
    let mut held = std::net::TcpStream::connect(addr).unwrap();
    write!(
        held,
        "POST /api/v1/create_session HTTP/1.1\r\nHost: {addr}\r\nX-API-Key: {key}\r\n\
         Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
    )
    .unwrap();
    // Answered after the request before it was read.
    home.run(&["serve", "status"]).ok();

    server.interrupt();
    server.wait_for("Ctrl-C again leaves at once");
    server.interrupt();

    let finished = server.finish();
    assert_eq!(finished.code, 130, "{finished:?}");
    assert!(
        finished.stderr.contains("error: left at once"),
        "{finished:?}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn the_server_may_open_more_files_than_its_shell_gave_it() {
    let home = Home::new();
    let tinker = home.command(&[]);
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", "ulimit -S -n 200 && exec \"$0\" serve --port 0"])
        .arg(tinker.get_program())
        .env_clear()
        .envs(
            tinker
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );

    let mut server = Running::new(shell);
    server.stdout_line();

    let sign = std::fs::read(home.path("home/server/server.json")).unwrap();
    let pid = serde_json::from_slice::<Value>(&sign).unwrap()["pid"].clone();
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let mut numbers = line.unwrap().split_whitespace();
    let (soft, hard) = (numbers.next().unwrap(), numbers.next().unwrap());
    assert_eq!(soft, hard);
    assert_ne!(soft, "200");
}

#[test]
fn the_key_of_the_environment_is_the_key_asked_for() {
    let home = Home::new();
    let mut command = home.command(&["serve", "--port", "0"]);
    command.env("TINKER_API_KEY", "tml-of-my-own");
    let mut server = Running::new(command);

    let url = server.stdout_line();
    let key = server.stdout_line();
    let refused = home.run_with_key(&["model", "list", "--base-url", url_of(&url)], "tml-other");

    assert_eq!(key, "export TINKER_API_KEY=tml-of-my-own\n");
    refused.failed(3, "", "hint: check TINKER_API_KEY");
}

fn url_of(line: &str) -> &str {
    line.trim_end()
        .strip_prefix("export TINKER_BASE_URL=")
        .unwrap()
}

#[test]
fn a_server_is_trained_on_by_its_address() {
    let home = Home::new();
    let elsewhere = Home::new();
    let (_server, url, key) = serve(&elsewhere, &[]);
    let data = pirate();
    let flags = ["--max-steps", "2", "--batch-size", "4", "--eval-every", "0"];
    let args = [
        &["train", "sft", &data, "--base-url", &url],
        flags.as_slice(),
    ]
    .concat();

    let unknown = home.run_with_key(&[args.as_slice(), &["-m", "Qwen/None"]].concat(), &key);
    let finished = home.run_with_key(&args, &key).ok();
    let runs = home.run_with_key(&["run", "list", "--json", "--base-url", &url], &key);

    unknown.failed(
        5,
        "the tokenizer of `Qwen/None` is not on this machine",
        "--tokenizer DIR",
    );
    assert!(
        finished
            .stderr
            .contains(&format!("sample --base-url {url} -m tinker://"))
    );
    assert_eq!(runs.ok().json()["runs"].as_array().unwrap().len(), 1);
    assert_eq!(
        home.status()["running"],
        false,
        "the embedded server is not needed"
    );
}

#[test]
fn a_model_that_the_server_lacks_is_answered_with_those_it_has() {
    let home = Home::new();
    let elsewhere = Home::new();
    let (_server, url, key) = serve(&elsewhere, &[]);
    let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano");
    let data = pirate();
    let args = ["train", "sft", &data, "--base-url", &url, "-m", "Qwen/None"];

    let finished = home.run_with_key(
        &[&args, ["--tokenizer", tokenizer].as_slice()].concat(),
        &key,
    );

    finished.failed(
        5,
        "the server has no base model `Qwen/None`",
        "hint: it has: tinker/nano",
    );
}

#[test]
fn an_address_where_nobody_answers_is_said_so() {
    let home = Home::new();

    let finished = home.run_with_key(
        &["run", "list", "--base-url", "http://127.0.0.1:1"],
        "tml-x",
    );

    assert!(
        finished
            .stderr
            .contains("warning: the server cannot be reached"),
        "{finished:?}"
    );
    finished.failed(1, "", "hint: check the address and whether the server runs");
}

#[test]
fn a_server_without_the_endpoint_is_told_from_a_missing_thing() {
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer_not_found(&mut stream.unwrap());
        }
    });

    let finished = home.run_with_key(&["model", "list", "--base-url", &url], "tml-x");

    finished.failed(6, "", "");
}

/// What the common Python framework says of a path it does not know.
fn answer_not_found(stream: &mut std::net::TcpStream) {
    use std::io::{Read as _, Write as _};
    let mut request = [0; 4096];
    let _ = stream.read(&mut request).unwrap();
    let body = r#"{"detail":"Not Found"}"#;
    let head = "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nConnection: close";
    write!(
        stream,
        "{head}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
}

#[test]
fn status_tells_where_it_is_and_not_its_key() {
    let home = Home::new();
    let (_server, url, key) = serve(&home, &[]);

    let status = home.run(&["serve", "status"]).ok();
    let exports = home.run(&["serve", "status", "--export"]).ok();

    assert!(status.stdout.contains(&url), "{status:?}");
    assert!(!status.stdout.contains(&key), "{status:?}");
    assert_eq!(
        exports.stdout,
        format!("export TINKER_BASE_URL={url}\nexport TINKER_API_KEY={key}\n")
    );
}

#[test]
fn a_second_server_on_the_same_data_is_refused() {
    let home = Home::new();
    let (_server, ..) = serve(&home, &[]);

    let second = home.run(&["serve", "--port", "0"]);

    second.failed(4, "data directory", "tinker serve stop");
}

#[test]
fn a_port_in_use_is_a_conflict() {
    let home = Home::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();

    let finished = home.run(&["serve", "--port", &port]);

    finished.failed(4, &format!("port {port} of 127.0.0.1 is taken"), "--port");
}

#[test]
fn other_machines_are_let_in_only_with_keys() {
    let home = Home::new();
    let flags = ["serve", "--port", "0", "--host", "0.0.0.0"];

    let refused = home.run(&flags);
    let of_the_service = home.run_with_key(&flags, "tml-x");
    home.run(&["serve", "keys", "add", "ann"]).ok();
    let (server, url, _key) = serve(&home, &["--host", "0.0.0.0"]);

    for finished in [refused, of_the_service] {
        finished.failed(
            2,
            "--host 0.0.0.0 opens the server",
            "hint: make one with `tinker serve keys add NAME`",
        );
    }
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");

    // One for this machine alone would keep it from coming back.
    server.kill();
    home.run(&["model", "list"]).failed(
        4,
        "the server of this data directory has ended; it was open to other machines at 0.0.0.0:",
        "hint: start it again with `tinker serve --port",
    );
}

#[test]
fn keys_are_given_listed_and_taken_away_while_the_server_runs() {
    let home = Home::new();
    let (_server, url, _key) = serve(&home, &[]);
    let elsewhere = Home::new();
    let list = ["run", "list", "--base-url", &url];

    let added = home
        .run(&["serve", "keys", "add", "ann", "--scope", "sample"])
        .ok();
    let key = added.stdout.trim_end();
    let allowed = elsewhere.run_with_key(&list, key);
    let again = home.run(&["serve", "keys", "add", "ann"]);
    let data = pirate();
    let train = ["train", "sft", &data, "--base-url", &url];
    let beyond_scope = elsewhere.run_with_key(&train, key);
    let keys = home.run(&["serve", "keys", "list", "--json"]).ok();
    home.run(&["serve", "keys", "remove", "ann"]).ok();
    let removed = elsewhere.run_with_key(&list, key);

    assert!(added.stderr.contains("the only time"), "{added:?}");
    allowed.ok();
    again.failed(4, "there is a key ann already", "");
    assert_eq!(beyond_scope.code, 3, "{beyond_scope:?}");
    let cause = "cause: API key ann lacks the scope train";
    assert!(beyond_scope.stderr.contains(cause), "{beyond_scope:?}");
    assert_eq!(
        keys.json()["keys"][0]["scopes"],
        serde_json::json!(["sample"])
    );
    assert!(!keys.stdout.contains(key), "{keys:?}");
    removed.failed(3, "", "");
    assert_eq!(home.run(&["serve", "keys", "remove", "ann"]).code, 5);
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named() {
    let home = Home::new();
    // A file where the directory should be: root, who may run the tests, ignores modes.
    home.file("home", "");

    let finished = home.run(&["sample", "-p", "hi"]);

    assert_eq!(finished.code, 1, "{finished:?}");
    assert!(
        finished
            .stderr
            .contains(&home.path("home").display().to_string()),
        "{finished:?}"
    );
    assert!(finished.stderr.contains("TINKER_HOME"), "{finished:?}");
    std::fs::remove_file(home.path("home")).unwrap();
}

#[test]
fn the_embedded_server_starts_when_needed_and_says_so() {
    let home = Home::new();

    let first = home.run(&["model", "list"]).ok();
    let second = home.run(&["model", "list"]).ok();

    assert!(
        first.stderr.contains("started the embedded server (log: "),
        "{first:?}"
    );
    assert_eq!(second.stderr, "");
    assert_eq!(home.status()["running"], true);
}

#[test]
fn a_server_that_does_not_come_up_shows_its_log() {
    let home = Home::new();
    std::fs::create_dir_all(home.path("home/server/tinker.db")).unwrap();

    let finished = home.run(&["model", "list"]);

    finished.failed(
        1,
        "the embedded server ended at its start",
        "hint: the end of its log, ",
    );
}
