//! What samples give, when they end and who waits for whom.

use super::*;

#[test]
fn samples_do_not_depend_on_company_or_rows() {
    for model in all_models() {
        check_company(model, load, &[1, 2, 4]);
    }
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
