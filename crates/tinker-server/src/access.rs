//! Every answered request, counted and noted in the access log.
//!
//! The log has no header, body or query: keys are in headers, signatures of links in queries.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;

use crate::app::App;

/// Where the lines of the access log come from, for filters of logs.
pub const ACCESS_LOG: &str = "tinker_server::access";

/// The route of paths that are none.
const NO_ROUTE: &str = "none";

/// Counts a request and its answer.
pub(crate) async fn note(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or_else(|| NO_ROUTE.to_owned(), |m| m.as_str().to_owned());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = next.run(request).await;
    let (status, took) = (response.status().as_u16(), started.elapsed());
    app.core.metrics.end_request(&route, status, took);
    tracing::debug!(
        target: ACCESS_LOG,
        %method,
        path,
        status,
        duration_ms = took.as_millis() as u64,
        "answered"
    );
    response
}
