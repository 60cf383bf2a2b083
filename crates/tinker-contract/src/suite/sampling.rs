//! Samples and log-probabilities.

use std::collections::BTreeSet;

use tinker_api::{
    ModelInput, SampleOptions, SampleResponse, SamplerKind, SamplingClient, SamplingParams,
    SamplingSource, SaveOptions, Stop, StopReason, TensorData, TrainingClient,
};
use tinker_types::TensorValues;

use super::{assert_close, batch, datum, score, step, tokens, trainer};
use crate::target::Target;

fn prompt() -> ModelInput {
    ModelInput::from_tokens(tokens(77, 6))
}

/// Twelve tokens from the whole distribution, never stopping early.
fn params(seed: i64) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(12),
        seed: Some(seed),
        stop: Some(Stop::Tokens(vec![])),
        ..SamplingParams::default()
    }
}

fn several(n: u32) -> SampleOptions {
    SampleOptions {
        num_samples: n,
        ..SampleOptions::default()
    }
}

async fn trained(target: &Target, seed: u64) -> TrainingClient {
    let trainer = trainer(target, seed).await;
    for _ in 0..10 {
        step(&trainer, batch(seed as u32)).await;
    }
    trainer
}

async fn sampler_of(trainer: &TrainingClient) -> SamplingClient {
    let path = trainer
        .save_weights_for_sampler("final", SaveOptions::default())
        .await
        .unwrap();
    trainer.create_sampling_client(path).await.unwrap()
}

async fn base_sampler(target: &Target) -> SamplingClient {
    let source = SamplingSource::BaseModel(target.base_model.clone());
    target
        .service()
        .create_sampling_client(source)
        .await
        .unwrap()
}

async fn sample(sampler: &SamplingClient, seed: i64) -> SampleResponse {
    sampler
        .sample(prompt(), params(seed), several(2))
        .await
        .unwrap()
}

fn some(logprobs: &[Option<f32>]) -> Vec<f32> {
    logprobs
        .iter()
        .map(|logprob| logprob.expect("a log-probability"))
        .collect()
}

/// Log-probabilities of samples are those that the sampler computes for them afterwards.
pub async fn sampled_log_probabilities_can_be_recomputed(target: &Target) {
    let trainer = trained(target, 1).await;
    let sampler = sampler_of(&trainer).await;

    let options = SampleOptions {
        prompt_logprobs: true,
        ..several(3)
    };
    let response = sampler.sample(prompt(), params(5), options).await.unwrap();

    let prompt = prompt().tokens().unwrap();
    let of_prompt = response.prompt_logprobs.unwrap();
    assert_eq!((of_prompt.len(), of_prompt[0]), (prompt.len(), None));
    for sequence in response.sequences {
        let whole = [prompt.clone(), sequence.tokens].concat();
        let again = sampler
            .compute_logprobs(ModelInput::from_tokens(whole))
            .await
            .unwrap();
        assert_eq!(again[0], None);
        assert_close(&some(&again[1..prompt.len()]), &some(&of_prompt[1..]), 1e-4);
        assert_close(
            &some(&again[prompt.len()..]),
            &sequence.logprobs.unwrap(),
            1e-4,
        );
    }
}

/// The sampler of a run says what the run itself says.
pub async fn samplers_have_the_trained_weights(target: &Target) {
    let trainer = trained(target, 2).await;
    let sampler = sampler_of(&trainer).await;

    let data = datum(3, 20);
    let mut whole = data.model_input.tokens().unwrap();
    whole.push(tokens(3, 21)[20]);
    let trained = score(&trainer, vec![data]).await.remove(0);
    let sampled = sampler
        .compute_logprobs(ModelInput::from_tokens(whole))
        .await
        .unwrap();

    assert_close(&some(&sampled[1..]), &trained, 1e-4);
}

/// Samplers of two runs and of the base model, used at once, give what each gives alone.
pub async fn samplers_are_isolated(target: &Target) {
    let (one, two) = (trained(target, 1).await, trained(target, 2).await);
    let samplers = [
        sampler_of(&one).await,
        sampler_of(&two).await,
        base_sampler(target).await,
    ];
    let mut alone = Vec::new();
    for sampler in &samplers {
        alone.push(sample(sampler, 9).await.sequences);
    }
    assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2]);

    let calls: Vec<_> = (0..30)
        .map(|i| {
            (
                i % 3,
                samplers[i % 3].sample(prompt(), params(9), several(2)),
            )
        })
        .collect();

    for (which, call) in calls {
        let sequences = call.await.unwrap().sequences;
        let (now, before) = (&sequences[0], &alone[which][0]);
        assert_eq!(now.tokens, before.tokens);
        assert_eq!(
            now.logprobs, before.logprobs,
            "not even the last bit depends on company"
        );
    }
}

/// A snapshot stays as it was while its run trains on.
pub async fn snapshots_do_not_follow_their_run(target: &Target) {
    let trainer = trained(target, 3).await;
    let snapshot = trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .await
        .unwrap();
    let before = snapshot.compute_logprobs(prompt()).await.unwrap();

    for _ in 0..3 {
        step(&trainer, batch(3)).await;
    }
    let later = trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .await
        .unwrap();

    assert_eq!(snapshot.compute_logprobs(prompt()).await.unwrap(), before);
    assert_ne!(later.compute_logprobs(prompt()).await.unwrap(), before);
}

/// A seed repeats its samples, and the samples of one request differ.
pub async fn seeds_repeat_and_samples_differ(target: &Target) {
    let sampler = base_sampler(target).await;

    let first = sampler
        .sample(prompt(), params(4), several(8))
        .await
        .unwrap()
        .sequences;
    let again = sampler
        .sample(prompt(), params(4), several(8))
        .await
        .unwrap()
        .sequences;
    let other = sampler
        .sample(prompt(), params(5), several(8))
        .await
        .unwrap()
        .sequences;

    assert_eq!(first.len(), 8);
    let tokens =
        |s: &[tinker_api::SampledSequence]| s.iter().map(|s| s.tokens.clone()).collect::<Vec<_>>();
    assert_eq!(tokens(&first), tokens(&again));
    assert_ne!(tokens(&first), tokens(&other));
    assert_eq!(tokens(&first).into_iter().collect::<BTreeSet<_>>().len(), 8);
}

/// Temperature 0 takes the most likely token each time.
pub async fn greedy_takes_the_most_likely(target: &Target) {
    let sampler = base_sampler(target).await;
    let params = SamplingParams {
        temperature: 0.0,
        ..params(1)
    };

    let options = SampleOptions {
        topk_sample_logprobs: 3,
        ..SampleOptions::default()
    };
    let sequence = sampler
        .sample(prompt(), params, options)
        .await
        .unwrap()
        .sequences
        .remove(0);

    let table = sequence.topk_logprobs.expect("a table");
    assert_eq!(table.len(), 12);
    for ((row, token), logprob) in table
        .iter()
        .zip(&sequence.tokens)
        .zip(sequence.logprobs.unwrap())
    {
        let row = row.as_ref().expect("a row");
        assert_eq!(row.len(), 3);
        assert!(row.windows(2).all(|pair| pair[0].1 >= pair[1].1), "{row:?}");
        assert_eq!((row[0].0, row[0].1), (*token, logprob));
    }
}

/// A continuation ends at a stop token or a stop text, which it includes, or when it is long enough.
pub async fn stops_end_a_continuation(target: &Target) {
    let sampler = base_sampler(target).await;
    let free = sampler
        .sample(prompt(), params(2), several(1))
        .await
        .unwrap()
        .sequences
        .remove(0);
    assert_eq!(
        (free.stop_reason, free.tokens.len()),
        (StopReason::Length, 12)
    );
    let stop = free.tokens[4];
    let n_before = free.tokens.iter().position(|&token| token == stop).unwrap();

    let stopping = SamplingParams {
        stop: Some(Stop::Tokens(vec![stop])),
        ..params(2)
    };
    let stopped = sampler
        .sample(prompt(), stopping, several(1))
        .await
        .unwrap()
        .sequences
        .remove(0);

    assert_eq!(stopped.stop_reason, StopReason::Stop);
    assert_eq!(stopped.tokens, free.tokens[..=n_before]);
    assert_eq!(stopped.logprobs.unwrap().len(), n_before + 1);
}

/// The most likely tokens at each prompt position, with the token that follows among all of them.
pub async fn tables_of_the_prompt_have_a_row_for_each_token(target: &Target) {
    let sampler = base_sampler(target).await;
    let all = prompt().tokens().unwrap();

    let options = SampleOptions {
        prompt_logprobs: true,
        topk_prompt_logprobs: 20,
        ..SampleOptions::default()
    };
    let response = sampler.sample(prompt(), params(1), options).await.unwrap();

    let table = response.topk_prompt_logprobs.unwrap();
    assert_eq!((table.len(), &table[0]), (all.len(), &None));
    let logprobs = response.prompt_logprobs.unwrap();
    for ((row, token), logprob) in table.iter().zip(&all).zip(logprobs).skip(1) {
        let row = row.as_ref().expect("a row");
        assert_eq!(row.len(), 20);
        assert!(row.windows(2).all(|pair| pair[0].1 >= pair[1].1), "{row:?}");
        let logprob = logprob.expect("a log-probability");
        match row.iter().find(|(candidate, _)| candidate == token) {
            Some((_, in_table)) => assert_close(&[*in_table], &[logprob], 1e-6),
            None => assert!(logprob <= row[19].1),
        }
    }
}

/// What a server cannot do is said, not left out.
pub async fn unsupported_extras_are_refused_by_name(target: &Target) {
    let sampler = base_sampler(target).await;
    let chosen = TensorData::dense(TensorValues::Int64(vec![5; 5]), vec![5, 1]).unwrap();

    let options = SampleOptions {
        target_prompt_logprobs: Some(chosen),
        ..SampleOptions::default()
    };
    match sampler.sample(prompt(), params(1), options).await {
        Ok(response) => assert!(response.target_prompt_logprobs.is_some()),
        Err(error) => assert!(
            error.to_string().contains("target_prompt_logprobs"),
            "{error}"
        ),
    }
}

/// Prompts that cannot be sampled from are refused with what is wrong.
pub async fn bad_prompts_are_refused(target: &Target) {
    let sampler = base_sampler(target).await;
    for (tokens, expected) in [(vec![5, 4000], "4000"), (vec![5; 600], "512")] {
        let prompt = ModelInput::from_tokens(tokens);

        let error = sampler
            .sample(prompt, params(1), several(1))
            .await
            .unwrap_err();

        assert!(
            error.is_user_error() && error.to_string().contains(expected),
            "{error}"
        );
    }
    sample(&sampler, 1).await;
}

/// Many samples at once all come back.
pub async fn many_samples_at_once(target: &Target) {
    let sampler = base_sampler(target).await;

    let calls: Vec<_> = (0..100)
        .map(|seed| sampler.sample(prompt(), params(seed), several(1)))
        .collect();

    let mut distinct = BTreeSet::new();
    for call in calls {
        distinct.insert(call.await.unwrap().sequences.remove(0).tokens);
    }
    assert_eq!(distinct.len(), 100);
}
