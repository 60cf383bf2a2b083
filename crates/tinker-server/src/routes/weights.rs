//! Saving and loading the weights of a training run.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Deserialize;
use tinker_types::{
    CopyWeightsRequest, CopyWeightsResponse, SessionId, UntypedFuture, WeightsInfo,
    WeightsInfoRequest,
};

use super::{Numbered, idempotency_key};
use crate::api_error::ApiResult;
use crate::app::App;
use crate::body::{Parsed, blocking, parse_json};
use crate::operation::OpKind;

pub(crate) async fn save(
    State(app): State<Arc<App>>,
    request: Parsed<Numbered>,
) -> ApiResult<Json<UntypedFuture>> {
    submit(&app, request, OpKind::SaveWeights).await
}

pub(crate) async fn save_for_sampler(
    State(app): State<Arc<App>>,
    request: Parsed<Numbered>,
) -> ApiResult<Json<UntypedFuture>> {
    submit(&app, request, OpKind::SaveWeightsForSampler).await
}

pub(crate) async fn save_external(
    State(app): State<Arc<App>>,
    request: Parsed<Numbered>,
) -> ApiResult<Json<UntypedFuture>> {
    submit(&app, request, OpKind::SaveWeightsExternal).await
}

/// Takes a numbered operation of a run into the log.
async fn submit(
    app: &Arc<App>,
    request: Parsed<Numbered>,
    kind: OpKind,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(app, move |app| {
        let Numbered { model_id, seq_id } = &request.value;
        app.submit_numbered(model_id, *seq_id, kind, &request.bytes)
    })
    .await
    .map(Json)
}

/// Copies a checkpoint. Repeated under the same idempotency key it gives the same copy.
pub(crate) async fn copy(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    request: Parsed<CopyWeightsRequest>,
) -> ApiResult<Json<CopyWeightsResponse>> {
    let key = idempotency_key(&headers);
    blocking(&app, move |app| {
        let tinker_path = app.copy_weights(&request.value, key.as_deref())?;
        Ok(CopyWeightsResponse { tinker_path })
    })
    .await
    .map(Json)
}

/// Loads a checkpoint into a new run of a session, or into a run that exists.
pub(crate) async fn load(
    State(app): State<Arc<App>>,
    request: Parsed<Target>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        let bytes = &request.bytes;
        match request.value {
            Target::New {
                session_id,
                model_seq_id,
            } => {
                let key = (&session_id, model_seq_id);
                app.create_from_weights(key, &parse_json(bytes)?, bytes)
            }
            Target::Existing(Numbered { model_id, seq_id }) => {
                app.submit_numbered(&model_id, seq_id, OpKind::LoadWeights, bytes)
            }
        }
    })
    .await
    .map(Json)
}

/// Where weights are loaded to.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "load_weights takes session_id and model_seq_id for a new training run, or model_id and seq_id for an existing one"
)]
pub(crate) enum Target {
    /// A training run that this request creates.
    New {
        session_id: SessionId,
        model_seq_id: u64,
    },
    /// A training run that exists.
    Existing(Numbered),
}

pub(crate) async fn info(
    State(app): State<Arc<App>>,
    request: Parsed<WeightsInfoRequest>,
) -> ApiResult<Json<WeightsInfo>> {
    let path = request.value.tinker_path;
    let Some(found) = app.core.catalog.find_checkpoint(&path) else {
        return Err(app.core.catalog.no_checkpoint(&path).into());
    };
    Ok(Json(WeightsInfo {
        base_model: found.base_model,
        is_lora: true,
        lora_rank: Some(found.lora.rank),
        train_unembed: Some(found.lora.train_unembed),
        train_mlp: Some(found.lora.train_mlp),
        train_attn: Some(found.lora.train_attn),
        optimizer_config: Some(app.core.catalog.optimizer_of(&path)),
    }))
}
