//! Search of sessions and checkpoints, newest first, page by page.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tinker_types::{
    CheckpointSearchCursor, CheckpointSearchRequest, CheckpointSearchResponse, FinishKind,
    FinishReason, SearchOwner, SessionSearchCursor, SessionSearchRequest, SessionSearchResponse,
    SessionStatus, SessionStatusQuery, SessionSummary, Timestamp,
};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Parsed, blocking};
use crate::caller;
use crate::catalog::{Catalog, LOCAL_PROJECT, SavedCheckpoint, Session};
use crate::clock::{Millis, millis, timestamp};

/// Most rows of a page.
const MAX_LIMIT: u32 = 200;

pub(crate) async fn sessions(
    State(app): State<Arc<App>>,
    request: Parsed<SessionSearchRequest>,
) -> ApiResult<Json<SessionSearchResponse>> {
    check(&request.value)?;
    blocking(&app, move |app| find(&app.core.catalog, &request.value))
        .await
        .map(Json)
}

fn check(request: &SessionSearchRequest) -> ApiResult<()> {
    check_page(request.limit, &request.owner)?;
    let is_empty = |what: &str| {
        Err(ApiError::unprocessable(format!(
            "{what} is empty: leave it out to find all"
        )))
    };
    if request.display_name.as_deref() == Some("") {
        return is_empty("display_name");
    }
    if request.statuses.as_ref().is_some_and(Vec::is_empty) {
        return is_empty("statuses");
    }
    Ok(())
}

fn check_page(limit: u32, owner: &SearchOwner) -> ApiResult<()> {
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::unprocessable(format!(
            "limit {limit} must be between 1 and {MAX_LIMIT}"
        )));
    }
    match owner {
        SearchOwner::User { owner_urns } if !(1..=10).contains(&owner_urns.len()) => {
            Err(ApiError::unprocessable(format!(
                "owner_urns has {} entries: name 1 to 10",
                owner_urns.len()
            )))
        }
        _ => Ok(()),
    }
}

/// Whether what belongs to a session is asked for. What the caller may not see is none of what is
/// searched.
fn is_owned_by(asked: &SearchOwner, session: &Session) -> bool {
    match asked {
        SearchOwner::Own => session.owner == caller::current_key(),
        SearchOwner::Accessible => true,
        SearchOwner::User { owner_urns } => owner_urns.contains(&session.user()),
    }
}

fn find(catalog: &Catalog, request: &SessionSearchRequest) -> ApiResult<SessionSearchResponse> {
    let after = match &request.cursor {
        Some(cursor) => Some((
            moment(&cursor.last_created_at)?,
            cursor.last_session_id.clone(),
        )),
        None => None,
    };
    let mut found = catalog.sessions();
    found.retain(|session| {
        is_owned_by(&request.owner, session)
            && matches(session, request)
            && after
                .as_ref()
                .is_none_or(|(at, id)| (session.created_at, &session.id) < (*at, id))
    });
    let limit = request.limit as usize;
    let has_more = found.len() > limit;
    found.truncate(limit);
    let next_cursor = found
        .last()
        .filter(|_| has_more)
        .map(|last| SessionSearchCursor {
            last_created_at: timestamp(last.created_at),
            last_session_id: last.id.clone(),
        });
    let sessions = found
        .into_iter()
        .filter_map(|s| summary(catalog, s))
        .collect();
    Ok(SessionSearchResponse {
        sessions,
        next_cursor,
    })
}

fn moment(text: &Timestamp) -> ApiResult<Millis> {
    millis(text).ok_or_else(|| {
        ApiError::unprocessable(format!("last_created_at {:?} is no RFC 3339 time", text.0))
    })
}

fn matches(session: &Session, request: &SessionSearchRequest) -> bool {
    let asked = &session.request;
    let has =
        |(key, value): (&String, &serde_json::Value)| asked.user_metadata.get(key) == Some(value);
    let project = asked
        .project_id
        .as_ref()
        .map_or(LOCAL_PROJECT, |p| p.as_str());
    request
        .session_id
        .as_ref()
        .is_none_or(|id| *id == session.id)
        && request
            .display_name
            .is_none_or_eq(asked.display_name.as_ref())
        && request.user_metadata.iter().all(has)
        && request
            .project_ids
            .as_ref()
            .is_none_or(|ids| ids.iter().any(|id| id.as_str() == project))
        && request
            .statuses
            .as_ref()
            .is_none_or(|all| all.iter().any(|query| is_in(session, query)))
}

trait NoneOrEq<T> {
    fn is_none_or_eq(&self, other: Option<&T>) -> bool;
}

impl<T: PartialEq> NoneOrEq<T> for Option<T> {
    fn is_none_or_eq(&self, other: Option<&T>) -> bool {
        self.is_none() || self.as_ref() == other
    }
}

/// Sessions here are open or were ended by their client.
fn is_in(session: &Session, query: &SessionStatusQuery) -> bool {
    match (query, &session.finish) {
        (SessionStatusQuery::Active, finish) => finish.is_none(),
        (SessionStatusQuery::ClientFinished { reasons }, Some(finish)) => reasons
            .as_ref()
            .is_none_or(|kinds| kinds.contains(&kind_of(finish.reason))),
        _ => false,
    }
}

const fn kind_of(reason: FinishReason) -> FinishKind {
    match reason {
        FinishReason::Success => FinishKind::Success,
        FinishReason::Errored => FinishKind::Errored,
        FinishReason::Interrupted => FinishKind::Interrupted,
    }
}

fn summary(catalog: &Catalog, session: Session) -> Option<SessionSummary> {
    let project_id = catalog.project_of(&session)?;
    let (runs, _) = catalog.of_session(&session.id);
    let saved: Vec<SavedCheckpoint> = runs
        .iter()
        .flat_map(|r| catalog.checkpoints_of(r))
        .collect();
    let status = match &session.finish {
        None => SessionStatus::Active,
        Some(finish) => SessionStatus::ClientFinished {
            reason: finish.reason,
            detail: finish.detail.clone(),
        },
    };
    Some(SessionSummary {
        created_at: timestamp(session.created_at),
        owner: session.user(),
        project_id,
        checkpoints_count: saved.len() as u64,
        status: Some(status),
        display_name: session.request.display_name,
        user_metadata: Some(session.request.user_metadata),
        checkpoint_storage_bytes: Some(saved.iter().map(|c| c.size_bytes).sum()),
        session_id: session.id,
    })
}

pub(crate) async fn checkpoints(
    State(app): State<Arc<App>>,
    request: Parsed<CheckpointSearchRequest>,
) -> ApiResult<Json<CheckpointSearchResponse>> {
    check_page(request.value.limit, &request.value.owner)?;
    blocking(&app, move |app| {
        find_checkpoints(&app.core.catalog, &request.value)
    })
    .await
    .map(Json)
}

fn find_checkpoints(
    catalog: &Catalog,
    request: &CheckpointSearchRequest,
) -> ApiResult<CheckpointSearchResponse> {
    let after = match &request.cursor {
        Some(cursor) => Some((
            moment(&cursor.last_created_at)?,
            &cursor.last_checkpoint_uuid,
        )),
        None => None,
    };
    let mut found = catalog.checkpoints();
    // Ties in time are in the order of the paths' text, which is what the cursor holds.
    found.sort_by_key(|c| std::cmp::Reverse((c.created_at, c.path.to_string())));
    found.retain(|c| {
        catalog
            .session_of_run(&c.path.run)
            .is_some_and(|session| is_owned_by(&request.owner, &session))
            && is_asked_for(catalog, c, request)
            && after.is_none_or(|(at, path)| (c.created_at, &c.path.to_string()) < (at, path))
    });
    let limit = request.limit as usize;
    let has_more = found.len() > limit;
    found.truncate(limit);
    let next_cursor = found
        .last()
        .filter(|_| has_more)
        .map(|c| CheckpointSearchCursor {
            last_created_at: timestamp(c.created_at),
            last_checkpoint_uuid: c.path.to_string(),
        });
    Ok(CheckpointSearchResponse {
        checkpoints: found.iter().map(SavedCheckpoint::listed).collect(),
        next_cursor,
    })
}

fn is_asked_for(
    catalog: &Catalog,
    checkpoint: &SavedCheckpoint,
    request: &CheckpointSearchRequest,
) -> bool {
    let metadata = checkpoint.user_metadata.as_ref();
    let has = |(key, value): (&String, &String)| metadata.and_then(|m| m.get(key)) == Some(value);
    let project = || catalog.project_of_run(&checkpoint.path.run);
    request.user_metadata.iter().all(has)
        && request
            .checkpoint_type
            .is_none_or(|kind| kind == checkpoint.path.checkpoint.kind)
        && request
            .base_models
            .as_ref()
            .is_none_or(|names| names.contains(&checkpoint.base_model))
        && request
            .project_ids
            .as_ref()
            .is_none_or(|ids| project().is_some_and(|own| ids.contains(&own)))
}
