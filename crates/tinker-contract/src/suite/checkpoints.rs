//! Runs and checkpoints as the REST endpoints list them.

use std::collections::BTreeSet;
use std::time::Duration;

use tinker_api::{CheckpointKind, ErrorKind, Page, SaveOptions, TinkerPath, TrainingRunId};

use super::{batch, step, trainer};
use crate::target::Target;

/// Runs are listed newest first, page by page.
pub async fn runs_are_listed_page_by_page(target: &Target) {
    let mut ids = Vec::new();
    for seed in 0..5 {
        ids.insert(0, trainer(target, seed).await.training_run_id().clone());
    }
    let rest = target.service().rest_client();

    let mut listed = Vec::new();
    let mut totals = BTreeSet::new();
    for offset in [0, 2, 4] {
        let page = rest
            .list_training_runs(Page { limit: 2, offset })
            .await
            .unwrap();
        assert!(page.training_runs.len() <= 2);
        assert_eq!(page.cursor.offset, offset);
        totals.insert(page.cursor.total_count);
        listed.extend(
            page.training_runs
                .into_iter()
                .map(|run| run.training_run_id),
        );
    }

    let all = rest.list_all_training_runs(None).await.unwrap();
    if target.is_own() {
        assert_eq!((listed, totals), (ids.clone(), [5].into()));
        assert_eq!(all.len(), 5);
    }
    let is_listed = |id: &&TrainingRunId| all.iter().any(|run| run.training_run_id == **id);
    assert_eq!(ids.iter().filter(is_listed).count(), 5);
    let run = rest.get_training_run(&ids[0]).await.unwrap();
    assert_eq!(
        (run.base_model, run.is_lora, run.lora_rank),
        (target.base_model.clone(), true, Some(4))
    );
}

/// Checkpoints are listed with what was said of them, and can be deleted.
pub async fn checkpoints_are_listed_and_deleted(target: &Target) {
    let trainer = trainer(target, 1).await;
    step(&trainer, batch(1)).await;
    let options = SaveOptions {
        ttl: Some(Duration::from_secs(7200)),
        user_metadata: Some([("note".to_owned(), "mine".to_owned())].into()),
        ..SaveOptions::default()
    };
    let state = trainer.save_state("a", options).await.unwrap();
    let sampler = trainer
        .save_weights_for_sampler("a", SaveOptions::default())
        .await
        .unwrap();
    assert_eq!(sampler, state.twin(CheckpointKind::Sampler));
    let rest = target.service().rest_client();

    let listed = rest
        .list_checkpoints(trainer.training_run_id())
        .await
        .unwrap();
    let paths: BTreeSet<TinkerPath> = listed.iter().map(|c| c.tinker_path.clone()).collect();
    assert_eq!(paths, [state.clone(), sampler.clone()].into());
    let row = rest.get_checkpoint(&state).await.unwrap().unwrap();
    assert_eq!(row.checkpoint_type, CheckpointKind::Training);
    assert!(row.expires_at.is_some() && row.size_bytes.is_some_and(|n| n > 0) && !row.public);
    assert_eq!(row.user_metadata.unwrap()["note"], "mine");
    let info = rest.get_weights_info_by_tinker_path(&state).await.unwrap();
    assert_eq!(
        (info.base_model, info.lora_rank),
        (target.base_model.clone(), Some(4))
    );
    assert_eq!(info.train_unembed, Some(true));

    rest.delete_checkpoint(&state).await.unwrap();
    assert_eq!(rest.get_checkpoint(&state).await.unwrap(), None);
    assert!(rest.get_checkpoint(&sampler).await.unwrap().is_some());
    let error = rest.delete_checkpoint(&state).await.unwrap_err();
    assert_eq!(error.kind(), Some(&ErrorKind::NotFound), "{error}");
    assert!(error.to_string().contains(&state.to_string()), "{error}");
}

/// A run that is not there is named.
pub async fn an_unknown_run_is_named(target: &Target) {
    let rest = target.service().rest_client();

    let error = rest
        .get_training_run(&"nobody:train:0".parse().unwrap())
        .await
        .unwrap_err();

    assert_eq!(error.kind(), Some(&ErrorKind::NotFound));
    assert!(error.to_string().contains("nobody:train:0"), "{error}");
}

/// The base models on offer include the one that the tests use.
pub async fn base_models_are_listed(target: &Target) {
    let offered = target
        .service()
        .get_server_capabilities()
        .await
        .unwrap()
        .supported_models;

    let names: Vec<_> = offered
        .iter()
        .filter_map(|model| model.model_name.as_deref())
        .collect();
    assert!(names.contains(&target.base_model.as_str()), "{names:?}");
}
