//! Bad data and bad flags: what is said, and the exit code. None of it starts a server.

use crate::support::{Home, pirate, row};

fn train(home: &Home, data: &str, flags: &[&str]) -> crate::support::Finished {
    let finished = home.run(&[&["train", "sft", data], flags].concat());
    assert_eq!(
        home.status()["running"],
        false,
        "no server is needed to refuse this"
    );
    finished
}

#[test]
fn missing_file() {
    let home = Home::new();

    train(&home, "nowhere.jsonl", &[]).failed(
        2,
        "cannot read data file `nowhere.jsonl`",
        "cause: No such file or directory",
    );
}

#[test]
fn empty_file() {
    let home = Home::new();
    let data = home.file("empty.jsonl", "\n\n");

    train(&home, &data, &[]).failed(
        2,
        &format!("data file `{data}` is empty"),
        "one JSON object per line",
    );
}

#[test]
fn row_that_is_not_json_is_named_by_line_and_column() {
    let home = Home::new();
    let data = home.file(
        "bad.jsonl",
        &format!("{}{{\"messages\": oops}}\n", row("a", "b")),
    );

    train(&home, &data, &[]).failed(2, &format!("`{data}` line 2 column 14: not JSON"), "");
}

#[test]
fn row_without_an_assistant_message() {
    let home = Home::new();
    let data = home.file(
        "mute.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n",
    );

    train(&home, &data, &[]).failed(2, &format!("`{data}` line 1: no assistant message"), "");
}

#[test]
fn row_longer_than_the_context_is_counted_and_refused() {
    let home = Home::new();
    let long = "word ".repeat(3000);
    let data = home.file(
        "long.jsonl",
        &format!("{}{}", row("a", "b"), row("a", &long)),
    );

    train(&home, &data, &[]).failed(
        2,
        &format!("`{data}`: 1 of 2 rows are longer than 1024 tokens"),
        "line 2",
    );
}

#[test]
fn unknown_model_lists_what_exists() {
    let home = Home::new();

    train(&home, &pirate(), &["-m", "tinker/giant"]).failed(
        5,
        "base model \"tinker/giant\" is unknown",
        "tinker/nano",
    );
}

#[test]
fn model_directory_without_a_config() {
    let home = Home::new();

    train(&home, &pirate(), &["-m", "./nothing"]).failed(
        5,
        "model directory `./nothing` has no config.json",
        "tinker model list",
    );
}

#[test]
fn settings_out_of_range() {
    let home = Home::new();
    let check = |flags: &[&str], message: &str| {
        train(&home, &pirate(), flags).failed(2, message, "");
    };

    check(&["--batch-size", "0"], "batch_size `0`: must be at least 1");
    check(
        &["--lr", "0"],
        "learning_rate `0`: must be a number above 0",
    );
    check(
        &["--max-length", "5000"],
        "max_length `5000`: must be 2 to 1024",
    );
    check(
        &["--test-size", "9999"],
        "test_size `9999`: must leave at least one",
    );
    check(
        &["--renderer", "chatml"],
        "invalid value 'chatml' for '--renderer <NAME>'",
    );
    check(&["--run", "../x"], "run name `../x` is not usable");
}

#[test]
fn remote_server_without_a_key() {
    let home = Home::new();

    home.run(&["run", "list", "--base-url", "http://127.0.0.1:1"])
        .failed(
            3,
            "no API key for http://127.0.0.1:1",
            "hint: set TINKER_API_KEY",
        );
}

#[test]
fn malformed_key() {
    let home = Home::new();
    let mut command = home.command(&["run", "list"]);
    command.env("TINKER_API_KEY", "secret-key");

    let finished = crate::support::finish(command);

    assert!(!finished.stderr.contains("secret-key"), "{finished:?}");
    finished.failed(3, "API key must start with the tml- prefix", "unset it");
}

#[test]
fn training_state_is_not_sampled_and_its_twin_is_named() {
    let home = Home::new();

    home.run(&[
        "sample",
        "-p",
        "hi",
        "-m",
        "tinker://S:train:0/weights/final",
    ])
    .failed(
        2,
        "tinker://S:train:0/weights/final holds training state",
        "hint: sample from its twin: tinker://S:train:0/sampler_weights/final",
    );
}

#[test]
fn malformed_path() {
    let home = Home::new();

    home.run(&["checkpoint", "info", "foo"]).failed(
        2,
        "path \"foo\" must start with tinker://",
        "hint: paths look like tinker://RUN/weights/NAME",
    );
}

#[test]
fn delete_reads_every_path_before_it_deletes_any() {
    let home = Home::new();

    home.run(&[
        "checkpoint",
        "delete",
        "-y",
        "tinker://S:train:0/weights/a",
        "nonsense",
    ])
    .failed(2, "path \"nonsense\"", "hint: paths look like");
    assert_eq!(home.status()["running"], false);
}

#[test]
fn prompts_that_are_none() {
    let home = Home::new();
    let check = |args: &[&str], message: &str| home.run(args).failed(2, message, "");
    let tokens = home.file("t.json", "[1.5]");

    check(
        &["sample"],
        "the following required arguments were not provided",
    );
    check(
        &["sample", "-p", "a", "--prompt-file", "b"],
        "the argument '--prompt <TEXT>' cannot be used",
    );
    check(
        &["sample", "--prompt-file", "nowhere"],
        "cannot read prompt file nowhere",
    );
    check(
        &["sample", "--tokens-file", &tokens],
        &format!("{tokens} does not hold token ids"),
    );
    check(
        &["sample", "-p", "a", "--top-p", "0"],
        "invalid value '0' for '--top-p <P>'",
    );
}

#[test]
fn resume_without_a_run() {
    let home = Home::new();

    home.run(&["resume"])
        .failed(5, "no run `@last`", "there are no runs yet");
}
