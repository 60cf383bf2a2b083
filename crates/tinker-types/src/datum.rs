//! One training example: an input and what its loss reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ModelInput, TensorData, TensorValues, TypeError};

/// Names of loss inputs on the wire.
pub mod loss_input {
    /// Tokens to predict: int64, `[n]` or `[n, k]`.
    pub const TARGET_TOKENS: &str = "target_tokens";
    /// Weight per target: float32, shaped like the targets.
    pub const WEIGHTS: &str = "weights";
    /// The sampler's log-probability per target: float32, `[n]`, natural log.
    pub const LOGPROBS: &str = "logprobs";
    /// Advantage per target: float32, `[n]`.
    pub const ADVANTAGES: &str = "advantages";
}

/// An example. Position `i` of the input predicts `target_tokens[i]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Datum {
    /// What the model reads.
    pub model_input: ModelInput,
    /// What the loss reads, by wire name.
    loss_fn_inputs: BTreeMap<String, TensorData>,
    /// Where the input tokens come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_input_spans: Option<Vec<ProvenanceSpan>>,
    /// Where the target tokens come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_fn_input_spans: Option<Vec<ProvenanceSpan>>,
}

impl Datum {
    /// An example for `cross_entropy` with one target per position.
    ///
    /// # Errors
    /// If the input holds anything but tokens, or the lengths differ.
    pub fn cross_entropy(
        input: ModelInput,
        targets: Vec<u32>,
        weights: Vec<f32>,
    ) -> Result<Self, TypeError> {
        let n = check_length(&input, "targets", targets.len())?;
        check_equal("weights", weights.len(), n)?;
        Ok(Self::of(
            input,
            [
                (loss_input::TARGET_TOKENS, ints(targets)),
                (loss_input::WEIGHTS, TensorData::floats(weights)),
            ],
        ))
    }

    /// An example for `cross_entropy` with `k` weighted targets per position (soft targets).
    ///
    /// `targets` and `weights` are `[n * k]`, row-major.
    ///
    /// # Errors
    /// If `k` is 0 or the lengths differ from `n * k`.
    pub fn soft_cross_entropy(
        input: ModelInput,
        targets: Vec<u32>,
        weights: Vec<f32>,
        k: usize,
    ) -> Result<Self, TypeError> {
        let n = input.length()?;
        let values = targets.into_iter().map(i64::from).collect();
        let targets = TensorData::dense(TensorValues::Int64(values), vec![n, k])?;
        let weights = TensorData::dense(TensorValues::Float32(weights), vec![n, k])?;
        if k == 0 {
            return Err(TypeError::new(
                "soft targets need at least one target per position",
            ));
        }
        Ok(Self::of(
            input,
            [
                (loss_input::TARGET_TOKENS, targets),
                (loss_input::WEIGHTS, weights),
            ],
        ))
    }

    /// An example for the policy losses: importance sampling, PPO, CISPO and DRO.
    ///
    /// # Errors
    /// If the lengths differ.
    pub fn policy_gradient(
        input: ModelInput,
        targets: Vec<u32>,
        logprobs: Vec<f32>,
        advantages: Vec<f32>,
    ) -> Result<Self, TypeError> {
        let n = check_length(&input, "targets", targets.len())?;
        check_equal("logprobs", logprobs.len(), n)?;
        check_equal("advantages", advantages.len(), n)?;
        Ok(Self::of(
            input,
            [
                (loss_input::TARGET_TOKENS, ints(targets)),
                (loss_input::LOGPROBS, TensorData::floats(logprobs)),
                (loss_input::ADVANTAGES, TensorData::floats(advantages)),
            ],
        ))
    }

    /// An example as it came over the wire; the server checks the inputs against the loss.
    #[must_use]
    pub const fn from_wire(
        model_input: ModelInput,
        loss_fn_inputs: BTreeMap<String, TensorData>,
    ) -> Self {
        Self {
            model_input,
            loss_fn_inputs,
            model_input_spans: None,
            loss_fn_input_spans: None,
        }
    }

    /// Adds what a loss reads, or replaces it: `sequence_ratio_mask` of GSPO, thresholds per token,
    /// what an uploaded loss names.
    #[must_use]
    pub fn with_input(mut self, name: impl Into<String>, tensor: TensorData) -> Self {
        self.loss_fn_inputs.insert(name.into(), tensor);
        self
    }

    /// Says where the tokens come from: `model_input` for the input, `targets` for the targets.
    ///
    /// # Errors
    /// If a span names no sequence, the spans of the input do not add up to its length, or those of
    /// one-dimensional targets not to theirs.
    pub fn with_provenance(
        mut self,
        model_input: Vec<ProvenanceSpan>,
        targets: Vec<ProvenanceSpan>,
    ) -> Result<Self, TypeError> {
        check_tiling("model_input", &model_input, self.model_input.length()?)?;
        let shape = self.loss_fn_inputs.get(loss_input::TARGET_TOKENS);
        if let Some([n]) = shape.map(TensorData::shape) {
            check_tiling("target_tokens", &targets, *n)?;
        }
        self.model_input_spans = Some(model_input);
        self.loss_fn_input_spans = Some(targets);
        Ok(self)
    }

    /// What the loss reads, by wire name.
    #[must_use]
    pub const fn loss_fn_inputs(&self) -> &BTreeMap<String, TensorData> {
        &self.loss_fn_inputs
    }

    /// Size in bytes as the chunking rule counts it.
    #[must_use]
    pub fn estimated_bytes(&self) -> usize {
        let input: usize = self
            .model_input
            .chunks
            .iter()
            .map(crate::Chunk::estimated_bytes)
            .sum();
        input
            + self
                .loss_fn_inputs
                .values()
                .map(TensorData::estimated_bytes)
                .sum::<usize>()
    }

    fn of<const N: usize>(input: ModelInput, tensors: [(&str, TensorData); N]) -> Self {
        let inputs = tensors
            .into_iter()
            .map(|(name, tensor)| (name.to_owned(), tensor))
            .collect();
        Self::from_wire(input, inputs)
    }
}

fn ints(tokens: Vec<u32>) -> TensorData {
    TensorData::ints(tokens.into_iter().map(i64::from).collect())
}

fn check_length(input: &ModelInput, what: &str, n: usize) -> Result<usize, TypeError> {
    let expected = input.length()?;
    check_equal(what, n, expected)?;
    Ok(expected)
}

fn check_equal(what: &str, n: usize, expected: usize) -> Result<(), TypeError> {
    if n == expected {
        return Ok(());
    }
    Err(TypeError::new(format!(
        "{n} {what} for {expected} input tokens"
    )))
}

fn check_tiling(what: &str, spans: &[ProvenanceSpan], n: usize) -> Result<(), TypeError> {
    let mut total = 0_u64;
    for span in spans {
        let (ProvenanceSpan::PromptTokens(of) | ProvenanceSpan::SampledTokens(of)) = span;
        if of.sequence_id.is_empty() {
            return Err(TypeError::new(format!(
                "a provenance span of {what} names no sequence"
            )));
        }
        total = total.saturating_add(of.length);
    }
    if total == n as u64 {
        return Ok(());
    }
    Err(TypeError::new(format!(
        "provenance spans of {what} cover {total} of {n} positions: they must cover each one once"
    )))
}

/// Where a run of tokens comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ProvenanceSpan {
    /// From the prompt of a sampled sequence.
    PromptTokens(SpanOf),
    /// From the continuation of a sampled sequence.
    SampledTokens(SpanOf),
}

/// A run of tokens of one sampled sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpanOf {
    /// The sequence, as the sample's future named it.
    pub sequence_id: String,
    /// First token.
    #[serde(default)]
    pub offset: u64,
    /// Number of tokens.
    pub length: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_arrays_of_different_lengths() {
        let input = || ModelInput::from_tokens(vec![1, 2, 3]);

        let error = Datum::cross_entropy(input(), vec![2, 3, 4], vec![1.0; 2]).unwrap_err();
        assert_eq!(error.to_string(), "2 weights for 3 input tokens");
        let error = Datum::policy_gradient(input(), vec![2, 3], vec![], vec![]).unwrap_err();
        assert_eq!(error.to_string(), "2 targets for 3 input tokens");
    }

    #[test]
    fn provenance_covers_every_position_once() {
        let datum = || {
            let input = ModelInput::from_tokens(vec![1, 2, 3]);
            Datum::cross_entropy(input, vec![2, 3, 4], vec![1.0; 3]).unwrap()
        };
        let span = |length, sequence_id: &str| SpanOf {
            sequence_id: sequence_id.into(),
            offset: 0,
            length,
        };
        let prompt = |n| ProvenanceSpan::PromptTokens(span(n, "q"));
        let sampled = |n| ProvenanceSpan::SampledTokens(span(n, "q"));

        let ok = datum().with_provenance(vec![prompt(2), sampled(1)], vec![prompt(1), sampled(2)]);
        assert_eq!(ok.unwrap().loss_fn_input_spans.unwrap().len(), 2);
        for (input, targets, expected) in [
            (
                vec![prompt(2)],
                vec![sampled(3)],
                "provenance spans of model_input cover 2 of 3 positions: they must cover each one once",
            ),
            (
                vec![prompt(3)],
                vec![sampled(4)],
                "provenance spans of target_tokens cover 4 of 3 positions: they must cover each one once",
            ),
            (
                vec![ProvenanceSpan::PromptTokens(span(3, ""))],
                vec![sampled(3)],
                "a provenance span of model_input names no sequence",
            ),
        ] {
            let error = datum().with_provenance(input, targets).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn counts_bytes_as_the_chunking_rule_does() {
        let datum = Datum::cross_entropy(
            ModelInput::from_tokens(vec![0; 10]),
            vec![0; 10],
            vec![1.0; 10],
        )
        .unwrap();

        assert_eq!(datum.estimated_bytes(), 10 * 4 + 10 * 8 + 10 * 4);
    }
}
