//! Which path goes to which handler.

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::get;
use tinker_types as t;

use crate::api_error::ApiError;
use crate::app::App;
use crate::{auth, routes};

/// The whole API over `app`.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route(t::HEALTHZ, get(routes::service::healthz))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(from_fn_with_state(Arc::clone(&app), auth::guard))
        .with_state(app)
}

async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!(
        "{method} {} is not part of this server",
        uri.path()
    ))
}

async fn unknown_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(format!("{} does not take {method}", uri.path()))
}
