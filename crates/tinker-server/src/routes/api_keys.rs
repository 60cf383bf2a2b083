//! Keys: exchanged for short-lived tokens, described, and not to be deleted.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tinker_types::{ApiKeyInfo, TokenResponse};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::Body;
use crate::caller::{self, Caller};
use crate::identity;

pub(crate) async fn token(
    State(app): State<Arc<App>>,
    _body: Body,
) -> ApiResult<Json<TokenResponse>> {
    let caller = caller::current().unwrap_or_else(Caller::own);
    let jwt = identity::issue(app.token(), &caller)
        .map_err(|error| ApiError::internal("cannot make a token", error.to_string()))?;
    Ok(Json(TokenResponse { jwt }))
}

pub(crate) async fn describe(State(app): State<Arc<App>>) -> Json<ApiKeyInfo> {
    let key = caller::current_key();
    Json(identity::key_info(app.token(), key.as_ref()))
}

/// Keys are given and taken away on the server's machine.
pub(crate) async fn delete() -> ApiError {
    if let Some(key) = caller::current_key() {
        return ApiError::forbidden(format!(
            "keys cannot be deleted here: on the server's machine `tinker serve keys remove {key}` does"
        ));
    }
    ApiError::forbidden(
        "this is the server's own key and cannot be deleted here: delete server/token in its data directory and start it again for another",
    )
}
