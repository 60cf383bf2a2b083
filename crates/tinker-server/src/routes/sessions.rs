//! Sessions: creation, heartbeat, end and look-up.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use tinker_types::{
    AssignProjectRequest, CreateSessionRequest, CreateSessionResponse, FinishSessionRequest,
    HeartbeatRequest, HeartbeatResponse, SessionId, SessionInfo, SessionsResponse, TraceExport,
    TraceStatus,
};

use super::{Page, idempotency_key};
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Params, Parsed, blocking};
use crate::links::{LinkMaker, Scheme};

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    request: Parsed<CreateSessionRequest>,
) -> ApiResult<Json<CreateSessionResponse>> {
    let key = idempotency_key(&headers);
    let session_id = blocking(&app, move |app| {
        let is_repeated = key
            .as_deref()
            .is_some_and(|key| app.core.catalog.session_of_key(key).is_some());
        if !is_repeated {
            app.check_sessions()?;
        }
        Ok(app.core.catalog.create_session(request.value, key)?)
    })
    .await?;
    Ok(Json(CreateSessionResponse {
        session_id,
        tag: Default::default(),
        info_message: None,
        warning_message: None,
        error_message: None,
    }))
}

pub(crate) async fn heartbeat(
    State(app): State<Arc<App>>,
    request: Parsed<HeartbeatRequest>,
) -> ApiResult<Json<HeartbeatResponse>> {
    let id = request.value.session_id;
    if app.core.catalog.beat(&id)? {
        Ok(Json(HeartbeatResponse::default()))
    } else {
        // Clients stop their heartbeats then.
        Err(ApiError::gone(format!("session {id} was ended")))
    }
}

pub(crate) async fn finish(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    request: Parsed<FinishSessionRequest>,
) -> ApiResult<StatusCode> {
    let id = session_id(&id)?;
    blocking(&app, move |app| {
        Ok(app.core.finish_session(&id, request.value)?)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Params(page): Params<Page>,
) -> Json<SessionsResponse> {
    let (sessions, _cursor) = page.cut(app.core.catalog.sessions(), 20);
    Json(SessionsResponse {
        sessions: sessions.into_iter().map(|s| s.id).collect(),
    })
}

pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> ApiResult<Json<SessionInfo>> {
    let session = app.core.catalog.session(&session_id(&id)?)?;
    let (training_run_ids, sampler_ids) = app.core.catalog.of_session(&session.id);
    Ok(Json(SessionInfo {
        training_run_ids,
        sampler_ids,
        user_metadata: Some(session.request.user_metadata),
        display_name: session.request.display_name,
    }))
}

/// Files a session, with its runs and checkpoints, under another project.
pub(crate) async fn assign_project(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    request: Parsed<AssignProjectRequest>,
) -> ApiResult<StatusCode> {
    let id = session_id(&id)?;
    blocking(&app, move |app| {
        let project = request.value.project_id;
        let details = serde_json::json!({"session_id": id, "project_id": project});
        app.core.catalog.assign_project(&id, project)?;
        app.core.accounts.note("project_session_assigned", details);
        Ok(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The trace is made when its link is read, so it is ready at once.
pub(crate) async fn export_trace(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    scheme: Scheme,
    headers: HeaderMap,
    uri: Uri,
) -> ApiResult<Json<TraceExport>> {
    let session = app.core.catalog.session(&session_id(&id)?)?;
    let links = LinkMaker::of_request(app.token(), (scheme, &headers, &uri))?;
    Ok(Json(TraceExport {
        status: TraceStatus::Ready,
        url: Some(links.link(&["traces", session.id.as_str()])),
        error: None,
    }))
}

pub(super) fn session_id(text: &str) -> ApiResult<SessionId> {
    text.parse()
        .map_err(|e: tinker_types::TypeError| ApiError::bad_request(e.to_string()))
}
