//! The embedded server dies, moves or is stopped while a command trains on it.

use rustix::process::Signal;

use crate::support::{Home, Running, pirate, short, signal};

#[test]
fn a_server_killed_in_training_is_started_again_and_nothing_is_lost() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();
    let mut running = home.start(&short(&data, &["--run", "hit"]));

    running.wait_for("step 3/24");
    let pid = home.status()["pid"].as_u64().unwrap();
    signal(u32::try_from(pid).unwrap(), Signal::KILL);
    running.wait_for("the embedded server has ended; starting it again");
    let finished = running.finish().ok();

    assert!(
        home.adapter(&whole) == home.adapter(&finished),
        "the adapters differ"
    );
}

#[test]
fn a_server_stopped_in_training_is_let_go() {
    let home = Home::new();
    let data = pirate();
    let mut running = home.start(&short(&data, &["--run", "left"]));

    running.wait_for("step 3/24");
    home.run(&["serve", "stop"]).ok();
    let finished = running.finish();

    assert_eq!(home.status()["running"], false);
    finished.failed(
        1,
        "the embedded server was stopped while it was needed",
        "hint: go on with: ",
    );
}

#[test]
fn a_server_that_comes_back_elsewhere_is_followed_and_nothing_is_lost() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();
    let mut running = home.start(&short(&data, &["--run", "moved"]));
    running.wait_for("step 3/24");

    // Paused, the command cannot start one before we do.
    let paused = running.pause();
    signal(home.server_pid(), Signal::KILL);
    let mut server = home.start(&["serve", "--port", "0"]);
    let url = server.stdout_line();
    drop(paused);
    running.wait_for("the embedded server has moved to http://127.0.0.1:");
    let finished = running.finish().ok();

    assert!(url.starts_with("export TINKER_BASE_URL="), "{url}");
    assert!(
        home.adapter(&whole) == home.adapter(&finished),
        "the adapters differ"
    );
}

#[test]
fn a_server_with_another_key_is_not_followed() {
    let home = Home::new();
    let data = pirate();
    let mut running = home.start(&short(&data, &["--run", "other"]));
    running.wait_for("step 3/24");

    let paused = running.pause();
    signal(home.server_pid(), Signal::KILL);
    let mut command = home.command(&["serve", "--port", "0"]);
    command.env("TINKER_API_KEY", "tml-another");
    let mut server = Running::new(command);
    server.stdout_line();
    drop(paused);
    let finished = running.finish();

    finished.failed(
        1,
        "the embedded server is another one now, at http://127.0.0.1:",
        "hint: go on with: ",
    );
}

#[test]
fn a_server_that_keeps_dying_is_given_up() {
    let home = Home::new();
    let data = pirate();
    let mut running = home.start(&short(&data, &["--run", "sick"]));
    running.wait_for("step 3/24");

    let paused = running.pause();
    let pid = home.server_pid();
    signal(pid, Signal::KILL);
    // None can start on a directory where the database should be.
    let database = home.path("home/server/tinker.db");
    std::fs::remove_file(&database).unwrap();
    std::fs::create_dir(&database).unwrap();
    drop(paused);
    let finished = running.finish();

    let n_starts = finished.stderr.matches("starting it again").count();
    assert_eq!(n_starts, 5, "{finished:#?}");
    finished.failed(
        1,
        "the embedded server ended 5 times in a row",
        "hint: go on with: ",
    );
}

#[test]
fn a_server_started_again_offers_the_models_it_offered() {
    let home = Home::new();
    let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano");
    let model = std::fs::canonicalize(nano).unwrap().display().to_string();
    let mut server = home.start(&["serve", "--port", "0", "--model", nano, "--threads", "1"]);
    server.stdout_line();
    let before = home.run(&["model", "list", "--json"]).ok().json();
    let data = pirate();
    let mut running = home.start(&short(&data, &[]));

    running.wait_for("step 3/24");
    server.kill();
    running.wait_for("the embedded server has ended; starting it again");
    running.finish().ok();

    let after = home.run(&["model", "list", "--json"]).ok().json();
    assert_eq!(after["models"][1]["model_name"], model.as_str());
    assert_eq!(after, before);
}
