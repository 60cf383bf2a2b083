//! What is asked about prompts.

use super::*;

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
