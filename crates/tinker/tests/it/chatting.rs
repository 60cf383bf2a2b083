//! `tinker chat` over a long silence, and over the end of its server.

use std::process::Stdio;

use crate::support::{Home, Running};

/// Starts a conversation.
fn chat(home: &Home) -> Running {
    let mut command = home.command(&["chat", "--max-tokens", "4", "--temperature", "0"]);
    command.stdin(Stdio::piped());
    let mut chat = Running::new(command);
    chat.wait_for("talking to tinker/nano");
    chat
}

#[test]
fn a_conversation_goes_on_after_its_server_died() {
    let home = Home::new();
    let mut server = home.start(&["serve", "--port", "0"]);
    server.stdout_line();
    let mut chat = chat(&home);

    chat.say("Hello!");
    let first = chat.stdout_line();
    server.kill();
    chat.say("/reset");
    chat.say("Hello!");
    let again = chat.stdout_line();
    let finished = chat.finish().ok();

    assert!(!first.trim().is_empty() && again == first, "{first}{again}");
    assert!(
        finished
            .stderr
            .contains("started the embedded server again"),
        "{finished:?}"
    );
}

#[test]
fn a_conversation_goes_on_where_its_server_moved() {
    let home = Home::new();
    let mut server = home.start(&["serve", "--port", "0"]);
    server.stdout_line();
    let mut chat = chat(&home);

    server.kill();
    let mut elsewhere = home.start(&["serve", "--port", "0"]);
    elsewhere.stdout_line();
    chat.say("Hello!");
    let answer = chat.stdout_line();
    let finished = chat.finish().ok();

    assert!(!answer.trim().is_empty(), "{finished:?}");
    assert_eq!(finished.stderr, "");
}

#[test]
fn a_conversation_outlasts_a_silence_longer_than_the_server_waits() {
    let home = Home::new();
    let mut server = home.start(&["serve", "--port", "0", "--idle-timeout", "2s"]);
    server.stdout_line();
    let mut command = home.command(&["chat", "--max-tokens", "4"]);
    command
        .env("TINKER_HEARTBEAT", "250ms")
        .env("RUST_LOG", "tinker_api=debug")
        .stdin(Stdio::piped());
    let mut chat = Running::new(command);
    chat.wait_for("talking to tinker/nano");

    // Heartbeats are all that the server hears for three seconds.
    for _ in 0..12 {
        chat.wait_for("kept alive");
    }
    chat.say("Hello!");
    let finished = chat.finish().ok();

    assert!(!finished.stdout.trim().is_empty(), "{finished:?}");
    let is_new = finished.stderr.contains("started the embedded server");
    assert!(!is_new, "the server left: {finished:?}");
}
