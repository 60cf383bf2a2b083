//! What can be sampled from: base models and checkpoints of samplers.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use tinker_types::CheckpointKind;

use super::OpenAiError;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::blocking;

pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, OpenAiError> {
    let data = blocking(&app, all).await?;
    Ok(Json(json!({"object": "list", "data": data})))
}

pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, OpenAiError> {
    let all = blocking(&app, all).await?;
    let mut all = all.into_iter();
    let found = all.find(|model| model["id"] == name);
    found
        .map(Json)
        .ok_or_else(|| ApiError::not_found(format!("model {name:?} is not on offer")).into())
}

fn all(app: &App) -> ApiResult<Vec<Value>> {
    let describe = |id: String, created: i64| json!({"id": id, "object": "model", "created": created, "owned_by": "local"});
    let bases = app.core.models.list()?;
    let bases = bases.into_iter().map(|base| describe(base.name, 0));
    let saved = app.core.catalog.checkpoints().into_iter();
    let samplers = saved
        .filter(|c| c.path.checkpoint.kind == CheckpointKind::Sampler)
        .map(|c| describe(c.path.to_string(), c.created_at / 1000));
    Ok(bases.chain(samplers).collect())
}
