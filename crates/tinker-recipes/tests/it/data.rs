//! What is wrong with a data file, and where.

use std::path::Path;

use proptest::prelude::*;
use tinker_chat::{Message, TrainOnWhat};
use tinker_recipes::Error;
use tinker_recipes::sft::Dataset;

use crate::support::parse;

const GOOD: &str =
    r#"{"messages":[{"role":"user","content":"é"},{"role":"assistant","content":"y"}]}"#;

fn check(text: &str, expected: &str) {
    let error = parse(text).unwrap_err();

    assert!(error.is_bad_input());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn both_shapes_are_read_and_other_keys_blank_lines_and_marks_ignored() {
    let text = format!("\u{feff}{GOOD}\r\n\n{{\"prompt\":\"p\",\"completion\":\"c\",\"id\":7}}\n");

    let data = parse(&text).unwrap();

    let lines: Vec<_> = data.rows.iter().map(|row| row.line).collect();
    assert_eq!(lines, [1, 3]);
    assert_eq!(
        data.rows[1].messages,
        [Message::user("p"), Message::assistant("c")]
    );
    assert_eq!(data.sha256.len(), 64);
}

#[test]
fn the_hash_is_that_of_the_file() {
    let data = parse("{\"prompt\":\"p\",\"completion\":\"c\"}\n").unwrap();

    // printf '{"prompt":"p","completion":"c"}\n' | sha256sum
    assert_eq!(
        data.sha256,
        "3ec86f2ae16d7b394dc8fb31a7813dd59dc706c96e7e2b0a989abcc43aef8e87"
    );
}

#[test]
fn a_row_that_is_not_json_is_located() {
    check(
        &format!("{GOOD}\n{{\"messages\" [}}\n"),
        "`data.jsonl` line 2 column 13: not JSON: expected `:`",
    );
    check(
        "{\"prompt\":\"é\",,",
        "`data.jsonl` line 1 column 15: not JSON: key must be a string",
    );
    check(
        "[",
        "`data.jsonl` line 1 column 1: not JSON: EOF while parsing a list",
    );
}

#[test]
fn a_row_of_another_shape_is_located() {
    check(
        r#"{"messages":"hi"}"#,
        "`data.jsonl` line 1 column 16: invalid type: string \"hi\", expected a sequence",
    );
    for text in [" [{\"prompt\":\"p\"}]", " \"p\"", " 7"] {
        let reason = "a row is a JSON object on a line of its own, and this is none";
        check(text, &format!("`data.jsonl` line 1 column 2: {reason}"));
    }
    check(
        r#"{"messages":[{"role":"bot","content":"x"}]}"#,
        "`data.jsonl` line 1 column 26: unknown variant `bot`, expected one of `system`, `user`, \
         `assistant`, `tool`",
    );
    let needs = "a row needs `messages`, or `prompt` and `completion`";
    check("{}", &format!("`data.jsonl` line 1 column 1: {needs}"));
    check(
        r#"{"prompt":"p"}"#,
        &format!("`data.jsonl` line 1 column 1: {needs}"),
    );
    check(
        r#"{"messages":[]}"#,
        "`data.jsonl` line 1 column 1: `messages` is empty",
    );
}

#[test]
fn text_that_is_not_utf8_is_located() {
    let bytes = b"{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\":\"\xff\"}\n";

    let error = Dataset::parse(Path::new("d"), bytes, TrainOnWhat::AllMessages).unwrap_err();

    assert_eq!(
        error.to_string(),
        "`d` line 2 column 12: the text is not UTF-8"
    );
}

#[test]
fn a_row_without_an_assistant_is_refused_unless_others_are_trained() {
    let row = "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}";
    check(
        &format!("{GOOD}\n{row}"),
        "`data.jsonl` line 2: no assistant message, so there is nothing to train",
    );

    let data = Dataset::parse(Path::new("d"), row.as_bytes(), TrainOnWhat::AllMessages);
    assert_eq!(data.unwrap().rows.len(), 1);
}

#[test]
fn an_empty_file_and_a_missing_one_are_named() {
    for text in ["", "\n  \n"] {
        check(
            text,
            "data file `data.jsonl` is empty; it needs one JSON object per line",
        );
    }
    let error = Dataset::read(Path::new("/no/such"), TrainOnWhat::AllMessages).unwrap_err();
    assert!(matches!(error, Error::ReadData { .. }));
    assert_eq!(error.to_string(), "cannot read data file `/no/such`");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// A damaged file is an error with a place in the file, never a panic.
    #[test]
    fn damaged_rows_are_located_within_the_file(
        at in 0_usize..120, junk in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let mut bytes = format!("{GOOD}\n{GOOD}\n").into_bytes();
        let at = at.min(bytes.len());
        bytes.splice(at.., junk);

        match Dataset::parse(Path::new("d"), &bytes, TrainOnWhat::AllAssistantMessages) {
            Ok(data) => prop_assert!(!data.rows.is_empty()),
            Err(Error::BadRow { line, column, .. }) => {
                let n_lines = bytes.split(|&byte| byte == b'\n').count();
                prop_assert!((1..=n_lines).contains(&line) && column >= 1);
                prop_assert!(column <= bytes.len() + 1);
            }
            Err(error) => prop_assert!(matches!(error, Error::EmptyData { .. }), "{error}"),
        }
    }
}
