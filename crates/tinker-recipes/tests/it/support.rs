//! Data, configurations and runs that several tests share.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use serde_json::{Value, json};
use tinker_chat::{Renderer, RendererName, Tokenizer, TrainOnWhat, renderer};
use tinker_recipes::sft::{
    Dataset, Event, Goodbye, Observer, Outcome, Prepared, SftConfig, SftJob,
};
use tinker_recipes::sft::{SftOptions, StopSignal, resume, train};
use tinker_recipes::{ModelFacts, Result};
use tinker_runs::{RunFolder, RunWriter};

use crate::fake::FakeService;

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    Tokenizer::from_dir(&fixtures.join("chat/bytes")).unwrap()
});

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    TOKENIZER.clone()
}

pub(crate) fn chatml() -> Arc<dyn Renderer> {
    renderer(RendererName::Qwen3Instruct, tokenizer()).unwrap()
}

pub(crate) fn parse(text: &str) -> Result<Dataset> {
    Dataset::parse(
        Path::new("data.jsonl"),
        text.as_bytes(),
        TrainOnWhat::AllAssistantMessages,
    )
}

/// `n` rows that differ.
pub(crate) fn rows(n: usize) -> Dataset {
    let row = |i: usize| json!({"prompt": format!("Say {i}"), "completion": "x".repeat(i % 5 + 1)});
    parse(&(0..n).map(|i| format!("{}\n", row(i))).collect::<String>()).unwrap()
}

pub(crate) fn resolve(options: &SftOptions, data: &Dataset) -> Result<SftConfig> {
    let model = ModelFacts::from_name("tinker/nano");
    options.resolve(data, &model, 64, &tokenizer())
}

/// 10 rows of which 2 are held out, 3 batches of 3, 3 and 2 an epoch, 6 steps.
pub(crate) fn small_options() -> SftOptions {
    SftOptions {
        held_out: tinker_recipes::sft::HeldOut::Rows(2),
        batch_size: 3,
        num_epochs: 2,
        eval_every: 2,
        save_every: 2,
        ..SftOptions::default()
    }
}

/// Keeps a line per event, and asks to stop when told to.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) lines: Vec<String>,
    pub(crate) stop_after: Option<u64>,
    pub(crate) stop: StopSignal,
}

impl Observer for Log {
    fn on(&mut self, event: Event<'_>) {
        self.lines.push(match event {
            Event::Planned {
                n_steps,
                n_steps_per_epoch,
                ..
            } => {
                format!("planned {n_steps} steps, {n_steps_per_epoch} an epoch")
            }
            Event::Notice(text) => format!("notice: {text}"),
            Event::Resumed {
                checkpoint,
                step,
                n_dropped,
            } => {
                let name = checkpoint.map(|row| row.name.clone());
                format!("resumed {name:?} at {step}, dropped {n_dropped}")
            }
            Event::Rejoined { step } => format!("rejoined at {step}"),
            Event::Step(report) => {
                if self.stop_after == Some(report.step) {
                    self.stop.request();
                }
                format!("step {} of {}", report.step, report.n_steps)
            }
            Event::Evaluated { step, .. } => format!("evaluated {step}"),
            Event::Saved(row) => format!("saved {}", row.name),
            Event::Stopping { next_step } => format!("stopping at {next_step}"),
            other => format!("{other:?}"),
        });
    }
}

/// A run folder with its data and settings.
pub(crate) struct Run {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) data: Dataset,
    pub(crate) config: SftConfig,
}

impl Run {
    pub(crate) fn new(options: &SftOptions, n_rows: usize) -> Self {
        let data = rows(n_rows);
        let config = resolve(options, &data).unwrap();
        Self {
            dir: tempfile::tempdir().unwrap(),
            data,
            config,
        }
    }

    pub(crate) fn small() -> Self {
        Self::new(&small_options(), 10)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub(crate) async fn train(&self, service: &FakeService, log: &mut Log) -> Result<Outcome> {
        let (outcome, goodbye) = self.train_only(service, log).await?;
        goodbye.say().await;
        outcome
    }

    /// Trains, and leaves it to the caller to end the session.
    pub(crate) async fn train_only(
        &self,
        service: &FakeService,
        log: &mut Log,
    ) -> Result<(Result<Outcome>, Goodbye)> {
        let (mut writer, goodbye) = (RunWriter::create(self.path())?, Goodbye::new());
        let prepared = self.prepare();
        let job = self.job(service, &mut writer, log, &prepared, &goodbye);
        Ok((train(job).await, goodbye))
    }

    pub(crate) async fn resume(&self, service: &FakeService, log: &mut Log) -> Result<Outcome> {
        let (mut writer, goodbye) = (RunWriter::resume(self.path())?, Goodbye::new());
        let prepared = self.prepare();
        let outcome = resume(self.job(service, &mut writer, log, &prepared, &goodbye)).await;
        goodbye.say().await;
        outcome
    }

    fn prepare(&self) -> Prepared {
        Prepared::new(&self.data, &self.config, &*chatml()).unwrap()
    }

    fn job<'a>(
        &'a self,
        service: &'a FakeService,
        writer: &'a mut RunWriter,
        log: &'a mut Log,
        prepared: &'a Prepared,
        goodbye: &Goodbye,
    ) -> SftJob<'a> {
        let stop = log.stop.clone();
        SftJob {
            config: &self.config,
            prepared,
            service,
            writer,
            observer: log,
            stop,
            goodbye: goodbye.clone(),
        }
    }

    pub(crate) fn folder(&self) -> RunFolder {
        RunFolder::open(self.path()).unwrap()
    }

    /// The metrics without what a clock decided.
    pub(crate) fn metrics(&self) -> Vec<Value> {
        let rows = self.folder().read_metrics().unwrap();
        let untimed = rows.iter().map(|row| {
            let mut row = serde_json::to_value(row).unwrap();
            let is_timed = |name: &str| name.starts_with("time/") || name == "tokens_per_second";
            row.as_object_mut()
                .unwrap()
                .retain(|name, _| !is_timed(name));
            row
        });
        untimed.collect()
    }
}
