//! Loading, encoding with and without special tokens, and what is wrong with bad files.

use tinker_chat::{Error, Tokenizer, TokenizerFiles};

use crate::support::{fixture, tokenizer};

#[test]
fn special_tokens_are_recognised_only_when_asked() {
    let end = tokenizer().token_id("<|im_end|>").unwrap();

    assert_eq!(tokenizer().encode("<|im_end|>").unwrap(), [end]);
    let plain = tokenizer().encode_text("<|im_end|>").unwrap();
    assert!(plain.len() > 1 && !plain.contains(&end));
    assert_eq!(tokenizer().decode(&plain).unwrap(), "<|im_end|>");
}

#[test]
fn end_tokens_come_from_both_configs_without_duplicates() {
    let ids = ["<|endoftext|>", "<|im_end|>"].map(|name| tokenizer().token_id(name).unwrap());

    assert_eq!(tokenizer().eos_token_ids(), ids);
    assert_eq!(tokenizer().bos_token_id(), None);
}

#[test]
fn special_tokens_can_be_left_out_of_decoded_text() {
    let tokens = tokenizer().encode("Hi<|im_end|>").unwrap();

    assert_eq!(tokenizer().decode(&tokens).unwrap(), "Hi<|im_end|>");
    assert_eq!(tokenizer().decode_without_special(&tokens).unwrap(), "Hi");
}

#[test]
fn a_token_in_the_config_may_be_an_object() {
    let json = std::fs::read(fixture("chat/bytes/tokenizer.json")).unwrap();
    let config = br#"{"bos_token":{"content":"<|begin_of_text|>"},"eos_token":"<|eot_id|>"}"#;
    let files = TokenizerFiles {
        tokenizer: &json,
        tokenizer_config: Some(config),
        ..Default::default()
    };

    let tokenizer = Tokenizer::from_files(files).unwrap();

    assert_eq!(
        tokenizer.bos_token_id(),
        tokenizer.token_id("<|begin_of_text|>")
    );
    assert_eq!(
        tokenizer.eos_token_ids(),
        [tokenizer.token_id("<|eot_id|>").unwrap()]
    );
}

#[test]
fn a_missing_file_is_named() {
    let error = Tokenizer::from_dir(&fixture("chat/absent")).unwrap_err();

    assert!(matches!(&error, Error::ReadFile { .. }));
    assert!(
        error.to_string().contains("absent/tokenizer.json"),
        "{error}"
    );
}

#[test]
fn a_malformed_file_is_named() {
    let load = |tokenizer: &[u8], config| {
        let files = TokenizerFiles {
            tokenizer,
            tokenizer_config: config,
            ..Default::default()
        };
        Tokenizer::from_files(files).unwrap_err().to_string()
    };
    let good = std::fs::read(fixture("chat/bytes/tokenizer.json")).unwrap();

    assert!(load(b"{}", None).starts_with("`tokenizer.json` is not a usable tokenizer file"));
    assert!(load(&good, Some(b"no")).starts_with("`tokenizer_config.json` is not"));
}
