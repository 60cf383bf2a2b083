//! What a person sees of a run while it goes on: the plan, then a line of progress.

use std::time::Duration;

use tinker_recipes::sft::{DataCounts, Event, Observer, SftConfig, StepReport};

use crate::human;
use crate::ui::{Progress, Ui};

/// Shows a run on standard error.
#[derive(Debug)]
pub(super) struct Watcher {
    ui: Ui,
    /// Where the run is recorded and where it is trained, for the plan.
    places: Places,
    progress: Option<Progress>,
    held_out: Option<f64>,
}

/// Where a run happens.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// The run folder.
    pub(super) folder: String,
    /// The server.
    pub(super) server: String,
}

impl Watcher {
    pub(super) fn new(ui: &Ui, places: Places) -> Self {
        Self {
            ui: ui.clone(),
            places,
            progress: None,
            held_out: None,
        }
    }

    fn step(&self, report: &StepReport) {
        if let Some(progress) = &self.progress {
            progress.step(report.step + 1, &progress_line(report, self.held_out));
        }
    }
}

impl Observer for Watcher {
    fn on(&mut self, event: Event<'_>) {
        match event {
            Event::Planned {
                config,
                counts,
                n_steps,
                n_steps_per_epoch,
            } => {
                self.ui.note(plan(
                    config,
                    counts,
                    (n_steps, n_steps_per_epoch),
                    &self.places,
                ));
                self.progress = Some(self.ui.progress(n_steps));
            }
            Event::Notice(text) => self.ui.warn(text),
            Event::Resumed {
                checkpoint,
                step,
                n_dropped,
            } => {
                let from = checkpoint.map_or("the start", |row| row.name.as_str());
                let again = match n_dropped {
                    0 => String::new(),
                    n => format!("; {} after it again", human::counted(n as u64, "step")),
                };
                self.ui
                    .note(format_args!("resuming from {from} at step {step}{again}"));
            }
            Event::Rejoined { step } => self.ui.note(format_args!(
                "going on at step {step}, where the server has the run; no step is done again"
            )),
            Event::Step(report) => self.step(report),
            Event::Evaluated { nll, .. } => self.held_out = Some(nll),
            Event::Stopping { next_step } => {
                self.ui.note(format_args!("saving before step {next_step}"));
            }
            _ => {}
        }
    }
}

/// What will be done, one line per decision.
fn plan(
    config: &SftConfig,
    counts: DataCounts,
    (n_steps, n_steps_per_epoch): (u64, u64),
    places: &Places,
) -> String {
    let n = |count: usize| human::count(count as u64);
    let trained = percent(counts.n_trained_tokens, counts.n_tokens);
    let epochs = human::counted(config.num_epochs, "epoch");
    let lines = [
        (
            "model",
            format!(
                "{} with a LoRA adapter of rank {}",
                config.model_name, config.lora_rank
            ),
        ),
        (
            "data",
            format!(
                "{}: {}, {} to train on, {} held out",
                config.file_path.display(),
                human::counted(counts.n_rows as u64, "row"),
                n(counts.n_train_rows),
                n(counts.n_test_rows)
            ),
        ),
        (
            "tokens",
            format!(
                "{} per epoch, {} of them trained ({trained}); longest row {} of {}",
                n(counts.n_tokens),
                n(counts.n_trained_tokens),
                n(counts.longest),
                n(config.max_length)
            ),
        ),
        (
            "steps",
            format!(
                "{} of {}, {n_steps_per_epoch} to an epoch, {epochs}{}",
                human::count(n_steps),
                human::counted(config.batch_size.min(counts.n_train_rows) as u64, "row"),
                if n_steps < config.num_epochs * n_steps_per_epoch {
                    " cut short by --max-steps"
                } else {
                    ""
                }
            ),
        ),
        (
            "format",
            format!(
                "{}, training {}",
                config.renderer_name, config.train_on_what
            ),
        ),
        (
            "rate",
            format!(
                "{:e}, {} ({})",
                config.learning_rate, config.lr_schedule, config.learning_rate_reason
            ),
        ),
        ("server", places.server.clone()),
        ("run", places.folder.clone()),
    ];
    let lines = lines.map(|(key, value)| format!("  {key:<7} {value}"));
    format!("plan\n{}", lines.join("\n"))
}

fn percent(part: usize, whole: usize) -> String {
    format!("{:.0}%", 100.0 * part as f64 / whole.max(1) as f64)
}

fn progress_line(report: &StepReport, held_out: Option<f64>) -> String {
    let held_out = held_out.map_or(String::new(), |nll| format!("  held-out {nll:.3}"));
    format!(
        "loss {:.3}{held_out}  {} tokens/s  ETA {}",
        report.train_mean_nll,
        human::count(report.tokens_per_second() as u64),
        human::duration(Duration::from_secs_f64(report.eta_seconds.max(0.0)))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_names_loss_held_out_rate_and_time_left() {
        let report = StepReport {
            step: 3,
            n_steps: 10,
            epoch: 0,
            learning_rate: 1e-3,
            train_mean_nll: 1.23456,
            n_sequences: 16,
            n_tokens: 3000,
            n_trained_tokens: 1000,
            seconds: 1.5,
            eta_seconds: 62.0,
        };

        let line = progress_line(&report, Some(2.5));

        assert_eq!(
            line,
            "loss 1.235  held-out 2.500  2,000 tokens/s  ETA 1m 02s"
        );
    }
}
