//! An undisturbed run: what it submits, in which order, and what it records.

use serde_json::json;
use tinker_recipes::Error;
use tinker_recipes::sft::{HeldOut, Outcome, SftConfig, SftOptions};

use crate::fake::FakeService;
use crate::support::{Log, Run, small_options};

#[tokio::test]
async fn submits_evaluation_gradient_step_and_checkpoint_in_order() {
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());

    run.train(&service, &mut log).await.unwrap();

    let expected = [
        "forward 2",
        "forward_backward 3",
        "optim_step",
        "forward_backward 3",
        "optim_step",
        "save_state 000002",
        "forward 2",
        "forward_backward 2",
        "optim_step",
        "forward_backward 3",
        "optim_step",
        "save_state 000004",
        "forward 2",
        "forward_backward 3",
        "optim_step",
        "forward_backward 2",
        "optim_step",
        "forward 2",
        "save_state final",
        "save_sampler final",
    ];
    assert_eq!(service.operations(), expected);
}

#[tokio::test]
async fn tells_the_observer_what_it_does() {
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());

    run.train(&service, &mut log).await.unwrap();

    let expected = [
        "planned 6 steps, 3 an epoch",
        "evaluated 0",
        "step 0 of 6",
        "step 1 of 6",
        "saved 000002",
        "evaluated 2",
        "step 2 of 6",
        "step 3 of 6",
        "saved 000004",
        "evaluated 4",
        "step 4 of 6",
        "step 5 of 6",
        "evaluated 6",
        "saved final",
    ];
    assert_eq!(log.lines, expected);
}

#[tokio::test]
async fn records_metrics_under_the_names_of_the_cookbook() {
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());

    run.train(&service, &mut log).await.unwrap();

    let rows = run.metrics();
    assert_eq!(rows.len(), 7);
    let mut first = rows[0].clone();
    let peak = run.config.learning_rate;
    assert_eq!(first["learning_rate"], json!(peak));
    assert_eq!(rows[3]["learning_rate"], json!(peak * 0.5));
    for name in ["num_tokens", "num_loss_tokens"] {
        assert!(first[name].as_u64().unwrap() > 3, "{first}");
        first.as_object_mut().unwrap().remove(name);
    }
    first.as_object_mut().unwrap().remove("learning_rate");
    let expected = json!({
        "step": 0, "epoch": 0, "progress": 0.0, "num_sequences": 3, "train_mean_nll": 2.0,
        "test/nll": 2.0, "grad_norm": 0.5,
    });
    assert_eq!(first, expected);
    assert_eq!(
        rows[6],
        json!({"step": 6, "progress": 1.0, "test/nll": 2.0_f32 / 7.0})
    );
    let timed = run.folder().read_metrics().unwrap();
    assert!(timed[0].get("time/step").is_some() && timed[0].get("tokens_per_second").is_some());
}

#[tokio::test]
async fn records_the_next_batch_with_each_checkpoint() {
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());

    let outcome = run.train(&service, &mut log).await.unwrap();

    let rows = run.folder().read_checkpoints().unwrap();
    let cursors: Vec<_> = rows
        .iter()
        .map(|row| (row.name.as_str(), row.epoch, row.batch, row.is_final))
        .collect();
    let expected = [
        ("000002", Some(0), Some(2), false),
        ("000004", Some(1), Some(1), false),
        ("final", Some(2), Some(0), true),
    ];
    assert_eq!(cursors, expected);
    let Outcome::Finished {
        n_steps,
        state,
        sampler,
        first_nll,
        last_nll,
    } = outcome
    else {
        panic!("{outcome:?}");
    };
    assert_eq!((n_steps, first_nll), (6, Some(2.0)));
    assert!(last_nll.unwrap() < 0.3);
    assert_eq!(Some(&state), rows[2].state_path.as_ref());
    assert_eq!(Some(&sampler), rows[2].sampler_path.as_ref());
    let recorded: SftConfig = run.folder().read_config().unwrap();
    assert_eq!(recorded, run.config);
}

#[tokio::test]
async fn three_rows_with_batch_size_128_train_and_say_so() {
    let options = SftOptions {
        batch_size: 128,
        num_epochs: 2,
        ..SftOptions::default()
    };
    let (run, service, mut log) = (
        Run::new(&options, 3),
        FakeService::default(),
        Log::default(),
    );

    run.train(&service, &mut log).await.unwrap();

    let expected = [
        "planned 2 steps, 1 an epoch",
        "notice: fewer training rows (3) than the batch size (128): each step trains all",
        "notice: no rows are held out, so the result is not evaluated",
        "step 0 of 2",
        "step 1 of 2",
        "saved final",
    ];
    assert_eq!(log.lines, expected);
    assert_eq!(service.operations()[0], "forward_backward 3");
}

#[tokio::test]
async fn without_intervals_only_the_ends_are_evaluated_and_saved() {
    let options = SftOptions {
        eval_every: 0,
        save_every: 0,
        ..small_options()
    };
    let (run, service, mut log) = (
        Run::new(&options, 10),
        FakeService::default(),
        Log::default(),
    );

    run.train(&service, &mut log).await.unwrap();

    let n = |word: &str| {
        log.lines
            .iter()
            .filter(|line| line.starts_with(word))
            .count()
    };
    assert_eq!((n("evaluated"), n("saved")), (2, 1));
}

#[tokio::test]
async fn a_loss_that_is_not_finite_stops_the_run() {
    let (run, service, mut log) = (Run::small(), FakeService::default(), Log::default());
    service.set_loss(f32::NAN);

    let error = run.train(&service, &mut log).await.unwrap_err();

    assert!(
        matches!(error, Error::LossNotFinite { step: 0, .. }),
        "{error}"
    );
    assert!(run.folder().read_checkpoints().unwrap().is_empty());
}

#[tokio::test]
async fn a_failed_request_says_what_was_being_done() {
    let options = SftOptions {
        held_out: HeldOut::Rows(0),
        ..small_options()
    };
    let (run, service, mut log) = (
        Run::new(&options, 10),
        FakeService::default(),
        Log::default(),
    );
    service.fail_after(Some(2));

    let error = run.train(&service, &mut log).await.unwrap_err();

    assert_eq!(error.to_string(), "training step 1 failed");
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "the server is gone");
}

#[tokio::test(start_paused = true)]
async fn a_run_has_ended_before_its_session_is_ended() {
    let (run, service) = (Run::small(), FakeService::default());
    service.answer_no_goodbye();

    let (outcome, goodbye) = run.train_only(&service, &mut Log::default()).await.unwrap();

    let outcome = outcome.unwrap();
    assert!(matches!(outcome, Outcome::Finished { .. }), "{outcome:?}");
    let started = tokio::time::Instant::now();
    goodbye.say().await;
    assert!(started.elapsed() < std::time::Duration::from_secs(3));
}
