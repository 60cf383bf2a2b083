//! Every answered request, counted and noted in the access log.
//!
//! The log has no header, body or query: keys are in headers, signatures of links in queries. It has the name
//! of a key, which is no secret.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;

use crate::app::App;
use crate::caller::Caller;

/// Where the lines of the access log come from, for filters of logs.
pub const ACCESS_LOG: &str = "tinker_server::access";

/// Who a request was answered for, as the log names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallerName(String);

impl CallerName {
    /// The name of a caller's key; `own` is the data directory's.
    pub(crate) fn of(caller: &Caller) -> Self {
        let key = caller.key.as_ref();
        Self(key.map_or_else(|| "own".to_owned(), |key| key.as_str().to_owned()))
    }
}

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
    // Without one the request needed no key, or had none that is known.
    let caller = response.extensions().get::<CallerName>();
    tracing::debug!(
        target: ACCESS_LOG,
        key = caller.map_or("-", |CallerName(name)| name),
        %method,
        path,
        status,
        duration_ms = took.as_millis() as u64,
        "answered"
    );
    response
}
