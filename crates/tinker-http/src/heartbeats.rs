//! The heartbeats of one session, over connections that no other call has.

use tinker_types::SessionId;

use crate::client::Client;
use crate::error::Result;

/// Keeps one session alive from a runtime of its own.
///
/// The runtime that calls [`beat`](Self::beat) drives its connections, alone: a heartbeat waits for
/// nothing that another runtime has to do, and leaves nothing behind that others would miss when
/// its runtime ends. Where the server wants tokens, it uses the newest there is, and replaces one
/// that nobody else replaced in time.
#[derive(Debug)]
pub struct Heartbeats {
    http: Client,
    pool: reqwest::Client,
    session_id: SessionId,
}

impl Heartbeats {
    /// Those of this session. Sends nothing.
    ///
    /// # Errors
    /// Of kind `Connect` if no connections can be set up.
    pub fn new(http: &Client, session_id: SessionId) -> Result<Self> {
        Ok(Self {
            http: http.clone(),
            pool: http.inner().pools.apart()?,
            session_id,
        })
    }

    /// Says that the session is in use: once, and once more if its token was refused, in 15 s, tokens
    /// included. Where a command prints the credential it may take its minute beside; it waits for
    /// one that another runtime runs.
    ///
    /// Endpoint: `POST /api/v1/session_heartbeat`.
    ///
    /// # Errors
    /// If the call fails; of kind `Expired` if the session is over, and `Timeout` if time is up.
    pub async fn beat(&self) -> Result<()> {
        let pool = self.pool.clone();
        self.http.heartbeat(&self.session_id, Some(pool)).await
    }
}
