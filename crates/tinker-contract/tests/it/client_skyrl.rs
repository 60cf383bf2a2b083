//! The client against SkyRL's dialect: what that server has works, what it lacks is named.

use std::fmt::Debug;

use tinker_api::{
    AdamParams, Error, ErrorKind, FinishReason, LoraConfig, LossFn, ModelInput, Page,
    SampleOptions, SamplerKind, SamplingClient, SamplingParams, SamplingSource, SaveOptions,
    ServiceClient, StateOptions, TinkerPath, TrainingClient,
};
use tinker_contract::mock::Mock;
use tinker_contract::skyrl::{self, BASE_MODEL, Version};
use tinker_types::{CANCEL_FUTURE, FORWARD, FORWARD_BACKWARD, OPTIM_STEP, SESSION_HEARTBEAT};

use crate::support::{KEY, datum, ms, service, until};

const CE: LossFn = LossFn::CrossEntropy;
const PAGE: Page = Page {
    limit: 20,
    offset: 0,
};

struct Rig {
    mock: Mock,
    service: ServiceClient,
}

impl Rig {
    async fn start() -> Self {
        Self::of(Version::Main).await
    }

    async fn of(version: Version) -> Self {
        let mock = skyrl::start(version).await;
        let service = service(&mock.base_url(), KEY)
            .heartbeat_interval(ms(2))
            .build()
            .unwrap();
        Self { mock, service }
    }

    async fn trainer(&self) -> TrainingClient {
        let lora = LoraConfig {
            rank: 16,
            ..LoraConfig::default()
        };
        self.service
            .create_lora_training_client(BASE_MODEL, lora)
            .await
            .unwrap()
    }

    async fn sampler(&self) -> SamplingClient {
        let source = SamplingSource::BaseModel(BASE_MODEL.into());
        self.service.create_sampling_client(source).await.unwrap()
    }
}

fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

fn prompt(n: usize) -> ModelInput {
    ModelInput::from_tokens(vec![5; n])
}

/// The error says that the server cannot do this.
#[track_caller]
fn check_lacks<T: Debug>(outcome: Result<T, Error>, capability: &str) {
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), Some(&ErrorKind::Unsupported), "{error}");
    let expected = format!("this server cannot {capability}");
    assert!(error.to_string().starts_with(&expected), "{error}");
    assert!(error.hint().contains("server that has it"));
}

// What it has.

#[tokio::test]
async fn a_run_is_created_and_described() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;

    assert_eq!(trainer.training_run_id().as_str(), "model_0");
    assert_eq!(trainer.base_model(), Some(BASE_MODEL));
}

#[tokio::test]
async fn a_pass_in_protobuf_brings_its_result_in_json() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;

    let data = vec![datum(1, 3), datum(2, 5)];
    let output = trainer.forward_backward(data, CE).await.unwrap();

    let lengths: Vec<usize> = output
        .loss_fn_outputs
        .iter()
        .map(|row| row["logprobs"].as_floats().unwrap().len())
        .collect();
    assert_eq!(lengths, [3, 5]);
    assert!(output.metrics.is_empty(), "it has none");
    assert!(output.loss_fn_outputs[0].contains_key("elementwise_loss"));
}

#[tokio::test]
async fn a_release_without_protobuf_gets_its_passes_in_json() {
    let rig = Rig::of(Version::Release).await;
    let trainer = rig.trainer().await;

    let backward = trainer.forward_backward(vec![datum(1, 3)], CE);
    let forward = trainer.forward(vec![datum(2, 4)], CE);
    assert_eq!(backward.await.unwrap().loss_fn_outputs.len(), 1);
    assert_eq!(forward.await.unwrap().loss_fn_outputs.len(), 1);

    let seen = rig.mock.seen_at(FORWARD_BACKWARD);
    assert_eq!(seen.len(), 2, "protobuf is tried once");
    let body = seen[1].json();
    assert_eq!(
        (body["seq_id"].as_u64(), body.get("forward_input")),
        (Some(1), None)
    );
    let input = &body["forward_backward_input"];
    assert_eq!(input["loss_fn"], "cross_entropy");
    let inputs = &input["data"][0]["loss_fn_inputs"];
    assert_eq!(inputs["target_tokens"]["dtype"], "int64");
    assert_eq!(inputs["weights"]["data"].as_array().unwrap().len(), 3);
    let forward = rig.mock.seen_at(FORWARD)[0].json();
    assert_eq!(forward["seq_id"], 2);
    assert_eq!(
        forward["forward_input"]["data"].as_array().unwrap().len(),
        1
    );
}

#[tokio::test]
async fn metrics_with_slashes_in_their_names_are_kept() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;

    trainer
        .forward_backward(vec![datum(1, 3)], CE)
        .await
        .unwrap();
    let step = trainer.optim_step(AdamParams::default()).await.unwrap();

    assert_eq!(step.metrics.unwrap()["skyrl.ai/grad_norm"], 0.5);
}

#[tokio::test]
async fn steps_are_pipelined_in_order() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;

    let mut calls = Vec::new();
    for i in 1..=5 {
        let pass = trainer.forward_backward(vec![datum(i, 3)], CE);
        calls.push((pass, trainer.optim_step(AdamParams::default())));
    }
    for (pass, step) in calls {
        pass.await.unwrap();
        step.await.unwrap();
    }

    let numbers = |path: &str| -> Vec<u64> {
        rig.mock
            .seen_at(path)
            .iter()
            .map(|seen| seen.seq_id())
            .collect()
    };
    assert_eq!(numbers(FORWARD_BACKWARD), [1, 3, 5, 7, 9]);
    assert_eq!(numbers(OPTIM_STEP), [2, 4, 6, 8, 10]);
}

#[tokio::test]
async fn the_path_of_a_sampler_gets_its_kind() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;

    let state = trainer
        .save_state("a", SaveOptions::default())
        .await
        .unwrap();
    let sampler = trainer
        .save_weights_for_sampler("a", SaveOptions::default())
        .await
        .unwrap();

    assert_eq!(state.to_string(), "tinker://model_0/weights/a");
    assert_eq!(sampler.to_string(), "tinker://model_0/sampler_weights/a");
    let sampler = rig.service.create_sampling_client(&sampler).await.unwrap();
    assert_eq!(sampler.base_model(), BASE_MODEL);
}

#[tokio::test]
async fn samples_without_names_are_read() {
    let rig = Rig::start().await;
    let sampler = rig.sampler().await;
    let options = SampleOptions {
        num_samples: 3,
        ..SampleOptions::default()
    };

    let response = sampler.sample(prompt(4), params(2), options).await.unwrap();

    assert_eq!(response.sequences.len(), 3);
    for sequence in response.sequences {
        assert_eq!(sequence.tokens, [7, 7]);
        assert_eq!(sequence.sequence_id, None);
    }
}

#[tokio::test]
async fn log_probabilities_of_a_prompt_get_the_one_that_is_none() {
    let rig = Rig::start().await;
    let sampler = rig.sampler().await;

    let logprobs = sampler.compute_logprobs(prompt(4)).await.unwrap();

    assert_eq!(logprobs, [None, Some(-1.0), Some(-1.0), Some(-1.0)]);
}

#[tokio::test]
async fn a_sampler_for_this_session_is_made_without_a_name() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;

    let sampler = trainer
        .save_weights_and_get_sampling_client(SamplerKind::Snapshot)
        .await
        .unwrap();
    let sample = sampler.sample(prompt(2), params(1), SampleOptions::default());

    assert_eq!(sample.await.unwrap().sequences.len(), 1);
}

#[tokio::test]
async fn its_runs_are_listed_and_described() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;
    let rest = rig.service.rest_client();

    let runs = rest.list_training_runs(PAGE).await.unwrap();
    let run = rest
        .get_training_run(trainer.training_run_id())
        .await
        .unwrap();

    assert_eq!(runs.training_runs, [run]);
}

#[tokio::test]
async fn an_unknown_run_is_not_taken_for_a_missing_endpoint() {
    let rig = Rig::start().await;
    let rest = rig.service.rest_client();

    let error = rest
        .get_training_run(&"model_9".parse().unwrap())
        .await
        .unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::NotFound), "{error}");
}

#[tokio::test]
async fn its_checkpoints_are_deleted() {
    let rig = Rig::start().await;
    let path = rig
        .trainer()
        .await
        .save_state("a", SaveOptions::default())
        .await
        .unwrap();
    let rest = rig.service.rest_client();

    rest.delete_checkpoint(&path).await.unwrap();

    let again = rest.delete_checkpoint(&path).await.unwrap_err();
    assert_eq!(again.kind(), Some(&ErrorKind::NotFound), "{again}");
}

#[tokio::test]
async fn its_sessions_are_kept_alive() {
    let rig = Rig::start().await;
    rig.service.session_id().await.unwrap();

    until(|| rig.mock.seen_at(SESSION_HEARTBEAT).len() > 3).await;
}

#[tokio::test]
async fn a_sample_given_up_is_not_cancelled_where_nobody_wants_to_know() {
    let rig = Rig::start().await;
    let sampler = rig.sampler().await;

    drop(sampler.sample(prompt(2), params(1), SampleOptions::default()));
    sampler.compute_logprobs(prompt(2)).await.unwrap();

    assert!(rig.mock.seen_at(CANCEL_FUTURE).is_empty());
}

// What goes wrong there.

#[tokio::test]
async fn a_failure_told_as_400_is_final_and_the_run_goes_on() {
    let rig = Rig::start().await;
    let lora = LoraConfig {
        rank: 64,
        ..LoraConfig::default()
    };

    let error = rig
        .service
        .create_lora_training_client(BASE_MODEL, lora)
        .await
        .unwrap_err();

    assert!(error.is_user_error(), "{error}");
    assert!(error.to_string().contains("max_lora_rank 32"), "{error}");
    let polls = rig.mock.seen_at(tinker_types::RETRIEVE_FUTURE);
    assert_eq!(polls.len(), 1, "asked once");
    rig.trainer().await;
}

#[tokio::test]
async fn a_loss_that_it_lacks_is_named_and_takes_no_number() {
    for version in [Version::Main, Version::Release] {
        let rig = Rig::of(version).await;
        let trainer = rig.trainer().await;
        let policy =
            tinker_api::Datum::policy_gradient(prompt(3), vec![1; 3], vec![-1.0; 3], vec![1.0; 3]);

        let error = trainer
            .forward_backward(vec![policy.unwrap()], LossFn::Dro)
            .await
            .unwrap_err();

        assert!(error.is_user_error(), "{error}");
        assert!(error.to_string().contains("loss_fn"), "{error}");
        trainer.optim_step(AdamParams::default()).await.unwrap();
        assert_eq!(rig.mock.seen_at(OPTIM_STEP)[0].seq_id(), 1);
    }
}

#[tokio::test]
async fn a_sample_without_a_limit_is_refused_with_the_name_of_the_limit() {
    let rig = Rig::start().await;
    let sampler = rig.sampler().await;

    let error = sampler
        .sample(
            prompt(2),
            SamplingParams::default(),
            SampleOptions::default(),
        )
        .await
        .unwrap_err();

    assert!(error.is_user_error(), "{error}");
    assert!(error.to_string().contains("max_tokens"), "{error}");
}

#[tokio::test]
async fn tables_of_the_prompt_are_refused_by_name() {
    let rig = Rig::start().await;
    let sampler = rig.sampler().await;
    let options = SampleOptions {
        topk_prompt_logprobs: 2,
        ..SampleOptions::default()
    };

    let error = sampler
        .sample(prompt(2), params(1), options)
        .await
        .unwrap_err();

    assert!(error.is_user_error(), "{error}");
    assert!(
        error.to_string().contains("topk_prompt_logprobs"),
        "{error}"
    );
}

#[tokio::test]
async fn a_name_that_is_taken_is_a_conflict() {
    let rig = Rig::start().await;
    let trainer = rig.trainer().await;
    trainer
        .save_state("a", SaveOptions::default())
        .await
        .unwrap();

    let error = trainer
        .save_state("a", SaveOptions::default())
        .await
        .unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::Conflict), "{error}");
    assert!(error.to_string().contains("'a' already exists"), "{error}");
}

// What it lacks.

#[tokio::test]
async fn lacking_settings_that_change_means_the_defaults() {
    let rig = Rig::start().await;

    rig.service.session_id().await.unwrap();
}

#[tokio::test]
async fn it_cannot_start_a_run_from_a_checkpoint() {
    let rig = Rig::start().await;
    let path = "tinker://model_0/weights/a".parse().unwrap();

    let plain = rig
        .service
        .create_training_client_from_state(&path, StateOptions::default());
    check_lacks(plain.await, "create a run from a checkpoint");
    let whole = rig
        .service
        .create_training_client_from_state_with_optimizer(&path, StateOptions::default());
    check_lacks(whole.await, "create a run from a checkpoint");
}

#[tokio::test]
async fn it_cannot_list_or_describe_sessions() {
    let rig = Rig::start().await;
    let rest = rig.service.rest_client();

    check_lacks(rest.list_sessions(PAGE).await, "list sessions");
    let session = rest.get_session(&"sess".parse().unwrap()).await;
    check_lacks(session, "describe sessions");
}

#[tokio::test]
async fn it_cannot_list_the_checkpoints_of_all_runs() {
    let rig = Rig::start().await;
    let rest = rig.service.rest_client();

    let all = rest.list_all_user_checkpoints(None).await;
    check_lacks(all, "list checkpoints of all runs");
}

#[tokio::test]
async fn it_cannot_take_the_end_of_a_session() {
    let rig = Rig::start().await;
    rig.service.session_id().await.unwrap();

    let closed = rig.service.close(FinishReason::Success, None).await;
    check_lacks(closed, "take the end of a session");
}

#[tokio::test]
async fn it_cannot_share_or_limit_checkpoints() {
    let rig = Rig::start().await;
    let rest = rig.service.rest_client();
    let path: TinkerPath = "tinker://model_0/weights/a".parse().unwrap();

    let published = rest.publish_checkpoint_from_tinker_path(&path).await;
    check_lacks(published, "publish checkpoints");
    let unpublished = rest.unpublish_checkpoint_from_tinker_path(&path).await;
    check_lacks(unpublished, "unpublish checkpoints");
    let limited = rest.set_checkpoint_ttl_from_tinker_path(&path, None).await;
    check_lacks(limited, "change the life of checkpoints");
}

#[tokio::test]
async fn it_cannot_hand_out_exported_weights() {
    let rig = Rig::start().await;
    let rest = rig.service.rest_client();
    let path: TinkerPath = "tinker://model_0/external_weights/a".parse().unwrap();

    let urls = rest.get_external_weights_urls(&path).await;
    check_lacks(urls, "hand out exported weights");
}

#[tokio::test]
async fn it_cannot_export_traces() {
    let rig = Rig::start().await;
    let rest = rig.service.rest_client();

    let trace = rest.export_session_trace(&"sess".parse().unwrap()).await;
    check_lacks(trace, "export the trace of a session");
}

#[tokio::test]
async fn it_cannot_say_whose_key_this_is() {
    let rig = Rig::start().await;
    let rest = rig.service.rest_client();

    let error = rest.whoami().await.unwrap_err();

    assert!(error.to_string().contains("hands out no tokens"), "{error}");
}
