//! Which server is chosen, by flags and environment.

use super::*;

fn settings(local: bool, flag_url: Option<&str>, env_url: Option<&str>, key: bool) -> Settings {
    with_key(local, flag_url, env_url, key.then_some("tml-k"))
}

fn with_key(
    local: bool,
    flag_url: Option<&str>,
    env_url: Option<&str>,
    key: Option<&str>,
) -> Settings {
    let flags = ServerFlags {
        local,
        base_url: flag_url.map(str::to_owned),
    };
    let environment = Layer {
        base_url: env_url.map(str::to_owned),
        api_key: key.map(str::to_owned),
        ..Layer::default()
    };
    Settings::new(PathBuf::new(), flags, environment)
}

fn url_of(settings: &Settings, model: &str) -> String {
    match settings.target(Some(model)).unwrap() {
        Target::Embedded => "embedded".to_owned(),
        Target::Remote { base_url, .. } => base_url,
    }
}

#[test]
fn flag_beats_environment_beats_default() {
    let check = |local, flag, env, key, model, expected| {
        assert_eq!(url_of(&settings(local, flag, env, key), model), expected);
    };

    check(false, None, None, false, "Qwen/Qwen3-8B", "embedded");
    check(false, None, None, true, "Qwen/Qwen3-8B", HOSTED_URL);
    check(false, None, None, true, "tinker/nano", "embedded");
    check(
        false,
        None,
        Some("http://e/"),
        true,
        "tinker/nano",
        "http://e",
    );
    check(
        false,
        Some("http://f"),
        Some("http://e"),
        true,
        "x",
        "http://f",
    );
    check(true, None, Some("http://e"), true, "x", "embedded");
}

#[test]
fn remote_without_a_key_is_a_credentials_failure() {
    let failure = settings(false, Some("http://f"), None, false)
        .target(None)
        .unwrap_err();

    assert_eq!(failure.kind, FailureKind::Credentials);
    assert!(failure.to_string().contains("TINKER_API_KEY"));
}

#[test]
fn a_malformed_key_matters_only_where_it_is_needed() {
    let bad_key = |local| with_key(local, None, None, Some("secret"));

    assert_eq!(bad_key(true).target(None).unwrap(), Target::Embedded);
    assert_eq!(
        bad_key(false).target(Some("tinker/nano")).unwrap(),
        Target::Embedded
    );
    let failure = bad_key(false).target(None).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Credentials);
    assert!(!failure.to_string().contains("secret"));
}

#[test]
fn a_run_goes_on_where_it_was_trained() {
    let check = |settings: Settings, server: TrainedOn, expected: Option<&str>| {
        let kind = match settings.target_of_run(Some(&server), "tinker/nano") {
            Ok(Target::Embedded) => Some("embedded".to_owned()),
            Ok(Target::Remote { base_url, .. }) => Some(base_url),
            Err(failure) => {
                assert_eq!(failure.kind, FailureKind::Conflict, "{failure}");
                None
            }
        };
        assert_eq!(kind.as_deref(), expected);
    };
    let there = || TrainedOn::BaseUrl("http://f".to_owned());

    check(settings(false, None, None, true), there(), Some("http://f"));
    check(
        settings(false, Some("http://f/"), None, true),
        there(),
        Some("http://f"),
    );
    check(settings(true, None, None, true), there(), None);
    check(settings(false, None, Some("http://e"), true), there(), None);
    check(
        settings(false, None, Some("http://e"), true),
        TrainedOn::Embedded,
        Some("embedded"),
    );
    check(
        settings(false, Some("http://f"), None, true),
        TrainedOn::Embedded,
        None,
    );
}

#[test]
fn next_command_repeats_the_flags_it_needs() {
    let check = |settings: Settings, model, expected| {
        let target = settings.target(Some(model)).unwrap();
        assert_eq!(settings.server_flags_to_repeat(&target), expected);
    };

    check(settings(false, None, None, false), "tinker/nano", "");
    check(settings(false, None, None, true), "tinker/nano", " --local");
    check(settings(true, None, None, false), "x", " --local");
    check(
        settings(false, Some("http://f"), None, true),
        "x",
        " --base-url http://f",
    );
    check(settings(false, None, Some("http://e"), true), "x", "");
    let there = TrainedOn::BaseUrl("http://f".to_owned());
    let resumed = settings(false, None, None, true);
    let target = resumed.target_of_run(Some(&there), "x").unwrap();
    assert_eq!(
        resumed.server_flags_to_repeat(&target),
        " --base-url http://f"
    );
}
