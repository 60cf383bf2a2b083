//! What our client gets of our server beyond training and sampling: shared samplers, tokens, copies,
//! downloads, projects and searches.

use tinker_api::{
    CheckpointKind, CopyOptions, ErrorKind, ExportOptions, LoraConfig, ModelInput, ProjectId,
    SampleOptions, SamplingClient, SamplingParams, SamplingSource, SaveOptions,
    SessionSearchRequest, Stop, TrainingClient,
};
use tinker_contract::suite::{batch, tokens};
use tinker_contract::target::Target;
use tinker_types::ClientConfig;

use crate::plain_http::plain_http;

/// A server whose clients wait for all their samples with one poll and exchange their key.
async fn every_option() -> Target {
    Target::start_with(|config| {
        *config = ClientConfig {
            pjwt_auth_enabled: true,
            sample_use_retrieve_futures: true,
            proto_compress_fwdbwd: true,
            ..config.clone()
        };
    })
    .await
}

async fn trained(target: &Target) -> TrainingClient {
    let lora = LoraConfig {
        rank: 4,
        seed: Some(1),
        ..LoraConfig::default()
    };
    let service = target.service();
    let created = service.create_lora_training_client(&target.base_model, lora);
    let trainer = created.await.unwrap();
    trainer
        .forward_backward(batch(1), tinker_api::LossFn::CrossEntropy)
        .await
        .unwrap();
    trainer
        .optim_step(tinker_api::AdamParams::default())
        .await
        .unwrap();
    trainer
}

async fn sampled(sampler: &SamplingClient, seed: i64) -> Vec<u32> {
    let params = SamplingParams {
        max_tokens: Some(8),
        seed: Some(seed),
        stop: Some(Stop::Tokens(vec![])),
        ..SamplingParams::default()
    };
    let prompt = ModelInput::from_tokens(tokens(77, 6));
    let response = sampler
        .sample(prompt, params, SampleOptions::default())
        .await;
    response.unwrap().sequences.remove(0).tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_poll_a_sampler_brings_every_sample_and_every_failure() {
    let target = every_option().await;
    let source = SamplingSource::BaseModel(target.base_model.clone());
    let sampler = target
        .service()
        .create_sampling_client(source)
        .await
        .unwrap();
    let bad = SamplingParams {
        top_p: 0.0,
        max_tokens: Some(1),
        ..SamplingParams::default()
    };

    let prompt = ModelInput::from_tokens(vec![3]);
    let refused = sampler.sample(prompt, bad, SampleOptions::default());
    let all = futures_util::future::join_all((0..60).map(|seed| sampled(&sampler, seed))).await;

    let distinct: std::collections::BTreeSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), 60);
    let error = refused.await.unwrap_err();
    assert!(error.to_string().contains("top_p 0"), "{error}");
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_sampler_gives_every_process_numbers_of_its_own() {
    let target = every_option().await;
    let source = SamplingSource::BaseModel(target.base_model.clone());
    let sampler = target
        .service()
        .create_sampling_client(source)
        .await
        .unwrap();
    let handle = sampler.get_sampler_handle().await.unwrap();
    let mut others = Vec::new();
    for _ in 0..2 {
        let service = target.service();
        let other = service.create_sampling_client_from_handle(&handle).await;
        others.push(other.unwrap());
    }

    // Without a seed, what is drawn follows from the number: equal numbers would draw the same.
    let params = || SamplingParams {
        max_tokens: Some(12),
        stop: Some(Stop::Tokens(vec![])),
        ..SamplingParams::default()
    };
    let mut drawn = std::collections::BTreeSet::new();
    for client in others.iter().chain([&sampler]) {
        let prompt = ModelInput::from_tokens(tokens(77, 6));
        let response = client.sample(prompt, params(), SampleOptions::default());
        drawn.insert(response.await.unwrap().sequences.remove(0).tokens);
    }

    assert_eq!(drawn.len(), 3);
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_says_who_one_is_and_old_tokens_are_exchanged() {
    let target = every_option().await;

    let whoami = target.service().rest_client().whoami().await.unwrap();

    assert_eq!(whoami.user_urn, "tml:user:local");
    assert_eq!(whoami.org_urn, "tml:organization:local");
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_a_checkpoint_of_its_own_in_its_project() {
    let target = every_option().await;
    let trainer = trained(&target).await;
    let saved = trainer
        .save_state("a", SaveOptions::default())
        .await
        .unwrap();
    let rest = target.service().rest_client();
    let project: ProjectId = "archive".parse().unwrap();

    let copy = rest
        .copy_weights(&saved, &project, CopyOptions::default())
        .await
        .unwrap();
    rest.delete_checkpoint(&saved).await.unwrap();

    assert_ne!(copy.run, saved.run);
    let row = rest.get_checkpoint(&copy).await.unwrap().unwrap();
    assert_eq!(row.checkpoint_type, CheckpointKind::Training);
    let service = target.service();
    let restored =
        service.create_training_client_from_state_with_optimizer(&copy, Default::default());
    restored.await.unwrap();
    let error = rest
        .copy_weights(&saved, &project, CopyOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Some(&ErrorKind::NotFound), "{error}");
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn external_weights_and_archives_are_downloaded_whole() {
    let target = Target::start().await;
    let trainer = trained(&target).await;
    let external = trainer
        .save_weights_external("out", ExportOptions::default())
        .await
        .unwrap();
    let sampler = trainer
        .save_weights_for_sampler("s", SaveOptions::default())
        .await
        .unwrap();
    let download = target.service().rest_client().download();
    let (files, archive) = (target.home().join("files"), target.home().join("archive"));

    download.external_weights(&external, &files).await.unwrap();
    download
        .checkpoint_archive(&sampler, &archive)
        .await
        .unwrap();

    let read =
        |dir: &std::path::Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(read(&files).len() > 1000);
    assert!(read(&files) == read(&archive), "the same weights");
    assert!(files.join("adapter_config.json").is_file());
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_found_in_the_project_they_moved_to() {
    let target = every_option().await;
    let service = target.service();
    let session = service.session_id().await.unwrap();
    let rest = service.rest_client();
    let project: ProjectId = "p".parse().unwrap();

    rest.assign_session_project(&session, &project)
        .await
        .unwrap();

    let request = SessionSearchRequest {
        project_ids: Some(vec![project]),
        ..SessionSearchRequest::default()
    };
    let found = rest.search_sessions(&request).await.unwrap();
    assert_eq!(found.sessions.len(), 1);
    assert_eq!(found.sessions[0].session_id, session);
    let url = rest.export_session_trace(&session).await.unwrap();
    let plain = plain_http();
    let answer = plain.get(url.expose()).send().await.unwrap();
    let trace = answer.text().await.unwrap();
    assert!(trace.contains("traceEvents"), "{trace}");
    target.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_is_a_mark_that_may_be_set_twice() {
    let target = Target::start().await;
    let trainer = trained(&target).await;
    let saved = trainer
        .save_state("a", SaveOptions::default())
        .await
        .unwrap();
    let rest = target.service().rest_client();

    for _ in 0..2 {
        rest.publish_checkpoint_from_tinker_path(&saved)
            .await
            .unwrap();
    }
    assert!(rest.get_checkpoint(&saved).await.unwrap().unwrap().public);
    for _ in 0..2 {
        rest.unpublish_checkpoint_from_tinker_path(&saved)
            .await
            .unwrap();
    }
    assert!(!rest.get_checkpoint(&saved).await.unwrap().unwrap().public);
    target.stop().await;
}
