//! The client over a wire that cuts, stalls, resets and repeats.

use std::time::{Duration, Instant};

use serde_json::json;
use tinker_api::{
    AdamParams, Error, ForwardBackwardOutput, LoraConfig, LossFn, ModelInput, SampleOptions,
    SamplingParams, SamplingSource, SaveOptions, ServiceClient, Timeouts, TrainingClient,
};
use tinker_contract::faults::{Fault, FaultServer};
use tinker_contract::mock::{Mock, Seen, json as reply, proto};
use tinker_contract::suite;
use tinker_contract::target::Target;
use tinker_http::{AccessScope, Client, ErrorKind, RetryPolicy};
use tinker_types::{
    ASAMPLE, CREATE_SESSION, CreateSessionRequest, CreateSessionTag, FORWARD_BACKWARD, OPTIM_STEP,
    RETRIEVE_FUTURE, SAVE_WEIGHTS, SESSION_HEARTBEAT, TRAINING_RUNS,
};

use crate::support::{KEY, builder, datum, ms, service, until};

const CE: LossFn = LossFn::CrossEntropy;

/// Long enough for a loaded machine to answer, short enough to wait out.
const SHORT: Timeouts = Timeouts {
    session: ms(400),
    train: ms(400),
    sample: ms(400),
    retrieve: ms(400),
    rest: ms(400),
};

/// A double behind a wire, and a client that has started up.
struct Rig {
    mock: Mock,
    wire: FaultServer,
    client: Client,
}

impl Rig {
    async fn start() -> Self {
        let mock = Mock::start().await;
        let wire = FaultServer::before(&mock.base_url()).await;
        let client = builder(&wire.base_url()).timeouts(SHORT).build().unwrap();
        client.config().await.unwrap();
        mock.forget();
        Self { mock, wire, client }
    }

    async fn create_session(&self) -> Result<String, tinker_http::Error> {
        let request = CreateSessionRequest {
            tags: vec![],
            user_metadata: Default::default(),
            sdk_version: "0.38.0".into(),
            project_id: None,
            display_name: None,
            tag: CreateSessionTag,
        };
        let created = self.client.create_session(&request).await?;
        Ok(created.session_id.to_string())
    }
}

/// A call succeeds in spite of the fault, and its request was delivered this often, each time the
/// same.
async fn check_survived(fault: Fault, n_delivered: usize) -> Rig {
    let rig = Rig::start().await;
    rig.wire.script(CREATE_SESSION, [fault.clone()]);

    let id = rig.create_session().await.unwrap();

    assert_eq!(id, "S1");
    let seen = rig.mock.seen_at(CREATE_SESSION);
    assert_eq!(seen.len(), n_delivered, "{fault:?}");
    check_equal(&seen);
    rig
}

/// Requests that the server can take for one.
fn check_equal(seen: &[Seen]) {
    for other in seen {
        assert_eq!(other.body, seen[0].body);
        let key = |seen: &Seen| seen.header("x-idempotency-key").map(str::to_owned);
        assert_eq!(key(other), key(&seen[0]));
    }
}

// One call.

#[tokio::test]
async fn a_reset_before_delivery_is_repeated() {
    check_survived(Fault::ResetBefore, 1).await;
}

#[tokio::test]
async fn a_close_before_delivery_is_repeated() {
    check_survived(Fault::CloseBefore, 1).await;
}

#[tokio::test]
async fn a_reset_after_delivery_repeats_the_same_request() {
    check_survived(Fault::ResetAfter, 2).await;
}

#[tokio::test]
async fn a_request_that_stalls_on_the_way_is_repeated() {
    check_survived(Fault::StallBefore, 1).await;
}

#[tokio::test]
async fn an_answer_that_never_comes_is_asked_for_again() {
    check_survived(Fault::StallAfter, 2).await;
}

#[tokio::test]
async fn an_answer_cut_in_its_head_is_asked_for_again() {
    for n in [0, 1, 12, 30] {
        check_survived(Fault::CutHead(n), 2).await;
    }
}

#[tokio::test]
async fn an_answer_cut_in_its_body_is_asked_for_again() {
    for n in [0, 1, 10] {
        check_survived(Fault::CutBody(n), 2).await;
    }
}

#[tokio::test]
async fn an_answer_reset_in_its_body_is_asked_for_again() {
    for n in [0, 5] {
        check_survived(Fault::ResetBody(n), 2).await;
    }
}

#[tokio::test]
async fn an_answer_that_stalls_in_its_body_is_asked_for_again() {
    for n in [0, 5] {
        check_survived(Fault::StallBody(n), 2).await;
    }
}

/// Pieces of one to three bytes end within characters, within escapes and within `\r\n`.
#[tokio::test]
async fn answers_cut_within_characters_are_read_whole() {
    let name = "Grüße 🙂 漢字\r\n\u{2028}end";
    for fault in [
        Fault::Trickle,
        Fault::Chunked(1),
        Fault::Chunked(2),
        Fault::Chunked(3),
    ] {
        let rig = Rig::start().await;
        let path = format!("{TRAINING_RUNS}/S1:train:0");
        let run = json!({
            "training_run_id": "S1:train:0", "base_model": name, "model_owner": name,
            "is_lora": true, "last_request_time": "2026-01-01T00:00:00Z",
        });
        rig.mock.script(&path, [reply(200, &run)]);
        rig.wire.script(&path, [fault.clone()]);

        let id = "S1:train:0".parse().unwrap();
        let run = rig.client.get_training_run(&id, AccessScope::Owned);
        let run = run.await.unwrap();

        assert_eq!(
            (&run.base_model[..], &run.model_owner[..]),
            (name, name),
            "{fault:?}"
        );
        assert_eq!(rig.wire.n_arrived(&path), 1);
    }
}

#[tokio::test]
async fn chunks_without_an_end_are_asked_for_again() {
    check_survived(Fault::CutChunked, 2).await;
}

#[tokio::test]
async fn an_answer_byte_by_byte_is_read() {
    check_survived(Fault::Trickle, 1).await;
}

#[tokio::test]
async fn an_answer_in_chunks_is_read() {
    for n in [1, 7, 1000] {
        check_survived(Fault::Chunked(n), 1).await;
    }
}

#[tokio::test]
async fn an_answer_without_a_length_is_read() {
    check_survived(Fault::WithoutLength, 1).await;
}

#[tokio::test]
async fn a_request_delivered_twice_is_answered_once() {
    check_survived(Fault::DeliverTwice, 2).await;
}

#[tokio::test]
async fn a_request_delivered_twice_without_an_answer_is_repeated() {
    check_survived(Fault::DeliverTwiceAndReset, 3).await;
}

#[tokio::test]
async fn an_early_hint_is_not_the_answer() {
    let body = r#"{"session_id":"S7"}"#;
    let hinted = format!(
        "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let rig = Rig::start().await;
    rig.wire
        .script(CREATE_SESSION, [Fault::Raw(hinted.into_bytes())]);

    assert_eq!(rig.create_session().await.unwrap(), "S7");
}

#[tokio::test]
async fn what_is_not_http_is_asked_for_again() {
    for garbage in [&b"\x16\x03\x01\x02\x00"[..], b"SSH-2.0-x\r\n", b"\0\0\0\0"] {
        check_survived(Fault::Raw(garbage.to_vec()), 1).await;
    }
}

#[tokio::test]
async fn one_fault_after_the_other_is_survived() {
    let rig = Rig::start().await;
    rig.wire.script(
        CREATE_SESSION,
        [
            Fault::ResetBefore,
            Fault::CutBody(3),
            Fault::StallBody(2),
            Fault::CloseBefore,
            Fault::CutChunked,
        ],
    );

    rig.create_session().await.unwrap();

    assert_eq!(rig.wire.n_arrived(CREATE_SESSION), 6);
    check_equal(&rig.mock.seen_at(CREATE_SESSION));
}

#[tokio::test]
async fn a_connection_that_went_stale_is_not_noticed() {
    let rig = Rig::start().await;
    for _ in 0..5 {
        rig.wire.script(CREATE_SESSION, [Fault::CloseAfter]);

        rig.create_session().await.unwrap();
    }

    assert!(rig.wire.n_connections() > 1);
}

#[tokio::test]
async fn connections_are_kept_for_the_next_call() {
    let rig = Rig::start().await;
    for _ in 0..20 {
        rig.create_session().await.unwrap();
    }

    // The start-up's and the calls'.
    assert!(
        rig.wire.n_connections() <= 2,
        "{:?}",
        rig.wire.n_connections()
    );
}

#[tokio::test]
async fn one_attempt_ends_with_the_name_of_the_fault() {
    for (fault, kind) in [
        (Fault::ResetAfter, ErrorKind::Connect),
        (Fault::CutBody(3), ErrorKind::Connect),
        (Fault::StallAfter, ErrorKind::Timeout),
        (Fault::StallBody(3), ErrorKind::Timeout),
    ] {
        let rig = Rig::start().await;
        let once = builder(&rig.wire.base_url())
            .timeouts(SHORT)
            .retry_policy(RetryPolicy::never())
            .build()
            .unwrap();
        once.config().await.unwrap();
        rig.wire.script(CREATE_SESSION, [fault.clone()]);
        let rig = Rig {
            client: once,
            ..rig
        };

        let error = rig.create_session().await.unwrap_err();

        assert_eq!(*error.kind(), kind, "{fault:?}: {error}");
        assert!(
            error.may_have_arrived() && error.is_retryable(),
            "{fault:?}"
        );
        assert!(error.to_string().contains(CREATE_SESSION), "{error}");
    }
}

#[tokio::test]
async fn a_body_of_the_wrong_bytes_is_a_decode_error() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\n";
    let rig = Rig::start().await;
    let bytes = [head.as_bytes(), b"\xff\xfe{}"].concat();
    rig.wire.script(CREATE_SESSION, [Fault::Raw(bytes)]);

    let error = rig.create_session().await.unwrap_err();

    assert_eq!(*error.kind(), ErrorKind::Decode, "{error}");
    assert_eq!(rig.wire.n_arrived(CREATE_SESSION), 1);
}

#[tokio::test]
async fn a_read_that_was_cut_is_read_again() {
    let rig = Rig::start().await;
    rig.wire
        .script(TRAINING_RUNS, [Fault::CutBody(20), Fault::ResetAfter]);
    let page = tinker_http::Page {
        limit: 20,
        offset: 0,
    };

    let runs = rig
        .client
        .list_training_runs(page, AccessScope::Owned, None)
        .await
        .unwrap();

    assert!(runs.training_runs.is_empty());
    assert_eq!(rig.wire.n_arrived(TRAINING_RUNS), 3);
}

// Operations of a run.

/// A training client over a wire to a double.
async fn trainer() -> (Mock, FaultServer, TrainingClient) {
    let mock = Mock::start().await;
    let wire = FaultServer::before(&mock.base_url()).await;
    let service = service(&wire.base_url(), KEY)
        .timeouts(SHORT)
        .build()
        .unwrap();
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();
    mock.forget();
    (mock, wire, trainer)
}

/// The first token of each datum that an output is of.
fn names(output: &ForwardBackwardOutput) -> Vec<u32> {
    let rows = output.loss_fn_outputs.iter();
    rows.map(|row| -row["logprobs"].as_floats().unwrap()[0] as u32)
        .collect()
}

/// A pass and its step survive the fault on `path`; every request with one number is the same.
async fn check_step(path: &str, fault: Fault) {
    let (mock, wire, trainer) = trainer().await;
    wire.script(path, [fault.clone()]);

    let pass = trainer.forward_backward(vec![datum(7, 4)], CE);
    let step = trainer.optim_step(AdamParams::default());

    assert_eq!(names(&pass.await.unwrap()), [7], "{fault:?}");
    step.await.unwrap();
    for (path, seq_id) in [(FORWARD_BACKWARD, 1), (OPTIM_STEP, 2)] {
        let seen = mock.seen_at(path);
        assert!(seen.iter().all(|seen| seen.seq_id() == seq_id), "{path}");
        check_equal(&seen);
    }
}

/// Every way in which a request or its answer gets lost.
fn losses() -> Vec<Fault> {
    vec![
        Fault::ResetBefore,
        Fault::CloseBefore,
        Fault::ResetAfter,
        Fault::StallAfter,
        Fault::CutHead(9),
        Fault::CutBody(5),
        Fault::ResetBody(5),
        Fault::StallBody(5),
        Fault::CutChunked,
        Fault::DeliverTwice,
        Fault::DeliverTwiceAndReset,
    ]
}

#[tokio::test]
async fn a_pass_that_gets_lost_is_sent_again_under_its_number() {
    for fault in losses() {
        check_step(FORWARD_BACKWARD, fault).await;
    }
}

#[tokio::test]
async fn a_step_that_gets_lost_is_sent_again_under_its_number() {
    for fault in losses() {
        check_step(OPTIM_STEP, fault).await;
    }
}

#[tokio::test]
async fn a_result_that_gets_lost_is_asked_for_again() {
    for fault in losses() {
        check_step(RETRIEVE_FUTURE, fault).await;
    }
}

#[tokio::test]
async fn a_save_that_gets_lost_is_sent_again_under_its_number() {
    for fault in losses() {
        let (mock, wire, trainer) = trainer().await;
        wire.script(SAVE_WEIGHTS, [fault]);

        let path = trainer
            .save_state("a", SaveOptions::default())
            .await
            .unwrap();

        assert_eq!(path.to_string(), "tinker://S1:train:0/weights/a");
        let seen = mock.seen_at(SAVE_WEIGHTS);
        assert!(seen.iter().all(|seen| seen.seq_id() == 1));
        check_equal(&seen);
    }
}

#[tokio::test]
async fn requests_of_one_pass_survive_faults_of_their_own() {
    let mock = Mock::with_config(json!({ "fwdbwd_max_chunk_len": 1 })).await;
    let wire = FaultServer::before(&mock.base_url()).await;
    let service = service(&wire.base_url(), KEY)
        .timeouts(SHORT)
        .build()
        .unwrap();
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();
    wire.script(
        FORWARD_BACKWARD,
        [
            Fault::ResetAfter,
            Fault::StallBefore,
            Fault::CutBody(2),
            Fault::DeliverTwice,
        ],
    );
    wire.script(RETRIEVE_FUTURE, [Fault::CutBody(1), Fault::ResetBefore]);

    let data = (1..=5).map(|i| datum(i, 4)).collect();
    let output = trainer.forward_backward(data, CE).await.unwrap();

    assert_eq!(names(&output), [1, 2, 3, 4, 5]);
    assert_eq!(output.metrics["loss:sum"], 5.0);
}

#[tokio::test]
async fn a_result_cut_without_notice_is_never_taken_for_whole() {
    let (mock, wire, trainer) = trainer().await;
    let n_whole = {
        let output = trainer.forward(vec![datum(1, 4), datum(2, 4)], CE).await;
        assert_eq!(names(&output.unwrap()), [1, 2]);
        mock.forget();
        // Cut at every place of the result, whole fields included.
        80
    };
    for n in (0..n_whole).step_by(7) {
        wire.script(RETRIEVE_FUTURE, [Fault::CutWithoutLength(n)]);

        let outcome = trainer.forward(vec![datum(1, 4), datum(2, 4)], CE).await;

        match outcome {
            Ok(output) => assert_eq!(names(&output), [1, 2], "cut at {n}"),
            Err(error) => assert!(
                error.kind() == Some(&ErrorKind::Decode) || matches!(error, Error::Protocol(_)),
                "cut at {n}: {error}"
            ),
        }
    }
}

#[tokio::test]
async fn a_result_with_an_output_too_few_is_an_error() {
    let (mock, _wire, trainer) = trainer().await;
    let short = tinker_contract::mock::forward_backward_output(&forward_request(1));
    mock.script(
        RETRIEVE_FUTURE,
        [proto(&tinker_types::proto::ForwardBackwardOutput::from(
            &short,
        ))],
    );

    let error = trainer
        .forward(vec![datum(1, 4), datum(2, 4)], CE)
        .await
        .unwrap_err();

    assert!(matches!(error, Error::Protocol(_)), "{error}");
    assert!(
        error.to_string().contains("1 outputs for 2 data"),
        "{error}"
    );
}

fn forward_request(n: u32) -> tinker_types::ForwardBackwardRequest {
    tinker_types::ForwardBackwardRequest {
        model_id: "S1:train:0".parse().unwrap(),
        seq_id: 1,
        data: (1..=n).map(|i| datum(i, 4)).collect(),
        loss_fn: CE,
        loss_fn_config: Default::default(),
        forward_only: true,
    }
}

#[tokio::test]
async fn a_stalled_upload_does_not_hold_up_the_heart() {
    let mock = Mock::start().await;
    let wire = FaultServer::before(&mock.base_url()).await;
    let service = service(&wire.base_url(), KEY)
        .heartbeat_interval(ms(2))
        .build()
        .unwrap();
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();
    wire.script(FORWARD_BACKWARD, [Fault::StallBefore]);
    let pass = trainer.forward_backward(vec![datum(1, 4)], CE);
    until(|| wire.n_arrived(FORWARD_BACKWARD) == 1).await;
    let before = wire.n_delivered(SESSION_HEARTBEAT);

    until(|| wire.n_delivered(SESSION_HEARTBEAT) > before + 10).await;

    assert_eq!(wire.n_delivered(FORWARD_BACKWARD), 0);
    drop(pass);
}

#[tokio::test]
async fn a_caller_is_not_held_by_a_wire_that_stalls() {
    let mock = Mock::start().await;
    let wire = FaultServer::before(&mock.base_url()).await;
    let service = service(&wire.base_url(), KEY).build().unwrap();
    let trainer = service
        .create_lora_training_client("test/base", LoraConfig::default())
        .await
        .unwrap();
    wire.decide(|_| Fault::StallAfter);
    let started = Instant::now();

    let error = trainer
        .forward(vec![datum(1, 4)], CE)
        .timeout(ms(50))
        .await
        .unwrap_err();

    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

// Samples.

#[tokio::test]
async fn a_sample_that_gets_lost_is_sent_again_under_its_number() {
    for fault in losses() {
        let mock = Mock::start().await;
        let wire = FaultServer::before(&mock.base_url()).await;
        let service = service(&wire.base_url(), KEY)
            .timeouts(SHORT)
            .build()
            .unwrap();
        let source = SamplingSource::BaseModel("test/base".into());
        let sampler = service.create_sampling_client(source).await.unwrap();
        wire.script(ASAMPLE, [fault.clone()]);

        let params = SamplingParams {
            max_tokens: Some(3),
            ..SamplingParams::default()
        };
        let prompt = ModelInput::from_tokens(vec![5; 4]);
        let response = sampler
            .sample(prompt, params, SampleOptions::default())
            .await
            .unwrap();

        assert_eq!(response.sequences[0].tokens, [1, 2, 3], "{fault:?}");
        let seen = mock.seen_at(ASAMPLE);
        assert!(seen.iter().all(|seen| seen.seq_id() == 0), "{fault:?}");
        check_equal(&seen);
    }
}

// Our own server behind the wire.

fn behind(target: &Target, wire: &FaultServer) -> ServiceClient {
    service(&wire.base_url(), &target.api_key).build().unwrap()
}

/// Three steps, a save, and what the run says then.
async fn three_steps(target: &Target, service: &ServiceClient) -> Vec<Vec<f32>> {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(9),
        ..LoraConfig::default()
    };
    let trainer = service
        .create_lora_training_client(&target.base_model, lora)
        .await
        .unwrap();
    let adam = AdamParams {
        learning_rate: 5e-3,
        ..AdamParams::default()
    };
    for i in 0..3 {
        let pass = trainer.forward_backward(suite::batch(i), CE);
        let step = trainer.optim_step(adam);
        pass.await.unwrap();
        step.await.unwrap();
    }
    let output = trainer.forward(suite::batch(7), CE).await.unwrap();
    let rows = output.loss_fn_outputs.iter();
    rows.map(|row| row["logprobs"].as_floats().unwrap().to_vec())
        .collect()
}

/// Steps over a wire with this fault at every third request train what undisturbed ones do.
async fn check_exactly_once(fault: Fault) {
    let target = Target::start().await;
    let wire = FaultServer::before(&target.base_url).await;
    let undisturbed = three_steps(&target, &target.service()).await;
    let mut n = 0;
    wire.decide(move |_| {
        n += 1;
        if n % 3 == 0 {
            fault.clone()
        } else {
            Fault::None
        }
    });

    let disturbed = three_steps(&target, &behind(&target, &wire)).await;

    assert_eq!(disturbed, undisturbed);
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_with_resets_before_delivery_are_applied_once() {
    check_exactly_once(Fault::ResetBefore).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_with_resets_after_delivery_are_applied_once() {
    check_exactly_once(Fault::ResetAfter).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_with_cut_answers_are_applied_once() {
    check_exactly_once(Fault::CutBody(4)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_delivered_twice_are_applied_once() {
    check_exactly_once(Fault::DeliverTwice).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_delivered_twice_and_never_answered_are_applied_once() {
    check_exactly_once(Fault::DeliverTwiceAndReset).await;
}
