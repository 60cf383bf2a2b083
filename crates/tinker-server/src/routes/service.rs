//! Health, capabilities and the settings handed to clients.

use axum::Json;
use tinker_types::HealthResponse;

pub(crate) async fn healthz() -> Json<HealthResponse> {
    Json(HealthResponse {
        status: "ok".into(),
    })
}
