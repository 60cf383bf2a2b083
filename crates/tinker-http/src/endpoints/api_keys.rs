//! The API key itself: whose it is, and its end.

use reqwest::Method;
use tinker_types::{API_KEY, ApiKeyInfo};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

impl Client {
    /// Says whose the key of this client is. The raw key is sent, never a token.
    ///
    /// Endpoint: `GET /api/v1/auth/apikey/me`.
    ///
    /// # Errors
    /// If the call fails; of kind `Unauthenticated` if the key is not known.
    pub async fn api_key_info(&self) -> Result<ApiKeyInfo> {
        let url = self.base_url().join(API_KEY, []);
        let call = Call::get(self, TrafficClass::Session, url).with_raw_key();
        self.send(call).await?.json()
    }

    /// Deletes the key of this client on the server.
    ///
    /// Endpoint: `DELETE /api/v1/auth/apikey/me`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn delete_api_key(&self) -> Result<()> {
        let url = self.base_url().join(API_KEY, []);
        let call = Call::new(self, Method::DELETE, TrafficClass::Session, url).with_raw_key();
        self.send(call).await.map(drop)
    }
}
