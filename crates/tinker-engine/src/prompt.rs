//! A prompt on its way through the model, and what is said about its tokens.
//!
//! The logits after a token score the next one, so each position is scored once: with the logits
//! that the chunk before it ended with, or those of a row within its chunk.

use crate::backend::{Backend, SlotId};
use crate::error::{Error, Result};
use crate::generate::{CHUNK, GenerateRequest, TopLogprobs};
use crate::prefix_cache::Shared;
use crate::sampler;

/// Tokens to draw at each position of a prompt but the first, in place of the token that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alternatives {
    /// How many at each position, at least one; independent, so one may come more than once.
    pub k: usize,
    /// Decides, with position and number, what is drawn.
    pub seed: u64,
}

/// What is known about the tokens of a prompt; empty where not asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PromptScores {
    /// `[prompt]`; the first is `None`, as nothing comes before it.
    pub logprobs: Vec<Option<f32>>,
    /// `[prompt]`; the first is `None`.
    pub top_logprobs: Vec<Option<TopLogprobs>>,
    /// One for each of [`GenerateRequest::prompt_targets`], natural log.
    pub targets: Vec<f32>,
    /// `[prompt - 1, k]`: tokens drawn at positions from 1 on, with their natural-log probabilities
    /// in the raw distribution.
    pub alternatives: Vec<(u32, f32)>,
}

/// A prompt that goes or went through the model.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Tokens that went through, those taken over included.
    pub(crate) done: usize,
    /// Tokens taken over from another request.
    pub(crate) n_cached: usize,
    /// `None` once the last sample took it over.
    pub(crate) slot: Option<SlotId>,
    pub(crate) next_logits: Vec<f32>,
    pub(crate) scores: PromptScores,
}

impl GenerateRequest {
    /// Tokens of the prompt of which nothing is wanted that a cached sequence does not hold. The last
    /// one goes through the model for what follows it.
    pub(crate) fn n_shareable(&self) -> usize {
        let last = self.prompt.len() - 1;
        self.first_scored()
            .map_or(last, |first| last.min(first - 1))
    }

    /// The first position of the prompt that something is wanted of, at least 1.
    fn first_scored(&self) -> Option<usize> {
        let shown = self.prompt_logprobs || self.topk_prompt_logprobs > 0;
        let shown = shown.then(|| self.prompt_logprobs_from.max(1));
        let target = self.prompt_targets.first().map(|(at, _)| *at);
        let drawn = self.prompt_alternatives.map(|_| 1);
        [shown, target, drawn].into_iter().flatten().min()
    }

    /// Whether the log-probabilities of the prompt's own tokens are not enough.
    fn needs_logits(&self) -> bool {
        self.topk_prompt_logprobs > 0
            || !self.prompt_targets.is_empty()
            || self.prompt_alternatives.is_some()
    }

    /// Checks what is asked about the prompt.
    pub(crate) fn check_scores(&self, vocab: usize) -> Result<()> {
        let n = self.prompt.len();
        let mut before = 0;
        for (at, token) in &self.prompt_targets {
            if *at == 0 || *at >= n || *at < before {
                return Err(Error::Invalid(format!(
                    "target position {at} must be in 1..{n} and not before {before}"
                )));
            }
            if *token as usize >= vocab {
                return Err(Error::Invalid(format!(
                    "target token {token} at position {at} is not below the vocabulary size {vocab}"
                )));
            }
            before = *at;
        }
        if self.prompt_alternatives.is_some_and(|a| a.k == 0) {
            let message = "the number of alternatives is 0, it must be at least 1";
            return Err(Error::Invalid(message.into()));
        }
        Ok(())
    }
}

impl PromptScores {
    fn of(request: &GenerateRequest) -> Self {
        let n = request.prompt.len();
        let rows = |wanted: bool| if wanted { n } else { 0 };
        Self {
            logprobs: vec![None; rows(request.prompt_logprobs)],
            top_logprobs: vec![None; rows(request.topk_prompt_logprobs > 0)],
            targets: Vec::new(),
            alternatives: Vec::new(),
        }
    }

    /// Notes what is wanted of position `at`, from the logits before it. Positions ascend.
    fn take(&mut self, request: &GenerateRequest, at: usize, logits: &[f32]) -> Result<()> {
        if at >= request.prompt_logprobs_from {
            if let Some(logprob) = self.logprobs.get_mut(at) {
                *logprob = Some(sampler::logprob_of(logits, request.prompt[at])?);
            }
            if let Some(top) = self.top_logprobs.get_mut(at) {
                let n = request.topk_prompt_logprobs;
                *top = Some(sampler::most_likely(logits, n)?);
            }
        }
        let rest = &request.prompt_targets[self.targets.len()..];
        let here = rest.partition_point(|(position, _)| *position <= at);
        let tokens = rest[..here].iter().map(|(_, token)| *token);
        sampler::logprobs_of(logits, tokens, &mut self.targets)?;
        if let Some(wanted) = request.prompt_alternatives {
            let first = (at * wanted.k) as u64;
            let steps = first..first + wanted.k as u64;
            let draws = &mut self.alternatives;
            sampler::sample_steps(logits, request.temperature, wanted.seed, steps, draws)?;
        }
        Ok(())
    }
}

impl Prompt {
    /// A slot for a request that holds what is shared with another sequence.
    pub(crate) fn open(
        backend: &mut dyn Backend,
        request: &GenerateRequest,
        max_tokens: usize,
        shared: Option<Shared>,
    ) -> Result<Self> {
        let capacity = request.prompt.len() + max_tokens;
        let slot = match shared {
            Some(Shared { slot, len }) => backend.fork_prefix(slot, len, capacity)?,
            None => backend.open_slot(request.adapter, capacity)?,
        };
        let done = shared.map_or(0, |shared| shared.len);
        Ok(Self {
            done,
            n_cached: done,
            slot: Some(slot),
            next_logits: Vec::new(),
            scores: PromptScores::of(request),
        })
    }

    /// Takes the prompt one chunk further, of at most `budget` tokens; returns how many.
    pub(crate) fn advance(
        &mut self,
        backend: &mut dyn Backend,
        request: &GenerateRequest,
        budget: usize,
    ) -> Result<usize> {
        let rest = &request.prompt[self.done..];
        let Some(slot) = self.slot.filter(|_| !rest.is_empty()) else {
            return Ok(0);
        };
        let n = rest.len().min(CHUNK).min(budget);
        let (part, start, end) = (&rest[..n], self.done, self.done + n);
        // Nothing precedes the first chunk, and a prompt that was taken over is scored later.
        if !self.next_logits.is_empty() {
            self.scores.take(request, start, &self.next_logits)?;
        }
        let first = request.first_scored().filter(|first| *first < end);
        self.next_logits = match first {
            Some(first) if request.needs_logits() => {
                let row = (first - 1).saturating_sub(start);
                let scores = &mut self.scores;
                let show = &mut |i, logits: &[f32]| scores.take(request, start + i + 1, logits);
                backend.prefill_logits(slot, part, row, show)?
            }
            first => {
                let prefill = backend.prefill(slot, part, first.is_some())?;
                for (at, logprob) in (start + 1..end).zip(prefill.prompt_logprobs) {
                    if at >= request.prompt_logprobs_from {
                        self.scores.logprobs[at] = Some(logprob);
                    }
                }
                prefill.next_logits
            }
        };
        self.done = end;
        Ok(n)
    }
}
