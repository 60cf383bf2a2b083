//! `tinker chat` over a long silence.

use std::process::Stdio;

use crate::support::{Home, Running};

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
}
