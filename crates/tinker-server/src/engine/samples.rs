//! Samples on the engine: from a logged request to the generator and back to a result.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use tinker_chat::{StopMatcher, Tokenizer};
use tinker_engine::generate::{
    FinishedGeneration, GenerateRequest, Generation, GenerationId, Generator, MAX_ROWS, Sample,
    StopCheck, StopFactory, StopReason as Ended,
};
use tinker_engine::{AdapterId, Backend, BaseInfo, Work};
use tinker_types::{
    ErrorCategory, RequestId, SampleRequest, SampleResponse, SampledSequence, SamplingParams, Stop,
    StopReason, TensorData, proto,
};

use super::base::Base;
use super::counting::count_sample;
use super::prompt_scores;
use super::runs::derived_seed;
use super::{Worker, engine_failed};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::loss_inputs::checked_tokens;
use crate::memory::{Ask, Promise, Purpose};
use crate::operation::{Form, Outcome, decode_sample};
use crate::watchers::DrawnToken;

/// A log of samples longer than this is started anew, and what is done is dropped from it.
const LOG_SEGMENT_BYTES: u64 = 32 << 20;
/// So is one that knows more samples than this: each takes about a kilobyte of memory.
const LOG_ENTRIES: usize = 20_000;
/// Most alternatives per token: a table of all of a large vocabulary would fill the memory.
pub(super) const MAX_TOPK: u32 = 100;

/// The samples of one base model.
#[derive(Debug)]
pub(super) struct Sampling {
    generator: Generator,
    running: HashMap<GenerationId, Running>,
}

/// A request under way, with what its result depends on beyond the generator.
#[derive(Debug)]
struct Running {
    request_id: RequestId,
    /// Tokens of the prompt.
    n_prompt: usize,
    /// Tokens that the prompt is to be scored with; the answer has its layout.
    targets: Option<TensorData>,
    /// For keys and values.
    _memory: Promise,
}

impl Sampling {
    pub(super) fn new(base: &BaseInfo) -> Self {
        Self {
            generator: Generator::new(base),
            running: HashMap::new(),
        }
    }

    /// Whether there is something to do.
    pub(super) fn is_active(&self) -> bool {
        !self.generator.is_idle()
    }

    /// Whether samples are being drawn from an adapter.
    pub(super) fn uses(&self, adapter: AdapterId) -> bool {
        self.generator.uses(adapter)
    }

    /// Frees what is kept of finished samples of an adapter, before that is dropped.
    pub(super) fn forget(&mut self, backend: &mut dyn Backend, adapter: AdapterId) {
        self.generator.forget_adapter(backend, adapter);
    }

    /// Bytes that samples under way hold.
    pub(super) fn held_bytes(&self, backend: &dyn Backend) -> usize {
        self.generator.held_bytes(backend)
    }

    /// Bytes that are kept of finished samples.
    pub(super) fn kept_bytes(&self) -> usize {
        self.generator.cached_bytes()
    }

    /// Frees what is kept of finished samples; returns how many bytes that were.
    pub(super) fn free_kept(&mut self, backend: &mut dyn Backend) -> usize {
        self.generator.clear_cache(backend)
    }

    /// The requests under way.
    pub(super) fn requests(&self) -> Vec<RequestId> {
        self.running
            .values()
            .map(|r| r.request_id.clone())
            .collect()
    }
}

impl Worker {
    /// Takes up a logged sample, behind those that wait for memory. True: it is tried again later.
    pub(super) fn admit(&mut self, id: &RequestId) -> bool {
        if !self.waiting.is_empty() {
            let why = "samples that came before wait for memory, and go first";
            self.line_up(id, why.into());
            return true;
        }
        let outcome = self.try_sample(id);
        self.settle(id, outcome)
    }

    /// Starts a logged sample.
    pub(super) fn try_sample(&mut self, id: &RequestId) -> Result<()> {
        let body = self.core.samples().body(id)?;
        let request = decode_sample(&body).map_err(|e| Error::Invalid(e.to_string()))?;
        self.start(id, &request)
    }

    /// What comes of a sample that was tried, and of which nothing was drawn yet. True: it is tried again later.
    pub(super) fn settle(&mut self, id: &RequestId, outcome: Result<()>) -> bool {
        match outcome {
            Ok(()) => return false,
            Err(Error::AwaitsMemory { message, .. }) => self.line_up(id, message),
            Err(error) if error.is_passing() => self.hold_sample(id, &error),
            Err(error) => {
                self.core.finish_sample(id, error.into());
                return false;
            }
        }
        true
    }

    /// Ends a sample that the engine failed at.
    pub(super) fn fail_sample(&self, id: &RequestId) {
        self.core.held_samples().remove(id);
        self.core.finish_sample(id, engine_failed());
    }

    fn start(&mut self, id: &RequestId, request: &SampleRequest) -> Result<()> {
        let missing = || Error::Invalid("sampling_session_id is missing".into());
        let sampler_id = request.sampling_session_id.as_ref().ok_or_else(missing)?;
        let sampler = self.core.live_sampler(sampler_id)?;
        let dir: Option<PathBuf> = self.core.sampler_dir(&sampler);
        if sampler.model_path.is_none() && dir.as_ref().is_some_and(|dir| !dir.exists()) {
            return Err(Error::NotFound(format!(
                "sampler {sampler_id} is no longer kept: without a name, the last {} of a training run are, until their session ends; save weights under a name to keep them",
                self.core.limits.keep_unnamed_samplers
            )));
        }
        let owner = self.core.catalog.owner_of(sampler.session_id.as_str());
        let model = &sampler.base_model;
        let read = dir.map(|dir| self.weights(model, &dir));
        let adapter = read.transpose().or_else(|error| {
            // A checkpoint that was deleted while it was read is a deleted one, not a damaged one.
            let _settled = self.core.change_checkpoints();
            self.core.live_sampler(sampler_id)?;
            Err(error)
        })?;
        let base = self.base(model)?;
        let mut generation = generate_request(base, adapter, request, id)?;
        generation.owner = owner.map(|key| key.as_str().into());
        let ask = ask_for(base, &generation);
        // Weights that nobody samples from may have to go.
        base.reserved = adapter;
        let memory = self.promise(&ask);
        let base = self.base(model)?;
        base.reserved = None;
        let running = Running {
            request_id: id.clone(),
            n_prompt: generation.prompt.len(),
            targets: request.target_prompt_logprobs.clone(),
            _memory: memory?,
        };
        let group = group_of(sampler.session_id.as_str());
        let number = base.sampling.generator.admit_of(group, generation)?;
        base.sampling.running.insert(number, running);
        Ok(())
    }

    /// Gives up a sample, if it is under way.
    pub(super) fn cancel(&mut self, id: &RequestId) {
        if self.let_go_of_sample(id) || self.give_up_waiting(id) {
            self.core.finish_sample(id, cancelled());
        }
        for base in self.bases.values_mut() {
            let found = base
                .sampling
                .running
                .iter()
                .find(|(_, r)| r.request_id == *id);
            let Some(number) = found.map(|(number, _)| *number) else {
                continue;
            };
            base.sampling.running.remove(&number);
            base.sampling.generator.cancel(number);
            self.core.finish_sample(id, cancelled());
        }
    }

    /// Runs sampling for about as long as `share`, at least one step of every base model.
    pub(super) fn sample_for(&mut self, share: Duration) {
        let started = Instant::now();
        let core = Arc::clone(&self.core);
        let mut broken = Vec::new();
        let bases = self.bases.iter_mut().filter(|(_, base)| base.is_sampling());
        let step = |(name, base): &mut (&String, &mut Base)| {
            let guarded = std::panic::AssertUnwindSafe(|| step(&core, base));
            if std::panic::catch_unwind(guarded).is_err() {
                broken.push((*name).clone());
                return false;
            }
            base.is_sampling()
        };
        in_turns(bases.collect(), step, || started.elapsed() >= share);
        for name in broken {
            self.fail_base(&name);
        }
    }

    /// Throws a base model away that failed while sampling, with the samples that ran on it.
    fn fail_base(&mut self, name: &str) {
        if let Some(base) = self.bases.remove(name) {
            self.runs.retain(|_, active| active.base != name);
            for id in base.sampling.requests() {
                self.core.finish_sample(&id, engine_failed());
            }
        }
    }
}

/// Lets each of `all` take a step and another one after that, for as long as `step` says of it that there is one;
/// until `is_over`, but one step each in any case.
fn in_turns<T>(mut all: Vec<T>, mut step: impl FnMut(&mut T) -> bool, is_over: impl Fn() -> bool) {
    while !all.is_empty() {
        all.retain_mut(&mut step);
        if is_over() {
            return;
        }
    }
}

fn cancelled() -> Outcome {
    Outcome::failed(ErrorCategory::User, "the sample was cancelled")
}

/// The keys and values of a request's samples: so many are drawn at once. Of more, the prompt is kept beside them, and
/// the first one.
fn ask_for(base: &Base, generation: &GenerateRequest) -> Ask<'static> {
    let n = generation.seeds.len().min(MAX_ROWS);
    let n_kept = if generation.seeds.len() > n { 2 } else { 0 };
    let n_prompt = generation.prompt.len();
    let n_drawn = generation.max_tokens.unwrap_or(0);
    let work = Work::Slots {
        n: n + n_kept,
        capacity: n_prompt.saturating_add(n_drawn),
    };
    Ask {
        purpose: Purpose::Samples,
        n_bytes: base.backend.memory_for(work),
        what: format!("{n} samples of {n_drawn} tokens after a prompt of {n_prompt}"),
        advice: "ask for fewer samples or tokens at once, or restart the server with fewer bits (--weights int8 or nf4)",
    }
}

/// One step of a base model's generator, publishing what it finished.
fn step(core: &Core, base: &mut Base) {
    match base.sampling.generator.step(base.backend.as_mut()) {
        Ok(finished) => {
            note_begun(core, &mut base.sampling);
            tell_watchers(core, &base.sampling);
            for generation in finished {
                publish(core, base, generation);
            }
        }
        Err(error) => {
            let message = Error::from(error).with_causes();
            for (_, running) in base.sampling.running.drain() {
                let outcome = Outcome::failed(ErrorCategory::Server, message.clone());
                core.finish_sample(&running.request_id, outcome);
            }
        }
    }
}

/// Notes which samples wait no longer.
fn note_begun(core: &Core, sampling: &mut Sampling) {
    let begun = sampling.generator.take_begun();
    let ids = begun
        .iter()
        .filter_map(|number| sampling.running.get(number));
    for running in ids {
        core.pending().set_started(&running.request_id, true);
    }
}

/// A number for a session: sessions take turns where there is no room for all samples.
fn group_of(session: &str) -> u64 {
    let digest = blake3::hash(session.as_bytes());
    let first = digest.as_bytes().iter().take(8);
    first.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Tells those who watch samples under way which tokens are new.
fn tell_watchers(core: &Core, sampling: &Sampling) {
    for (number, running) in &sampling.running {
        let id = &running.request_id;
        if !core.watchers.is_watched(id) {
            continue;
        }
        for (i, drawn) in sampling.generator.drawn(*number).enumerate() {
            core.watchers
                .tell(id, i, drawn.tokens.len(), |at| DrawnToken {
                    id: drawn.tokens[at],
                    logprob: drawn.logprobs[at],
                    top: drawn.top_logprobs.get(at).cloned().unwrap_or_default(),
                });
        }
    }
}

/// Tells those who watch a finished request its last tokens.
fn tell_last(core: &Core, id: &RequestId, samples: &[Sample]) {
    for (i, sample) in samples.iter().enumerate() {
        core.watchers
            .tell(id, i, sample.tokens.len(), |at| DrawnToken {
                id: sample.tokens[at],
                logprob: sample.logprobs[at],
                top: sample.top_logprobs.get(at).cloned().unwrap_or_default(),
            });
    }
}

fn publish(core: &Core, base: &mut Base, finished: FinishedGeneration) {
    let Some(running) = base.sampling.running.remove(&finished.id) else {
        return;
    };
    let outcome = match finished.outcome {
        Ok(generation) => {
            tell_last(core, &running.request_id, &generation.samples);
            let n_drawn = generation.samples.iter().map(|s| s.tokens.len()).sum();
            count_sample(core, &running.request_id, running.n_prompt, n_drawn);
            let message = proto::SampleResponse::from(&response(&running, generation));
            Outcome {
                form: Form::SampleProto,
                body: message.encode_to_vec().into(),
            }
        }
        Err(error) => Error::from(error).into(),
    };
    core.finish_sample(&running.request_id, outcome);
    let mut journal = core.samples();
    if journal.is_long(LOG_SEGMENT_BYTES, LOG_ENTRIES)
        && let Err(error) = journal.shorten()
    {
        tracing::warn!(
            error = error.with_causes(),
            "cannot shorten the log of samples"
        );
    }
}

// From the wire to the generator

/// One seed per sample. Without one in the request it is derived from what names the request, so
/// that a sample which is executed again after a crash is the same.
fn seeds(id: &RequestId, request: &SampleRequest) -> Vec<u64> {
    let given = request.sampling_params.seed.map(|seed| seed.to_string());
    let kind = if given.is_some() { "seed" } else { "request" };
    let name = given.as_deref().unwrap_or(id.as_str());
    (0..request.num_samples)
        .map(|index| derived_seed(&[kind, name, &index.to_string()]))
        .collect()
}

fn generate_request(
    base: &Base,
    adapter: Option<AdapterId>,
    request: &SampleRequest,
    id: &RequestId,
) -> Result<GenerateRequest> {
    let info = base.backend.info();
    check_extras(request)?;
    let prompt = checked_tokens(&request.prompt, info)
        .map_err(|why| Error::Invalid(format!("prompt: {why}")))?;
    if let Some(n) = request.prompt_logprobs_last_n
        && (n == 0 || n as usize >= prompt.len())
    {
        return Err(Error::Invalid(format!(
            "prompt_logprobs_last_n {n} must be between 1 and {} for a prompt of {} tokens",
            prompt.len().saturating_sub(1),
            prompt.len()
        )));
    }
    let shown = request.prompt_logprobs_last_n.map(|n| n as usize);
    let prompt_logprobs_from = shown.map_or(0, |n| prompt.len() - n);
    let params = &request.sampling_params;
    // The context ends a sample just as `max_tokens` does.
    let room = info.max_context.saturating_sub(prompt.len());
    let asked = params.max_tokens.map_or(room, |n| n as usize);
    let (stop_tokens, stop) = stops(base.tokenizer.as_ref(), params.stop.as_ref())?;
    let asked_for = request.target_prompt_logprobs.as_ref();
    let prompt_targets = prompt_scores::targets(asked_for, prompt.len(), info)?;
    let prompt_alternatives = prompt_scores::alternatives(id, request, prompt.len())?;
    Ok(GenerateRequest {
        owner: None,
        adapter,
        prompt,
        max_tokens: Some(asked.min(room)),
        temperature: temperature(params)?,
        top_k: top_k(params)?,
        top_p: top_p(params)?,
        seeds: seeds(id, request),
        stop_tokens,
        stop,
        prompt_logprobs: request.prompt_logprobs.unwrap_or(false),
        prompt_logprobs_from,
        topk_prompt_logprobs: request.topk_prompt_logprobs as usize,
        prompt_targets,
        prompt_alternatives,
        topk_sample_logprobs: request.topk_sample_logprobs as usize,
    })
}

fn check_extras(request: &SampleRequest) -> Result<()> {
    if request.record_stability_info {
        return Err(Error::Invalid(
            "record_stability_info is not supported by this server".into(),
        ));
    }
    let counts = [
        ("topk_prompt_logprobs", request.topk_prompt_logprobs),
        ("topk_sample_logprobs", request.topk_sample_logprobs),
    ];
    match counts.iter().find(|(_, k)| *k > MAX_TOPK) {
        Some((name, k)) => Err(Error::Invalid(format!("{name} {k} is above {MAX_TOPK}"))),
        None => Ok(()),
    }
}

fn temperature(params: &SamplingParams) -> Result<f32> {
    let temperature = params.temperature as f32;
    if temperature.is_finite() && temperature >= 0.0 {
        return Ok(temperature);
    }
    Err(Error::Invalid(format!(
        "temperature {} must be at least 0",
        params.temperature
    )))
}

fn top_k(params: &SamplingParams) -> Result<Option<usize>> {
    match params.top_k {
        -1 => Ok(None),
        k => match usize::try_from(k) {
            Ok(k) if k > 0 => Ok(Some(k)),
            _ => Err(Error::Invalid(format!(
                "top_k {k} must be at least 1, or -1 for all"
            ))),
        },
    }
}

fn top_p(params: &SamplingParams) -> Result<f32> {
    if params.top_p > 0.0 && params.top_p <= 1.0 {
        return Ok(params.top_p as f32);
    }
    Err(Error::Invalid(format!(
        "top_p {} must be above 0 and at most 1",
        params.top_p
    )))
}

/// Stop tokens and a check for stop strings. Absent stops mean the end-of-sequence tokens; a list,
/// even an empty one, takes their place.
fn stops(
    tokenizer: Option<&Arc<Tokenizer>>,
    stop: Option<&Stop>,
) -> Result<(Vec<u32>, Option<StopFactory>)> {
    let texts = match stop {
        None => {
            let eos = tokenizer.map_or(Vec::new(), |t| t.eos_token_ids().to_vec());
            return Ok((eos, None));
        }
        Some(Stop::Tokens(tokens)) => return Ok((tokens.clone(), None)),
        Some(Stop::Text(text)) => vec![text.clone()],
        Some(Stop::Texts(texts)) => texts.clone(),
    };
    if let Some(i) = texts.iter().position(String::is_empty) {
        return Err(Error::Invalid(format!("stop string {i} is empty")));
    }
    let Some(tokenizer) = tokenizer.cloned() else {
        return Err(Error::Invalid(
            "this base model has no tokenizer: stop by token ids instead of strings".into(),
        ));
    };
    let make = move || -> Box<dyn StopCheck> {
        Box::new(StopTexts(StopMatcher::new(
            Arc::clone(&tokenizer),
            texts.clone(),
        )))
    };
    Ok((Vec::new(), Some(Box::new(make))))
}

/// Stop strings as the generator checks them.
struct StopTexts(StopMatcher);

impl StopCheck for StopTexts {
    fn push(&mut self, token: u32) -> bool {
        // Text that cannot be decoded contains no stop string.
        self.0.push(token).unwrap_or(false)
    }
}

// From the generator to the wire

fn response(running: &Running, generation: Generation) -> SampleResponse {
    let scores = generation.prompt;
    let targets = running.targets.as_ref();
    SampleResponse {
        sequences: generation.samples.into_iter().map(sequence).collect(),
        target_prompt_logprobs: targets
            .and_then(|asked| prompt_scores::target_logprobs(asked, &scores.targets)),
        prompt_alt_tokens: prompt_scores::alt_tokens(&scores, running.n_prompt),
        prompt_logprobs: (!scores.logprobs.is_empty()).then_some(scores.logprobs),
        topk_prompt_logprobs: (!scores.top_logprobs.is_empty()).then_some(scores.top_logprobs),
        prompt_cache_hit_tokens: u32::try_from(generation.n_cached).unwrap_or(u32::MAX),
    }
}

fn sequence(sample: Sample) -> SampledSequence {
    let top = sample.top_logprobs;
    SampledSequence {
        stop_reason: match sample.stop_reason {
            Ended::Stop => StopReason::Stop,
            Ended::Length => StopReason::Length,
        },
        tokens: sample.tokens,
        logprobs: Some(sample.logprobs),
        topk_logprobs: (!top.is_empty()).then(|| top.into_iter().map(Some).collect()),
        sequence_id: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_take_turns_while_there_is_time_and_one_step_in_any_case() {
        let taken = |most: usize| {
            let log = std::cell::RefCell::new(String::new());
            let step = |(name, left): &mut (char, u32)| {
                log.borrow_mut().push(*name);
                *left -= 1;
                *left > 0
            };
            let is_over = || log.borrow().len() >= most;
            in_turns(vec![('a', 3), ('b', 9), ('c', 1)], step, is_over);
            log.into_inner()
        };

        assert_eq!(taken(0), "abc");
        assert_eq!(taken(5), "abcab");
        assert_eq!(taken(99), "abcababbbbbbb");
    }

    fn request(json: &str) -> SampleRequest {
        let body =
            format!(r#"{{"prompt":{{"chunks":[]}},"sampling_params":{{}},"num_samples":3{json}}}"#);
        serde_json::from_str(&body).unwrap()
    }

    #[test]
    fn seeds_depend_on_request_or_seed_and_on_the_index() {
        let (a, b): (RequestId, RequestId) = ("s:op:1".parse().unwrap(), "s:op:2".parse().unwrap());
        let plain = request("");
        let mut seeded = request("");
        seeded.sampling_params.seed = Some(4);

        assert_eq!(seeds(&a, &plain), seeds(&a, &plain));
        assert_ne!(seeds(&a, &plain), seeds(&b, &plain));
        assert_eq!(seeds(&a, &seeded), seeds(&b, &seeded));
        let all = seeds(&a, &seeded);
        assert!(all[0] != all[1] && all[1] != all[2]);
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        let params = SamplingParams {
            temperature: -1.0,
            top_k: 0,
            top_p: 1.5,
            ..SamplingParams::default()
        };

        assert!(
            temperature(&params)
                .unwrap_err()
                .to_string()
                .contains("temperature -1")
        );
        assert!(top_k(&params).unwrap_err().to_string().contains("top_k 0"));
        assert!(
            top_p(&params)
                .unwrap_err()
                .to_string()
                .contains("top_p 1.5")
        );
    }

    #[test]
    fn stop_strings_need_a_tokenizer_and_an_empty_list_stops_nothing() {
        let text = Stop::Text("x".into());
        let Err(error) = stops(None, Some(&text)) else {
            panic!("a stop string without a tokenizer was taken");
        };
        assert!(error.to_string().contains("no tokenizer"));
        let (tokens, check) = stops(None, Some(&Stop::Tokens(Vec::new()))).unwrap();
        assert!(tokens.is_empty() && check.is_none());
    }
}
