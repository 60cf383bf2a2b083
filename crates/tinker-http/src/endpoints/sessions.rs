//! Sessions: creation, heartbeat, end and look-up.

use std::time::Duration;

use reqwest::Method;
use tinker_types::{
    AssignProjectRequest, CREATE_SESSION, CreateSessionRequest, CreateSessionResponse,
    FinishSessionRequest, HeartbeatRequest, ProjectId, SESSION_HEARTBEAT, SESSIONS, SessionId,
    SessionInfo, SessionsResponse, TraceExport,
};

use super::training_runs::{AccessScope, Page};
use crate::call::{Body, Call};
use crate::client::Client;
use crate::credentials::{COMMAND_TIMEOUT, CredentialOrigin};
use crate::error::{Error, ErrorKind, Result};
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

/// Time for a heartbeat: the next one comes soon.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for all that a heartbeat takes but a credential command: tokens, and another attempt.
const HEARTBEAT_TOTAL: Duration = Duration::from_secs(15);
/// Time for the end of a session: who ends one wants to leave, and the server ends it anyway when
/// its heartbeats cease.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);

impl Client {
    /// Opens a session.
    ///
    /// Endpoint: `POST /api/v1/create_session`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn create_session(
        &self,
        request: &CreateSessionRequest,
    ) -> Result<CreateSessionResponse> {
        let call = Call::post(self, TrafficClass::Session, CREATE_SESSION, request)?;
        self.send(call).await?.json()
    }

    /// Keeps a session alive: in 15 s, tokens included, and a minute more for a credential command.
    ///
    /// Endpoint: `POST /api/v1/session_heartbeat`.
    ///
    /// # Errors
    /// If the call fails; of kind `Expired` if the session is over.
    pub async fn session_heartbeat(&self, session_id: &SessionId) -> Result<()> {
        self.heartbeat(session_id, None).await
    }

    /// One heartbeat, over connections of its own if it is given some.
    pub(crate) async fn heartbeat(
        &self,
        session_id: &SessionId,
        apart: Option<reqwest::Client>,
    ) -> Result<()> {
        let request = HeartbeatRequest {
            session_id: session_id.clone(),
            tag: tinker_types::SessionHeartbeatTag,
        };
        let call = Call::post(self, TrafficClass::Session, SESSION_HEARTBEAT, &request)?
            .apart(apart)
            .retry(RetryPolicy::never())
            .timeout(HEARTBEAT_TIMEOUT);
        // A command that was ended half way may have used up what it works only once with.
        let limit = match self.credential_origin() {
            CredentialOrigin::Command => HEARTBEAT_TOTAL + COMMAND_TIMEOUT,
            _ => HEARTBEAT_TOTAL,
        };
        tokio::select! {
            outcome = self.send(call) => outcome.map(drop),
            () = self.sleep(limit) => Err(Error::new(
                ErrorKind::Timeout,
                format!("the heartbeat of session {session_id} did not end within {limit:?}"),
            )),
        }
    }

    /// Ends a session: one attempt, 3 s in all. The first reason given wins.
    ///
    /// Endpoint: `POST /api/v1/sessions/{id}/finish`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn finish_session(
        &self,
        session_id: &SessionId,
        request: &FinishSessionRequest,
    ) -> Result<()> {
        let url = self
            .base_url()
            .join(SESSIONS, [session_id.as_str(), "finish"]);
        let call = Call::new(self, Method::POST, TrafficClass::Session, url)
            .body(Body::json(request)?)
            .retry(RetryPolicy::never())
            .timeout(FINISH_TIMEOUT);
        // A token that has to be fetched first counts, too.
        tokio::select! {
            outcome = self.send(call) => outcome.map(drop),
            () = self.sleep(FINISH_TIMEOUT) => Err(Error::new(
                ErrorKind::Timeout,
                format!("session {session_id} was not ended within {FINISH_TIMEOUT:?}"),
            )),
        }
    }

    /// Lists sessions, newest first.
    ///
    /// Endpoint: `GET /api/v1/sessions`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_sessions(&self, page: Page, scope: AccessScope) -> Result<SessionsResponse> {
        let mut url = self.base_url().join(SESSIONS, []);
        page.write(&mut url);
        scope.write(&mut url);
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }

    /// Describes a session.
    ///
    /// Endpoint: `GET /api/v1/sessions/{id}`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_session(
        &self,
        session_id: &SessionId,
        scope: AccessScope,
    ) -> Result<SessionInfo> {
        let mut url = self.base_url().join(SESSIONS, [session_id.as_str()]);
        scope.write(&mut url);
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }

    /// Moves a session to a project, with its runs and checkpoints.
    ///
    /// Endpoint: `PUT /api/v1/sessions/{id}/project`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn assign_session_project(
        &self,
        session_id: &SessionId,
        project_id: &ProjectId,
    ) -> Result<()> {
        let url = self
            .base_url()
            .join(SESSIONS, [session_id.as_str(), "project"]);
        let request = AssignProjectRequest {
            project_id: project_id.clone(),
        };
        let call =
            Call::new(self, Method::PUT, TrafficClass::Rest, url).body(Body::json(&request)?);
        self.send(call).await.map(drop)
    }

    /// Asks once whether the trace of a session can be read; the first question has it written.
    ///
    /// Endpoint: `GET /api/v1/sessions/{id}/trace_export`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn session_trace(&self, session_id: &SessionId) -> Result<TraceExport> {
        let url = self
            .base_url()
            .join(SESSIONS, [session_id.as_str(), "trace_export"]);
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }
}
