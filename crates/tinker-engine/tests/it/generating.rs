//! Continuous batching: the same samples whoever else is running, and clean ends of every kind.

mod prompts;
mod samples;
mod sharing;

use tinker_engine::{
    AdapterId, Alternatives, Backend, FakeBackend, GenerateRequest, Generation, Generator, Loss,
    SlotId, StopCheck, StopReason, TrainSequence, load_cpu, sampler,
};

use crate::common::{Load, Reference, all_models, all_modules, dir, load};

fn request(prompt: &[u32], seeds: &[u64]) -> GenerateRequest {
    GenerateRequest {
        owner: None,
        adapter: None,
        prompt: prompt.to_vec(),
        max_tokens: Some(20),
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        seeds: seeds.to_vec(),
        stop_tokens: Vec::new(),
        stop: None,
        prompt_logprobs: false,
        prompt_logprobs_from: 0,
        topk_prompt_logprobs: 0,
        prompt_targets: Vec::new(),
        prompt_alternatives: None,
        topk_sample_logprobs: 0,
    }
}

/// Runs requests to their end; outcomes in order of admission.
fn run(
    backend: &mut dyn Backend,
    max_rows: usize,
    requests: Vec<GenerateRequest>,
) -> Vec<Generation> {
    let mut generator = Generator::new(backend.info()).with_max_rows(max_rows);
    let ids: Vec<_> = requests
        .into_iter()
        .map(|r| generator.admit(r).unwrap())
        .collect();
    let mut finished = Vec::new();
    while !generator.is_idle() {
        finished.extend(generator.step(backend).unwrap());
    }
    generator.clear_cache(backend);
    finished.sort_by_key(|f| f.id);
    assert!(finished.iter().map(|f| f.id).eq(ids));
    finished.into_iter().map(|f| f.outcome.unwrap()).collect()
}

fn one(backend: &mut dyn Backend, request: GenerateRequest) -> Generation {
    run(backend, 64, vec![request]).remove(0)
}

/// Checks that requests get the same samples with others, with few rows, and alone.
pub(crate) fn check_company(model: &str, load: Load, rows: &[usize]) {
    let mut backend = load(model, 2);
    let tuned = Some(Reference::of(model).import(&mut *backend));
    let requests = || -> Vec<GenerateRequest> {
        let with = |adapter, prompt: &[u32], seeds: &[u64]| GenerateRequest {
            adapter,
            ..request(prompt, seeds)
        };
        vec![
            with(tuned, &[5, 6, 7], &[1, 2, 3]),
            with(None, &[9; 40], &[1]),
            with(tuned, &[1], &[7, 8]),
        ]
    };
    let together = run(&mut *backend, 64, requests());

    for max_rows in rows.iter().copied() {
        assert_eq!(
            run(&mut *backend, max_rows, requests()),
            together,
            "{model}"
        );
    }
    for (request, expected) in requests().into_iter().zip(&together) {
        assert_eq!(one(&mut *backend, request), *expected, "{model}");
    }
    let [first, second, third] = &together[0].samples[..] else {
        panic!("three samples")
    };
    assert!(first.tokens != second.tokens && second.tokens != third.tokens);
}

/// Tokens of a prompt that differ from each other's neighbours.
fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + 11) % 320).collect()
}

fn backend_state(backend: &mut dyn Backend, model: &str) -> tinker_engine::AdapterState {
    let adapter = Reference::of(model).import(backend);
    backend.export_adapter(adapter).unwrap()
}

/// The logits after each token of a prompt but the last, token by token.
fn logits_by_token(
    backend: &mut dyn Backend,
    adapter: Option<AdapterId>,
    prompt: &[u32],
) -> Vec<Vec<f32>> {
    let slot = backend.open_slot(adapter, prompt.len()).unwrap();
    let rows = prompt[..prompt.len() - 1]
        .iter()
        .map(|token| backend.decode_step(&[(slot, *token)]).unwrap())
        .collect();
    backend.close_slot(slot);
    rows
}
