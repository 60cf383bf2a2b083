//! Interrupted and resumed equals uninterrupted, wherever the cut is.

use tinker_recipes::Error;
use tinker_recipes::sft::{Outcome, StopSignal};

use crate::fake::FakeService;
use crate::support::{Log, Run};

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
