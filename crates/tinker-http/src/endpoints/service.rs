//! Health and capabilities.

use tinker_types::{CAPABILITIES, HEALTHZ, HealthResponse, ServerCapabilities};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

impl Client {
    /// Asks once whether the server is there.
    ///
    /// Endpoint: `GET /api/v1/healthz`.
    ///
    /// # Errors
    /// If it does not answer `ok`.
    pub async fn healthz(&self) -> Result<HealthResponse> {
        let url = self.base_url().join(HEALTHZ, []);
        let call = Call::get(self, TrafficClass::Session, url)
            .retry(RetryPolicy::never())
            .with_raw_key();
        self.send(call).await?.json()
    }

    /// Lists the base models on offer.
    ///
    /// Endpoint: `GET /api/v1/get_server_capabilities`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_server_capabilities(&self) -> Result<ServerCapabilities> {
        let url = self.base_url().join(CAPABILITIES, []);
        let call = Call::get(self, TrafficClass::Rest, url);
        self.send(call).await?.json()
    }

    /// Asks once, without repetition, whether the credential is accepted and the account is set up.
    ///
    /// Endpoint: `GET /api/v1/get_server_capabilities`.
    ///
    /// # Errors
    /// Of kind `Unauthenticated` if the credential is refused, `BillingPaused` if billing is
    /// missing, `Connect` if the server cannot be reached.
    pub async fn check_accessible(&self) -> Result<()> {
        let url = self.base_url().join(CAPABILITIES, []);
        let call = Call::get(self, TrafficClass::Rest, url).retry(RetryPolicy::never());
        self.send(call).await.map(drop)
    }
}
