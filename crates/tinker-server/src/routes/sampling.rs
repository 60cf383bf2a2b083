//! Samplers and samples.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use tinker_types::{
    CheckpointKind, CreateSamplingSessionRequest, CreateSamplingSessionResponse,
    JoinSamplingSessionRequest, JoinSamplingSessionResponse, SampleRequest, SamplerInfo,
    SamplingSessionId, TinkerPath, TypeError, UntypedFuture,
};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Parsed, blocking};
use crate::catalog::Sampler;
use crate::clock::now;

pub(crate) async fn create_session(
    State(app): State<Arc<App>>,
    request: Parsed<CreateSamplingSessionRequest>,
) -> ApiResult<Json<CreateSamplingSessionResponse>> {
    blocking(&app, move |app| create(app, &request.value))
        .await
        .map(Json)
}

fn create(
    app: &App,
    request: &CreateSamplingSessionRequest,
) -> ApiResult<CreateSamplingSessionResponse> {
    let catalog = &app.core.catalog;
    catalog.session(&request.session_id)?;
    let (base_model, model_path) = match (&request.model_path, &request.base_model) {
        (Some(path), base) => {
            let path: TinkerPath = path.parse().map_err(bad)?;
            let checkpoint = catalog.checkpoint(&path, CheckpointKind::Sampler)?;
            if let Some(base) = base.as_ref().filter(|b| **b != checkpoint.base_model) {
                return Err(ApiError::bad_request(format!(
                    "{path} was trained on {}, not on {base}",
                    checkpoint.base_model
                )));
            }
            (checkpoint.base_model, Some(path))
        }
        (None, Some(base)) => (base.clone(), None),
        (None, None) => {
            return Err(ApiError::bad_request(
                "create_sampling_session takes a base_model or a model_path",
            ));
        }
    };
    let model = app.core.models.resolve(&base_model)?;
    let number = request.sampling_session_seq_id;
    let id = SamplingSessionId::of_session(&request.session_id, number);
    if catalog.sampler(&id).is_err() {
        app.take_up(&request.session_id)?;
    }
    catalog.put_sampler(Sampler {
        id: id.clone(),
        session_id: request.session_id.clone(),
        base_model: model.name,
        model_path,
        request_id: None,
        created_at: now(),
        n_clients: 1,
        inflight: false,
    })?;
    Ok(CreateSamplingSessionResponse {
        sampling_session_id: id,
        tag: Default::default(),
    })
}

/// Gives one more client of a sampler numbers of its own for its samples.
pub(crate) async fn join(
    State(app): State<Arc<App>>,
    request: Parsed<JoinSamplingSessionRequest>,
) -> ApiResult<Json<JoinSamplingSessionResponse>> {
    blocking(&app, move |app| {
        let sampler = app.core.live_sampler(&request.value.sampling_session_id)?;
        Ok(JoinSamplingSessionResponse {
            client_counter: app.core.catalog.join_sampler(&sampler.id)?,
            tag: Default::default(),
        })
    })
    .await
    .map(Json)
}

pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> ApiResult<Json<SamplerInfo>> {
    let id: SamplingSessionId = id.parse().map_err(bad)?;
    let sampler = app.core.catalog.sampler(&id)?;
    Ok(Json(SamplerInfo {
        sampler_id: sampler.id,
        base_model: sampler.base_model,
        model_path: sampler.model_path,
    }))
}

pub(crate) async fn sample(
    State(app): State<Arc<App>>,
    request: Parsed<SampleRequest>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| app.sample(&request.value, &request.bytes))
        .await
        .map(Json)
}

fn bad(error: TypeError) -> ApiError {
    ApiError::bad_request(error.to_string())
}
