//! Training that is interrupted, once or twice or for good, and resumed to the same result.

use crate::support::{Home, Paused, pirate, short};

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

#[test]
fn a_killed_command_is_resumed_to_the_same_result() {
    let home = Home::new();
    let data = pirate();
    let whole = home.run(&short(&data, &["--run", "whole"])).ok();
    let mut running = home.start(&short(&data, &["--run", "cut"]));

    running.wait_for("step 7/24");
    running.kill();
    let resumed = home
        .run(&["train", "sft", "--resume", "--run", "cut", "--json"])
        .ok();

    assert!(
        resumed.stderr.contains("resuming from 0000"),
        "{resumed:#?}"
    );
    assert!(
        home.adapter(&whole) == home.adapter(&resumed),
        "the adapters differ"
    );
}

#[test]
fn a_second_interrupt_ends_at_once_and_the_run_is_resumed_to_the_same_result() {
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
    assert!(
        resumed.stderr.contains("resuming from 000004 at step 4"),
        "{resumed:#?}"
    );
    assert!(
        home.adapter(&whole) == home.adapter(&resumed),
        "the adapters differ"
    );
}
