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
fn a_list_of_rows_is_told_from_a_row() {
    let home = Home::new();
    let data = home.file(
        "list.json",
        "[{\"prompt\": \"a\", \"completion\": \"b\"}]\n",
    );

    train(&home, &data, &[]).failed(
        2,
        &format!("`{data}` line 1 column 1: a row is a JSON object on a line of its own"),
        "hint: a row is one line: {\"messages\": [...]}",
    );
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
    check(
        &["--lr", "-1"],
        "learning_rate `-1`: must be a number above 0",
    );
    check(
        &["--lr", "fast"],
        "invalid value 'fast' for '--lr <X>': write a number",
    );
    check(
        &["--batch-size", "-3"],
        "invalid value '-3' for '--batch-size <N>': write a whole number of at least 0",
    );
    check(
        &["--rank", "99999999999"],
        "invalid value '99999999999' for '--rank <N>': too large",
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
fn malformed_address() {
    let home = Home::new();

    for (url, what) in [
        ("foo", "is not an address"),
        ("ftp://x", "must start with http"),
    ] {
        home.run(&["run", "list", "--base-url", url]).failed(
            2,
            &format!("base URL \"{url}\" {what}"),
            "hint: write it like https://host/path or http://127.0.0.1:8642",
        );
    }
}

#[test]
fn malformed_interval_of_heartbeats() {
    let home = Home::new();

    for (value, what) in [
        ("soon", "write a number and ms, s, m or h"),
        ("0s", "it must be more"),
    ] {
        let mut command = home.command(&["run", "list"]);
        command.env("TINKER_HEARTBEAT", value);
        let finished = crate::support::finish(command);
        finished.failed(2, &format!("TINKER_HEARTBEAT={value}: {what}"), "");
    }
}

#[test]
fn a_tokenizer_that_is_not_there() {
    let home = Home::new();

    train(&home, &pirate(), &["--tokenizer", "/nowhere"]).failed(
        2,
        "cannot read `/nowhere/tokenizer.json`",
        "hint: --tokenizer takes the directory that tokenizer.json is in",
    );
}

#[test]
fn a_chat_format_of_another_model() {
    let home = Home::new();

    train(&home, &pirate(), &["--renderer", "llama3"]).failed(
        2,
        "renderer `llama3` needs the token `<|begin_of_text|>`",
        "choose the renderer that belongs to the model",
    );
}

#[test]
fn a_run_folder_that_cannot_be_made() {
    let home = Home::new();
    let data = home.file("few.jsonl", &row("a", "b").repeat(3));

    home.run(&["train", "sft", &data, "--log-path", &data])
        .failed(
            1,
            &format!("cannot create `{data}`"),
            "hint: check the folder, or choose another with --log-path",
        );
}

#[test]
fn a_run_that_cannot_begin_does_not_take_a_name() {
    let home = Home::new();
    let data = home.file("few.jsonl", &row("a", "b").repeat(3));
    let args = ["train", "sft", &data, "--run", "mine", "--max-steps", "1"];
    let with = |flags: &[&str]| home.run(&[args.as_slice(), flags].concat());

    let steep = with(&["--rank", "100000"]);
    let missing = with(&["--load-checkpoint", "tinker://x/weights/y"]);
    let sampler = with(&["--load-checkpoint", "tinker://x/sampler_weights/y"]);

    assert!(
        steep.stderr.contains("LoRA rank 100000 is not in 1..="),
        "{steep:?}"
    );
    steep.failed(2, "creating the training run failed", "cause: ");
    missing.failed(5, "creating the training run failed", "does not exist");
    sampler.failed(2, "", "did you mean tinker://x/weights/y?");
    with(&[]).ok();
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_gpu_to_serve_with_that_the_program_was_not_built_for() {
    let home = Home::new();

    home.run(&["serve", "--port", "0", "--device", "cuda"])
        .failed(
            1,
            "this program was built without support for GPUs",
            "cargo build --release --features cuda",
        );
    let weights = ["--device", "cuda", "--weights", "nf4"];
    home.run(&[&["serve", "--port", "0"], &weights[..]].concat())
        .failed(
            2,
            "--weights nf4 is for the CPU",
            "leave it out or use --device cpu",
        );
}

#[test]
fn a_model_directory_to_serve_that_is_none() {
    let home = Home::new();
    let empty = home.path("").display().to_string();
    let serve = |model: &str| home.run(&["serve", "--port", "0", "--model", model]);

    for dir in ["/nowhere", &empty] {
        serve(dir).failed(
            5,
            &format!("model directory `{dir}` has no config.json"),
            "hint: give a directory in the Hugging Face layout",
        );
    }
    home.run(&["serve", "--port", "70000"]).failed(
        2,
        "invalid value '70000' for '--port <N>': write a port number, 0 to 65535",
        "",
    );
}

#[test]
fn an_output_file_that_cannot_be_is_refused_before_sampling() {
    let home = Home::new();
    let dir = home.path("").display().to_string();

    home.run(&["sample", "-p", "hi", "-o", &dir]).failed(
        2,
        &format!("cannot write {dir}: it is a directory"),
        "hint: name a file in it",
    );
    assert_eq!(home.status()["running"], false);
}

#[test]
fn malformed_key() {
    let home = Home::new();
    let mut command = home.command(&["run", "list"]);
    command.env("TINKER_API_KEY", "secret-key");

    let finished = crate::support::finish(command);

    assert!(!finished.stderr.contains("secret-key"), "{finished:?}");
    finished.failed(
        3,
        "TINKER_API_KEY: API key must start with the tml- prefix",
        "hint: check TINKER_API_KEY, or use --local",
    );
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
        &["sample", "-p", "a", "--temperature", "-1"],
        "invalid value '-1' for '--temperature <X>': write a number of at least 0",
    );
    check(
        &["sample", "-p", "a", "--stop", ""],
        "invalid value '' for '--stop <TEXT>': write at least one character",
    );
    check(
        &["sample", "-p", "a", "-n", "0"],
        "invalid value '0' for '--num-samples <N>': write a whole number of at least 1",
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

#[test]
fn a_damaged_run_folder_is_named_with_the_place() {
    let home = Home::new();
    let data = home.file("few.jsonl", &row("a", "b").repeat(3));
    let args = ["train", "sft", &data, "--run", "mine", "--max-steps", "1"];
    home.run(&args).ok();
    let file = |name: &str| home.path("home/runs/mine").join(name);
    let checkpoints = std::fs::read_to_string(file("checkpoints.jsonl")).unwrap();

    std::fs::write(file("checkpoints.jsonl"), format!("oops\n{checkpoints}")).unwrap();
    let rows = home.run(&["sample", "-p", "hi", "-m", "mine@last"]);
    std::fs::write(file("config.json"), "{}").unwrap();
    let config = home.run(&["resume", "mine"]);

    let hint = "hint: restore or mend the file, or begin a new run";
    let name = |file: std::path::PathBuf| file.display().to_string();
    rows.failed(
        1,
        &format!(
            "`{}` line 1 column 1: expected value\n",
            name(file("checkpoints.jsonl"))
        ),
        hint,
    );
    config.failed(
        1,
        &format!(
            "`{}` line 1 column 2: missing field `recipe`\n",
            name(file("config.json"))
        ),
        hint,
    );
}

#[test]
fn data_that_were_moved_are_asked_for() {
    let home = Home::new();
    let data = home.file("few.jsonl", &row("a", "b").repeat(3));
    home.run(&["train", "sft", &data, "--run", "mine", "--max-steps", "1"])
        .ok();
    std::fs::rename(&data, home.path("moved.jsonl")).unwrap();

    let moved = home.run(&["resume", "mine", "--data", "moved.jsonl"]);

    assert!(moved.stderr.contains("/moved.jsonl: 3 rows"), "{moved:?}");
    moved.failed(4, "run `mine` is complete at step 1 of 1", "");
    home.run(&["resume", "mine"]).failed(
        2,
        &format!("cannot read data file `{data}`"),
        "hint: if the file was moved: tinker resume mine --data DATA",
    );
}
