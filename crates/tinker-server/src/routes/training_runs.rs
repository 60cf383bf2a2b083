//! Training runs: list and look-up.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use tinker_types::{CheckpointKind, TrainingRun, TrainingRunId, TrainingRunsResponse, TypeError};

use super::Page;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::Params;
use crate::catalog::{Catalog, Run};
use crate::clock::timestamp;
use crate::identity;

pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Params(page): Params<Page>,
) -> Json<TrainingRunsResponse> {
    let mut runs = app.core.catalog.runs();
    if let Some(project) = &page.project_id {
        runs.retain(|run| app.core.catalog.project_of_run(&run.id).as_ref() == Some(project));
    }
    let (runs, cursor) = page.cut(runs, 20);
    let training_runs = runs
        .into_iter()
        .map(|run| listed(&app.core.catalog, run))
        .collect();
    Json(TrainingRunsResponse {
        training_runs,
        cursor,
    })
}

pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> ApiResult<Json<TrainingRun>> {
    let run = app.core.catalog.run(&run_id(&id)?)?;
    Ok(Json(listed(&app.core.catalog, run)))
}

fn listed(catalog: &Catalog, run: Run) -> TrainingRun {
    let of_run = catalog.checkpoints_of(&run.id);
    let newest = |kind| {
        let found = of_run.iter().find(|c| c.path.checkpoint.kind == kind);
        found.map(crate::catalog::SavedCheckpoint::listed)
    };
    let session = catalog.session(&run.session_id);
    TrainingRun {
        last_checkpoint: newest(CheckpointKind::Training),
        last_sampler_checkpoint: newest(CheckpointKind::Sampler),
        training_run_id: run.id,
        base_model: run.base_model,
        model_owner: session.map_or_else(|_| identity::user(None), |s| s.user()),
        is_lora: true,
        last_request_time: timestamp(run.last_request_at),
        corrupted: run.corrupted.is_some(),
        lora_rank: Some(run.lora.rank),
        user_metadata: run.user_metadata,
    }
}

pub(super) fn run_id(text: &str) -> ApiResult<TrainingRunId> {
    text.parse()
        .map_err(|e: TypeError| ApiError::bad_request(e.to_string()))
}
