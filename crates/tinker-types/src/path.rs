//! `tinker://` paths: which checkpoint of which training run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{TrainingRunId, TypeError};

const SCHEME: &str = "tinker://";

/// What a checkpoint holds and what it can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// Weights and optimizer state, to train on from.
    Training,
    /// Weights alone, to sample from.
    Sampler,
    /// Weights written for use outside the service.
    External,
}

impl CheckpointKind {
    /// The path segment: `weights`, `sampler_weights` or `external_weights`.
    #[must_use]
    pub const fn segment(self) -> &'static str {
        match self {
            Self::Training => "weights",
            Self::Sampler => "sampler_weights",
            Self::External => "external_weights",
        }
    }

    /// The kind of a name: `training`, `sampler` or `external`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "training" => Some(Self::Training),
            "sampler" => Some(Self::Sampler),
            "external" => Some(Self::External),
            _ => None,
        }
    }

    /// The kind of a path segment.
    #[must_use]
    pub fn from_segment(segment: &str) -> Option<Self> {
        [Self::Training, Self::Sampler, Self::External]
            .into_iter()
            .find(|kind| kind.segment() == segment)
    }
}

/// A checkpoint within its run: `weights/NAME`, `sampler_weights/NAME` or `external_weights/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CheckpointId {
    /// What it holds.
    pub kind: CheckpointKind,
    name: String,
}

impl CheckpointId {
    /// A checkpoint id of a kind and a name.
    ///
    /// # Errors
    /// If the name is empty, `.`, `..`, longer than 256 bytes, or holds `/`, `\`, white space or a
    /// control character.
    pub fn new(kind: CheckpointKind, name: impl Into<String>) -> Result<Self, TypeError> {
        let name = name.into();
        let bad = |c: char| c == '/' || c == '\\' || c.is_control() || c.is_whitespace();
        if name.is_empty() || name.len() > 256 || name == "." || name == ".." || name.contains(bad)
        {
            let shown: String = name.chars().take(80).collect();
            return Err(TypeError::new(format!(
                "checkpoint name {shown:?} must be 1 to 256 bytes without `/`, `\\`, spaces or control characters"
            )));
        }
        Ok(Self { kind, name })
    }

    /// The name alone.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.segment(), self.name)
    }
}

impl FromStr for CheckpointId {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let parsed = text
            .split_once('/')
            .and_then(|(segment, name)| Some((CheckpointKind::from_segment(segment)?, name)));
        let Some((kind, name)) = parsed else {
            return Err(TypeError::new(format!(
                "checkpoint id {text:?} must be weights/NAME, sampler_weights/NAME or external_weights/NAME"
            )));
        };
        Self::new(kind, name)
    }
}

impl TryFrom<String> for CheckpointId {
    type Error = TypeError;

    fn try_from(text: String) -> Result<Self, TypeError> {
        text.parse()
    }
}

impl From<CheckpointId> for String {
    fn from(id: CheckpointId) -> Self {
        id.to_string()
    }
}

/// A checkpoint anywhere: `tinker://<training run>/<segment>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TinkerPath {
    /// The training run that wrote it.
    pub run: TrainingRunId,
    /// The checkpoint within the run.
    pub checkpoint: CheckpointId,
}

impl TinkerPath {
    /// The same name in another kind, such as the sampler twin of a training checkpoint.
    #[must_use]
    pub fn twin(&self, kind: CheckpointKind) -> Self {
        let checkpoint = CheckpointId {
            kind,
            name: self.checkpoint.name.clone(),
        };
        Self {
            run: self.run.clone(),
            checkpoint,
        }
    }
}

impl fmt::Display for TinkerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.run, self.checkpoint)
    }
}

impl FromStr for TinkerPath {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let fault = |why: &str| TypeError::new(format!("path {text:?} {why}"));
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return Err(fault("must start with tinker://"));
        };
        let parts: Vec<&str> = rest.split('/').collect();
        let [run, segment, name] = parts[..] else {
            return Err(fault(
                "must be tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME",
            ));
        };
        let Some(kind) = CheckpointKind::from_segment(segment) else {
            return Err(fault(
                "must name weights, sampler_weights or external_weights after the run",
            ));
        };
        let run = run
            .parse()
            .map_err(|error: TypeError| fault(&format!("is malformed: {error}")))?;
        Ok(Self {
            run,
            checkpoint: CheckpointId::new(kind, name)?,
        })
    }
}

impl TryFrom<String> for TinkerPath {
    type Error = TypeError;

    fn try_from(text: String) -> Result<Self, TypeError> {
        text.parse()
    }
}

impl From<TinkerPath> for String {
    fn from(path: TinkerPath) -> Self {
        path.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints_the_three_kinds() {
        for text in [
            "tinker://S1:train:0/weights/0001",
            "tinker://r/sampler_weights/a-b",
            "tinker://r/external_weights/x",
        ] {
            let path: TinkerPath = text.parse().unwrap();
            assert_eq!(path.to_string(), text);
        }
    }

    #[test]
    fn refuses_other_shapes() {
        for text in [
            "S1/weights/a",
            "tinker://r/weights",
            "tinker://r/weights/a/b",
            "tinker://r/states/a",
            "tinker:///weights/a",
            "tinker://r/weights/..",
        ] {
            assert!(text.parse::<TinkerPath>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_the_sampler_twin() {
        let path: TinkerPath = "tinker://r/weights/final".parse().unwrap();

        assert_eq!(
            path.twin(CheckpointKind::Sampler).to_string(),
            "tinker://r/sampler_weights/final"
        );
    }
}
