//! Creating, describing and unloading the model of a training run.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tinker_types::{
    CreateModelRequest, GetInfoRequest, GetInfoResponse, ModelData, UnloadModelRequest,
    UntypedFuture,
};

use crate::api_error::ApiResult;
use crate::app::App;
use crate::body::{Parsed, blocking};

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Parsed<CreateModelRequest>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| {
        app.create_model(&request.value, &request.bytes)
    })
    .await
    .map(Json)
}

pub(crate) async fn get_info(
    State(app): State<Arc<App>>,
    request: Parsed<GetInfoRequest>,
) -> ApiResult<Json<GetInfoResponse>> {
    blocking(&app, move |app| {
        let run = app.core.catalog.run(&request.value.model_id)?;
        let model = app.core.models.resolve(&run.base_model)?;
        Ok(GetInfoResponse {
            model_id: run.id,
            model_data: ModelData {
                arch: model.architecture,
                model_name: Some(model.name.clone()),
                tokenizer_id: Some(model.dir.display().to_string()),
            },
            tag: Default::default(),
            optimizer_config: Some(run.optimizer),
            is_lora: Some(true),
            lora_rank: Some(run.lora.rank),
            model_name: Some(model.name),
        })
    })
    .await
    .map(Json)
}

pub(crate) async fn unload(
    State(app): State<Arc<App>>,
    request: Parsed<UnloadModelRequest>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| app.unload(&request.value.model_id))
        .await
        .map(Json)
}
