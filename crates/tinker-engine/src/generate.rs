//! Continuous batching: prompts and samples of any number of requests over one [`Backend`].
//!
//! Each step takes some tokens of the prompts and appends one token to every running sample, so
//! requests come and go between steps, and a long prompt holds up neither samples nor short prompts.
//! A prompt that begins like another one of the same owner and adapter takes over what that has computed. What a
//! sample gives depends on its request and seed alone; who else is running decides only when it is
//! done.

mod active;
mod turns;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use self::active::{Active, Running};
use crate::backend::{AdapterId, Backend, BaseInfo, SlotId};
use crate::error::{Error, Result};
use crate::prefix_cache::{MIN_SHARED, Origin, PrefixCache, Shared, common, max_bytes};
use crate::prompt::{Alternatives, Prompt, PromptScores};
use crate::sampler::Sampling;

/// A request that a [`Generator`] has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GenerationId(pub u64);

/// Decides on stopping by text or anything else that lies above tokens; one per sample.
pub trait StopCheck: Send {
    /// Takes the next sampled token; returns whether the sample ends with it.
    fn push(&mut self, token: u32) -> bool;
}

/// Makes one [`StopCheck`] for each sample.
pub type StopFactory = Box<dyn Fn() -> Box<dyn StopCheck> + Send>;

/// What to generate.
pub struct GenerateRequest {
    /// Whose it is. What a prompt has in common with those of others is computed anew.
    pub owner: Option<Arc<str>>,
    /// Adapter to sample with; `None` is the base model. Its weights must never change, as what was
    /// computed with them serves later requests: see [`Backend::snapshot_adapter`].
    pub adapter: Option<AdapterId>,
    /// Tokens to continue, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens of a sample; `None` is what the context has room for.
    pub max_tokens: Option<usize>,
    /// See [`Sampling::temperature`].
    pub temperature: f32,
    /// See [`Sampling::top_k`].
    pub top_k: Option<usize>,
    /// See [`Sampling::top_p`].
    pub top_p: f32,
    /// One seed per sample, at least one.
    pub seeds: Vec<u64>,
    /// A sample ends with any of these.
    pub stop_tokens: Vec<u32>,
    /// Further reasons to stop.
    pub stop: Option<StopFactory>,
    /// Whether to return the log-probability of each prompt token.
    pub prompt_logprobs: bool,
    /// The first position of the prompt whose log-probability is wanted; those before it are `None`.
    pub prompt_logprobs_from: usize,
    /// Most likely tokens to return at each prompt token from `prompt_logprobs_from` on.
    pub topk_prompt_logprobs: usize,
    /// Positions of the prompt, ascending and at least 1, and tokens whose log-probability there is
    /// wanted.
    pub prompt_targets: Vec<(usize, u32)>,
    /// Tokens to draw at each prompt token but the first, at this temperature, nothing cut off.
    pub prompt_alternatives: Option<Alternatives>,
    /// Most likely tokens to return at each sampled token.
    pub topk_sample_logprobs: usize,
}

/// The most likely tokens at a position, with natural-log probabilities, most likely first.
pub type TopLogprobs = Vec<(u32, f32)>;

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// By a stop token or a [`StopCheck`]; the tokens that completed the stop are included.
    Stop,
    /// At its most tokens.
    Length,
}

/// One finished sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Sampled tokens.
    pub tokens: Vec<u32>,
    /// `[tokens]`, natural log, at most 0, of the raw distribution (temperature 1, nothing cut off).
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// `[tokens]` if asked for, else empty.
    pub top_logprobs: Vec<TopLogprobs>,
}

/// What was drawn so far of a sample under way; as in [`Sample`].
#[derive(Debug, Clone, Copy)]
pub struct DrawnSoFar<'a> {
    /// Sampled tokens.
    pub tokens: &'a [u32],
    /// `[tokens]`.
    pub logprobs: &'a [f32],
    /// `[tokens]` if asked for, else empty.
    pub top_logprobs: &'a [TopLogprobs],
}

/// A finished request.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// One per seed, in order.
    pub samples: Vec<Sample>,
    /// What was asked about the prompt.
    pub prompt: PromptScores,
    /// Tokens of the prompt that another request of the owner had computed; depends on what else was
    /// there.
    pub n_cached: usize,
}

/// A request that has ended, well or not.
#[derive(Debug)]
pub struct FinishedGeneration {
    /// Which.
    pub id: GenerationId,
    /// Its samples, or why it could not be finished.
    pub outcome: Result<Generation>,
}

/// Most samples that run at a time, unless set otherwise.
pub const MAX_ROWS: usize = 64;

/// Most tokens of one prompt that go through in a step: enough for a backend to be fast.
pub const CHUNK: usize = 480;

/// Tokens of all prompts that go through in a step: a chunk of a long one leaves room for short ones.
const PROMPT_TOKENS_PER_STEP: usize = 2 * CHUNK;

/// Most waiting prompts that a step looks at.
const LOOKAHEAD: usize = 64;

/// Most tokens that all samples of a short request may draw.
const SHORT_TOKENS: usize = 16;

/// Of so many rows one more is kept for short requests, so that they need not wait for long ones.
const ROWS_PER_SHORT_ROW: usize = 8;

/// Runs generation requests in batches that change from step to step.
#[derive(Debug)]
pub struct Generator {
    vocab_size: usize,
    max_context: usize,
    max_rows: usize,
    next_id: u64,
    /// Requests in the order they came; those at the front may have samples running.
    active: VecDeque<Active>,
    /// Slots of cancelled requests, closed by the next step.
    orphans: Vec<SlotId>,
    /// Requests whose first sample began in the last step.
    begun: Vec<GenerationId>,
    cache: PrefixCache,
}

/// What is known of a prompt before it begins.
enum Beginning {
    /// What another sequence holds of it now, if any does.
    Known(Option<Shared>),
    /// Another prompt computes it in one of the next steps.
    UnderWay,
}

impl Generator {
    /// A generator for backends that run `base`.
    pub fn new(base: &BaseInfo) -> Self {
        Self {
            vocab_size: base.vocab_size,
            max_context: base.max_context,
            max_rows: MAX_ROWS,
            next_id: 0,
            active: VecDeque::new(),
            orphans: Vec::new(),
            begun: Vec::new(),
            cache: PrefixCache::new(max_bytes(base)),
        }
    }

    /// Runs at most `max_rows` samples at a time, at least one, and an eighth more of short requests;
    /// others wait for their turn.
    #[must_use]
    pub fn with_max_rows(mut self, max_rows: usize) -> Self {
        self.max_rows = max_rows.max(1);
        self
    }

    /// Frees what is kept of finished requests of an adapter, before that is dropped.
    pub fn forget_adapter(&mut self, backend: &mut dyn Backend, adapter: AdapterId) {
        self.cache.forget(backend, adapter);
    }

    /// Frees everything that is kept of finished requests; returns how many bytes that were.
    pub fn clear_cache(&mut self, backend: &mut dyn Backend) -> usize {
        self.cache.clear(backend)
    }

    /// Bytes of memory that are kept of finished requests.
    pub fn cached_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Bytes of memory that requests under way hold.
    pub fn held_bytes(&self, backend: &dyn Backend) -> usize {
        let slots = self.active.iter().flat_map(|active| {
            let prompt = active.prompt.iter().filter_map(|p| p.slot);
            prompt.chain(active.samples.iter().flatten().filter_map(|s| s.slot))
        });
        slots.map(|slot| backend.slot_bytes(slot)).sum()
    }

    /// Takes a request of group 0; see [`Self::admit_of`].
    ///
    /// # Errors
    /// As [`Self::admit_of`].
    pub fn admit(&mut self, request: GenerateRequest) -> Result<GenerationId> {
        self.admit_of(0, request)
    }

    /// Takes a request of a group. Where there is no room for all samples, groups take turns, however
    /// much each of them asks for.
    ///
    /// # Errors
    /// If the prompt is empty or has a token outside the vocabulary, prompt and `max_tokens` together
    /// exceed the context, there is no seed, or a sampling parameter is out of range.
    pub fn admit_of(&mut self, group: u64, request: GenerateRequest) -> Result<GenerationId> {
        let max_tokens = self.check(&request)?;
        self.next_id += 1;
        let id = GenerationId(self.next_id);
        let samples = request.seeds.iter().map(|_| None).collect();
        self.active.push_back(Active {
            id,
            group,
            request,
            max_tokens,
            prompt: None,
            samples,
        });
        Ok(id)
    }

    /// The requests whose first sample began in the last step, once.
    pub fn take_begun(&mut self) -> Vec<GenerationId> {
        std::mem::take(&mut self.begun)
    }

    /// Forgets a request; ids that are not (or no longer) known are ignored.
    pub fn cancel(&mut self, id: GenerationId) {
        if let Some(i) = self.active.iter().position(|a| a.id == id)
            && let Some(active) = self.active.remove(i)
        {
            self.orphans.extend(active.slots());
        }
    }

    /// Whether there is nothing to do. A cancelled request is work until a step has closed its slots.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty() && self.orphans.is_empty()
    }

    /// What was drawn so far of a request's samples, in order, up to the first that has not begun;
    /// nothing for requests that are not (or no longer) known.
    pub fn drawn(&self, id: GenerationId) -> impl Iterator<Item = DrawnSoFar<'_>> {
        let found = self.active.iter().find(|active| active.id == id);
        let samples = found.into_iter().flat_map(|active| &active.samples);
        samples.map_while(|sample| {
            let sample = sample.as_ref()?;
            Some(DrawnSoFar {
                tokens: &sample.tokens,
                logprobs: &sample.logprobs,
                top_logprobs: &sample.top_logprobs,
            })
        })
    }

    /// Whether an unfinished request samples with `adapter`.
    pub fn uses(&self, adapter: AdapterId) -> bool {
        self.active
            .iter()
            .any(|a| a.request.adapter == Some(adapter))
    }

    /// Takes prompts a chunk further while there is room for samples, appends a token to every running
    /// sample, and returns what ended by that.
    ///
    /// # Errors
    /// If the backend cannot decode. Every request under way is lost then.
    pub fn step(&mut self, backend: &mut dyn Backend) -> Result<Vec<FinishedGeneration>> {
        for slot in self.orphans.drain(..) {
            backend.close_slot(slot);
        }
        self.begun.clear();
        let mut finished = self.start_samples(backend);
        self.decode(backend, &mut finished).inspect_err(|_| {
            for slot in self.active.drain(..).flat_map(|a| a.slots()) {
                backend.close_slot(slot);
            }
        })?;
        finished.extend(self.take_finished(backend));
        Ok(finished)
    }

    fn check(&self, request: &GenerateRequest) -> Result<usize> {
        let (n, context) = (request.prompt.len(), self.max_context);
        if n == 0 {
            return Err(Error::Invalid("the prompt is empty".into()));
        }
        if request.seeds.is_empty() {
            return Err(Error::Invalid("a request needs at least one sample".into()));
        }
        let outside = |t: &&u32| **t as usize >= self.vocab_size;
        if let Some(token) = request
            .prompt
            .iter()
            .chain(&request.stop_tokens)
            .find(outside)
        {
            let vocab = self.vocab_size;
            let message = format!("token {token} is not below the vocabulary size {vocab}");
            return Err(Error::Invalid(message));
        }
        request.sampling().check()?;
        request.check_scores(self.vocab_size)?;
        let room = context.checked_sub(n).ok_or_else(|| {
            Error::Invalid(format!(
                "a prompt of {n} tokens exceeds the context of {context}"
            ))
        })?;
        match request.max_tokens {
            Some(max) if max > room => Err(Error::Invalid(format!(
                "a prompt of {n} tokens and {max} more exceed the context of {context}"
            ))),
            max => Ok(max.unwrap_or(room)),
        }
    }

    /// How many more samples of request `i` may begin.
    fn room(&self, i: usize, n_running: usize) -> usize {
        let for_short = if self.active[i].is_short() {
            self.max_rows / ROWS_PER_SHORT_ROW
        } else {
            0
        };
        (self.max_rows + for_short).saturating_sub(n_running)
    }

    /// Takes prompts further and starts waiting samples, groups in turn, while there is room.
    fn start_samples(&mut self, backend: &mut dyn Backend) -> Vec<FinishedGeneration> {
        let mut n_running: usize = self.active.iter().map(Active::n_running).sum();
        let all_rows = self.max_rows + self.max_rows / ROWS_PER_SHORT_ROW;
        if n_running >= all_rows {
            return Vec::new();
        }
        let turns::Order { places, n_groups } = turns::order(
            self.active.iter().map(Active::share),
            LOOKAHEAD.max(all_rows),
        );
        let share = self.max_rows.div_ceil(n_groups.max(1));
        let (mut budget, mut looked_at) = (PROMPT_TOKENS_PER_STEP, 0);
        let mut failed = Vec::new();
        for &i in &places {
            let room = self.room(i, n_running);
            if room == 0 {
                continue;
            }
            if !self.active[i].has_prompt() {
                if budget == 0 || looked_at == LOOKAHEAD {
                    continue;
                }
                looked_at += 1;
                match self.advance(backend, i, budget) {
                    Ok(n) => budget -= n.min(budget),
                    Err(error) => {
                        failed.push((self.active[i].id, error));
                        continue;
                    }
                }
            }
            n_running += self.start(backend, i, room.min(share), &mut failed);
        }
        // What one group leaves of its share is the others'.
        for &i in &places {
            let room = self.room(i, n_running);
            if !failed.iter().any(|(id, _)| *id == self.active[i].id) {
                n_running += self.start(backend, i, room, &mut failed);
            }
        }
        failed
            .into_iter()
            .map(|(id, error)| self.fail(backend, id, error))
            .collect()
    }

    /// Starts at most `room` samples of request `i` if its prompt is ready; returns how many.
    fn start(
        &mut self,
        backend: &mut dyn Backend,
        i: usize,
        room: usize,
        failed: &mut Vec<(GenerationId, Error)>,
    ) -> usize {
        let active = &mut self.active[i];
        let is_first = active.samples.iter().all(Option::is_none);
        match active.start(backend, room) {
            Ok(started) => {
                if is_first && started > 0 {
                    self.begun.push(active.id);
                }
                started
            }
            Err(error) => {
                failed.push((active.id, error));
                0
            }
        }
    }

    /// Takes prompt `i` further; returns what that cost, in tokens.
    fn advance(&mut self, backend: &mut dyn Backend, i: usize, budget: usize) -> Result<usize> {
        if self.active[i].prompt.is_none() {
            let Beginning::Known(shared) = self.beginning(i) else {
                return Ok(0);
            };
            let active = &mut self.active[i];
            let prompt = Prompt::open(backend, &active.request, active.max_tokens, shared)?;
            active.prompt = Some(prompt);
        }
        let Active {
            request, prompt, ..
        } = &mut self.active[i];
        let Some(prompt) = prompt else {
            return Ok(0);
        };
        prompt.advance(backend, request, budget)
    }

    /// Where the beginning of prompt `i`, which is not begun, can be taken from.
    fn beginning(&mut self, i: usize) -> Beginning {
        let request = &self.active[i].request;
        let wanted = &request.prompt[..request.n_shareable()];
        let mut best = self.cache.find(&request.origin(), wanted);
        let mut promised = 0;
        for other in &self.active {
            let Some((slot, done)) = other.held().filter(|_| other.shares(request)) else {
                continue;
            };
            let len = common(&other.request.prompt, wanted);
            let ready = len.min(done);
            if ready >= MIN_SHARED && best.is_none_or(|best| best.len < ready) {
                best = Some(Shared { slot, len: ready });
            }
            promised = promised.max(len);
        }
        // Another prompt is about to compute more of it than there is now.
        if promised >= best.map_or(0, |best| best.len) + MIN_SHARED {
            return Beginning::UnderWay;
        }
        Beginning::Known(best)
    }

    fn fail(
        &mut self,
        backend: &mut dyn Backend,
        id: GenerationId,
        error: Error,
    ) -> FinishedGeneration {
        self.cancel(id);
        for slot in self.orphans.drain(..) {
            backend.close_slot(slot);
        }
        FinishedGeneration {
            id,
            outcome: Err(error),
        }
    }

    /// Appends one token to every running sample.
    fn decode(
        &mut self,
        backend: &mut dyn Backend,
        finished: &mut Vec<FinishedGeneration>,
    ) -> Result<()> {
        let mut rows = Vec::new();
        for active in &self.active {
            for sample in active
                .samples
                .iter()
                .flatten()
                .filter(|s| s.ended.is_none())
            {
                rows.extend(sample.slot.zip(sample.tokens.last().copied()));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let logits = backend.decode_step(&rows)?;
        let mut logits = logits.chunks_exact(self.vocab_size);
        let mut failed = Vec::new();
        for active in &mut self.active {
            for i in 0..active.samples.len() {
                let is_running = |s: &Running| s.ended.is_none();
                if !active.samples[i].as_ref().is_some_and(is_running) {
                    continue;
                }
                let Some(logits) = logits.next() else { break };
                match active.push(backend, i, logits) {
                    Ok(()) => {}
                    Err(error) => failed.push((active.id, error)),
                }
            }
        }
        failed.dedup_by_key(|(id, _)| *id);
        finished.extend(
            failed
                .into_iter()
                .map(|(id, error)| self.fail(backend, id, error)),
        );
        Ok(())
    }

    fn take_finished(&mut self, backend: &mut dyn Backend) -> Vec<FinishedGeneration> {
        let mut finished = Vec::new();
        for mut active in std::mem::take(&mut self.active) {
            if active
                .samples
                .iter()
                .all(|s| s.as_ref().is_some_and(|s| s.ended.is_some()))
            {
                if let Some((slot, tokens)) = active.take_sequence() {
                    let origin = active.request.origin();
                    self.cache.insert(backend, origin, tokens, slot);
                }
                finished.push(active.finish());
            } else {
                self.active.push_back(active);
            }
        }
        finished
    }
}

impl GenerateRequest {
    fn origin(&self) -> Origin {
        Origin {
            owner: self.owner.clone(),
            adapter: self.adapter,
        }
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        }
    }
}

impl fmt::Debug for GenerateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GenerateRequest")
            .field("adapter", &self.adapter)
            .field("prompt", &self.prompt.len())
            .field("samples", &self.seeds.len())
            .finish_non_exhaustive()
    }
}
