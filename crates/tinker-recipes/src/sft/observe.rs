//! What a run tells whoever watches it.

use tinker_runs::CheckpointRow;

use super::config::SftConfig;
use super::prepare::DataCounts;

/// Watches a run: a terminal, a log, a test.
pub trait Observer: Send {
    /// Takes note of `event`; must return soon, since training waits.
    fn on(&mut self, event: Event<'_>);
}

/// An observer for those who do not want to watch.
impl Observer for () {
    fn on(&mut self, _event: Event<'_>) {}
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// What the run is about to do; comes first.
    Planned {
        /// Every setting.
        config: &'a SftConfig,
        /// What the data hold.
        counts: DataCounts,
        /// Optimizer steps in all.
        n_steps: u64,
        /// Steps in an epoch.
        n_steps_per_epoch: u64,
    },
    /// Something that a person should know, in a sentence.
    Notice(String),
    /// The run goes on from an earlier one.
    Resumed {
        /// The checkpoint; `None` if none was saved, so that the run starts over.
        checkpoint: Option<&'a CheckpointRow>,
        /// The next step.
        step: u64,
        /// Steps measured after the checkpoint, which are done again.
        n_dropped: usize,
    },
    /// The run goes on where an earlier process left it: the server has all that it did.
    Rejoined {
        /// The next step to report; the server may have begun it.
        step: u64,
    },
    /// A step's gradient was applied.
    Step(&'a StepReport),
    /// The held-out rows were scored.
    Evaluated {
        /// Steps done before.
        step: u64,
        /// Mean negative log-likelihood, natural log, 0 or more.
        nll: f64,
    },
    /// A checkpoint was saved and recorded.
    Saved(&'a CheckpointRow),
    /// A stop was asked for: the steps under way are finished and a checkpoint is saved.
    Stopping {
        /// The step that a resumed run begins with.
        next_step: u64,
    },
}

/// One step, measured.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// From 0.
    pub step: u64,
    /// Steps in all.
    pub n_steps: u64,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Mean negative log-likelihood before the step, natural log, 0 or more.
    pub train_mean_nll: f64,
    /// Sequences trained.
    pub n_sequences: usize,
    /// Tokens read.
    pub n_tokens: usize,
    /// Tokens trained.
    pub n_trained_tokens: usize,
    /// Since the step before was done.
    pub seconds: f64,
    /// Until the last step is done, at the mean pace so far.
    pub eta_seconds: f64,
}

impl StepReport {
    /// Tokens read per second.
    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 {
            self.n_tokens as f64 / self.seconds
        } else {
            0.0
        }
    }
}
