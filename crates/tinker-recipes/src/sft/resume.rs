//! Going on with a run from its last checkpoint that still exists.

use tinker_runs::CheckpointRow;
use tinker_types::TinkerPath;

use super::checkpoints::next_step;
use super::observe::Event;
use super::train::{Loop, Outcome, SftJob, failed};
use crate::error::{Error, Result};
use crate::trainer::{Restored, Trainer};

/// Goes on with the run in the job's folder, whose configuration is `job.config`.
///
/// Takes the newest checkpoint that the server still has, with its optimizer, and drops the
/// metrics measured after it. A run that saved none starts over, from the same seed.
///
/// # Errors
/// As [`super::train()`]; [`Error::AlreadyComplete`] if the run ended as planned,
/// [`Error::NoUsableCheckpoint`] if the server can load none of its checkpoints any more.
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
    let n_tried = candidates.len();
    for (row, state) in candidates
        .iter()
        .filter_map(|row| Some((row, row.state_path.as_ref()?)))
    {
        let Some(step) = next_step(row, &plan) else {
            continue;
        };
        if let Some(trainer) = restore(&mut job, state).await? {
            return go_on(job, trainer, Some((row, state)), step).await;
        }
    }
    if n_tried > 0 {
        return Err(Error::NoUsableCheckpoint {
            run: job.writer.folder().name(),
            n_tried,
        });
    }
    let trainer = job.create_trainer().await?;
    go_on(job, trainer, None, 0).await
}

/// The training run saved at `state`, or a notice why there is none.
async fn restore(job: &mut SftJob<'_>, state: &TinkerPath) -> Result<Option<Box<dyn Trainer>>> {
    let restored = job.service.restore(state).await;
    match restored.map_err(failed(format!("restoring `{state}`")))? {
        Restored::Trainer(trainer) => Ok(Some(trainer)),
        Restored::Unusable(why) => {
            let text =
                format!("checkpoint `{state}` cannot be used ({why}); trying an earlier one");
            job.observer.on(Event::Notice(text));
            Ok(None)
        }
    }
}

async fn go_on(
    job: SftJob<'_>,
    trainer: Box<dyn Trainer>,
    from: Option<(&CheckpointRow, &TinkerPath)>,
    step: u64,
) -> Result<Outcome> {
    let n_dropped = job.writer.drop_metrics_from(step)?;
    job.observer.on(Event::Resumed {
        checkpoint: from.map(|(row, _)| row),
        step,
        n_dropped,
    });
    Loop::new(job, trainer)
        .run(step, from.map(|(_, state)| state.clone()))
        .await
}
