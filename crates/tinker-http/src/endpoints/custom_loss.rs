//! Uploading a traced loss.

use tinker_types::{CREATE_CUSTOM_LOSS, CreateCustomLossRequest, UntypedFuture};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

impl Client {
    /// Submits a traced loss; its future brings a `CreateCustomLossResponse`.
    ///
    /// Endpoint: `POST /api/v1/create_custom_loss`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn create_custom_loss(
        &self,
        request: &CreateCustomLossRequest,
    ) -> Result<UntypedFuture> {
        let call = Call::post(self, TrafficClass::Train, CREATE_CUSTOM_LOSS, request)?;
        self.send(call).await?.json()
    }
}
