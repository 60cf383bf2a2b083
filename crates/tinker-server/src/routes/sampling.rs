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
use crate::inference::random_number;

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
    let named = [&request.base_model, &request.model_path].map(Option::as_deref);
    let (base_model, model_path) = weights_of(app, named)?.ok_or_else(|| {
        ApiError::bad_request("create_sampling_session takes a base_model or a model_path")
    })?;
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

/// The base model and the checkpoint that a request names, one of them or both.
fn weights_of(
    app: &App,
    [base_model, model_path]: [Option<&str>; 2],
) -> ApiResult<Option<(String, Option<TinkerPath>)>> {
    let Some(path) = model_path else {
        return Ok(base_model.map(|base| (base.to_owned(), None)));
    };
    let path: TinkerPath = path.parse().map_err(bad)?;
    let catalog = &app.core.catalog;
    let checkpoint = catalog.checkpoint(&path, CheckpointKind::Sampler)?;
    if let Some(base) = base_model.filter(|base| *base != checkpoint.base_model) {
        return Err(ApiError::bad_request(format!(
            "{path} was trained on {}, not on {base}",
            checkpoint.base_model
        )));
    }
    Ok(Some((checkpoint.base_model, Some(path))))
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
    blocking(&app, move |app| match by_weights(app, &request.value)? {
        None => app.sample(&request.value, &request.bytes),
        Some(request) => {
            let body = serde_json::to_vec(&request)
                .map_err(|e| ApiError::internal("cannot log the request", e.to_string()))?;
            app.sample(&request, &body)
        }
    })
    .await
    .map(Json)
}

/// A request without a sampler that names weights instead, as one of the hidden session's sampler of these. It has
/// no number that it could be repeated under.
fn by_weights(app: &App, request: &SampleRequest) -> ApiResult<Option<SampleRequest>> {
    if request.sampling_session_id.is_some() {
        return Ok(None);
    }
    let named = [&request.base_model, &request.model_path].map(Option::as_deref);
    let Some((base_model, model_path)) = weights_of(app, named)? else {
        return Ok(None);
    };
    let base = app.core.models.resolve(&base_model)?;
    Ok(Some(SampleRequest {
        sampling_session_id: Some(app.inference_sampler(&base.name, model_path)?),
        seq_id: Some(random_number()),
        base_model: None,
        model_path: None,
        ..request.clone()
    }))
}

fn bad(error: TypeError) -> ApiError {
    ApiError::bad_request(error.to_string())
}
