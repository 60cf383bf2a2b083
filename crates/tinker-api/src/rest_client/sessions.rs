//! Sessions: look-up, search, projects and traces; and who asks.

use std::time::Duration;

use tinker_http::{AccessScope, Page};
use tinker_types::{
    CheckpointSearchRequest, CheckpointSearchResponse, ProjectId, SessionId, SessionInfo,
    SessionSearchRequest, SessionSearchResponse, SignedUrl, TraceStatus, Whoami,
};

use super::RestClient;
use crate::error::{Error, Result};

/// Rows that a search may return at a time.
const SEARCH_LIMIT: std::ops::RangeInclusive<u32> = 1..=200;
/// Time between two questions for a trace.
const TRACE_INTERVAL: Duration = Duration::from_secs(5);

impl RestClient {
    /// Describes a session.
    ///
    /// Endpoint: `GET /api/v1/sessions/{id}`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_session(&self, id: &SessionId) -> Result<SessionInfo> {
        self.get_session_in(id, AccessScope::Owned).await
    }

    /// Describes a session that need not be one's own.
    ///
    /// Endpoint: `GET /api/v1/sessions/{id}`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_session_in(&self, id: &SessionId, scope: AccessScope) -> Result<SessionInfo> {
        Ok(self.http.get_session(id, scope).await?)
    }

    /// Lists one page of one's sessions, newest first.
    ///
    /// Endpoint: `GET /api/v1/sessions`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_sessions(&self, page: Page) -> Result<Vec<SessionId>> {
        self.list_sessions_in(page, AccessScope::Owned).await
    }

    /// Lists one page of sessions, newest first, by owner.
    ///
    /// Endpoint: `GET /api/v1/sessions`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_sessions_in(&self, page: Page, scope: AccessScope) -> Result<Vec<SessionId>> {
        Ok(self.http.list_sessions(page, scope).await?.sessions)
    }

    /// Finds sessions, newest first; the answer's cursor leads to the next page. Experimental on the
    /// service's side.
    ///
    /// Endpoint: `POST /api/v1/sessions/search`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if `limit` is not 1 to 200, or a name or list of states is empty;
    /// and if the call fails.
    pub async fn search_sessions(
        &self,
        request: &SessionSearchRequest,
    ) -> Result<SessionSearchResponse> {
        check_limit(request.limit)?;
        if request.display_name.as_deref() == Some("") {
            return Err(Error::InvalidRequest("display_name is empty".into()));
        }
        if request.statuses.as_ref().is_some_and(Vec::is_empty) {
            let text = "statuses is empty: leave it out to find sessions in any state";
            return Err(Error::InvalidRequest(text.into()));
        }
        Ok(self.http.search_sessions(request).await?)
    }

    /// Finds checkpoints, newest first; the answer's cursor leads to the next page. Experimental, on
    /// servers for SDK 0.39.
    ///
    /// Endpoint: `POST /api/v1/checkpoints/search`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if `limit` is not 1 to 200, and if the call fails.
    pub async fn search_checkpoints(
        &self,
        request: &CheckpointSearchRequest,
    ) -> Result<CheckpointSearchResponse> {
        check_limit(request.limit)?;
        Ok(self.http.search_checkpoints(request).await?)
    }

    /// Moves a session to a project, with its runs and checkpoints.
    ///
    /// Endpoint: `PUT /api/v1/sessions/{id}/project`.
    ///
    /// # Errors
    /// If the call fails; of kind `PermissionDenied` if one may not write to the project.
    pub async fn assign_session_project(
        &self,
        session_id: &SessionId,
        project_id: &ProjectId,
    ) -> Result<()> {
        Ok(self
            .http
            .assign_session_project(session_id, project_id)
            .await?)
    }

    /// Has a Perfetto trace of a session written and says where to read it: a plain `GET` without a
    /// key, for about an hour. Asks every 5 s until it is written, or as often as the longest delay
    /// of the poll policy if that is less.
    ///
    /// Endpoint: `GET /api/v1/sessions/{id}/trace_export`.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the server cannot write it, and if a call fails.
    pub async fn export_session_trace(&self, session_id: &SessionId) -> Result<SignedUrl> {
        let interval = TRACE_INTERVAL.min(self.http.poll_policy().backoff.max_delay);
        let failed = |why: &str| {
            Error::Protocol(format!(
                "the trace of session {session_id} has failed: {why}"
            ))
        };
        loop {
            let trace = self.http.session_trace(session_id).await?;
            match (trace.status, trace.url) {
                (TraceStatus::Ready, Some(url)) => return Ok(url),
                (TraceStatus::Ready, None) => return Err(failed("the server did not say where")),
                (TraceStatus::Failed, _) => {
                    return Err(failed(
                        trace.error.as_deref().unwrap_or("no reason was given"),
                    ));
                }
                _ => self.http.sleep(interval).await,
            }
        }
    }

    /// Says whom the credential speaks for, by its token's claims. Asks no endpoint but the token
    /// exchange.
    ///
    /// # Errors
    /// If the server hands out no tokens and the credential is not one that says.
    pub async fn whoami(&self) -> Result<Whoami> {
        Ok(self.http.whoami().await?)
    }
}

fn check_limit(limit: u32) -> Result<()> {
    if SEARCH_LIMIT.contains(&limit) {
        return Ok(());
    }
    Err(Error::InvalidRequest(format!(
        "limit {limit}: it must be 1 to {}",
        SEARCH_LIMIT.end()
    )))
}
