//! Telemetry.

use std::time::Duration;

use tinker_types::{TELEMETRY, TelemetryRequest, TelemetryResponse};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::machine::RetryPolicy;
use crate::pools::TrafficClass;

/// Time for a report: nobody waits for one.
const TELEMETRY_TIMEOUT: Duration = Duration::from_secs(5);

impl Client {
    /// Reports events: one attempt of 5 s. What may be in an event is the caller's business.
    ///
    /// Endpoint: `POST /api/v1/telemetry`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn send_telemetry(&self, request: &TelemetryRequest) -> Result<TelemetryResponse> {
        let call = Call::post(self, TrafficClass::Session, TELEMETRY, request)?
            .retry(RetryPolicy::never())
            .timeout(TELEMETRY_TIMEOUT);
        self.send(call).await?.json()
    }
}
