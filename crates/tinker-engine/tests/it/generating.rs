//! Continuous batching: the same samples whoever else is running, and clean ends of every kind.

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

#[test]
fn samples_do_not_depend_on_company_or_rows() {
    for model in all_models() {
        check_company(model, load, &[1, 2, 4]);
    }
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

#[test]
fn sampled_logprobs_equal_recomputed_ones_bit_for_bit() {
    for model in all_models() {
        let mut backend = load(model, 2);
        let adapter = Some(Reference::of(model).import(&mut *backend));
        let prompt = [3, 1, 4, 1, 5];
        let generation = one(
            &mut *backend,
            GenerateRequest {
                adapter,
                temperature: 0.7,
                ..request(&prompt, &[42])
            },
        );
        let sample = &generation.samples[0];
        let mut all = prompt.to_vec();
        all.extend(&sample.tokens);
        let n = all.len() - 1;
        let loss = Loss::CrossEntropy {
            weights: vec![0.0; n],
        };
        let (tokens, targets) = (all[..n].to_vec(), all[1..].to_vec());

        let scored = backend
            .forward(
                adapter,
                &[TrainSequence {
                    tokens,
                    targets,
                    k: 1,
                    loss,
                }],
            )
            .unwrap();

        assert_eq!(
            scored[0].logprobs[prompt.len() - 1..],
            sample.logprobs,
            "{model}"
        );
    }
}

#[test]
fn prompt_logprobs_are_the_same_with_and_without_their_top() {
    let mut backend = load("qwen3", 2);
    let ask = |top| GenerateRequest {
        prompt_logprobs: true,
        topk_prompt_logprobs: top,
        topk_sample_logprobs: top,
        max_tokens: Some(3),
        temperature: 0.0,
        ..request(&[10, 20, 30, 40], &[0])
    };

    let (plain, top) = (one(&mut *backend, ask(0)), one(&mut *backend, ask(5)));

    assert_eq!(plain.prompt.logprobs, top.prompt.logprobs);
    assert_eq!(plain.prompt.logprobs.len(), 4);
    assert_eq!(plain.prompt.logprobs[0], None);
    assert!(plain.prompt.top_logprobs.is_empty() && plain.samples[0].top_logprobs.is_empty());
    assert!(top.prompt.top_logprobs[0].is_none());
    assert!(
        top.prompt.top_logprobs[1..]
            .iter()
            .all(|t| t.as_ref().unwrap().len() == 5)
    );
    let sample = &top.samples[0];
    for ((best, token), logprob) in sample
        .top_logprobs
        .iter()
        .zip(&sample.tokens)
        .zip(&sample.logprobs)
    {
        assert_eq!(best[0], (*token, *logprob));
    }
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

#[test]
fn everything_about_a_prompt_in_chunks_has_the_bits_of_single_tokens() {
    for model in all_models() {
        let mut backend = load(model, 2);
        let adapter = Some(Reference::of(model).import(&mut *backend));
        let tokens = prompt(500);
        let rows = logits_by_token(&mut *backend, adapter, &tokens);
        // Rows of one chunk, of the next one, and the first of that.
        let targets = vec![(1, 3), (1, 4), (300, 7), (480, 5), (481, 6), (499, 2)];

        for from in [0, 7, 480, 490] {
            let asked = GenerateRequest {
                adapter,
                max_tokens: Some(1),
                prompt_logprobs: true,
                prompt_logprobs_from: from,
                topk_prompt_logprobs: 3,
                prompt_targets: targets.clone(),
                ..request(&tokens, &[1])
            };
            let scores = one(&mut *backend, asked).prompt;

            for at in 0..500 {
                let row = (at >= from.max(1)).then(|| &rows[at - 1]);
                let logprob = row.map(|row| sampler::logprob_of(row, tokens[at]).unwrap());
                let top = row.map(|row| sampler::most_likely(row, 3).unwrap());
                assert_eq!(
                    scores.logprobs[at], logprob,
                    "{model}, from {from}, at {at}"
                );
                assert_eq!(
                    scores.top_logprobs[at], top,
                    "{model}, from {from}, at {at}"
                );
            }
            let expected = targets
                .iter()
                .map(|(at, token)| sampler::logprob_of(&rows[at - 1], *token).unwrap());
            assert!(expected.eq(scores.targets), "{model}, from {from}");
        }
    }
}

#[test]
fn targets_alone_leave_what_is_before_them_to_the_cache() {
    let mut backend = load("qwen3", 2);
    let tokens = prompt(70);
    let rows = logits_by_token(&mut *backend, None, &tokens);
    let ask = |at| GenerateRequest {
        prompt_targets: vec![(at, 9)],
        ..request(&tokens, &[1])
    };

    let both = run(&mut *backend, 64, vec![request(&tokens, &[1]), ask(50)]);

    assert_eq!(both[1].n_cached, 49);
    assert_eq!(
        both[1].prompt.targets,
        [sampler::logprob_of(&rows[49], 9).unwrap()]
    );
    assert!(both[1].prompt.logprobs.is_empty());
}

#[test]
fn alternatives_follow_the_distribution_at_their_position_and_their_seed() {
    let mut backend = load("qwen3", 2);
    let tokens = prompt(6);
    let rows = logits_by_token(&mut *backend, None, &tokens);
    let mut ask = |temperature, k, seed| {
        let asked = GenerateRequest {
            temperature,
            // Cuts samples, and nothing about the prompt.
            top_k: Some(1),
            max_tokens: Some(1),
            prompt_alternatives: Some(Alternatives { k, seed }),
            ..request(&tokens, &[1])
        };
        one(&mut *backend, asked).prompt.alternatives
    };
    const K: usize = 4000;

    let drawn = ask(0.7, K, 5);

    assert_eq!(drawn.len(), 5 * K);
    assert_eq!(drawn, ask(0.7, K, 5));
    assert_ne!(drawn, ask(0.7, K, 6));
    for (drawn, row) in drawn.chunks(K).zip(&rows) {
        for (token, logprob) in &drawn[..50] {
            assert_eq!(*logprob, sampler::logprob_of(row, *token).unwrap());
        }
        let (best, _) = sampler::most_likely(row, 1).unwrap()[0];
        let weights: Vec<f64> = row.iter().map(|x| (f64::from(*x) / 0.7).exp()).collect();
        let p = weights[best as usize] / weights.iter().sum::<f64>();
        let share = drawn.iter().filter(|(token, _)| *token == best).count() as f64 / K as f64;
        let deviation = (p * (1.0 - p) / K as f64).sqrt();
        assert!((share - p).abs() < 4.0 * deviation, "{share} for {p}");
    }
    let greedy = ask(0.0, 2, 5);
    let best = rows
        .iter()
        .map(|row| sampler::most_likely(row, 1).unwrap()[0]);
    assert!(best.flat_map(|best| [best, best]).eq(greedy));
}

#[test]
fn the_most_likely_of_a_prompt_go_through_in_chunks_and_end_with_a_cancellation() {
    let mut backend = FakeBackend::new(32, 2048);
    let ask = || GenerateRequest {
        prompt_logprobs: true,
        topk_prompt_logprobs: 2,
        max_tokens: Some(1),
        ..request(&[7; 1200], &[1])
    };
    let mut generator = Generator::new(backend.info());
    let doomed = generator.admit(ask()).unwrap();
    let kept = generator.admit(ask()).unwrap();
    generator.step(&mut backend).unwrap();
    generator.cancel(doomed);

    let (mut finished, mut steps) = (Vec::new(), 0);
    while !generator.is_idle() {
        finished.extend(generator.step(&mut backend).unwrap());
        steps += 1;
    }

    assert_eq!((finished.len(), finished[0].id, steps), (1, kept, 2));
    generator.clear_cache(&mut backend);
    let generation = finished.remove(0).outcome.unwrap();
    assert_eq!(generation.prompt.logprobs.len(), 1200);
    assert_eq!(generation.prompt.top_logprobs.len(), 1200);
    assert_eq!(backend.n_slots(), 0);
    let plain = GenerateRequest {
        topk_prompt_logprobs: 0,
        ..ask()
    };
    let plain = one(&mut backend, plain);
    assert_eq!(plain.prompt.logprobs, generation.prompt.logprobs);
    assert_eq!(plain.samples, generation.samples);
}

/// Ends after a number of tokens.
struct After(usize);

impl StopCheck for After {
    fn push(&mut self, _token: u32) -> bool {
        self.0 -= 1;
        self.0 == 0
    }
}

#[test]
fn samples_end_by_token_check_or_length() {
    let mut backend = FakeBackend::new(32, 64);
    let free = one(&mut backend, request(&[1, 2], &[5])).samples.remove(0);
    assert_eq!(
        (free.tokens.len(), free.stop_reason),
        (20, StopReason::Length)
    );

    let stop = free.tokens[7];
    let first = free.tokens.iter().position(|t| *t == stop).unwrap();
    let by_token = GenerateRequest {
        stop_tokens: vec![stop],
        ..request(&[1, 2], &[5])
    };
    let by_token = one(&mut backend, by_token).samples.remove(0);
    assert_eq!(by_token.tokens, free.tokens[..=first]);
    assert_eq!(by_token.stop_reason, StopReason::Stop);

    let stop: Box<dyn Fn() -> Box<dyn StopCheck> + Send> = Box::new(|| Box::new(After(4)));
    let by_check = GenerateRequest {
        stop: Some(stop),
        ..request(&[1, 2], &[5, 6])
    };
    for sample in one(&mut backend, by_check).samples {
        assert_eq!(
            (sample.tokens.len(), sample.stop_reason),
            (4, StopReason::Stop)
        );
    }

    let to_the_end = GenerateRequest {
        max_tokens: None,
        ..request(&[1, 2], &[5])
    };
    assert_eq!(one(&mut backend, to_the_end).samples[0].tokens.len(), 62);
    let nothing = GenerateRequest {
        max_tokens: Some(0),
        ..request(&[1, 2], &[5])
    };
    assert!(one(&mut backend, nothing).samples[0].tokens.is_empty());
    assert_eq!(backend.n_slots(), 0);
}

#[test]
fn cancelling_frees_everything_and_leaves_the_others() {
    let mut backend = FakeBackend::new(32, 64);
    let expected = one(&mut backend, request(&[4], &[1, 2]));
    let mut generator = Generator::new(backend.info());
    let doomed = generator.admit(request(&[3], &[1, 2, 3])).unwrap();
    let kept = generator.admit(request(&[4], &[1, 2])).unwrap();
    generator.step(&mut backend).unwrap();
    generator.step(&mut backend).unwrap();

    generator.cancel(doomed);

    let mut finished = Vec::new();
    while !generator.is_idle() {
        finished.extend(generator.step(&mut backend).unwrap());
    }
    assert_eq!(finished.len(), 1);
    assert_eq!(finished[0].id, kept);
    assert_eq!(*finished[0].outcome.as_ref().unwrap(), expected);
    generator.clear_cache(&mut backend);
    assert_eq!(backend.n_slots(), 0);
}

#[test]
fn a_request_whose_adapter_is_gone_fails_alone() {
    let mut backend = FakeBackend::new(32, 64);
    let adapter = backend.create_adapter(&all_modules(2)).unwrap();
    let mut generator = Generator::new(backend.info());
    let orphan = GenerateRequest {
        adapter: Some(adapter),
        ..request(&[3], &[1])
    };
    let doomed = generator.admit(orphan).unwrap();
    generator.admit(request(&[3], &[1])).unwrap();
    assert!(generator.uses(adapter) && !generator.uses(AdapterId(99)));
    backend.drop_adapter(adapter);

    let mut finished = Vec::new();
    while !generator.is_idle() {
        finished.extend(generator.step(&mut backend).unwrap());
    }

    let (failed, done): (Vec<_>, Vec<_>) = finished.into_iter().partition(|f| f.id == doomed);
    let message = failed[0].outcome.as_ref().unwrap_err().to_string();
    assert_eq!(message, format!("adapter {} is not loaded", adapter.0));
    assert!(done[0].outcome.is_ok());
    generator.clear_cache(&mut backend);
    assert_eq!(backend.n_slots(), 0);
}

#[test]
fn bad_requests_are_refused() {
    let mut generator = Generator::new(FakeBackend::new(32, 64).info());
    let base = || request(&[1, 2], &[1]);
    let cases = [
        (
            GenerateRequest {
                prompt: vec![],
                ..base()
            },
            "the prompt is empty",
        ),
        (
            GenerateRequest {
                prompt: vec![32],
                ..base()
            },
            "token 32 is not below the vocabulary size 32",
        ),
        (
            GenerateRequest {
                stop_tokens: vec![40],
                ..base()
            },
            "token 40 is not below the vocabulary size 32",
        ),
        (
            GenerateRequest {
                seeds: vec![],
                ..base()
            },
            "a request needs at least one sample",
        ),
        (
            GenerateRequest {
                prompt: vec![1; 65],
                ..base()
            },
            "a prompt of 65 tokens exceeds the context of 64",
        ),
        (
            GenerateRequest {
                prompt: vec![1; 50],
                ..base()
            },
            "a prompt of 50 tokens and 20 more exceed the context of 64",
        ),
        (
            GenerateRequest {
                temperature: -0.5,
                ..base()
            },
            "temperature is -0.5, it must be at least 0",
        ),
        (
            GenerateRequest {
                prompt_targets: vec![(0, 1)],
                ..base()
            },
            "target position 0 must be in 1..2 and not before 0",
        ),
        (
            GenerateRequest {
                prompt_targets: vec![(1, 32)],
                ..base()
            },
            "target token 32 at position 1 is not below the vocabulary size 32",
        ),
        (
            GenerateRequest {
                prompt: vec![1; 4],
                prompt_targets: vec![(3, 1), (2, 1)],
                ..base()
            },
            "target position 2 must be in 1..4 and not before 3",
        ),
        (
            GenerateRequest {
                prompt_alternatives: Some(Alternatives { k: 0, seed: 1 }),
                ..base()
            },
            "the number of alternatives is 0, it must be at least 1",
        ),
    ];
    for (request, expected) in cases {
        assert_eq!(generator.admit(request).unwrap_err().to_string(), expected);
    }
    assert!(generator.is_idle());
}

/// Tokens of a prompt that differ from each other's neighbours.
fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + 11) % 320).collect()
}

#[test]
fn nine_adapters_in_one_batch_sample_as_each_does_alone() {
    for model in ["qwen3", "llama-bf16", "gemma3"] {
        let mut backend = load(model, 2);
        let state = backend_state(&mut *backend, model);
        let adapters: Vec<AdapterId> = (0..9u8)
            .map(|i| {
                let mut state = state.clone();
                let scale = |x: &mut f32| *x *= 1.0 - f32::from(i) / 16.0;
                let tensors = state.weights.values_mut();
                tensors.flat_map(|t| &mut t.data).for_each(scale);
                backend.import_adapter(&state).unwrap()
            })
            .collect();
        let ask = |i: usize| GenerateRequest {
            adapter: adapters.get(i).copied(),
            max_tokens: Some(6 + i),
            ..request(&prompt(3 + 5 * i as u32), &[4, 5])
        };

        // The last one is of the base model.
        let together = run(&mut *backend, 64, (0..10).map(ask).collect());

        for (i, expected) in together.iter().enumerate() {
            assert_eq!(
                one(&mut *backend, ask(i)),
                *expected,
                "{model}, request {i}"
            );
        }
    }
}

fn backend_state(backend: &mut dyn Backend, model: &str) -> tinker_engine::AdapterState {
    let adapter = Reference::of(model).import(backend);
    backend.export_adapter(adapter).unwrap()
}

/// Everything of a generation but where its prompt came from.
fn drawn(generation: Generation) -> Generation {
    Generation {
        n_cached: 0,
        ..generation
    }
}

#[test]
fn a_prompt_taken_from_the_cache_gives_the_bits_of_one_computed_anew() {
    for model in all_models() {
        let mut backend = load(model, 2);
        let adapter = Some(Reference::of(model).import(&mut *backend));
        let ask = |tokens: &[u32]| GenerateRequest {
            adapter,
            ..request(tokens, &[3, 4])
        };
        let mut generator = Generator::new(backend.info());
        let mut next = |backend: &mut dyn Backend, request| {
            generator.admit(request).unwrap();
            let mut finished = Vec::new();
            while !generator.is_idle() {
                finished.extend(generator.step(backend).unwrap());
            }
            finished.remove(0).outcome.unwrap()
        };
        let first = next(&mut *backend, ask(&prompt(70)));
        let mut turn = prompt(70);
        turn.extend(&first.samples[0].tokens);
        turn.extend([9; 25]);
        let other_end = [&prompt(45)[..], &[1, 2, 3]].concat();
        let scored = |from| GenerateRequest {
            prompt_logprobs: true,
            prompt_logprobs_from: from,
            ..ask(&turn)
        };
        // The last token of a prompt, and the last one drawn, went through nothing yet.
        let cases = [
            (ask(&prompt(70)), 69),
            (ask(&turn), 89),
            (ask(&other_end), 45),
            (scored(60), 59),
            (scored(0), 0),
            (ask(&[5; 40]), 0),
            (
                GenerateRequest {
                    adapter: None,
                    ..ask(&prompt(70))
                },
                0,
            ),
        ];

        for (i, (request, n_cached)) in cases.into_iter().enumerate() {
            let copy = GenerateRequest {
                owner: None,
                prompt: request.prompt.clone(),
                seeds: request.seeds.clone(),
                prompt_targets: Vec::new(),
                stop_tokens: Vec::new(),
                stop: None,
                ..request
            };
            let cached = next(&mut *backend, request);

            assert_eq!(cached.n_cached, n_cached, "{model}, case {i}");
            let anew = one(&mut *backend, copy);
            assert_eq!(anew.n_cached, 0);
            assert_eq!(drawn(cached), anew, "{model}, case {i}");
        }
    }
}

#[test]
fn a_prompt_in_chunks_has_the_logprobs_of_the_whole() {
    for model in all_models() {
        let mut backend = load(model, 2);
        let adapter = Some(Reference::of(model).import(&mut *backend));
        let slot = backend.open_slot(adapter, 512).unwrap();
        let whole = backend.prefill(slot, &prompt(500), true).unwrap();
        let ask = |from| GenerateRequest {
            adapter,
            max_tokens: Some(1),
            prompt_logprobs: true,
            prompt_logprobs_from: from,
            ..request(&prompt(500), &[1])
        };

        for from in [0, 300, 480, 490] {
            let logprobs = one(&mut *backend, ask(from)).prompt.logprobs;

            let n_hidden = from.max(1);
            assert!(logprobs[..n_hidden].iter().all(Option::is_none), "{model}");
            let shown: Vec<f32> = logprobs[n_hidden..].iter().flatten().copied().collect();
            assert_eq!(
                shown,
                whole.prompt_logprobs[n_hidden - 1..],
                "{model}, {from}"
            );
        }
    }
}

/// A model whose configuration allows so many tokens.
fn with_context(model: &str, n_tokens: usize) -> tempfile::TempDir {
    let (from, to) = (
        dir(model),
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
    );
    let weights = "model.safetensors";
    std::fs::copy(from.join(weights), to.path().join(weights)).unwrap();
    let config = std::fs::read(from.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["max_position_embeddings"] = n_tokens.into();
    std::fs::write(to.path().join("config.json"), config.to_string()).unwrap();
    to
}

#[test]
fn scored_prompts_that_share_steps_have_the_bits_of_each_alone_with_any_threads() {
    for model in ["llama", "qwen3-bf16"] {
        let files = with_context(model, 1024);
        let mut of_one_thread = None;
        for threads in [1, 2, 5] {
            let mut backend = load_cpu(files.path(), threads).unwrap();
            let adapter = Some(Reference::of(model).import(&mut *backend));
            let ask = |(n, top)| GenerateRequest {
                adapter,
                prompt_logprobs: true,
                topk_prompt_logprobs: top,
                max_tokens: Some(4),
                ..request(&prompt(n), &[1, 2])
            };
            let lengths = [13, 470, 900];
            let asked = || [0, 2].into_iter().flat_map(|top| lengths.map(|n| (n, top)));

            let together = run(&mut *backend, 64, asked().map(ask).collect());

            for (asked, expected) in asked().zip(&together) {
                let alone = one(&mut *backend, ask(asked));
                assert_eq!(alone, *expected, "{model}, {threads} threads, {asked:?}");
            }
            let first = of_one_thread.get_or_insert_with(|| together.clone());
            assert_eq!(*first, together, "{model}, {threads} threads");
        }
    }
}

#[test]
fn prompts_that_arrive_together_are_computed_once() {
    let mut backend = FakeBackend::new(64, 4096);
    let long: Vec<u32> = (0..2000).map(|i| i % 61).collect();
    let ask = || GenerateRequest {
        max_tokens: Some(3),
        ..request(&long, &[1])
    };

    let together = run(&mut backend, 64, vec![ask(), ask(), ask()]);

    let cached: Vec<usize> = together.iter().map(|g| g.n_cached).collect();
    assert_eq!(cached, [0, 1999, 1999]);
    assert_eq!(together[0].samples, together[2].samples);
    assert_eq!(backend.n_slots(), 0);
}

/// Stops a sample at its tenth token.
struct AtTen(usize);

impl StopCheck for AtTen {
    fn push(&mut self, _token: u32) -> bool {
        self.0 += 1;
        self.0 == 10
    }
}

#[test]
fn what_is_kept_of_a_sample_has_no_room_to_grow() {
    let mut backend = load("llama", 2);
    let ask = GenerateRequest {
        max_tokens: Some(400),
        stop: Some(Box::new(|| Box::new(AtTen(0)))),
        ..request(&prompt(60), &[1])
    };
    let mut generator = Generator::new(backend.info());
    generator.admit(ask).unwrap();
    while !generator.is_idle() {
        generator.step(&mut *backend).unwrap();
    }
    let kept: usize = (0..100).map(|i| backend.slot_bytes(SlotId(i))).sum();

    let exact = backend.open_slot(None, 69).unwrap();
    backend.prefill(exact, &prompt(69), false).unwrap();

    assert_eq!(kept, backend.slot_bytes(exact));
}

#[test]
fn nobody_learns_what_others_asked() {
    let mut backend = FakeBackend::new(64, 128);
    let ask = |owner: &str| GenerateRequest {
        owner: Some(owner.into()),
        ..request(&[7; 40], &[1])
    };
    let mut generator = Generator::new(backend.info());
    let mut n_cached = |owners: &[&str]| -> Vec<usize> {
        for owner in owners {
            generator.admit(ask(owner)).unwrap();
        }
        let mut finished = Vec::new();
        while !generator.is_idle() {
            finished.extend(generator.step(&mut backend).unwrap());
        }
        finished.sort_by_key(|f| f.id);
        let generations = finished.into_iter().map(|f| f.outcome.unwrap());
        generations.map(|g| g.n_cached).collect()
    };

    assert_eq!(n_cached(&["ann", "ben", "ann"]), [0, 0, 39]);
    assert_eq!(n_cached(&["cid"]), [0]);
    assert_eq!(n_cached(&["ben", "cid"]), [39, 39]);
}

#[test]
fn a_long_prompt_holds_up_neither_samples_nor_short_prompts() {
    let mut backend = FakeBackend::new(64, 8192);
    let mut generator = Generator::new(backend.info());
    let n_drawn =
        |generator: &Generator, id| generator.drawn(id).map(|d| d.tokens.len()).sum::<usize>();
    let running = generator.admit(request(&[1], &[1])).unwrap();
    generator.step(&mut backend).unwrap();
    let long = generator.admit(request(&[2; 8000], &[1])).unwrap();
    let short = generator.admit(request(&[3], &[1])).unwrap();

    generator.step(&mut backend).unwrap();

    let drawn: [usize; 3] = [running, long, short].map(|id| n_drawn(&generator, id));
    assert_eq!(drawn, [3, 0, 2]);
    let mut steps = 1;
    while n_drawn(&generator, long) == 0 {
        generator.step(&mut backend).unwrap();
        steps += 1;
    }
    assert_eq!(steps, 8000usize.div_ceil(tinker_engine::generate::CHUNK));
}

#[test]
fn a_cancelled_request_gives_its_row_to_the_next_at_once() {
    let mut backend = FakeBackend::new(64, 64);
    let mut generator = Generator::new(backend.info()).with_max_rows(2);
    let doomed = generator.admit(request(&[1], &[1, 2])).unwrap();
    let next = generator.admit(request(&[2], &[1, 2])).unwrap();
    generator.step(&mut backend).unwrap();
    assert_eq!(generator.drawn(next).count(), 0);

    generator.cancel(doomed);
    generator.step(&mut backend).unwrap();

    assert_eq!(generator.drawn(next).count(), 2);
    assert_eq!(backend.n_slots(), 2);
}

#[test]
fn what_an_adapter_left_in_the_cache_goes_with_it() {
    let mut backend = FakeBackend::new(64, 128);
    let adapter = backend.create_adapter(&all_modules(2)).unwrap();
    let mut generator = Generator::new(backend.info());
    for adapter in [Some(adapter), None] {
        let ask = GenerateRequest {
            adapter,
            ..request(&[7; 40], &[1])
        };
        generator.admit(ask).unwrap();
    }
    while !generator.is_idle() {
        generator.step(&mut backend).unwrap();
    }
    assert_eq!(backend.n_slots(), 2);

    generator.forget_adapter(&mut backend, adapter);

    assert_eq!(backend.n_slots(), 1);
}
