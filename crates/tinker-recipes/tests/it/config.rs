//! Resolving settings: what is recorded, and what is refused.

use tinker_recipes::sft::{HeldOut, SftConfig, SftOptions};
use tinker_recipes::{Error, ModelFacts};

use crate::support::{resolve, rows, tokenizer};

#[test]
fn every_setting_is_recorded_with_the_reason_for_the_learning_rate() {
    let mut config = resolve(&SftOptions::default(), &rows(20)).unwrap();
    config.file_path = "data.jsonl".into();
    config.learning_rate = 1e-3;

    insta::assert_json_snapshot!(config);
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<SftConfig>(&text).unwrap(), config);
}

#[test]
fn a_given_learning_rate_wins() {
    let options = SftOptions {
        learning_rate: Some(3e-4),
        ..SftOptions::default()
    };

    let config = resolve(&options, &rows(20)).unwrap();

    assert_eq!(
        (config.learning_rate, config.learning_rate_reason.as_str()),
        (3e-4, "given")
    );
}

#[test]
fn an_unknown_model_needs_a_learning_rate() {
    let model = ModelFacts::from_name("acme/secret-7b");

    let error = SftOptions::default()
        .resolve(&rows(20), &model, 64, &tokenizer())
        .unwrap_err();

    assert!(matches!(error, Error::NoLearningRate { .. }), "{error}");
}

#[test]
fn settings_out_of_range_are_refused() {
    let check = |change: fn(&mut SftOptions), expected: &str| {
        let mut options = SftOptions::default();
        change(&mut options);
        let error = resolve(&options, &rows(20)).unwrap_err();
        assert!(error.is_bad_input());
        assert_eq!(error.to_string(), expected);
    };

    check(|o| o.batch_size = 0, "batch_size `0`: must be at least 1");
    check(|o| o.num_epochs = 0, "num_epochs `0`: must be at least 1");
    check(
        |o| o.max_steps = Some(0),
        "max_steps `0`: must be at least 1",
    );
    check(|o| o.lora_rank = 0, "lora_rank `0`: must be at least 1");
    check(
        |o| o.learning_rate = Some(0.0),
        "learning_rate `0`: must be a number above 0",
    );
    check(
        |o| o.learning_rate = Some(f64::NAN),
        "learning_rate `NaN`: must be a number above 0",
    );
    check(
        |o| o.weight_decay = -1.0,
        "weight_decay `-1`: must be a number of at least 0",
    );
    check(
        |o| o.max_length = Some(65),
        "max_length `65`: must be 2 to 64, the model's context",
    );
    check(
        |o| o.ttl_seconds = Some(60),
        "ttl_seconds `60`: must be at least 3600, one hour",
    );
    check(
        |o| o.held_out = HeldOut::Rows(20),
        "test_size `20`: must leave at least one of the 20 rows to train on",
    );
    check(
        |o| o.held_out = HeldOut::Fraction(1.0),
        "test_size `1`: a share must be at least 0 and below 1",
    );
}

#[test]
fn changed_data_are_refused() {
    let config = resolve(&SftOptions::default(), &rows(20)).unwrap();

    config.check_data(&rows(20)).unwrap();
    let error = config.check_data(&rows(21)).unwrap_err();

    assert!(
        error
            .to_string()
            .contains("has changed since the run began (SHA-256 "),
        "{error}"
    );
}
