//! Saving and loading the weights of a training run.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tinker_types::{
    LoadWeightsRequest, OptimizerConfig, SaveWeightsForSamplerRequest, SaveWeightsRequest,
    UntypedFuture, WeightsInfo, WeightsInfoRequest,
};

use crate::api_error::ApiResult;
use crate::app::App;
use crate::body::{Parsed, blocking};
use crate::operation::OpKind;

pub(crate) async fn save(
    State(app): State<Arc<App>>,
    request: Parsed<SaveWeightsRequest>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        let (run, seq) = (&request.value.model_id, request.value.seq_id);
        app.submit_numbered(run, seq, OpKind::SaveWeights, &request.bytes)
    })
    .await
    .map(Json)
}

pub(crate) async fn save_for_sampler(
    State(app): State<Arc<App>>,
    request: Parsed<SaveWeightsForSamplerRequest>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        let (run, seq) = (&request.value.model_id, request.value.seq_id);
        app.submit_numbered(run, seq, OpKind::SaveWeightsForSampler, &request.bytes)
    })
    .await
    .map(Json)
}

pub(crate) async fn load(
    State(app): State<Arc<App>>,
    request: Parsed<LoadWeightsRequest>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        app.load_weights(&request.value, &request.bytes)
    })
    .await
    .map(Json)
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
        optimizer_config: Some(OptimizerConfig::default()),
    }))
}
