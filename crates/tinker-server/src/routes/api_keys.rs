//! The server's token: exchanged for short-lived ones, described, and not to be deleted.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tinker_types::{ApiKeyInfo, TokenResponse};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::Body;
use crate::identity;

pub(crate) async fn token(
    State(app): State<Arc<App>>,
    _body: Body,
) -> ApiResult<Json<TokenResponse>> {
    let jwt = identity::issue(app.token())
        .map_err(|error| ApiError::internal("cannot make a token", error.to_string()))?;
    Ok(Json(TokenResponse { jwt }))
}

pub(crate) async fn describe(State(app): State<Arc<App>>) -> Json<ApiKeyInfo> {
    Json(identity::key_info(app.token()))
}

/// The one key belongs to the data directory; without it nobody could use the server.
pub(crate) async fn delete() -> ApiError {
    ApiError::forbidden(
        "this is the server's own key and cannot be deleted here: delete server/token in its data directory and start it again for another",
    )
}
