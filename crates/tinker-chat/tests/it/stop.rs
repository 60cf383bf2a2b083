//! Stop strings that span token borders, and decoding that waits for whole characters.

use proptest::prelude::*;
use tinker_chat::{DecodeStream, StopMatcher};

use crate::support::tokenizer;

/// The number of tokens after which `stops` is found in `text`.
fn found_after(text: &str, stops: &[&str]) -> Option<usize> {
    let tokens = tokenizer().encode(text).unwrap();
    let mut matcher = StopMatcher::new(tokenizer(), stops.iter().map(|&s| s.to_owned()));
    tokens
        .iter()
        .position(|&token| matcher.push(token).unwrap())
        .map(|at| at + 1)
}

fn n_tokens(text: &str) -> usize {
    tokenizer().encode(text).unwrap().len()
}

#[test]
fn finds_a_string_that_spans_tokens() {
    assert_eq!(
        found_after("xyz\n\nUser: more", &["\n\nUser:"]),
        Some(n_tokens("xyz\n\nUser: "))
    );
    assert_eq!(found_after("xyz\n\nUsed", &["\n\nUser:"]), None);
    assert_eq!(found_after("aab", &["ab", "zz"]), Some(3));
}

#[test]
fn finds_a_special_token_by_its_name() {
    assert_eq!(found_after("q<|im_end|>q", &["<|im_end|>"]), Some(2));
}

#[test]
fn finds_a_string_inside_one_token_and_of_many_bytes() {
    assert_eq!(found_after("🙂é漢x", &["é漢"]), Some(n_tokens("🙂é漢")));
    assert_eq!(found_after("User", &["se"]), Some(1));
}

#[test]
fn ignores_empty_stop_strings() {
    assert_eq!(found_after("abc", &[""]), None);
}

#[test]
fn a_stream_holds_back_incomplete_characters() {
    let tokens = tokenizer().encode("aé").unwrap();
    assert_eq!(tokens.len(), 3);
    let mut stream = DecodeStream::new(tokenizer());

    let pieces: Vec<String> = tokens.iter().map(|&t| stream.push(t).unwrap()).collect();

    assert_eq!(pieces, ["a", "", "é"]);
}

#[test]
fn a_stream_that_ends_inside_a_character_shows_the_replacement() {
    let tokens = tokenizer().encode("é").unwrap();
    let mut stream = DecodeStream::new(tokenizer());

    assert_eq!(stream.push(tokens[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn pieces_join_to_the_whole(text in "[^\u{fffd}]{0,24}") {
        let tokens = tokenizer().encode_text(&text).unwrap();
        let mut stream = DecodeStream::new(tokenizer());
        let mut joined = String::new();
        for token in tokens {
            joined += &stream.push(token).unwrap();
        }
        joined += &stream.finish().unwrap();
        prop_assert_eq!(joined, text);
    }

    #[test]
    fn a_stop_is_found_exactly_when_the_text_contains_it(
        text in "[ab\n:é]{0,16}", stop in "[ab\n:é]{1,3}",
    ) {
        prop_assert_eq!(found_after(&text, &[&stop]).is_some(), text.contains(&stop));
    }
}
