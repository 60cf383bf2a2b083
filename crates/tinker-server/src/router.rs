//! Which path goes to which handler.

use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, post, put};
use axum::{Extension, Router};
use tinker_types as t;

use crate::access;
use crate::api_error::ApiError;
use crate::app::App;
use crate::auth;
use crate::body::BodySize;
use crate::caller::Scope;
use crate::routes::{
    admin, anthropic, api_keys, checkpoints, custom_losses, futures, models, openai, sampling,
    search, service, sessions, signed, training, training_runs, uploads, weights,
};

/// Where Prometheus looks.
const METRICS: &str = "/metrics";

/// The whole API over `app`: every path, with the checks of host, origin, key and scope before it.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .merge(for_everybody())
        .merge(needing(Scope::Sample, sampling_routes()))
        .merge(needing(Scope::Train, training_routes()))
        .merge(needing(Scope::Admin, admin_routes()))
        .merge(signed_routes())
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        // Bodies are bounded where they are read, so that the refusal can explain itself.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(Arc::clone(&app), auth::guard))
        // Refusals are counted too.
        .layer(from_fn_with_state(Arc::clone(&app), access::note))
        .with_state(app)
}

/// Routes that take a key with a scope.
fn needing(scope: Scope, routes: Router<Arc<App>>) -> Router<Arc<App>> {
    routes.route_layer(from_fn_with_state(scope, auth::need))
}

/// What every key may do: look at what belongs to it, and keep a session.
fn for_everybody() -> Router<Arc<App>> {
    Router::new().merge(session_routes()).merge(lookup_routes())
}

fn session_routes() -> Router<Arc<App>> {
    Router::new()
        .route(t::HEALTHZ, get(service::healthz))
        .route(t::CAPABILITIES, get(service::capabilities))
        .route(t::CLIENT_CONFIG, post(service::client_config))
        .route(t::DYNAMIC_CONFIG, post(service::dynamic_config))
        .route(t::TELEMETRY, post(service::telemetry))
        .route(t::AUTH_TOKEN, post(api_keys::token))
        .route(t::API_KEY, get(api_keys::describe).delete(api_keys::delete))
        .route(t::CREATE_SESSION, post(sessions::create))
        .route(t::SESSION_HEARTBEAT, post(sessions::heartbeat))
        .route(t::SESSIONS, get(sessions::list))
        .route(&under(t::SESSIONS, "/{id}"), get(sessions::get))
        .route(&under(t::SESSIONS, "/{id}/finish"), post(sessions::finish))
        .route(
            &under(t::SESSIONS, "/{id}/trace_export"),
            get(sessions::export_trace),
        )
        .route(t::RETRIEVE_FUTURE, post(futures::retrieve))
        .route(t::RETRIEVE_FUTURES, post(futures::retrieve_many))
        .route(t::CANCEL_FUTURE, post(futures::cancel))
}

fn lookup_routes() -> Router<Arc<App>> {
    let checkpoint = checkpoint();
    Router::new()
        .route(t::SEARCH_SESSIONS, post(search::sessions))
        .route(t::SEARCH_CHECKPOINTS, post(search::checkpoints))
        .route(t::GET_INFO, post(models::get_info))
        .route(t::WEIGHTS_INFO, post(weights::info))
        .route(&under(t::SAMPLERS, "/{id}"), get(sampling::get))
        .route(t::TRAINING_RUNS, get(training_runs::list))
        .route(&under(t::TRAINING_RUNS, "/{id}"), get(training_runs::get))
        .route(
            &under(t::TRAINING_RUNS, "/{id}/checkpoints"),
            get(checkpoints::list_of_run),
        )
        .route(t::CHECKPOINTS, get(checkpoints::list))
        .route(
            &under(&checkpoint, "/external_weights_urls"),
            get(checkpoints::external_weights_urls),
        )
        .route(&under(&checkpoint, "/archive"), get(checkpoints::archive))
        .route(t::BILLING_USAGE, get(admin::usage))
        .route(t::STORAGE_USAGE, get(admin::storage))
        .route("/oai/api/v1/models", get(openai::models))
        .route("/oai/api/v1/models/{*name}", get(openai::model))
}

fn checkpoint() -> String {
    under(t::TRAINING_RUNS, "/{id}/checkpoints/{segment}/{name}")
}

fn training_routes() -> Router<Arc<App>> {
    Router::new()
        .route(t::CREATE_MODEL, post(models::create))
        .route(t::UNLOAD_MODEL, post(models::unload))
        .route(t::OPTIM_STEP, post(training::optim_step))
        .route(t::ZERO_GRAD, post(training::zero_grad))
        .route(t::GRADIENT_STATS, post(training::gradient_stats))
        .route(t::SAVE_WEIGHTS, post(weights::save))
        .route(t::LOAD_WEIGHTS, post(weights::load))
        .route(t::SAVE_WEIGHTS_FOR_SAMPLER, post(weights::save_for_sampler))
        .route(t::SAVE_WEIGHTS_EXTERNAL, post(weights::save_external))
        .route(t::COPY_WEIGHTS, post(weights::copy))
        .route(t::START_UPLOAD, post(uploads::start))
        .route(t::FINISH_UPLOAD, post(uploads::finish))
        .route(
            &under(t::SESSIONS, "/{id}/project"),
            put(sessions::assign_project),
        )
        .merge(checkpoint_changes())
        .merge(data_routes().layer(Extension(BodySize::Large)))
        .merge(program_routes().layer(Extension(BodySize::Medium)))
}

fn data_routes() -> Router<Arc<App>> {
    Router::new()
        .route(t::FORWARD_BACKWARD, post(training::forward_backward))
        .route(t::FORWARD, post(training::forward))
}

fn program_routes() -> Router<Arc<App>> {
    Router::new().route(t::CREATE_CUSTOM_LOSS, post(custom_losses::create))
}

fn checkpoint_changes() -> Router<Arc<App>> {
    let checkpoint = checkpoint();
    Router::new()
        .route(&checkpoint, delete(checkpoints::delete))
        .route(
            &under(&checkpoint, "/publish"),
            post(checkpoints::publish).delete(checkpoints::unpublish),
        )
        .route(&under(&checkpoint, "/ttl"), put(checkpoints::set_ttl))
}

fn admin_routes() -> Router<Arc<App>> {
    Router::new()
        .route(METRICS, get(service::metrics))
        .route(t::AUDIT, get(admin::audit))
        .route(t::BACKUP, post(admin::backup))
}

/// Samples, also of clients that know other APIs.
fn sampling_routes() -> Router<Arc<App>> {
    Router::new()
        .route(t::CREATE_SAMPLING_SESSION, post(sampling::create_session))
        .route(t::JOIN_SAMPLING_SESSION, post(sampling::join))
        .route(t::ASAMPLE, post(sampling::sample))
        .route("/oai/api/v1/completions", post(openai::completions))
        .route("/oai/api/v1/chat/completions", post(openai::chat))
        .route("/anthropic/api/v1/messages", post(anthropic::messages))
        .route(
            "/anthropic/api/v1/messages/count_tokens",
            post(anthropic::count_tokens),
        )
        .layer(Extension(BodySize::Medium))
}

/// Where signed links lead.
fn signed_routes() -> Router<Arc<App>> {
    Router::new()
        .route(
            "/signed/files/{run}/{segment}/{name}/{file}",
            get(signed::file),
        )
        .route(
            "/signed/archives/{run}/{segment}/{name}",
            get(signed::archive),
        )
        .route("/signed/traces/{session}", get(signed::trace))
        .route("/signed/uploads/{upload}/{file}", put(uploads::receive))
        .layer(Extension(BodySize::Large))
}

fn under(path: &str, rest: &str) -> String {
    format!("{path}{rest}")
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
