//! `tinker sample` and `tinker chat`.

use serde_json::Value;

use crate::support::{Home, RUN, trained};

fn sample(home: &Home, flags: &[&str]) -> Value {
    home.run(&[&["sample", "--json", "--max-tokens", "12"], flags].concat())
        .ok()
        .json()
}

fn tokens(sequence: &Value) -> Vec<u64> {
    let tokens = sequence["tokens"].as_array().unwrap();
    tokens.iter().map(|token| token.as_u64().unwrap()).collect()
}

/// What the sequences of an answer are, without the names the server gave them.
fn drawn(answer: &Value) -> Vec<(&Value, &Value)> {
    let sequences = answer["sequences"].as_array().unwrap();
    sequences
        .iter()
        .map(|one| (&one["tokens"], &one["logprobs"]))
        .collect()
}

#[test]
fn weights_are_named_by_path_by_folder_and_as_the_last() {
    let trained = trained();
    let by_folder = format!("{RUN}@final");

    let answers: Vec<Value> = [trained.sampler.as_str(), &by_folder, "@last"]
        .iter()
        .map(|name| {
            sample(
                &trained.home,
                &["-m", name, "-p", "Who are you?", "--temperature", "0"],
            )
        })
        .collect();

    for answer in &answers {
        assert_eq!(answer["model"], trained.sampler.as_str());
        assert_eq!(drawn(answer), drawn(&answers[0]));
    }
}

#[test]
fn a_seed_repeats_different_samples() {
    let trained = trained();
    let flags = ["-p", "Tell me a story.", "-n", "3", "--seed", "7"];

    let first = sample(&trained.home, &flags);
    let second = sample(&trained.home, &flags);

    assert_eq!(drawn(&first), drawn(&second));
    let sequences = first["sequences"].as_array().unwrap();
    assert_eq!(sequences.len(), 3);
    assert!(
        sequences
            .iter()
            .any(|one| tokens(one) != tokens(&sequences[0])),
        "{first}"
    );
}

#[test]
fn log_probabilities_come_with_every_token() {
    let trained = trained();

    let answer = sample(
        &trained.home,
        &["-p", "Hello!", "--logprobs", "--prompt-logprobs"],
    );
    let text = trained
        .home
        .run(&["sample", "-p", "Hello!", "--max-tokens", "3", "--logprobs"]);

    let prompt = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(
        prompt.len(),
        answer["prompt_tokens"].as_array().unwrap().len()
    );
    assert!(prompt[0].is_null() && prompt[1].as_f64().unwrap() <= 0.0);
    let sequence = &answer["sequences"][0];
    assert_eq!(
        sequence["logprobs"].as_array().unwrap().len(),
        tokens(sequence).len()
    );
    assert!(text.ok().stdout.lines().count() >= 4);
}

#[test]
fn token_files_are_prompts() {
    let trained = trained();
    let file = trained
        .home
        .file("tokens.json", r#"{"tokens": [70, 71, 72]}"#);

    let answer = sample(
        &trained.home,
        &["--tokens-file", &file, "--temperature", "0"],
    );

    assert_eq!(answer["prompt_tokens"], serde_json::json!([70, 71, 72]));
    assert!(!tokens(&answer["sequences"][0]).is_empty());
}

#[test]
fn a_token_out_of_range_is_refused() {
    let trained = trained();
    let file = trained.home.file("large.json", "[99999999]");

    let finished = trained.home.run(&["sample", "--tokens-file", &file]);

    finished.failed(2, "", "token 99999999");
}

#[test]
fn a_line_that_cannot_be_answered_does_not_end_the_conversation() {
    let trained = trained();
    let long = "word ".repeat(3000);

    let finished = trained.home.run_with_input(
        &["chat", "-m", "@last", "--max-tokens", "8", "--json"],
        &format!("Hello!\n{long}\nHello!\n"),
    );

    assert_eq!(finished.code, 1, "{finished:?}");
    assert!(
        finished.stderr.contains("error: 1 line not answered"),
        "{finished:?}"
    );
    assert_eq!(finished.json()["messages"].as_array().unwrap().len(), 4);
}

#[test]
fn raw_prompts_and_standard_input_are_continued() {
    let trained = trained();
    let args = [
        "sample",
        "--raw",
        "--prompt-file",
        "-",
        "--max-tokens",
        "4",
        "--json",
    ];

    let answer = trained
        .home
        .run_with_input(&args, "Once upon a time")
        .ok()
        .json();
    let chat = sample(&trained.home, &["-p", "Once upon a time"]);

    let n_raw = answer["prompt_tokens"].as_array().unwrap().len();
    assert!(n_raw < chat["prompt_tokens"].as_array().unwrap().len());
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_shown() {
    let trained = trained();
    let ask = |stop: &[&str]| {
        let flags = ["-p", "Who are you?", "--temperature", "0"];
        sample(&trained.home, &[&flags, stop].concat())
    };
    let whole = ask(&[])["sequences"][0]["text"]
        .as_str()
        .unwrap()
        .to_owned();
    let (before, _) = whole.split_once(' ').unwrap();

    let stopped = ask(&["--stop", " "]);

    assert_eq!(stopped["sequences"][0]["text"], before);
    assert_eq!(stopped["sequences"][0]["stop_reason"], "stop");
}

#[test]
fn output_goes_to_a_file_when_asked() {
    let trained = trained();
    let file = trained.home.path("out/answer.txt");
    let name = file.display().to_string();

    let finished = trained
        .home
        .run(&["sample", "-p", "Hello!", "--max-tokens", "5", "-o", &name])
        .ok();

    assert_eq!(finished.stdout, "");
    assert!(!std::fs::read_to_string(&file).unwrap().trim().is_empty());
    assert!(
        finished.stderr.contains(&format!("wrote {name}")),
        "{finished:?}"
    );
}

#[test]
fn tinkex_scripts_get_their_blocks() {
    let trained = trained();

    let finished = trained
        .home
        .run(&[
            "run",
            "--base-model",
            "tinker/nano",
            "--prompt",
            "The cat",
            "--max-tokens",
            "4",
        ])
        .ok();

    assert!(finished.stdout.starts_with("Sample 1:\n"), "{finished:?}");
    assert!(finished.stdout.contains("\nstop_reason="), "{finished:?}");
    assert!(finished.stdout.contains(" | avg_logprob=-"), "{finished:?}");
    assert!(
        finished.stderr.contains("Sampling complete (1 sequences)"),
        "{finished:?}"
    );
}

#[test]
fn chat_answers_each_line_and_obeys_its_commands() {
    let trained = trained();
    let input =
        "Hello!\n/dance\n/reset\n/system Speak like a pirate.\nWho are you?\n/exit\nnever\n";

    let finished = trained
        .home
        .run_with_input(&["chat", "-m", "@last", "--max-tokens", "8"], input)
        .ok();

    assert_eq!(
        finished
            .stdout
            .lines()
            .filter(|line| !line.is_empty())
            .count(),
        2,
        "{finished:?}"
    );
    assert!(
        finished.stderr.contains("no command /dance"),
        "{finished:?}"
    );
    assert!(finished.stderr.contains("forgotten"), "{finished:?}");
}
