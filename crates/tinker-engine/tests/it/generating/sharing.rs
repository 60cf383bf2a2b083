//! What requests take over from others of the same owner.

use super::*;

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
