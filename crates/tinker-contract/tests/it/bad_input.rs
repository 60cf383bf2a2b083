//! What people and machines get wrong: each a typed error that says what to do, never a panic.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use serde_json::json;
use tempfile::TempDir;
use tinker_api::cassette::Recorder;
use tinker_api::custom_loss::ComposedLoss;
use tinker_api::{
    AdamParams, ApiKey, Datum, Error, ErrorKind, FinishReason, LoraConfig, LossFn, ModelInput,
    RetryPolicy, SampleOptions, SamplingParams, SamplingSource, ServiceClient, TensorData,
    Timeouts, TrainingClient,
};
use tinker_contract::mock::{Mock, Reply, empty, failed, json as reply, refusal};
use tinker_http::machine::parse_retry_after;
use tinker_types::{
    ASAMPLE, AUTH_TOKEN, CREATE_MODEL, CREATE_SAMPLING_SESSION, CREATE_SESSION, FORWARD_BACKWARD,
    OPTIM_STEP, RETRIEVE_FUTURE, TensorValues, loss_input,
};
use tokio::runtime::Runtime;

use crate::support::{KEY, datum, service, trainer};

const CE: LossFn = LossFn::CrossEntropy;

/// The error is of this kind, holds this text, and says what to do.
#[track_caller]
fn check(error: &Error, kind: &ErrorKind, text: &str) {
    assert_eq!(error.kind(), Some(kind), "{error}");
    assert!(error.to_string().contains(text), "{error}");
    assert!(!error.hint().is_empty());
    assert!(!error.to_string().contains(KEY), "the key is shown");
}

fn client(mock: &Mock) -> ServiceClient {
    service(&mock.base_url(), KEY).build().unwrap()
}

async fn create(service: &ServiceClient) -> Result<TrainingClient, Error> {
    let lora = LoraConfig::default();
    service.create_lora_training_client("test/base", lora).await
}

fn source() -> SamplingSource {
    SamplingSource::BaseModel("test/base".into())
}

/// Creating a run meets this answer at this path.
async fn run_refused(path: &str, answer: Reply) -> Error {
    let mock = Mock::start().await;
    mock.script(path, vec![answer; 3]);
    create(&client(&mock)).await.unwrap_err()
}

// Keys, tokens, permissions, bills.

#[test]
fn a_key_of_the_wrong_form_is_refused_before_anything_is_sent() {
    for (text, says) in [
        ("", "empty"),
        ("sk-123", "tml-"),
        ("tml-a b", "characters"),
        ("tml-ключ", "characters"),
    ] {
        let error = text.parse::<ApiKey>().unwrap_err();

        assert_eq!(*error.kind(), ErrorKind::Unauthenticated, "{text}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(error.hint().contains("API key"), "{}", error.hint());
        assert!(text.len() < 4 || !error.to_string().contains(text), "shown");
    }
}

#[test]
fn a_missing_key_names_the_server_it_is_for() {
    let error = ServiceClient::builder("http://127.0.0.1:9").build();

    check(
        &error.unwrap_err(),
        &ErrorKind::Unauthenticated,
        "no API key was given for http://127.0.0.1:9",
    );
}

#[tokio::test]
async fn an_unknown_key_is_named_as_the_fault() {
    let error = run_refused(CREATE_SESSION, refusal(401, "unknown key")).await;

    check(&error, &ErrorKind::Unauthenticated, "unknown key");
    assert!(error.hint().contains("API key"));
}

#[tokio::test]
async fn an_expired_token_that_cannot_be_renewed_is_an_error() {
    let mock = Mock::with_config(json!({ "pjwt_auth_enabled": true })).await;
    let expired =
        refusal(401, "expired").header("www-authenticate", "Bearer error=\"invalid_token\"");
    mock.script(CREATE_SESSION, vec![expired; 4]);

    let error = client(&mock).session_id().await.unwrap_err();

    check(&error, &ErrorKind::Unauthenticated, "expired");
    assert_eq!(mock.seen_at(CREATE_SESSION).len(), 2, "replayed once");
    assert_eq!(mock.seen_at(AUTH_TOKEN).len(), 2);
}

#[tokio::test]
async fn a_refused_exchange_of_the_key_is_an_error() {
    let mock = Mock::with_config(json!({ "pjwt_auth_enabled": true })).await;
    mock.script(AUTH_TOKEN, vec![refusal(401, "key was revoked"); 9]);

    let error = client(&mock).session_id().await.unwrap_err();

    check(&error, &ErrorKind::Unauthenticated, "key was revoked");
    assert!(mock.seen_at(CREATE_SESSION).is_empty());
}

#[tokio::test]
async fn a_key_without_permission_is_told_from_a_wrong_one() {
    let error = run_refused(CREATE_MODEL, refusal(403, "not for your team")).await;

    check(&error, &ErrorKind::PermissionDenied, "not for your team");
    assert!(error.hint().contains("access") && error.is_user_error());
}

#[tokio::test]
async fn a_billing_block_says_to_settle_the_bill() {
    let error = run_refused(CREATE_MODEL, refusal(402, "out of credit")).await;

    check(&error, &ErrorKind::BillingPaused, "out of credit");
    assert!(error.hint().contains("bill"));
}

// Names.

#[tokio::test]
async fn an_unknown_base_model_is_the_users_error_however_it_is_told() {
    for (path, answer) in [
        (CREATE_MODEL, refusal(404, "no base model no/such")),
        (CREATE_MODEL, refusal(400, "no base model no/such")),
        (CREATE_MODEL, refusal(422, "no base model no/such")),
        (RETRIEVE_FUTURE, failed("no base model no/such", "user")),
    ] {
        let error = run_refused(path, answer).await;

        assert!(error.is_user_error(), "{error}");
        assert!(error.to_string().contains("no/such"), "{error}");
        assert!(!error.hint().is_empty());
    }
}

#[tokio::test]
async fn an_unknown_model_of_a_sampler_is_the_users_error() {
    for code in [400, 404, 422] {
        let mock = Mock::start().await;
        mock.script(
            CREATE_SAMPLING_SESSION,
            [refusal(code, "no base model no/such")],
        );
        let unknown = SamplingSource::BaseModel("no/such".into());

        let error = client(&mock)
            .create_sampling_client(unknown)
            .await
            .unwrap_err();

        assert!(error.is_user_error(), "{error}");
        assert!(error.to_string().contains("no/such"), "{error}");
        assert!(!error.hint().is_empty());
    }
}

#[test]
fn malformed_paths_say_what_is_wrong_with_them() {
    for text in [
        "",
        "final",
        "tinker://",
        "tinker://run",
        "tinker://run/weights",
        "tinker://run/weights/",
        "tinker://run/weights/a/b",
        "tinker://run/elsewhere/a",
        "http://run/weights/a",
        "tinker://run/weights/..",
        "tinker://run/weights/a b",
    ] {
        let error = text.parse::<tinker_api::TinkerPath>().unwrap_err();

        assert!(error.to_string().len() > text.len(), "{error}");
    }
}

#[tokio::test]
async fn settings_without_an_attempt_or_any_time_are_refused_before_anything_is_sent() {
    let mock = Mock::start().await;
    let never = RetryPolicy {
        max_attempts: 0,
        ..RetryPolicy::default()
    };
    let no_time = Timeouts {
        retrieve: Duration::ZERO,
        ..Timeouts::default()
    };
    let builder = || service(&mock.base_url(), KEY);
    for (builder, says) in [
        (builder().retry_policy(never), "max_attempts"),
        (builder().timeouts(no_time), "retrieve"),
    ] {
        let error = builder.build().unwrap_err();

        check(&error, &ErrorKind::InvalidRequest, says);
    }
    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn the_cause_at_the_end_of_a_chain_decides_the_kind() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let service = service(&nobody, KEY).retry_policy(RetryPolicy::never());

    let asked = service.build().unwrap().get_server_capabilities().await;

    let error = asked.unwrap_err();
    check(&error, &ErrorKind::Connect, "cannot");
    assert!(error.is_server_lost() && !error.is_user_error());
    let first = std::error::Error::source(&error);
    let causes: Vec<_> = std::iter::successors(first, |cause| cause.source()).collect();
    let last = causes.last().and_then(|cause| cause.downcast_ref());
    let refused: &std::io::Error = last.expect("the system's own error");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn a_directory_where_a_file_is_needed_is_named() {
    let (mock, dir) = (Mock::start().await, TempDir::new().unwrap());
    let name = dir.path().display().to_string();

    let ledger = service(&mock.base_url(), KEY).ledger(dir.path()).build();
    let cassette = Recorder::create(dir.path()).map(drop);

    let of_ledger = ledger.unwrap_err();
    assert!(of_ledger.to_string().contains(&name), "{of_ledger}");
    assert!(!of_ledger.hint().is_empty());
    let of_cassette = cassette.unwrap_err();
    assert!(of_cassette.to_string().contains(&name), "{of_cassette}");
    assert!(mock.seen().is_empty());
}

#[test]
fn malformed_base_urls_are_refused_without_showing_passwords() {
    for text in [
        "",
        "host",
        "ftp://host",
        "http://",
        "http://user:secret@host",
        "http://host?x=1",
        "http://host#x",
    ] {
        let builder = ServiceClient::builder(text).api_key(KEY.parse().unwrap());
        let error = builder.build().unwrap_err();

        check(&error, &ErrorKind::InvalidRequest, "base URL");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}

// Data.

#[test]
fn tensors_whose_shape_is_not_their_size_are_refused() {
    for (n, shape) in [
        (4, vec![3]),
        (4, vec![2, 3]),
        (0, vec![1]),
        (1, vec![usize::MAX, 2]),
        (4, vec![usize::MAX, usize::MAX]),
    ] {
        let values = TensorValues::Float32(vec![0.0; n]);

        let error = TensorData::dense(values, shape.clone()).unwrap_err();

        assert!(!error.to_string().is_empty(), "{shape:?}");
    }
}

#[test]
fn data_of_different_lengths_name_both() {
    let input = || ModelInput::from_tokens(vec![1, 2, 3]);

    for error in [
        Datum::cross_entropy(input(), vec![1, 2], vec![1.0; 3]).unwrap_err(),
        Datum::cross_entropy(input(), vec![1, 2, 3], vec![1.0; 2]).unwrap_err(),
        Datum::policy_gradient(input(), vec![1, 2, 3], vec![0.0; 2], vec![0.0; 3]).unwrap_err(),
        Datum::policy_gradient(input(), vec![1, 2, 3], vec![0.0; 3], vec![0.0; 2]).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains('2') && text.contains('3'), "{text}");
    }
}

/// The call fails here: nothing is sent, and the next operation has number 1.
async fn check_unsent(data: Vec<Datum>, loss: LossFn, text: &str) {
    let mock = Mock::start().await;
    let trainer = trainer(&mock).await;

    let error = trainer.forward_backward(data, loss).await.unwrap_err();

    assert!(error.is_user_error(), "{error}");
    assert!(error.to_string().contains(text), "{error}");
    assert!(mock.seen().is_empty());
    trainer.optim_step(AdamParams::default()).await.unwrap();
    assert_eq!(mock.seen_at(OPTIM_STEP)[0].seq_id(), 1);
}

#[tokio::test]
async fn an_empty_batch_is_refused_before_it_takes_a_number() {
    check_unsent(vec![], CE, "at least one datum").await;
}

#[tokio::test]
async fn a_loss_without_its_inputs_is_refused_before_it_takes_a_number() {
    check_unsent(vec![datum(1, 3)], LossFn::ImportanceSampling, "needs").await;
}

#[tokio::test]
async fn an_unknown_loss_is_refused_with_a_list_of_those_there_are() {
    let typo = LossFn::from("importance_samplin");

    check_unsent(vec![datum(1, 3)], typo, "importance_sampling, ppo").await;
}

#[tokio::test]
async fn an_input_that_no_loss_reads_is_left_to_the_server() {
    let mock = Mock::start().await;
    let trainer = trainer(&mock).await;
    let mut inputs = datum(3, 2).loss_fn_inputs().clone();
    inputs.insert("wieghts".into(), TensorData::floats(vec![1.0; 2]));
    let odd = Datum::from_wire(ModelInput::from_tokens(vec![3, 1]), inputs);
    mock.script(
        RETRIEVE_FUTURE,
        [failed("unknown loss input `wieghts`: use weights", "user")],
    );

    let error = trainer.forward_backward(vec![odd], CE).await.unwrap_err();

    assert!(error.is_user_error(), "{error}");
    assert!(error.to_string().contains("wieghts"), "{error}");
    assert!(error.hint().contains("correct"));
    let sent = mock.seen_at(FORWARD_BACKWARD)[0].forward_backward();
    assert!(sent.data[0].loss_fn_inputs().contains_key("wieghts"));
    assert!(
        sent.data[0]
            .loss_fn_inputs()
            .contains_key(loss_input::TARGET_TOKENS)
    );
}

#[tokio::test]
async fn a_datum_above_the_limit_is_sent_alone_and_its_refusal_names_the_size() {
    let mock = Mock::start().await;
    let trainer = trainer(&mock).await;
    let too_large = "a request of 6 MB: this server takes 5 MB";
    mock.script(FORWARD_BACKWARD, [refusal(413, too_large)]);

    // 16 bytes a token: above the five million bytes of a request.
    let error = trainer
        .forward_backward(vec![datum(1, 350_000)], CE)
        .await
        .unwrap_err();

    check(&error, &ErrorKind::InvalidRequest, too_large);
    assert_eq!(mock.seen_at(FORWARD_BACKWARD).len(), 1, "final");
}

#[tokio::test]
async fn samples_out_of_range_are_refused_before_they_take_a_number() {
    let mock = Mock::start().await;
    let sampler = client(&mock)
        .create_sampling_client(source())
        .await
        .unwrap();
    let with = |change: fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        change(&mut params);
        params
    };
    let prompt = || ModelInput::from_tokens(vec![5]);
    for (prompt, params, n, text) in [
        (
            ModelInput::from_tokens(vec![]),
            with(|_| ()),
            1,
            "prompt is empty",
        ),
        (prompt(), with(|_| ()), 0, "num_samples is 0"),
        (
            prompt(),
            with(|p| p.temperature = -1.0),
            1,
            "temperature -1",
        ),
        (
            prompt(),
            with(|p| p.temperature = f64::NAN),
            1,
            "temperature NaN",
        ),
        (prompt(), with(|p| p.top_p = 0.0), 1, "top_p 0"),
        (prompt(), with(|p| p.top_p = 1.5), 1, "top_p 1.5"),
    ] {
        let options = SampleOptions {
            num_samples: n,
            ..SampleOptions::default()
        };

        let error = sampler.sample(prompt, params, options).await.unwrap_err();

        assert!(
            error.is_user_error() && error.to_string().contains(text),
            "{error}"
        );
    }
    assert!(mock.seen_at(ASAMPLE).is_empty());
}

// Clients and runtimes that are gone.

#[tokio::test]
async fn a_closed_client_says_that_it_is_closed() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let trainer = create(&service).await.unwrap();
    let sampler = service.create_sampling_client(source()).await.unwrap();
    service.close(FinishReason::Success, None).await.unwrap();
    mock.forget();

    let errors = [
        create(&service).await.unwrap_err(),
        service.create_sampling_client(source()).await.unwrap_err(),
        trainer
            .forward_backward(vec![datum(1, 2)], CE)
            .await
            .unwrap_err(),
        trainer.optim_step(AdamParams::default()).await.unwrap_err(),
        sampler
            .compute_logprobs(ModelInput::from_tokens(vec![1, 2]))
            .await
            .unwrap_err(),
    ];

    for error in errors {
        assert!(matches!(error, Error::Closed), "{error}");
        assert!(error.hint().contains("service client"));
    }
    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn what_was_submitted_before_a_close_still_brings_its_result() {
    let mock = Mock::start().await;
    let service = client(&mock);
    let trainer = create(&service).await.unwrap();
    let pass = trainer.forward_backward(vec![datum(4, 2)], CE);

    service.close(FinishReason::Success, None).await.unwrap();

    assert_eq!(pass.await.unwrap().loss_fn_outputs.len(), 1);
}

#[test]
fn a_runtime_that_is_gone_is_an_error_of_the_call() {
    let (trainer, sampler, _mock) = {
        let runtime = Runtime::new().unwrap();
        let made = runtime.block_on(async {
            let mock = Mock::start().await;
            let sampler = client(&mock).create_sampling_client(source()).await;
            (trainer(&mock).await, sampler.unwrap(), mock)
        });
        runtime.shutdown_background();
        made
    };
    let other = Runtime::new().unwrap();

    let step = trainer.optim_step(AdamParams::default());
    let pass = trainer.forward_backward(vec![datum(1, 2)], CE);
    let logprobs = sampler.compute_logprobs(ModelInput::from_tokens(vec![1, 2]));

    for error in [
        other.block_on(step).unwrap_err(),
        other.block_on(pass).unwrap_err(),
        other.block_on(logprobs).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Abandoned(_)), "{error}");
        assert!(error.hint().contains("runtime"));
    }
}

#[test]
fn a_client_outlives_the_runtime_that_used_it_first() {
    let lasting = Runtime::new().unwrap();
    let config = json!({ "pjwt_auth_enabled": true });
    let mock = lasting.block_on(Mock::with_config(config));
    let service = client(&mock);
    // Each runtime takes its connections, and the task that keeps the token fresh, with it.
    for _ in 0..3 {
        let runtime = Runtime::new().unwrap();

        runtime.block_on(service.get_server_capabilities()).unwrap();
    }
    lasting.block_on(create(&service)).unwrap();

    assert_eq!(mock.seen_at(AUTH_TOKEN).len(), 1);
}

#[test]
fn waiting_for_some_time_without_a_runtime_is_an_error_and_no_panic() {
    let runtime = Runtime::new().unwrap();
    let (trainer, _mock) = runtime.block_on(async {
        let mock = Mock::start().await;
        (trainer(&mock).await, mock)
    });

    let step = trainer.optim_step(AdamParams::default());
    let waited = poll_once(step.timeout(Duration::from_secs(1))).expect("an answer at once");

    assert!(waited.unwrap_err().to_string().contains("tokio runtime"));
}

/// Polls a future once, outside of any runtime.
fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

#[test]
fn calls_without_a_runtime_are_an_error_and_no_panic() {
    let service = service("http://127.0.0.1:9", KEY).build().unwrap();

    let session = poll_once(service.session_id()).expect("an answer at once");
    let models = poll_once(service.get_server_capabilities()).expect("an answer at once");

    for error in [session.unwrap_err(), models.unwrap_err()] {
        assert!(error.to_string().contains("tokio runtime"), "{error}");
        assert!(error.is_user_error(), "{error}");
    }
}

#[test]
fn a_clock_that_jumps_does_not_make_a_wait_long() {
    let date = "Sun, 06 Nov 1994 08:49:47 GMT";
    let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);

    // The clock fell back by years: the date seems far away and is capped.
    let behind = parse_retry_after(None, Some(date), at(0));
    // It leapt ahead: the date has passed.
    let ahead = parse_retry_after(None, Some(date), at(4_000_000_000));

    assert_eq!(behind, Some(Duration::from_secs(60)));
    assert_eq!(ahead, None);
}

// Losses of several terms.

/// A loss with a regularizer of this name and weight beside `l1`.
fn composed(name: &str, weight: f64) -> ComposedLoss {
    ComposedLoss::new(|tape, _, _| Ok(tape.number(0.0)))
        .with_function("l1", 0.5, |tape, _, _| Ok(tape.number(0.0)))
        .with_function(name, weight, |tape, _, _| Ok(tape.number(0.0)))
}

#[test]
fn a_regularizer_out_of_order_is_named() {
    composed("l2", 0.0).check().unwrap();
    for (name, weight, text) in [
        ("l1", 1.0, "the name `l1` is taken"),
        ("base", 1.0, "the name `base` is taken"),
        ("", 1.0, "has no name"),
        ("l2", -1.0, "weight -1 of `l2`"),
        ("l2", f64::NAN, "weight NaN of `l2`"),
    ] {
        let error = composed(name, weight).check().unwrap_err();

        assert!(error.to_string().contains(text), "{error}");
    }
}

// Servers that answer nonsense.

#[tokio::test]
async fn answers_of_the_wrong_shape_are_decode_errors() {
    for body in [
        json!(null),
        json!([]),
        json!({}),
        json!("S1"),
        json!({ "session_id": 7 }),
    ] {
        let error = run_refused(CREATE_SESSION, reply(200, &body)).await;

        check(&error, &ErrorKind::Decode, "was not understood");
    }
}

#[tokio::test]
async fn an_empty_answer_where_one_is_needed_is_a_decode_error() {
    let error = run_refused(CREATE_SESSION, empty(200)).await;

    check(&error, &ErrorKind::Decode, CREATE_SESSION);
}

#[tokio::test]
async fn an_endless_reason_is_cut() {
    let error = run_refused(CREATE_MODEL, refusal(400, &"x".repeat(1 << 20))).await;

    assert!(error.to_string().len() < 4000);
}
