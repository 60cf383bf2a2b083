//! Going on with a run: where a killed process left it on the server, or else from its last
//! checkpoint that still exists.

use tinker_api::{ErrorKind, LedgerError};
use tinker_runs::CheckpointRow;
use tinker_types::{FinishReason, TinkerPath};

use super::checkpoints::next_step;
use super::goodbye;
use super::observe::Event;
use super::segment::Segment;
use super::train::{Loop, Opened, Outcome, SftJob, failed};
use crate::error::{Error, Result};
use crate::trainer::Restored;

/// Goes on with the run in the job's folder, whose configuration is `job.config`.
///
/// If the process before did not come to an end and the server still has the training run, nothing
/// is computed again. Otherwise takes the newest checkpoint that the server still has, with its
/// optimizer, and drops the metrics measured after it. A run that saved none starts over, from the
/// same seed.
///
/// # Errors
/// As [`super::train()`]; [`Error::AlreadyComplete`] if the run ended as planned,
/// [`Error::NoUsableCheckpoint`] if the server has none of its checkpoints.
pub async fn resume(mut job: SftJob<'_>) -> Result<Outcome> {
    job.plan();
    let candidates = job.writer.folder().resume_candidates()?;
    let plan = job.batch_plan();
    if let Some(newest) = candidates.first()
        && next_step(newest, &plan).is_some_and(|step| step >= plan.n_steps())
    {
        let (run, n_steps) = (job.writer.folder().name(), plan.n_steps());
        return Err(Error::AlreadyComplete { run, n_steps });
    }
    let has_ended = candidates.first().is_some_and(|newest| newest.is_final);
    let unfinished: Option<Segment> = job.writer.folder().read_unfinished()?;
    if let Some(segment) = unfinished.filter(|_| !has_ended)
        && let Some(opened) = rejoin(&mut job, &segment).await?
    {
        let rows = job.writer.folder().read_metrics()?;
        let segment = segment.rejoined(&rows, plan.n_steps());
        let step = segment.first_unrecorded;
        job.observer.on(Event::Rejoined { step });
        return Loop::new(job, opened, segment).carry().await;
    }
    let n_tried = candidates.len();
    for (row, state) in candidates
        .iter()
        .filter_map(|row| Some((row, row.state_path.as_ref()?)))
    {
        let Some(step) = next_step(row, &plan) else {
            continue;
        };
        if let Some(opened) = restore(&mut job, state).await? {
            return go_on(job, opened, Some((row, state)), step).await;
        }
    }
    if n_tried > 0 {
        return Err(Error::NoUsableCheckpoint {
            run: job.writer.folder().name(),
            n_tried,
        });
    }
    let opened = job.create().await?;
    go_on(job, opened, None, 0).await
}

/// The training run that an earlier process left, or a notice why it cannot be gone on with.
async fn rejoin(job: &mut SftJob<'_>, segment: &Segment) -> Result<Option<Opened>> {
    let why = match reopen(job, segment).await? {
        Ok(opened) => return Ok(Some(opened)),
        Err(why) => why,
    };
    job.observer.on(Event::Notice(format!(
        "the run cannot go on where it was ({why}); going on from its last checkpoint"
    )));
    Ok(None)
}

/// The training run of the ledger, or why there is none.
async fn reopen(
    job: &SftJob<'_>,
    segment: &Segment,
) -> Result<std::result::Result<Opened, String>> {
    let ledger = job.writer.folder().ledger_path();
    // Without one, another training run would be started.
    if !ledger.is_file() {
        return Ok(Err("its ledger is gone".to_owned()));
    }
    let service = match job.service.with_ledger(&ledger) {
        Ok(service) => service,
        Err(error) => return reason_not_to(error).map(Err),
    };
    let found = match &segment.from {
        None => service.create(&job.spec()).await.map(Restored::Trainer),
        Some(state) => service.restore(state).await,
    };
    let why = match found {
        Ok(Restored::Trainer(trainer)) => return Ok(Ok(Opened { service, trainer })),
        Ok(Restored::Unusable(why)) => why,
        // If this is no reason, the next process goes on with the session, which must not end.
        Err(error) => reason_not_to(error)?,
    };
    goodbye::end(&*service, FinishReason::Errored).await;
    Ok(Err(why))
}

/// Why the training run is not to be gone on with, if that is what the error says: it is gone from
/// the server, or the ledger cannot vouch for it.
fn reason_not_to(error: tinker_api::Error) -> Result<String> {
    let is_gone = match &error {
        tinker_api::Error::Ledger(error) => {
            use LedgerError::{InUse, Io, OtherFormat};
            !matches!(error, Io { .. } | InUse { .. } | OtherFormat { .. })
        }
        tinker_api::Error::RequestFailed { .. } => true,
        error => matches!(
            error.kind(),
            Some(
                ErrorKind::NotFound
                    | ErrorKind::Expired
                    | ErrorKind::InvalidRequest
                    | ErrorKind::Unsupported
            )
        ),
    };
    if is_gone {
        Ok(error.to_string())
    } else {
        Err(failed("going on with the training run")(error))
    }
}

/// The training run saved at `state`, or a notice why there is none.
async fn restore(job: &mut SftJob<'_>, state: &TinkerPath) -> Result<Option<Opened>> {
    let service = job.open_service()?;
    match service.restore(state).await {
        Ok(Restored::Trainer(trainer)) => Ok(Some(Opened { service, trainer })),
        Ok(Restored::Unusable(why)) => {
            goodbye::end(&*service, FinishReason::Errored).await;
            let text =
                format!("checkpoint `{state}` cannot be used ({why}); trying an earlier one");
            job.observer.on(Event::Notice(text));
            Ok(None)
        }
        Err(error) => {
            job.goodbye.leave(service, FinishReason::Errored);
            Err(failed(format!("restoring `{state}`"))(error))
        }
    }
}

async fn go_on(
    job: SftJob<'_>,
    opened: Opened,
    from: Option<(&CheckpointRow, &TinkerPath)>,
    step: u64,
) -> Result<Outcome> {
    let n_dropped = job.writer.drop_metrics_from(step)?;
    job.observer.on(Event::Resumed {
        checkpoint: from.map(|(row, _)| row),
        step,
        n_dropped,
    });
    let segment = Segment::new(from.map(|(_, state)| state.clone()), step);
    job.writer.write_unfinished(&segment)?;
    Loop::new(job, opened, segment).carry().await
}
