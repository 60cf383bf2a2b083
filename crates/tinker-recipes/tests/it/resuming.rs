//! Interrupted and resumed equals uninterrupted, wherever the cut is.

use tinker_api::{LedgerError, ServiceClient};
use tinker_recipes::Error;
use tinker_recipes::sft::{Outcome, SftOptions, StopSignal};

use wiremock::{Mock, MockServer, ResponseTemplate, matchers};

use crate::fake::FakeService;
use crate::support::{Log, Run, small_options};

const N_STEPS: u64 = 6;

/// What a finished run leaves: the digest of its weights and its metrics.
fn result(run: &Run, service: &FakeService, outcome: &Outcome) -> (u64, Vec<serde_json::Value>) {
    let Outcome::Finished { state, .. } = outcome else {
        panic!("{outcome:?}")
    };
    (service.weights_at(state), run.metrics())
}

async fn undisturbed() -> (u64, Vec<serde_json::Value>) {
    let (run, service) = (Run::small(), FakeService::default());
    let outcome = run.train(&service, &mut Log::default()).await.unwrap();
    result(&run, &service, &outcome)
}

fn stopping_after(step: u64) -> Log {
    Log {
        stop_after: Some(step),
        ..Log::default()
    }
}

#[tokio::test]
async fn interrupted_after_any_step_and_resumed_equals_undisturbed() {
    let expected = undisturbed().await;
    for step in 0..N_STEPS {
        let (run, service, mut log) = (Run::small(), FakeService::default(), stopping_after(step));

        let mut outcome = run.train(&service, &mut log).await.unwrap();
        if let Outcome::Interrupted { resume_from, .. } = outcome {
            // The step after the one that was seen was already submitted.
            assert_eq!(resume_from, step + 2);
            outcome = run.resume(&service, &mut Log::default()).await.unwrap();
        }

        assert_eq!(
            result(&run, &service, &outcome),
            expected,
            "stopped after step {step}"
        );
    }
}

#[tokio::test]
async fn interrupted_at_every_step_in_turn_equals_undisturbed() {
    let expected = undisturbed().await;
    let (run, service) = (Run::small(), FakeService::default());

    let mut outcome = run.train(&service, &mut stopping_after(0)).await.unwrap();
    while let Outcome::Interrupted { resume_from, .. } = outcome {
        outcome = run
            .resume(&service, &mut stopping_after(resume_from))
            .await
            .unwrap();
    }

    assert_eq!(result(&run, &service, &outcome), expected);
}

#[tokio::test]
async fn failed_at_any_request_and_resumed_equals_undisturbed() {
    let expected = undisturbed().await;
    let (run, service) = (Run::small(), FakeService::default());
    run.train(&service, &mut Log::default()).await.unwrap();
    let n_operations = service.operations().len();
    for n in 0..n_operations {
        let (run, service) = (Run::small(), FakeService::default());
        service.fail_after(Some(n));
        run.train(&service, &mut Log::default()).await.unwrap_err();
        service.fail_after(None);

        let outcome = run.resume(&service, &mut Log::default()).await.unwrap();

        assert_eq!(
            result(&run, &service, &outcome),
            expected,
            "failed after {n} requests"
        );
    }
}

#[tokio::test]
async fn a_stop_before_the_first_step_saves_and_resumes_too() {
    let expected = undisturbed().await;
    let (run, service) = (Run::small(), FakeService::default());
    let stop = StopSignal::new();
    stop.request();
    let mut log = Log {
        stop,
        ..Log::default()
    };

    let outcome = run.train(&service, &mut log).await.unwrap();
    assert!(matches!(
        outcome,
        Outcome::Interrupted {
            resume_from: 0,
            n_steps: 6,
            ..
        }
    ));
    assert_eq!(
        log.lines,
        [
            "planned 6 steps, 3 an epoch",
            "stopping at 0",
            "saved 000000"
        ]
    );

    let outcome = run.resume(&service, &mut Log::default()).await.unwrap();
    assert_eq!(result(&run, &service, &outcome), expected);
}

#[tokio::test]
async fn a_stop_at_a_saved_step_does_not_save_twice() {
    let (run, service, mut log) = (Run::small(), FakeService::default(), stopping_after(2));

    run.train(&service, &mut log).await.unwrap();

    let n_saved = log
        .lines
        .iter()
        .filter(|line| line.starts_with("saved 000004"))
        .count();
    assert_eq!(n_saved, 1);
    assert_eq!(log.lines.last().unwrap(), "saved 000004");
}

#[tokio::test]
async fn an_expired_checkpoint_falls_back_to_an_earlier_with_a_notice() {
    let expected = undisturbed().await;
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
    run.train(&service, &mut stopping_after(3)).await.unwrap();
    service.expire("000005");
    service.expire("000004");

    let outcome = run.resume(&service, &mut log).await.unwrap();

    assert_eq!(result(&run, &service, &outcome), expected);
    let gone = |name| {
        format!(
            "notice: checkpoint `tinker://run-0/weights/{name}` cannot be used (it does not exist); \
             trying an earlier one"
        )
    };
    assert_eq!(
        log.lines[1..4],
        [
            gone("000005"),
            gone("000004"),
            "resumed Some(\"000002\") at 2, dropped 3".to_owned(),
        ]
    );
}

#[tokio::test]
async fn a_run_whose_checkpoints_are_all_gone_says_so() {
    let (run, service) = (Run::small(), FakeService::default());
    run.train(&service, &mut stopping_after(0)).await.unwrap();
    service.expire("000002");

    let error = run.resume(&service, &mut Log::default()).await.unwrap_err();

    assert!(
        matches!(error, Error::NoUsableCheckpoint { n_tried: 1, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_complete_run_is_not_resumed() {
    let (run, service) = (Run::small(), FakeService::default());
    run.train(&service, &mut Log::default()).await.unwrap();

    let error = run.resume(&service, &mut Log::default()).await.unwrap_err();

    let expected = "run `run` is complete at step 6 of 6; there is nothing to resume";
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn a_complete_run_can_be_extended_by_more_epochs() {
    let (mut run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
    run.train(&service, &mut Log::default()).await.unwrap();
    run.config.num_epochs = 3;

    let outcome = run.resume(&service, &mut log).await.unwrap();

    assert!(matches!(outcome, Outcome::Finished { n_steps: 9, .. }));
    assert_eq!(log.lines[1], "resumed Some(\"final\") at 6, dropped 1");
}

/// Where the killed process left off, by what the observer was told.
fn rejoined(log: &Log) -> bool {
    log.lines.iter().any(|line| line.starts_with("rejoined"))
}

#[tokio::test]
async fn killed_at_any_operation_and_resumed_does_nothing_twice() {
    let (run, service) = (Run::small(), FakeService::default());
    let outcome = run.train(&service, &mut Log::default()).await.unwrap();
    let (expected, operations) = (result(&run, &service, &outcome), service.operations());
    for n in 0..operations.len() {
        let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
        service.leave_after(n);
        run.train(&service, &mut Log::default()).await.unwrap_err();
        service.fail_after(None);

        let outcome = run.resume(&service, &mut log).await.unwrap();

        assert_eq!(result(&run, &service, &outcome), expected, "{n} done");
        assert_eq!(service.operations(), operations, "{n} done");
        assert!(rejoined(&log), "{n} done: {:?}", log.lines);
        let rows = run.folder().read_checkpoints().unwrap();
        let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["000002", "000004", "final"], "{n} done");
    }
}

#[tokio::test]
async fn killed_again_and_again_does_nothing_twice() {
    let (run, service) = (Run::small(), FakeService::default());
    let outcome = run.train(&service, &mut Log::default()).await.unwrap();
    let (expected, operations) = (result(&run, &service, &outcome), service.operations());
    let (run, service) = (Run::small(), FakeService::default());
    service.leave_after(0);

    let mut outcome = run.train(&service, &mut Log::default()).await;
    while outcome.is_err() {
        service.leave_after(1);
        outcome = run.resume(&service, &mut Log::default()).await;
    }

    assert_eq!(result(&run, &service, &outcome.unwrap()), expected);
    assert_eq!(service.operations(), operations);
}

#[tokio::test]
async fn a_segment_from_a_checkpoint_is_rejoined_too() {
    let expected = undisturbed().await;
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
    run.train(&service, &mut stopping_after(0)).await.unwrap();
    let n_before = service.operations().len();
    service.leave_after(5);
    run.resume(&service, &mut Log::default()).await.unwrap_err();
    service.fail_after(None);

    let outcome = run.resume(&service, &mut log).await.unwrap();

    assert_eq!(result(&run, &service, &outcome), expected);
    assert!(rejoined(&log), "{:?}", log.lines);
    let steps = service.operations();
    let n_steps = |operations: &[String]| operations.iter().filter(|o| *o == "optim_step").count();
    assert_eq!(n_steps(&steps), N_STEPS as usize);
    assert!(steps.len() > n_before);
}

#[tokio::test]
async fn metrics_that_a_power_cut_took_are_recorded_again() {
    let expected = undisturbed().await;
    let (run, service) = (Run::small(), FakeService::default());
    service.leave_after(12);
    run.train(&service, &mut Log::default()).await.unwrap_err();
    service.fail_after(None);
    let path = run.path().join("metrics.jsonl");
    let rows = std::fs::read_to_string(&path).unwrap();
    let kept: Vec<_> = rows.lines().take(1).collect();
    assert!(kept.len() < rows.lines().count(), "{rows}");
    std::fs::write(&path, kept.join("\n") + "\n").unwrap();
    let mut log = Log::default();
    log.stop.request();

    // The stop waits for all that the ledger has, although the metrics do not tell of it.
    let stopped = run.resume(&service, &mut log).await.unwrap();
    let Outcome::Interrupted { resume_from, .. } = stopped else {
        panic!("{stopped:?}")
    };
    assert_eq!(resume_from, 4);
    let outcome = run.resume(&service, &mut Log::default()).await.unwrap();

    assert_eq!(result(&run, &service, &outcome), expected);
}

/// Six steps without checkpoints between: a stop after step 2 saves before step 4.
fn without_checkpoints() -> Run {
    let options = SftOptions {
        save_every: 0,
        ..small_options()
    };
    Run::new(&options, 10)
}

/// Operations of such a run before the checkpoint of the stop.
const N_BEFORE_STOP: usize = 10;

async fn check_goes_on_after_a_stop(run: &Run, service: &FakeService) {
    let (expected, _) = undisturbed().await;
    let mut log = Log::default();

    let outcome = run.resume(service, &mut log).await.unwrap();

    assert!(rejoined(&log), "{:?}", log.lines);
    let Outcome::Finished { state, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!(service.weights_at(&state), expected);
    assert_eq!(service.operations()[N_BEFORE_STOP], "save_state 000004");
    let rows = run.folder().read_checkpoints().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["000004", "final"]);
}

#[tokio::test]
async fn killed_before_the_checkpoint_of_a_stop_the_run_saves_it_and_goes_on() {
    let (run, service) = (without_checkpoints(), FakeService::default());
    service.leave_after(N_BEFORE_STOP);
    let stopped = run.train(&service, &mut stopping_after(2)).await;
    assert_eq!(
        stopped.unwrap_err().to_string(),
        "saving the checkpoint to resume from failed"
    );
    service.fail_after(None);

    check_goes_on_after_a_stop(&run, &service).await;
}

#[tokio::test]
async fn killed_after_the_checkpoint_of_a_stop_the_run_records_it_and_goes_on() {
    let (run, service) = (without_checkpoints(), FakeService::default());
    run.train(&service, &mut stopping_after(2)).await.unwrap();
    // As a process that is killed before it records what was saved leaves it.
    let write = |name, text| std::fs::write(run.path().join(name), text).unwrap();
    let unfinished = r#"{"from": null, "first_step": 0, "stops": [4]}"#;
    write("unfinished.json", unfinished);
    write("ledger.jsonl", "0");
    write("checkpoints.jsonl", "");

    check_goes_on_after_a_stop(&run, &service).await;
}

#[tokio::test]
async fn a_stop_while_a_run_is_rejoined_waits_for_what_was_submitted() {
    let expected = undisturbed().await;
    let (run, service) = (Run::small(), FakeService::default());
    service.leave_after(4);
    run.train(&service, &mut Log::default()).await.unwrap_err();
    service.fail_after(None);
    let mut log = Log::default();
    log.stop.request();

    let outcome = run.resume(&service, &mut log).await.unwrap();
    assert!(
        matches!(outcome, Outcome::Interrupted { .. }),
        "{outcome:?}"
    );
    let outcome = run.resume(&service, &mut Log::default()).await.unwrap();

    assert_eq!(result(&run, &service, &outcome), expected);
}

#[tokio::test]
async fn a_run_that_the_server_lost_goes_on_from_its_checkpoint() {
    let expected = undisturbed().await;
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
    service.leave_after(10);
    run.train(&service, &mut Log::default()).await.unwrap_err();
    service.fail_after(None);
    service.forget_runs();

    let outcome = run.resume(&service, &mut log).await.unwrap();

    assert_eq!(result(&run, &service, &outcome), expected);
    assert!(
        log.lines[1].starts_with("notice: the run cannot go on where it was (the server's view"),
        "{:?}",
        log.lines
    );
    assert_eq!(log.lines[2], "resumed Some(\"000002\") at 2, dropped 1");
}

#[tokio::test]
async fn a_run_that_ended_has_left_the_server() {
    let (run, service) = (Run::small(), FakeService::default());

    run.train(&service, &mut Log::default()).await.unwrap();

    assert_eq!(service.n_open_sessions(), 0);
    for gone in ["unfinished.json", "ledger.jsonl"] {
        assert!(!run.path().join(gone).exists(), "{gone}");
    }
}

#[tokio::test]
async fn a_run_whose_ledger_is_gone_goes_on_from_its_checkpoint() {
    let expected = undisturbed().await;
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
    service.leave_after(10);
    run.train(&service, &mut Log::default()).await.unwrap_err();
    service.fail_after(None);
    std::fs::remove_file(run.path().join("ledger.jsonl")).unwrap();

    let outcome = run.resume(&service, &mut log).await.unwrap();

    assert_eq!(result(&run, &service, &outcome), expected);
    assert!(
        log.lines[1].contains("its ledger is gone"),
        "{:?}",
        log.lines
    );
    assert_eq!(log.lines[2], "resumed Some(\"000002\") at 2, dropped 1");
}

/// What a client says that may not ask.
async fn forbidden() -> tinker_api::Error {
    let server = MockServer::start().await;
    let forbidden = ResponseTemplate::new(403);
    let all = Mock::given(matchers::any()).respond_with(forbidden);
    all.mount(&server).await;
    let client = ServiceClient::builder(server.uri())
        .api_key("tml-other".parse().unwrap())
        .build()
        .unwrap();
    let asked = client.rest_client().get_server_capabilities().await;
    asked.unwrap_err()
}

#[tokio::test]
async fn a_resume_that_may_not_ask_leaves_the_run_to_the_next() {
    let other = LedgerError::OtherFormat {
        path: "ledger.jsonl".into(),
        found: 9,
        known: 2,
    };
    let expected = undisturbed().await;
    for refused in [forbidden().await, other.into()] {
        let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
        service.leave_after(10);
        run.train(&service, &mut Log::default()).await.unwrap_err();
        service.fail_after(None);

        let why = refused.to_string();
        service.fail_start(refused);
        let error = run.resume(&service, &mut Log::default()).await.unwrap_err();
        let outcome = run.resume(&service, &mut log).await.unwrap();

        assert_eq!(
            error.to_string(),
            "going on with the training run failed",
            "{why}"
        );
        assert!(rejoined(&log), "{why}: {:?}", log.lines);
        assert_eq!(result(&run, &service, &outcome), expected, "{why}");
    }
}

#[tokio::test]
async fn a_start_that_fails_leaves_no_session_behind() {
    let lost = || tinker_api::Error::Stopped("the server is gone".to_owned());
    let (run, service) = (Run::small(), FakeService::default());

    service.fail_start(lost());
    run.train(&service, &mut Log::default()).await.unwrap_err();
    assert_eq!(service.n_open_sessions(), 0, "a new run");
    run.resume(&service, &mut stopping_after(0)).await.unwrap();
    service.fail_start(lost());
    run.resume(&service, &mut Log::default()).await.unwrap_err();
    assert_eq!(service.n_open_sessions(), 0, "a checkpoint");
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_that_cannot_be_used_holds_up_no_longer_than_a_goodbye() {
    let (run, service) = (Run::small(), FakeService::default());
    run.train(&service, &mut stopping_after(2)).await.unwrap();
    service.expire("000004");
    service.answer_no_goodbye();

    let outcome = run.resume(&service, &mut Log::default()).await.unwrap();

    assert!(matches!(outcome, Outcome::Finished { .. }), "{outcome:?}");
}
