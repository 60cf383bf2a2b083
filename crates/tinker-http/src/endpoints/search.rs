//! Search of sessions and checkpoints.

use tinker_types::{
    CheckpointSearchRequest, CheckpointSearchResponse, SEARCH_CHECKPOINTS, SEARCH_SESSIONS,
    SessionSearchRequest, SessionSearchResponse,
};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

impl Client {
    /// Finds sessions, newest first. Experimental on the service's side.
    ///
    /// Endpoint: `POST /api/v1/sessions/search`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn search_sessions(
        &self,
        request: &SessionSearchRequest,
    ) -> Result<SessionSearchResponse> {
        let call = Call::post(self, TrafficClass::Rest, SEARCH_SESSIONS, request)?;
        self.send(call).await?.json()
    }

    /// Finds checkpoints, newest first. Experimental, on servers for SDK 0.39.
    ///
    /// Endpoint: `POST /api/v1/checkpoints/search`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn search_checkpoints(
        &self,
        request: &CheckpointSearchRequest,
    ) -> Result<CheckpointSearchResponse> {
        let call = Call::post(self, TrafficClass::Rest, SEARCH_CHECKPOINTS, request)?;
        self.send(call).await?.json()
    }
}
