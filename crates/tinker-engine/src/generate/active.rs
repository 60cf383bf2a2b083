//! Requests under way, and their samples.

use std::fmt;

use super::{
    CHUNK, FinishedGeneration, GenerateRequest, Generation, GenerationId, SHORT_TOKENS, Sample,
    StopCheck, StopReason, TopLogprobs, turns,
};
use crate::backend::{Backend, SlotId};
use crate::error::Result;
use crate::prompt::Prompt;
use crate::sampler::{self, Draw};

/// A request under way.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) id: GenerationId,
    /// Whose it is.
    pub(super) group: u64,
    pub(super) request: GenerateRequest,
    pub(super) max_tokens: usize,
    pub(super) prompt: Option<Prompt>,
    /// Samples not yet started are `None`.
    pub(super) samples: Vec<Option<Running>>,
}

/// A sample that has begun.
pub(super) struct Running {
    pub(super) slot: Option<SlotId>,
    check: Option<Box<dyn StopCheck>>,
    pub(super) ended: Option<StopReason>,
    pub(super) tokens: Vec<u32>,
    pub(super) logprobs: Vec<f32>,
    pub(super) top_logprobs: Vec<TopLogprobs>,
}

impl Active {
    pub(super) fn slots(self) -> impl Iterator<Item = SlotId> {
        let prompt = self.prompt.and_then(|p| p.slot);
        prompt
            .into_iter()
            .chain(self.samples.into_iter().flatten().filter_map(|s| s.slot))
    }

    /// Samples that run.
    pub(super) fn n_running(&self) -> usize {
        let running = self.samples.iter().flatten();
        running.filter(|sample| sample.ended.is_none()).count()
    }

    pub(super) fn share(&self) -> turns::Share<'_> {
        turns::Share {
            owner: self.request.owner.as_deref(),
            group: self.group,
            n_running: self.n_running(),
            n_waiting: self.samples.iter().filter(|s| s.is_none()).count(),
            is_short: self.is_short(),
        }
    }

    /// Whether it is over soon once it has begun.
    pub(super) fn is_short(&self) -> bool {
        self.max_tokens.saturating_mul(self.samples.len()) <= SHORT_TOKENS
            && self.request.prompt.len() <= CHUNK
    }

    /// Whether all of the prompt went through the model.
    pub(super) fn has_prompt(&self) -> bool {
        let n = self.request.prompt.len();
        self.prompt.as_ref().is_some_and(|p| p.done == n)
    }

    /// A slot that holds the beginning of the prompt, and how much of it.
    pub(super) fn held(&self) -> Option<(SlotId, usize)> {
        let prompt = self.prompt.as_ref()?;
        let of_samples = || self.samples.iter().flatten().find_map(|s| s.slot);
        prompt
            .slot
            .or_else(of_samples)
            .map(|slot| (slot, prompt.done))
    }

    /// Whether a request computes the same from the same tokens, and may know that.
    pub(super) fn shares(&self, request: &GenerateRequest) -> bool {
        self.request.adapter == request.adapter && self.request.owner == request.owner
    }

    /// The slot of the first sample with the tokens it holds: the last one drawn never went through.
    pub(super) fn take_sequence(&mut self) -> Option<(SlotId, Vec<u32>)> {
        let sample = self.samples.first_mut()?.as_mut()?;
        let slot = sample.slot.take()?;
        let drawn = sample.tokens.split_last().map_or(&[][..], |(_, rest)| rest);
        Some((slot, [&self.request.prompt[..], drawn].concat()))
    }

    /// Starts at most `room` samples once all of the prompt went through; returns how many.
    pub(super) fn start(&mut self, backend: &mut dyn Backend, room: usize) -> Result<usize> {
        let n = self.request.prompt.len();
        let Some(mut prompt) = self.prompt.take_if(|p| p.done == n) else {
            return Ok(0);
        };
        let waiting: Vec<usize> = (0..self.samples.len())
            .filter(|i| self.samples[*i].is_none())
            .collect();
        let started = waiting.len().min(room);
        let outcome = waiting.iter().take(room).try_for_each(|i| {
            let is_last = *i + 1 == self.samples.len();
            let slot = if is_last {
                prompt.slot.take()
            } else {
                prompt
                    .slot
                    .map(|slot| backend.fork_slot(slot))
                    .transpose()?
            };
            self.samples[*i] = Some(Running::new(slot, &self.request));
            self.push(backend, *i, &prompt.next_logits)
        });
        self.prompt = Some(prompt);
        outcome.map(|()| started)
    }

    /// Draws the next token of sample `i` from the logits after its last.
    pub(super) fn push(
        &mut self,
        backend: &mut dyn Backend,
        i: usize,
        logits: &[f32],
    ) -> Result<()> {
        let Some(sample) = &mut self.samples[i] else {
            return Ok(());
        };
        if self.max_tokens == 0 {
            sample.ended = Some(StopReason::Length);
        } else {
            let step = sample.tokens.len() as u64;
            let request = &self.request;
            let draw = sampler::sample(logits, &request.sampling(), request.seeds[i], step)?;
            if request.topk_sample_logprobs > 0 {
                let top = sampler::most_likely(logits, request.topk_sample_logprobs)?;
                sample.top_logprobs.push(top);
            }
            sample.push(draw, request, self.max_tokens);
        }
        // The first sample's may serve later requests.
        if sample.ended.is_some()
            && i > 0
            && let Some(slot) = sample.slot.take()
        {
            backend.close_slot(slot);
        }
        Ok(())
    }

    pub(super) fn finish(self) -> FinishedGeneration {
        let samples = self.samples.into_iter().flatten().map(|s| Sample {
            tokens: s.tokens,
            logprobs: s.logprobs,
            stop_reason: s.ended.unwrap_or(StopReason::Length),
            top_logprobs: s.top_logprobs,
        });
        let (prompt, n_cached) = self
            .prompt
            .map(|p| (p.scores, p.n_cached))
            .unwrap_or_default();
        let outcome = Ok(Generation {
            samples: samples.collect(),
            prompt,
            n_cached,
        });
        FinishedGeneration {
            id: self.id,
            outcome,
        }
    }
}

impl Running {
    fn new(slot: Option<SlotId>, request: &GenerateRequest) -> Self {
        Self {
            slot,
            check: request.stop.as_ref().map(|make| make()),
            ended: None,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            top_logprobs: Vec::new(),
        }
    }

    fn push(&mut self, draw: Draw, request: &GenerateRequest, max_tokens: usize) {
        self.tokens.push(draw.token);
        self.logprobs.push(draw.logprob);
        // The check sees every token, also one that is a stop by itself.
        let checked = self
            .check
            .as_mut()
            .is_some_and(|check| check.push(draw.token));
        if checked || request.stop_tokens.contains(&draw.token) {
            self.ended = Some(StopReason::Stop);
        } else if self.tokens.len() == max_tokens {
            self.ended = Some(StopReason::Length);
        }
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Running({} tokens)", self.tokens.len())
    }
}
