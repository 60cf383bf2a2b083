//! What `-m` may name: a base model, a checkpoint by its path, or one by its run folder.

use serde::Deserialize;
use tinker_chat::RendererName;
use tinker_runs::{CheckpointRow, RunFolder, Runs};
use tinker_types::{CheckpointKind, TinkerPath};

use crate::failure::{Failure, FailureKind, Result};

const SCHEME: &str = "tinker://";
/// The newest checkpoint of a run, or of the newest run.
const LAST: &str = "last";

/// Weights to sample from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Weights {
    /// A base model, by name or directory.
    Base(String),
    /// A checkpoint, with what its run folder knows of it.
    Checkpoint {
        /// Its path.
        path: TinkerPath,
        /// The run folder's record, if there is one here.
        origin: Option<Origin>,
    },
}

/// What a run folder records of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Base model.
    pub(crate) base_model: String,
    /// Chat format that it was trained in.
    pub(crate) renderer: RendererName,
}

impl Weights {
    /// Reads `text` as one of the three, looking into the run folders of this machine.
    ///
    /// # Errors
    /// The path holds training state, or no such run or checkpoint is recorded here.
    pub(crate) fn find(runs: &Runs, text: &str) -> Result<Self> {
        if text.starts_with(SCHEME) {
            let path: TinkerPath = text.parse()?;
            check_kind(&path)?;
            let origin = origin_of(runs, &path);
            return Ok(Self::Checkpoint { path, origin });
        }
        let Some((run, checkpoint)) = text.rsplit_once('@') else {
            return Ok(Self::Base(text.to_owned()));
        };
        let run = if run.is_empty() { "@last" } else { run };
        let folder = runs.find(run)?.folder;
        let path = sampler_path(&folder, checkpoint)?;
        let origin = read_origin(&folder);
        Ok(Self::Checkpoint { path, origin })
    }

    /// The base model, as far as it is known here.
    pub(crate) fn base_model(&self) -> Option<&str> {
        match self {
            Self::Base(name) => Some(name),
            Self::Checkpoint { origin, .. } => Some(&origin.as_ref()?.base_model),
        }
    }
}

/// Refuses what cannot be sampled, and names what can.
fn check_kind(path: &TinkerPath) -> Result<()> {
    if path.checkpoint.kind != CheckpointKind::Training {
        return Ok(());
    }
    let twin = path.twin(CheckpointKind::Sampler);
    Err(Failure::usage(format!(
        "{path} holds training state, not weights to sample from"
    ))
    .hint(format!("sample from its twin: {twin}")))
}

/// The sampler weights of the checkpoint called `name`, or of the newest that has some.
fn sampler_path(folder: &RunFolder, name: &str) -> Result<TinkerPath> {
    let rows = folder.read_checkpoints()?;
    let mut newest_first = rows.iter().rev();
    let row = match name {
        LAST => newest_first.find(|row| row.sampler_path.is_some()),
        name => newest_first.find(|row| row.name == name),
    };
    let run = folder.name();
    match row {
        Some(CheckpointRow {
            sampler_path: Some(path),
            ..
        }) => Ok(path.clone()),
        Some(row) => Err(Failure::usage(format!(
            "checkpoint `{}` of run `{run}` holds training state, not weights to sample from",
            row.name
        ))
        .hint(sampler_hint(&rows))),
        None if rows.iter().all(|row| row.sampler_path.is_none()) => Err(Failure::not_found(
            format!("run `{run}` has no weights to sample from yet"),
        )
        .hint(format!("let it end: tinker resume {run}"))),
        None => Err(
            Failure::not_found(format!("run `{run}` has no checkpoint `{name}`"))
                .hint(sampler_hint(&rows)),
        ),
    }
}

fn sampler_hint(rows: &[CheckpointRow]) -> String {
    let names: Vec<&str> = rows
        .iter()
        .filter(|row| row.sampler_path.is_some())
        .map(|row| row.name.as_str())
        .collect();
    match names.as_slice() {
        [] => "weights to sample from are saved when the run ends".to_owned(),
        names => format!("it has: {}", names.join(", ")),
    }
}

/// The run folder here that recorded `path`.
fn origin_of(runs: &Runs, path: &TinkerPath) -> Option<Origin> {
    let is_here = |folder: &RunFolder| {
        folder.read_checkpoints().is_ok_and(|rows| {
            let mut paths = rows.iter().filter_map(|row| row.sampler_path.as_ref());
            paths.any(|sampler| sampler == path)
        })
    };
    let entries = runs.list().ok()?;
    let entry = entries.iter().find(|entry| is_here(&entry.folder))?;
    read_origin(&entry.folder)
}

/// Every recipe's configuration has the two, also those of Python's cookbook.
fn read_origin(folder: &RunFolder) -> Option<Origin> {
    #[derive(Deserialize)]
    struct Config {
        model_name: String,
        renderer_name: RendererName,
    }
    let config: Config = folder.read_config().ok()?;
    Some(Origin {
        base_model: config.model_name,
        renderer: config.renderer_name,
    })
}

/// The checkpoint that `text` names: a path, or `RUN@NAME` in a run folder here.
///
/// # Errors
/// It is neither.
pub(crate) fn find_checkpoint(runs: &Runs, text: &str) -> Result<TinkerPath> {
    match text.rsplit_once('@') {
        Some((run, name)) if !text.starts_with(SCHEME) => {
            let run = if run.is_empty() { "@last" } else { run };
            let folder = runs.find(run)?.folder;
            let rows = folder.read_checkpoints()?;
            let row = match name {
                LAST => rows.last(),
                name => rows.iter().rev().find(|row| row.name == name),
            };
            let path = row.and_then(|row| row.state_path.clone().or(row.sampler_path.clone()));
            path.ok_or_else(|| {
                let what = format!("run `{}` has no checkpoint `{name}`", folder.name());
                Failure::new(FailureKind::NotFound, what)
            })
        }
        _ => text.parse().map_err(|error: tinker_types::TypeError| {
            Failure::from(error)
                .hint("paths look like tinker://RUN/weights/NAME; see `tinker checkpoint list`")
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str) -> Result<Weights> {
        Weights::find(&Runs::new("/nonexistent"), text)
    }

    #[test]
    fn names_and_paths_are_told_apart() {
        assert_eq!(
            find("tinker/nano").unwrap(),
            Weights::Base("tinker/nano".to_owned())
        );
        let Weights::Checkpoint { path, origin } = find("tinker://r/sampler_weights/a").unwrap()
        else {
            panic!("a path is a checkpoint");
        };
        assert_eq!(path.to_string(), "tinker://r/sampler_weights/a");
        assert_eq!(origin, None);
    }

    #[test]
    fn training_state_names_its_sampler_twin() {
        let failure = find("tinker://r/weights/final").unwrap_err();

        assert_eq!(failure.kind, FailureKind::Usage);
        assert_eq!(
            failure.to_string(),
            "error: tinker://r/weights/final holds training state, not weights to sample from\n\
             hint: sample from its twin: tinker://r/sampler_weights/final"
        );
    }

    #[test]
    fn a_run_of_the_python_cookbook_says_its_model_and_chat_format() {
        let runs = tempfile::tempdir().unwrap();
        let folder = runs.path().join("sl");
        std::fs::create_dir(&folder).unwrap();
        let config = r#"{"model_name": "tinker/nano", "renderer_name": "qwen3_instruct", "lr_schedule": "linear"}"#;
        std::fs::write(folder.join("config.json"), config).unwrap();
        let row = r#"{"name": "final", "batch": 0, "sampler_path": "tinker://r:train:0/sampler_weights/final"}"#;
        std::fs::write(folder.join("checkpoints.jsonl"), row).unwrap();

        let found = Weights::find(&Runs::new(runs.path()), "sl@final").unwrap();

        let Weights::Checkpoint { origin, .. } = found else {
            panic!("a checkpoint");
        };
        let origin = origin.unwrap();
        assert_eq!(origin.base_model, "tinker/nano");
        assert_eq!(origin.renderer, RendererName::Qwen3Instruct);
    }

    #[test]
    fn a_run_that_is_not_here_is_not_found() {
        assert_eq!(find("pirate@last").unwrap_err().kind, FailureKind::NotFound);
        assert_eq!(find("@last").unwrap_err().kind, FailureKind::NotFound);
    }
}
