//! Who begins first where there is no room for all samples.

use tinker_engine::{Backend as _, FakeBackend, GenerateRequest, GenerationId, Generator};

fn request(token: u32, n_samples: u64, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        owner: None,
        adapter: None,
        prompt: vec![token],
        max_tokens: Some(max_tokens),
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        seeds: (0..n_samples).collect(),
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

fn n_begun(generator: &Generator, id: GenerationId) -> usize {
    generator.drawn(id).count()
}

/// Runs to the end; the requests in the order in which they finished.
fn finish(generator: &mut Generator, backend: &mut FakeBackend) -> Vec<GenerationId> {
    let mut ended = Vec::new();
    while !generator.is_idle() {
        let finished = generator.step(backend).unwrap();
        ended.extend(finished.into_iter().map(|finished| {
            finished.outcome.unwrap();
            finished.id
        }));
    }
    ended
}

#[test]
fn a_group_with_one_request_goes_before_the_rest_of_a_group_with_many() {
    let mut backend = FakeBackend::new(64, 256);
    let mut generator = Generator::new(backend.info()).with_max_rows(2);
    let many: Vec<_> = (1..10)
        .map(|token| generator.admit_of(1, request(token, 1, 20)).unwrap())
        .collect();
    let one = generator.admit_of(2, request(10, 1, 20)).unwrap();

    let ended = finish(&mut generator, &mut backend);

    assert_eq!(ended[..2], [many[0], one]);
    assert_eq!(ended[2..], many[1..]);
}

#[test]
fn a_request_for_many_samples_leaves_room_for_other_groups() {
    let mut backend = FakeBackend::new(64, 256);
    let mut generator = Generator::new(backend.info()).with_max_rows(4);
    let large = generator.admit_of(1, request(1, 100, 20)).unwrap();
    let small = generator.admit_of(2, request(2, 1, 20)).unwrap();

    generator.step(&mut backend).unwrap();

    // What the small one leaves of its half goes to the large one.
    assert_eq!(n_begun(&generator, small), 1);
    assert_eq!(n_begun(&generator, large), 3);
    assert_eq!(generator.take_begun(), [large, small]);
}

#[test]
fn a_short_request_does_not_wait_for_long_ones() {
    let mut backend = FakeBackend::new(64, 256);
    let mut generator = Generator::new(backend.info()).with_max_rows(8);
    let long = generator.admit(request(1, 50, 200)).unwrap();
    generator.step(&mut backend).unwrap();
    assert_eq!(n_begun(&generator, long), 8);

    let next_long = generator.admit(request(2, 1, 200)).unwrap();
    let short = generator.admit(request(3, 1, 4)).unwrap();
    let mut ended = Vec::new();
    for _ in 0..4 {
        ended.extend(generator.step(&mut backend).unwrap());
    }

    let ended: Vec<_> = ended.iter().map(|finished| finished.id).collect();
    assert_eq!(ended, [short]);
    assert_eq!(n_begun(&generator, next_long), 0);
}

#[test]
fn a_short_request_does_not_wait_for_as_many_samples_as_there_are_rows() {
    for n_samples in [64, 200] {
        let mut backend = FakeBackend::new(64, 256);
        let mut generator = Generator::new(backend.info());
        let long = generator.admit(request(1, n_samples, 200)).unwrap();
        generator.step(&mut backend).unwrap();
        assert_eq!(n_begun(&generator, long), 64);

        let short = generator.admit(request(2, 1, 1)).unwrap();
        let ended = generator.step(&mut backend).unwrap();

        let ended: Vec<_> = ended.iter().map(|finished| finished.id).collect();
        assert_eq!(ended, [short], "{n_samples}");
    }
}

#[test]
fn what_has_begun_is_told_once() {
    let mut backend = FakeBackend::new(64, 256);
    let mut generator = Generator::new(backend.info()).with_max_rows(1);
    let [first, second] = [1, 2].map(|token| generator.admit(request(token, 1, 3)).unwrap());
    assert!(generator.take_begun().is_empty());

    generator.step(&mut backend).unwrap();
    assert_eq!(generator.take_begun(), [first]);
    assert!(generator.take_begun().is_empty());

    while generator.drawn(first).count() > 0 {
        generator.step(&mut backend).unwrap();
        assert!(generator.take_begun().is_empty());
    }
    generator.step(&mut backend).unwrap();
    assert_eq!(generator.take_begun(), [second]);
    assert!(generator.take_begun().is_empty());
}

#[test]
fn what_has_begun_is_not_kept_for_those_who_do_not_ask() {
    let mut backend = FakeBackend::new(64, 256);
    let mut generator = Generator::new(backend.info());
    generator.admit(request(1, 1, 2)).unwrap();
    generator.step(&mut backend).unwrap();
    generator.step(&mut backend).unwrap();

    assert!(generator.take_begun().is_empty());
}
