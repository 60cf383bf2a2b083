//! A program that is killed and started again goes on with its ledger; one that may not is told why.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;
use tinker_api::custom_loss::differentiate;
use tinker_api::{
    AdamParams, Datum, Error, LedgerError, LoraConfig, LossFn, ModelInput, Result, SaveOptions,
    ServiceClient, TrainingClient,
};
use wiremock::matchers::path;
use wiremock::{Mock, MockServer, Request, Respond, ResponseTemplate};

use crate::support::*;

/// A server that knows a request by its number, as servers do.
async fn numbering_server() -> MockServer {
    let server = server().await;
    let numbered = |kind: &'static str| {
        move |request: &Request| {
            let seq_id = body(request)["seq_id"].clone();
            ok(json!({"request_id": format!("{kind}-{seq_id}")}))
        }
    };
    let pass = |request: &Request| {
        let (n, seq_id) = (pass(request).data.len(), pass(request).seq_id);
        ok(json!({"request_id": format!("pass:{n}-{seq_id}")}))
    };
    mount(&server, "forward_backward", pass).await;
    mount(&server, "optim_step", numbered("step")).await;
    mount(&server, "save_weights", numbered("save")).await;
    server
}

/// Weaker than what a test asks for by `answer_with`.
async fn mount(server: &MockServer, route: &str, responder: impl Respond + 'static) {
    Mock::given(path(format!("/api/v1/{route}")))
        .respond_with(responder)
        .with_priority(5)
        .mount(server)
        .await;
}

/// Futures of a kind have no result while the flag stands.
async fn withhold(server: &MockServer, kind: &'static str) -> Arc<AtomicBool> {
    let is_withheld = Arc::new(AtomicBool::new(true));
    let flag = Arc::clone(&is_withheld);
    let is_of_kind = move |request: &Request| {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let id = body["request_id"].as_str();
        flag.load(Ordering::Relaxed) && id.is_some_and(|id| id.starts_with(kind))
    };
    Mock::given(path("/api/v1/retrieve_future"))
        .and(is_of_kind)
        .respond_with(ResponseTemplate::new(408))
        .with_priority(1)
        .mount(server)
        .await;
    is_withheld
}

/// A ledger that is written to the end: nobody can take it sooner.
fn content(server: &MockServer, ledger: &Path) -> Vec<u8> {
    drop(start(server, ledger).unwrap());
    std::fs::read(ledger).unwrap()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn ledger(&self) -> PathBuf {
        self.0.path().join("ledger.jsonl")
    }
}

/// A process that starts: nothing of an earlier one is left but the ledger.
fn start(server: &MockServer, ledger: &Path) -> Result<ServiceClient> {
    builder(server).ledger(ledger).build()
}

async fn trainer(server: &MockServer, ledger: &Path) -> Result<TrainingClient> {
    start(server, ledger)?
        .create_lora_training_client("tinker/nano", LoraConfig::default())
        .await
}

/// A process that dies between the answers to a step and to the pass before it.
async fn step_that_misses_the_pass(server: &MockServer, ledger: &Path) {
    dies_before_the_answer(server, ledger, "pass", |trainer| {
        drop(trainer.forward_backward(vec![datum()], LossFn::CrossEntropy));
    })
    .await;
}

/// A process that dies between the answers to a step and to what was submitted before it, whose
/// futures are of this kind.
async fn dies_before_the_answer(
    server: &MockServer,
    ledger: &Path,
    kind: &'static str,
    submit: impl FnOnce(&TrainingClient) + Send,
) {
    let withheld = withhold(server, kind).await;
    let process = async {
        let trainer = trainer(server, ledger).await.unwrap();
        submit(&trainer);
        trainer.optim_step(AdamParams::default()).await.unwrap();
    };
    // Its tasks die with its runtime.
    std::thread::scope(|scope| {
        let process = || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(process);
        };
        scope.spawn(process).join().unwrap();
    });
    withheld.store(false, Ordering::Relaxed);
}

async fn two_steps(trainer: &TrainingClient) -> Vec<f64> {
    let mut losses = Vec::new();
    for i in 0..2 {
        let pass = trainer.forward_backward(vec![datum(); i + 1], LossFn::CrossEntropy);
        let step = trainer.optim_step(AdamParams::default());
        losses.push(pass.await.unwrap().metrics["loss:sum"]);
        step.await.unwrap();
    }
    losses
}

fn ledger_error(error: Error) -> LedgerError {
    match error {
        Error::Ledger(error) => error,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_restarted_program_does_not_send_what_was_answered() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let first = two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;
    let sent = operations(&server).await;

    let again = trainer(&server, &folder.ledger()).await.unwrap();
    let second = two_steps(&again).await;
    let path = again.save_state("a", SaveOptions::default()).await.unwrap();

    assert_eq!(second, first);
    assert_eq!(path.to_string(), "tinker://S1:train:0/weights/0001");
    let now = operations(&server).await;
    assert_eq!(now[..sent.len()], sent);
    assert_eq!(now[sent.len()..], [("save_weights".to_owned(), 5)]);
    for route in ["create_session", "create_model"] {
        assert_eq!(requests(&server, route).await.len(), 1, "{route}");
    }
}

#[tokio::test]
async fn an_unanswered_operation_is_sent_again_under_its_number_with_its_bytes() {
    let (server, folder) = (numbering_server().await, Folder::new());
    answer_with(&server, "optim_step", Some(4), refusal(500)).await;
    let killed = trainer(&server, &folder.ledger()).await.unwrap();
    let pass = killed.forward_backward(vec![datum()], LossFn::CrossEntropy);
    let lost = killed.optim_step(AdamParams::default()).await;
    assert!(lost.unwrap_err().is_server_lost());
    drop((pass, killed));

    two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;

    let steps = requests(&server, "optim_step").await;
    let (first, second): (Vec<_>, Vec<_>) =
        steps.iter().partition(|step| body(step)["seq_id"] == 2);
    assert!(first.len() > 1 && first.iter().all(|step| step.body == first[0].body));
    assert_eq!(second.len(), 1);
    assert_eq!(body(second[0])["seq_id"], 4);
}

#[tokio::test]
async fn an_answer_that_was_missed_is_fetched() {
    let (server, folder) = (numbering_server().await, Folder::new());
    step_that_misses_the_pass(&server, &folder.ledger()).await;

    let again = trainer(&server, &folder.ledger()).await.unwrap();
    let pass = again.forward_backward(vec![datum()], LossFn::CrossEntropy);
    let step = again.optim_step(AdamParams::default());

    assert_eq!(pass.await.unwrap().metrics["loss:sum"], 1.0);
    step.await.unwrap();
    assert_eq!(requests(&server, "optim_step").await.len(), 1);
}

#[tokio::test]
async fn a_save_that_was_accepted_and_is_a_conflict_now_is_the_one_that_was_made() {
    let (server, folder) = (numbering_server().await, Folder::new());
    dies_before_the_answer(&server, &folder.ledger(), "save", |trainer| {
        drop(trainer.save_state("a", SaveOptions::default()));
    })
    .await;
    answer_with(&server, "save_weights", None, refusal(409)).await;

    let again = trainer(&server, &folder.ledger()).await.unwrap();
    let saved = again.save_state("a", SaveOptions::default());
    let step = again.optim_step(AdamParams::default());

    let path = saved.await.unwrap().to_string();
    assert_eq!(path, "tinker://S1:train:0/weights/0001");
    step.await.unwrap();
    assert_eq!(requests(&server, "optim_step").await.len(), 1);
}

#[tokio::test]
async fn a_failure_stays_one_after_a_restart() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let failure = ok(json!({"error": "no gradient", "category": "user"}));
    let first = trainer(&server, &folder.ledger()).await.unwrap();
    answer_with(&server, "retrieve_future", Some(1), failure).await;
    let before = first.optim_step(AdamParams::default()).await.unwrap_err();
    drop(first);

    let again = trainer(&server, &folder.ledger()).await.unwrap();
    let after = again.optim_step(AdamParams::default()).await.unwrap_err();

    assert!(before.to_string().contains("no gradient"), "{before}");
    assert_eq!(after.to_string(), before.to_string());
    assert_eq!(requests(&server, "optim_step").await.len(), 1);
}

#[tokio::test]
async fn a_refusal_that_the_program_survived_is_repeated_from_the_ledger() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let first = trainer(&server, &folder.ledger()).await.unwrap();
    answer_with(&server, "optim_step", Some(1), refusal(422)).await;
    let run = async |trainer: &TrainingClient| {
        let refused = trainer.optim_step(AdamParams::default()).await.unwrap_err();
        let pass = trainer.forward_backward(vec![datum()], LossFn::CrossEntropy);
        pass.await.unwrap();
        refused.to_string()
    };
    run(&first).await;
    drop(first);
    let sent = operations(&server).await;

    let refused = run(&trainer(&server, &folder.ledger()).await.unwrap()).await;

    assert!(
        refused.contains("(seq_id 1) was refused before the restart"),
        "{refused}"
    );
    assert_eq!(operations(&server).await, sent);
}

#[tokio::test]
async fn a_training_run_that_was_not_created_stays_so_after_a_restart() {
    let (server, folder) = (numbering_server().await, Folder::new());
    answer_with(&server, "create_model", Some(1), refusal(422)).await;
    let run = async || {
        let service = start(&server, &folder.ledger()).unwrap();
        let create = || service.create_lora_training_client("tinker/nano", LoraConfig::default());
        let refused = create().await.unwrap_err();
        (
            refused.to_string(),
            create().await.unwrap().training_run_id().clone(),
        )
    };
    let (_, first) = run().await;

    let (refused, again) = run().await;

    assert!(refused.contains("refused before the restart"), "{refused}");
    assert_eq!(again, first);
}

#[tokio::test]
async fn a_refusal_that_ended_the_program_is_tried_again() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let first = trainer(&server, &folder.ledger()).await.unwrap();
    answer_with(&server, "optim_step", Some(1), refusal(401)).await;
    first.optim_step(AdamParams::default()).await.unwrap_err();
    drop(first);

    let again = trainer(&server, &folder.ledger()).await.unwrap();

    again.optim_step(AdamParams::default()).await.unwrap();
    let arrived = operations(&server).await;
    assert!(
        arrived.iter().all(|(_, seq_id)| *seq_id == 1),
        "{arrived:?}"
    );
}

#[tokio::test]
async fn other_data_than_before_is_not_sent() {
    let (server, folder) = (numbering_server().await, Folder::new());
    two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;
    let sent = operations(&server).await;

    let again = trainer(&server, &folder.ledger()).await.unwrap();
    let input = ModelInput::from_tokens(vec![1]);
    let other = Datum::cross_entropy(input, vec![2], vec![0.5]).unwrap();
    let error = again
        .forward_backward(vec![other], LossFn::CrossEntropy)
        .await
        .unwrap_err();
    let next = again.optim_step(AdamParams::default()).await.unwrap_err();

    assert_eq!(
        error.to_string(),
        "operation 1 of S1:train:0 was ForwardBackward of other content and is ForwardBackward now"
    );
    assert!(
        error
            .hint()
            .starts_with("a restarted program makes the same calls")
    );
    assert!(matches!(next, Error::Stopped(_)), "{next}");
    assert_eq!(operations(&server).await, sent);
}

#[tokio::test]
async fn the_ledger_of_another_run_is_refused() {
    let (server, folder) = (numbering_server().await, Folder::new());
    trainer(&server, &folder.ledger()).await.unwrap();

    let lora = LoraConfig {
        rank: 8,
        ..LoraConfig::default()
    };
    let service = start(&server, &folder.ledger()).unwrap();
    let error = service
        .create_lora_training_client("tinker/nano", lora)
        .await
        .unwrap_err();

    let LedgerError::OtherRun {
        recorded, asked, ..
    } = ledger_error(error)
    else {
        panic!("another error");
    };
    assert_eq!(recorded, "a new adapter of tinker/nano (rank 32, seed no)");
    assert_eq!(asked, "a new adapter of tinker/nano (rank 8, seed no)");
}

#[tokio::test]
async fn one_process_uses_a_ledger_at_a_time() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let first = start(&server, &folder.ledger()).unwrap();

    let error = ledger_error(start(&server, &folder.ledger()).unwrap_err());

    let own = Some(std::process::id());
    assert!(
        matches!(error, LedgerError::InUse { pid, .. } if pid == own),
        "{error}"
    );
    drop(first);
    start(&server, &folder.ledger()).unwrap();
}

#[tokio::test]
async fn a_ledger_cut_off_anywhere_is_gone_on_with() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let expected = two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;
    let whole = content(&server, &folder.ledger());
    let text = String::from_utf8(whole.clone()).unwrap();
    // Two operations of two steps: noted, accepted, answered; and the start of session and run.
    let is_about_the_run = |line: &&str| !line.contains(r#""what":"synced""#);
    assert_eq!(text.lines().filter(is_about_the_run).count(), 4 + 3 * 4);

    for n_kept in (0..whole.len()).step_by(61) {
        let torn = Folder::new();
        std::fs::write(torn.ledger(), &whole[..n_kept]).unwrap();

        let losses = two_steps(&trainer(&server, &torn.ledger()).await.unwrap()).await;

        assert_eq!(losses, expected, "{n_kept} bytes kept");
    }
    let sent = operations(&server).await;
    let n_numbers = sent.iter().map(|(_, seq_id)| *seq_id).max();
    assert_eq!(n_numbers, Some(4), "no new numbers were given out");
}

#[tokio::test]
async fn damage_before_the_last_line_is_named() {
    let (server, folder) = (numbering_server().await, Folder::new());
    two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;
    let whole = content(&server, &folder.ledger());
    let third_line = whole
        .split_inclusive(|b| *b == b'\n')
        .take(2)
        .flatten()
        .count();
    for damage in [third_line, third_line + 20] {
        let mut bytes = whole.clone();
        bytes[damage] ^= 4;
        std::fs::write(folder.ledger(), &bytes).unwrap();

        let error = ledger_error(start(&server, &folder.ledger()).unwrap_err());

        assert!(
            matches!(error, LedgerError::Damaged { line: 3, .. }),
            "{error}"
        );
        let is_left = std::fs::read(folder.ledger()).unwrap() == bytes;
        assert!(is_left, "it was changed");
    }
}

#[tokio::test]
async fn a_file_that_is_no_ledger_is_left_alone() {
    let (server, folder) = (numbering_server().await, Folder::new());
    for content in ["{}", "name: x\n", "0000000000000000 {}\n"] {
        std::fs::write(folder.ledger(), content).unwrap();

        let error = ledger_error(start(&server, &folder.ledger()).unwrap_err());

        assert!(
            matches!(error, LedgerError::Damaged { line: 1, .. }),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(folder.ledger()).unwrap(), content);
    }
    let nowhere = folder.ledger().join("missing/ledger.jsonl");
    let error = ledger_error(start(&server, &nowhere).unwrap_err());
    assert!(matches!(error, LedgerError::Io { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_lost_the_run_is_told_apart() {
    let (server, folder) = (numbering_server().await, Folder::new());
    two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;
    for lost in [
        ResponseTemplate::new(404),
        not_found(),
        ResponseTemplate::new(410),
    ] {
        answer_with(&server, "get_info", Some(1), lost).await;

        let error = trainer(&server, &folder.ledger()).await.unwrap_err();

        let message = error.to_string();
        let expected = "the server's view of S1:train:0 differs from the ledger's: \
                        it does not have the run any more, nor what it answered up to \
                        OptimStep (seq_id 4): ";
        assert!(message.starts_with(expected), "{message}");
        assert!(error.hint().contains("last checkpoint"), "{}", error.hint());
    }
    // Not a word about the run.
    answer_with(&server, "get_info", Some(1), refusal(403)).await;
    let error = trainer(&server, &folder.ledger()).await.unwrap_err();
    assert!(matches!(error, Error::Transport(_)), "{error}");
}

/// What common frameworks say of an endpoint that they lack, and some servers of a run.
fn not_found() -> ResponseTemplate {
    ResponseTemplate::new(404).set_body_json(json!({"detail": "Not Found"}))
}

#[tokio::test]
async fn a_server_put_back_to_an_older_state_is_told_apart() {
    for newest in [
        ResponseTemplate::new(404),
        not_found(),
        ok(json!({"metrics": {"grad_norm": 2.0}})),
    ] {
        let (server, folder) = (numbering_server().await, Folder::new());
        two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;
        answer_with(&server, "retrieve_future", None, newest).await;

        let error = ledger_error(trainer(&server, &folder.ledger()).await.unwrap_err());

        assert!(
            error.to_string().contains("OptimStep (seq_id 4)"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_server_that_forgets_old_results_is_not_at_fault() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let first = two_steps(&trainer(&server, &folder.ledger()).await.unwrap()).await;
    answer_with(&server, "retrieve_future", None, ResponseTemplate::new(410)).await;

    let again = trainer(&server, &folder.ledger()).await.unwrap();

    assert_eq!(two_steps(&again).await, first);
}

#[tokio::test]
async fn an_operation_that_has_another_future_now_stops_the_client() {
    let (server, folder) = (numbering_server().await, Folder::new());
    step_that_misses_the_pass(&server, &folder.ledger()).await;
    let other = ok(json!({"request_id": "pass:1-new"}));
    answer_with(&server, "forward_backward", None, other).await;
    // The newest answer is that of the step, and still there.
    let again = trainer(&server, &folder.ledger()).await.unwrap();

    let pass = again.forward_backward(vec![datum()], LossFn::CrossEntropy);
    let next = again.optim_step(AdamParams::default());

    let error = ledger_error(pass.await.unwrap_err());
    assert!(
        matches!(error, LedgerError::ServerDiffers { .. }),
        "{error}"
    );
    assert!(matches!(next.await.unwrap_err(), Error::Stopped(_)));
}

#[tokio::test]
async fn a_custom_loss_is_computed_again_and_not_sent_again() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let first = custom_step(&server, &folder.ledger(), 1.0).await.unwrap();
    let sent = operations(&server).await;

    let second = custom_step(&server, &folder.ledger(), 1.0).await.unwrap();

    assert_eq!(second, first);
    assert_eq!(sent.len(), 3);
    assert_eq!(operations(&server).await, sent);
}

#[tokio::test]
async fn a_custom_loss_with_another_gradient_is_refused() {
    let (server, folder) = (numbering_server().await, Folder::new());
    custom_step(&server, &folder.ledger(), 1.0).await.unwrap();

    let error = custom_step(&server, &folder.ledger(), 2.0).await;

    let error = ledger_error(error.unwrap_err());
    assert!(
        matches!(&error, LedgerError::Diverged { seq_id: 2, .. }),
        "{error}"
    );
}

/// A process that makes one step of a loss of its own.
async fn custom_step(server: &MockServer, ledger: &Path, factor: f64) -> Result<f64> {
    let trainer = trainer(server, ledger).await?;
    let loss = differentiate(move |tape, _, x| Ok(tape.concat(x.to_vec()).sum() * factor));
    let pass = trainer.forward_backward_custom(vec![datum()], loss);
    let step = trainer.optim_step(AdamParams::default());
    let loss = pass.await?.metrics["loss:sum"];
    step.await?;
    Ok(loss)
}

/// What a program is told whose save met these answers, and what its ledger says of the save.
async fn save_answered(statuses: [u16; 2]) -> (Error, bool) {
    let (server, folder) = (numbering_server().await, Folder::new());
    answer_with(&server, "save_weights", Some(1), refusal(statuses[0])).await;
    answer_with(&server, "save_weights", None, refusal(statuses[1])).await;
    let process = trainer(&server, &folder.ledger()).await.unwrap();
    let saved = process.save_state("a", SaveOptions::default()).await;
    drop(process);
    let noted = String::from_utf8(content(&server, &folder.ledger())).unwrap();
    (saved.unwrap_err(), noted.contains(r#""what":"refused""#))
}

#[tokio::test]
async fn a_save_that_may_have_been_made_is_not_noted_as_refused() {
    let (error, is_noted) = save_answered([503, 409]).await;
    let message = "SaveWeights may have been made: an attempt was not answered, \
                   and the name is taken now";
    assert_eq!(error.to_string(), message);
    assert!(!is_noted);

    let (error, is_noted) = save_answered([409, 409]).await;
    assert!(matches!(error, Error::Transport(_)), "{error}");
    assert!(is_noted);
}

#[tokio::test]
async fn a_save_whose_answer_was_lost_with_the_process_may_have_been_made() {
    let (server, folder) = (numbering_server().await, Folder::new());
    answer_with(&server, "save_weights", Some(1), refusal(401)).await;
    answer_with(&server, "save_weights", None, refusal(409)).await;
    let killed = trainer(&server, &folder.ledger()).await.unwrap();
    killed
        .save_state("a", SaveOptions::default())
        .await
        .unwrap_err();
    drop(killed);
    // As a process that is killed before it notes the answer leaves it.
    let noted = content(&server, &folder.ledger());
    let noted: Vec<_> = noted.split_inclusive(|byte| *byte == b'\n').collect();
    let sending = noted
        .iter()
        .position(|line| String::from_utf8_lossy(line).contains(r#""what":"sending""#));
    std::fs::write(folder.ledger(), noted[..=sending.unwrap()].concat()).unwrap();

    let again = trainer(&server, &folder.ledger()).await.unwrap();
    let error = again.save_state("a", SaveOptions::default()).await;

    let error = error.unwrap_err();
    assert!(matches!(error, Error::MaybeSaved { .. }), "{error}");
}

#[tokio::test]
async fn a_program_knows_whether_it_repeats_what_an_earlier_one_did() {
    let (server, folder) = (numbering_server().await, Folder::new());
    let first = trainer(&server, &folder.ledger()).await.unwrap();
    two_steps(&first).await;
    answer_with(&server, "optim_step", Some(1), refusal(422)).await;
    first.optim_step(AdamParams::default()).await.unwrap_err();
    assert!(!first.is_repeating());
    drop(first);

    let again = trainer(&server, &folder.ledger()).await.unwrap();

    assert!(again.is_repeating());
    two_steps(&again).await;
    // What was refused last is tried again or not.
    assert!(!again.is_repeating());
}
