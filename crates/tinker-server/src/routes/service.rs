//! Health, capabilities and the settings handed to clients.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};
use tinker_types::{
    ClientConfig, DynamicConfig, HealthResponse, ServerCapabilities, SupportedModel,
};

use crate::api_error::ApiResult;
use crate::app::App;
use crate::body::{Body, blocking};
use crate::metrics::Present;

/// What this server does beyond the API.
const EXTENSIONS: [&str; 2] = ["zero_grad", "gradient_stats"];

/// 200 while work is taken and done, else 503 with the reason: what a supervisor or a load balancer
/// goes by. It needs no key and so tells nothing else.
pub(crate) async fn healthz(State(app): State<Arc<App>>) -> ApiResult<Json<HealthResponse>> {
    app.check_health()?;
    Ok(Json(HealthResponse {
        status: "ok".into(),
    }))
}

/// The counters in the text format of Prometheus.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let core = &app.core;
    let present = Present {
        queue: &core.queue(),
        n_futures: core.futures.len(),
        promised: core.memory.promised(),
        connections: core.connections.count(),
    };
    let page = core.metrics.render(&core.version, &present);
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, content_type)], page).into_response()
}

pub(crate) async fn capabilities(
    State(app): State<Arc<App>>,
) -> ApiResult<Json<ServerCapabilities>> {
    let models = blocking(&app, |app| Ok(app.core.models.list()?)).await?;
    let supported_models = models
        .into_iter()
        .map(|model| SupportedModel {
            model_name: Some(model.name),
            max_context_length: model.max_context,
            trainable: Some(true),
            sampleable: Some(true),
        })
        .collect();
    Ok(Json(ServerCapabilities {
        supported_models,
        extensions: EXTENSIONS.map(str::to_owned).to_vec(),
        weights: app.core.models.weights().map(|w| w.name().to_owned()),
        precision: Some(app.core.models.precision().name().to_owned()),
        device: Some(app.core.device.name().to_owned()),
    }))
}

pub(crate) async fn client_config(State(app): State<Arc<App>>, _body: Body) -> Json<ClientConfig> {
    Json(app.client_config().clone())
}

pub(crate) async fn dynamic_config(_body: Body) -> Json<DynamicConfig> {
    Json(DynamicConfig {
        sample_cancel_enabled: true,
        ..DynamicConfig::default()
    })
}

/// Taken and thrown away: some clients put their key into failure reports.
pub(crate) async fn telemetry(_body: Body) -> Json<Value> {
    Json(json!({"status": "accepted"}))
}
