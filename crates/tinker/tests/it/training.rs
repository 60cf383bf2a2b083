//! `tinker train sft` from data to weights: plan, result, interruption, resumption, outages.

use std::path::Path;

use crate::support::{Finished, Home, RUN, pirate, row, trained};

#[test]
fn training_says_what_it_does_and_where_the_weights_are() {
    let home = Home::new();
    let rows: String = (0..20).map(|i| row(&format!("Say {i}."), "Arr!")).collect();
    let data = home.file("arr.jsonl", &rows);

    let finished = home
        .run(&[
            "train",
            "sft",
            &data,
            "--run",
            "first",
            "--max-steps",
            "3",
            "--lr",
            "1e-3",
        ])
        .ok();

    let (plan, progress) = finished.stderr.split_once("\nstep 1/3").unwrap();
    let plan = plan.replace(&home.path("").display().to_string(), "HOME/");
    let lines = plan.lines().filter(|line| !line.contains("server"));
    insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"), @r"
    plan
      model   tinker/nano with a LoRA adapter of rank 32
      data    HOME/arr.jsonl: 20 rows, 18 to train on, 2 held out
      tokens  314 per epoch, 90 of them trained (29%); longest row 19 of 1,024
      steps   3 of 16 rows, 2 to an epoch, 5 epochs cut short by --max-steps
      format  qwen3_instruct, training all_assistant_messages
      rate    1e-3, linear (given)
      run     HOME/home/runs/first
    ");
    let said = |text: &str| assert!(progress.contains(text), "{text}: {finished:#?}");
    said("step 3/3 loss ");
    said("held-out NLL ");
    said("tinker sample -m tinker://");
    said("tinker chat -m tinker://");
    let lines: Vec<&str> = finished.stdout.lines().collect();
    assert!(lines[0].starts_with("state    tinker://") && lines[0].ends_with("/weights/final"));
    assert!(lines[1].starts_with("sampler  tinker://"), "{lines:?}");
    for file in ["config.json", "metrics.jsonl", "checkpoints.jsonl"] {
        assert!(home.path("home/runs/first").join(file).is_file(), "{file}");
    }
}

#[test]
fn fewer_rows_than_a_batch_are_trained_and_said_so() {
    let home = Home::new();
    let data = home.file("few.jsonl", &row("Hello!", "Arr!").repeat(3));

    let finished = home
        .run(&[
            "train",
            "sft",
            &data,
            "--batch-size",
            "128",
            "--epochs",
            "2",
            "--json",
        ])
        .ok();

    assert_eq!(finished.json()["n_steps"], 2);
    assert!(
        finished
            .stderr
            .contains("fewer training rows (3) than the batch size (128)"),
        "{finished:#?}"
    );
}

#[test]
fn a_run_folder_is_not_used_twice() {
    let trained = trained();

    let again = trained.home.run(&["train", "sft", &pirate(), "--run", RUN]);
    let resumed = trained.home.run(&["resume", RUN]);
    let changed = trained.home.run(&[
        "train",
        "sft",
        "--resume",
        "--run",
        RUN,
        "--batch-size",
        "9",
    ]);

    let config = trained.home.path("home/runs").join(RUN).join("config.json");
    let config = std::fs::read_to_string(config).unwrap();
    assert!(config.contains("\"server\": \"embedded\""), "{config}");
    let refused = |flags: &[&str], message: &str| {
        let args = ["train", "sft", "--resume", "--run", RUN];
        let finished = trained.home.run_with_key(&[&args, flags].concat(), "tml-x");
        finished.failed(4, message, "begin a new run");
    };
    refused(
        &["--model", "x/y"],
        "--model \"x/y\" differs from the run's",
    );
    refused(&["--test-size", "0.5"], "--test-size 187 differs from");
    refused(
        &["--load-checkpoint", &trained.state],
        &format!("--load-checkpoint \"{}\" differs", trained.state),
    );
    refused(
        &["--base-url", "http://127.0.0.1:1"],
        "the run was trained on the embedded server, not on http://127.0.0.1:1",
    );
    again.failed(4, "run folder", "already holds a run");
    assert!(!resumed.stderr.contains("hint:"), "{resumed:?}");
    resumed.failed(
        4,
        "run `pirate` is complete at step 4 of 4",
        "nothing to resume",
    );
    changed.failed(
        4,
        "--batch-size 9 differs from the run's 8",
        "hint: leave the flag out",
    );
}

#[test]
fn a_changed_data_file_is_not_resumed_from() {
    let home = Home::new();
    let rows: String = (0..64).map(|i| row(&format!("Say {i}."), "Arr!")).collect();
    let data = home.file("data.jsonl", &rows);
    let args = ["train", "sft", &data, "--run", "cut", "--batch-size", "2"];
    let mut running = home.start(&args);
    running.wait_for("step 1/");
    running.interrupt();
    assert_eq!(running.finish().code, 130);

    home.file("data.jsonl", &format!("{rows}{}", row("More?", "Aye!")));
    let resumed = home.run(&["resume", "cut"]);

    resumed.failed(4, "data file", "has changed since the run began");
}

/// Trains on a copy of the embedded model, changed by `damage`.
fn train_on_damaged(damage: impl FnOnce(&Path)) -> Finished {
    let home = Home::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/nano");
    let model = home.path("model");
    std::fs::create_dir(&model).unwrap();
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ] {
        std::fs::copy(source.join(name), model.join(name)).unwrap();
    }
    damage(&model);
    let data = pirate();
    home.run(&[
        "train",
        "sft",
        &data,
        "-m",
        "./model",
        "--renderer",
        "qwen3_instruct",
        "--lr",
        "1e-3",
    ])
}

#[test]
fn weights_that_are_no_tensors_are_named() {
    let finished = train_on_damaged(|model| {
        std::fs::write(model.join("model.safetensors"), b"not tensors").unwrap();
    });

    finished.failed(2, "", "model.safetensors");
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let finished = train_on_damaged(|model| {
        let path = model.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        // The last bf16 value of the file becomes NaN.
        let at = bytes.len() - 2;
        bytes[at..].copy_from_slice(&0x7fc0_u16.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    });

    finished.failed(2, "", "NaN");
}

#[test]
fn weights_of_another_shape_than_the_configuration_says_are_named() {
    let finished = train_on_damaged(|model| {
        let path = model.join("config.json");
        let config = std::fs::read_to_string(&path).unwrap();
        let changed = config.replace("\"intermediate_size\": 640", "\"intermediate_size\": 672");
        assert_ne!(changed, config);
        std::fs::write(path, changed).unwrap();
    });

    finished.failed(2, "", "672");
}

#[test]
fn weights_that_diverge_are_named_with_their_step_and_not_resumed() {
    let home = Home::new();
    let data = pirate();
    let args = ["train", "sft", &data, "--run", "hot", "--lr", "1e30"];
    let flags = ["--max-steps", "8", "--batch-size", "4", "--eval-every", "0"];

    let finished = home.run(&[args.as_slice(), &flags].concat());

    assert!(finished.stderr.contains(" is NaN"), "{finished:#?}");
    assert!(!finished.stderr.contains("go on with"), "{finished:#?}");
    finished.failed(
        1,
        "training step 1 failed; start again with a learning rate below 1e30",
        "hint: begin a new run with a lower --lr",
    );
}
