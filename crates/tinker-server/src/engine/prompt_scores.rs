//! What a sample asks about its prompt: chosen tokens and drawn ones, from the wire and back.

use tinker_engine::{Alternatives, BaseInfo, PromptScores};
use tinker_types::{PromptAltTokens, RequestId, SampleRequest, TensorData, TensorValues};

use super::runs::derived_seed;
use super::samples::MAX_TOPK;
use crate::error::{Error, Result};

/// Most tokens to score at each position of a prompt, on average.
const MAX_TARGETS: usize = 1024;

/// A cell that asks for nothing.
const SKIPPED: i64 = -1;

/// The cells of `target_prompt_logprobs` as positions and tokens: row `i` is about position `i + 1`.
///
/// # Errors
/// If shape or type are not those of the prompt, or a token is neither -1 nor in the vocabulary.
pub(super) fn targets(
    tensor: Option<&TensorData>,
    n_prompt: usize,
    info: &BaseInfo,
) -> Result<Vec<(usize, u32)>> {
    let Some(tensor) = tensor else {
        return Ok(Vec::new());
    };
    let refused = |why: String| Err(Error::Invalid(format!("target_prompt_logprobs {why}")));
    let TensorValues::Int64(values) = tensor.values() else {
        return refused("must be int64, got float32".into());
    };
    let n_rows = n_prompt.saturating_sub(1);
    if !matches!(tensor.shape(), &[rows, _] if rows == n_rows) {
        let shape = tensor.shape();
        return refused(format!(
            "of shape {shape:?} for a prompt of {n_prompt} tokens: it must be [{n_rows}, k]"
        ));
    }
    if values.len() > n_rows.saturating_mul(MAX_TARGETS) {
        let n = values.len();
        return refused(format!(
            "has {n} cells for {n_rows} positions: at most {MAX_TARGETS} for each are taken"
        ));
    }
    let mut targets = Vec::new();
    for (row, &token) in rows(tensor).zip(values) {
        match u32::try_from(token) {
            Ok(token) if (token as usize) < info.vocab_size => targets.push((row + 1, token)),
            _ if token == SKIPPED => {}
            _ => {
                let vocab = info.vocab_size;
                return refused(format!(
                    "asks for token {token} in row {row}, outside the vocabulary of {vocab} tokens"
                ));
            }
        }
    }
    if targets.is_empty() {
        return refused("asks for no token: leave it out".into());
    }
    Ok(targets)
}

/// The row of each listed value.
fn rows(tensor: &TensorData) -> Box<dyn Iterator<Item = usize> + '_> {
    if let Some(index) = tensor.sparse_index() {
        let counts = index.crow_indices.windows(2);
        let counts = counts.map(|pair| usize::try_from(pair[1] - pair[0]).unwrap_or(0));
        return Box::new(
            counts
                .enumerate()
                .flat_map(|(row, n)| std::iter::repeat_n(row, n)),
        );
    }
    let k = tensor.shape().last().copied().unwrap_or(0);
    Box::new((0..tensor.values().len()).map(move |cell| cell / k.max(1)))
}

/// The log-probabilities in the layout of the request, 0 where nothing was asked for.
pub(super) fn target_logprobs(asked: &TensorData, logprobs: &[f32]) -> Option<TensorData> {
    let TensorValues::Int64(tokens) = asked.values() else {
        return None;
    };
    let mut logprobs = logprobs.iter();
    let cells = tokens.iter().map(|token| match *token {
        SKIPPED => 0.0,
        _ => logprobs.next().copied().unwrap_or_default(),
    });
    let (values, shape) = (TensorValues::Float32(cells.collect()), asked.shape().into());
    let tensor = match asked.sparse_index() {
        Some(index) => TensorData::sparse(values, shape, index.clone()),
        None => TensorData::dense(values, shape),
    };
    tensor.ok()
}

/// What `prompt_alt_tokens_k` asks for. The seed is that of the request, or derived from its id, as
/// those of the samples are.
///
/// # Errors
/// If k is too large, or the prompt has no position to draw at.
pub(super) fn alternatives(
    id: &RequestId,
    request: &SampleRequest,
    n_prompt: usize,
) -> Result<Option<Alternatives>> {
    let k = request.prompt_alt_tokens_k;
    if k == 0 {
        return Ok(None);
    }
    if k > MAX_TOPK {
        let message = format!("prompt_alt_tokens_k {k} is above {MAX_TOPK}");
        return Err(Error::Invalid(message));
    }
    if n_prompt < 2 {
        let message = format!("prompt_alt_tokens_k {k} needs a prompt of 2 tokens at least");
        return Err(Error::Invalid(message));
    }
    let seed = match request.sampling_params.seed {
        Some(seed) => derived_seed(&["seed", &seed.to_string(), "alternatives"]),
        None => derived_seed(&["request", id.as_str(), "alternatives"]),
    };
    Ok(Some(Alternatives {
        k: k as usize,
        seed,
    }))
}

/// The drawn tokens as tensors `[prompt - 1, k]`.
pub(super) fn alt_tokens(scores: &PromptScores, n_prompt: usize) -> Option<PromptAltTokens> {
    let drawn = &scores.alternatives;
    let n_rows = n_prompt.checked_sub(1).filter(|_| !drawn.is_empty())?;
    let shape = vec![n_rows, drawn.len().checked_div(n_rows)?];
    let tokens = drawn.iter().map(|(token, _)| i64::from(*token)).collect();
    let logprobs = drawn.iter().map(|(_, logprob)| *logprob).collect();
    Some(PromptAltTokens {
        tokens: TensorData::dense(TensorValues::Int64(tokens), shape.clone()).ok()?,
        logprobs: TensorData::dense(TensorValues::Float32(logprobs), shape).ok()?,
    })
}
