//! Splitting, rendering and the length limit.

use tinker_recipes::sft::{HeldOut, Prepared, SftOptions};
use tinker_recipes::{Error, Result};

use crate::support::{chatml, parse, resolve, rows};

fn prepare(text: &str, options: &SftOptions) -> Result<Prepared> {
    let data = parse(text).unwrap();
    Prepared::new(&data, &resolve(options, &data)?, &*chatml())
}

/// Two short rows and a long third.
fn one_long() -> String {
    let row = |n: usize| {
        format!(
            "{{\"prompt\":\"hi\",\"completion\":\"{}\"}}\n",
            "z".repeat(n)
        )
    };
    [row(3), row(4), row(200)].concat()
}

fn all_train() -> SftOptions {
    SftOptions {
        held_out: HeldOut::Rows(0),
        ..SftOptions::default()
    }
}

#[test]
fn the_split_holds_out_what_was_asked_and_follows_the_seed() {
    let data = rows(20);
    let counts = |options: &SftOptions| {
        let config = resolve(options, &data).unwrap();
        Prepared::new(&data, &config, &*chatml()).unwrap().counts
    };

    let tenth = counts(&SftOptions::default());
    assert_eq!(
        (tenth.n_rows, tenth.n_train_rows, tenth.n_test_rows),
        (20, 18, 2)
    );
    assert_eq!(counts(&all_train()).n_test_rows, 0);
    let many = |seed| SftOptions {
        held_out: HeldOut::Rows(10),
        seed,
        ..SftOptions::default()
    };
    assert_eq!(counts(&many(1)), counts(&many(1)));
    assert_ne!(counts(&many(1)).n_tokens, counts(&many(2)).n_tokens);
}

#[test]
fn counts_are_those_of_the_rendered_rows() {
    let counts = prepare("{\"prompt\":\"q\",\"completion\":\"z\"}", &all_train())
        .unwrap()
        .counts;

    let text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nz<|im_end|>";
    let n_rendered = crate::support::tokenizer().encode(text).unwrap().len();
    assert_eq!(
        (counts.longest, counts.n_tokens),
        (n_rendered, n_rendered - 1)
    );
    assert_eq!((counts.n_sequences, counts.n_trained_tokens), (1, 2));
}

#[test]
fn a_long_row_is_refused_with_its_place_and_length() {
    let error = prepare(&one_long(), &all_train()).unwrap_err();

    assert!(matches!(
        error,
        Error::RowsTooLong {
            n_long: 1,
            n_rows: 3,
            line: 3,
            ..
        }
    ));
    let text = error.to_string();
    assert!(
        text.starts_with("`data.jsonl`: 1 of 3 rows are longer than 64 tokens"),
        "{text}"
    );
}

#[test]
fn a_long_row_is_cut_if_asked() {
    let options = SftOptions {
        truncate: true,
        ..all_train()
    };

    let counts = prepare(&one_long(), &options).unwrap().counts;

    assert_eq!(
        (counts.n_train_rows, counts.n_truncated, counts.n_dropped),
        (3, 1, 0)
    );
    assert!(counts.longest > 200);
}

#[test]
fn rows_that_lose_every_trained_token_are_left_out() {
    let options = SftOptions {
        truncate: true,
        max_length: Some(4),
        ..all_train()
    };

    let error = prepare(&one_long(), &options).unwrap_err();

    let expected = "`data.jsonl`: no row is left to train on: 3 rows, 0 held out, 3 without a \
                    trained token within 4 tokens";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_row_that_cannot_be_rendered_is_located() {
    let row = r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y","trainable":true}]}"#;

    let error = prepare(row, &all_train()).unwrap_err();

    assert_eq!(error.to_string(), "`data.jsonl` line 1 cannot be rendered");
    assert!(
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains("`trainable` flag")
    );
}
