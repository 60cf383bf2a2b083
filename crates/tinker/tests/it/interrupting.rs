//! Training that is interrupted, once or twice or for good, and resumed to the same result.

use rustix::process::Signal;

use crate::support::{Finished, Home, Paused, pirate, short, signal};

#[test]
fn interrupted_and_resumed_equals_uninterrupted() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();
    let mut running = home.start(&short(&data, &["--run", "cut"]));

    running.wait_for("step 3/24");
    running.interrupt();
    running.wait_for("finishing the step in flight, then saving; Ctrl-C again quits");
    let interrupted = running.finish();
    let resumed = home.run(&["resume", "cut", "--json"]).ok();

    assert_eq!(interrupted.code, 130, "{interrupted:#?}");
    assert!(
        interrupted
            .stderr
            .contains("error: interrupted before step"),
        "{interrupted:#?}"
    );
    assert!(
        interrupted.stderr.contains("tinker resume cut"),
        "{interrupted:#?}"
    );
    assert!(
        resumed.stderr.contains("resuming from 0000"),
        "{resumed:#?}"
    );
    assert!(
        home.adapter(&whole) == home.adapter(&resumed),
        "the adapters differ"
    );
}

/// A run called `cut` that is killed as soon as it says `moment`.
fn killed_at(home: &Home, data: &str, moment: &str) {
    let mut running = home.start(&short(data, &["--run", "cut"]));
    running.wait_for(moment);
    running.kill();
}

/// Training runs that the server has.
fn n_runs(home: &Home) -> usize {
    let listed = home.run(&["run", "list", "--json"]).ok().json();
    listed["runs"].as_array().unwrap().len()
}

/// Makes sure that `resumed` did nothing again and has the adapter of `whole`.
fn check_rejoined(home: &Home, resumed: &Finished, whole: &Finished) {
    assert!(
        resumed.stderr.contains("no step is done again"),
        "{resumed:#?}"
    );
    assert_eq!(n_runs(home), 2, "the run and the undisturbed one");
    assert!(
        home.adapter(whole) == home.adapter(resumed),
        "the adapters differ"
    );
}

#[test]
fn a_killed_command_goes_on_where_it_was_with_the_same_result() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();

    killed_at(&home, &data, "step 7/24");
    let resumed = home
        .run(&["train", "sft", "--resume", "--run", "cut", "--json"])
        .ok();

    check_rejoined(&home, &resumed, &whole);
    let checkpoints = home.path("home/runs/cut/checkpoints.jsonl");
    let n_checkpoints = std::fs::read_to_string(checkpoints)
        .unwrap()
        .lines()
        .count();
    assert_eq!(n_checkpoints, 6, "five on the way and the final one");
}

#[test]
fn a_command_that_is_killed_again_and_again_ends_with_the_same_result() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();

    killed_at(&home, &data, "step 2/24");
    for moment in ["step 5/24", "step 12/24", "step 13/24", "step 24/24"] {
        let mut running = home.start(&["resume", "cut", "--json"]);
        running.wait_for(moment);
        running.kill();
    }
    let resumed = home.run(&["resume", "cut", "--json"]).ok();

    check_rejoined(&home, &resumed, &whole);
}

#[test]
fn a_command_killed_with_its_server_goes_on_where_it_was() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();

    // In this order, or the command would start the server again.
    killed_at(&home, &data, "step 7/24");
    signal(home.server_pid(), Signal::KILL);
    let resumed = home.run(&["resume", "cut", "--json"]).ok();

    check_rejoined(&home, &resumed, &whole);
}

#[test]
fn a_killed_command_whose_ledger_is_damaged_goes_on_from_its_checkpoint() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();

    killed_at(&home, &data, "step 7/24");
    let ledger = home.path("home/runs/cut/ledger.jsonl");
    let mut bytes = std::fs::read(&ledger).unwrap();
    bytes[200] ^= 1;
    std::fs::write(&ledger, bytes).unwrap();
    let resumed = home.run(&["resume", "cut", "--json"]).ok();

    for said in [
        "the run cannot go on where it was (the ledger ",
        "resuming from 00000",
    ] {
        assert!(resumed.stderr.contains(said), "{said}: {resumed:#?}");
    }
    assert!(
        home.adapter(&whole) == home.adapter(&resumed),
        "the adapters differ"
    );
}

#[test]
fn a_second_interrupt_ends_at_once_and_the_run_goes_on_where_it_was() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();
    let mut running = home.start(&short(&data, &["--run", "cut"]));

    running.wait_for("step 7/24");
    // The step in flight does not end, so that the first request alone would wait for ever.
    let paused = Paused::process(home.server_pid());
    running.interrupt();
    running.wait_for("finishing the step in flight, then saving; Ctrl-C again quits");
    running.interrupt();
    let ended = running.finish();
    drop(paused);
    let resumed = home.run(&["resume", "cut", "--json"]).ok();

    ended.failed(130, "ended without saving", "hint: go on with: ");
    check_rejoined(&home, &resumed, &whole);
}
