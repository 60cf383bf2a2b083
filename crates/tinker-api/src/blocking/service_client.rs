//! The entry to the blocking clients.

use std::future::Future;
use std::sync::Arc;

use tinker_types::{FinishReason, ServerCapabilities, TinkerPath};

use super::{Background, SamplingClient, TrainingClient};
use crate::error::Result;
use crate::options::{SamplingSource, StateOptions, TrainingOptions};
use crate::service_client::ServiceClientBuilder;

/// A [`ServiceClient`](crate::ServiceClient) whose methods block. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ServiceClient {
    inner: crate::ServiceClient,
    background: Arc<Background>,
}

impl ServiceClient {
    /// Checks the settings and starts a runtime on a thread of its own. Sends nothing.
    ///
    /// # Errors
    /// As [`ServiceClientBuilder::build`], or if the system has no thread left.
    pub fn new(builder: ServiceClientBuilder) -> Result<Self> {
        let inner = builder.build()?;
        let background = Arc::new(Background::start(inner.submissions().clone())?);
        Ok(Self { inner, background })
    }

    /// The async client, for what has no method here.
    #[must_use]
    pub const fn inner(&self) -> &crate::ServiceClient {
        &self.inner
    }

    /// Blocks until a future of the async clients ends.
    ///
    /// # Errors
    /// Those of the future; [`Error::Abandoned`](crate::Error::Abandoned) if it panics, and
    /// [`Error::InvalidRequest`](crate::Error::InvalidRequest) if an observer of this client calls
    /// it: hand the work to another thread.
    pub fn wait_for<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.background.wait_for(future)
    }

    /// As [`get_server_capabilities`](crate::ServiceClient::get_server_capabilities).
    ///
    /// # Errors
    /// As there.
    pub fn get_server_capabilities(&self) -> Result<ServerCapabilities> {
        let inner = self.inner.clone();
        self.wait_for(async move { inner.get_server_capabilities().await })
    }

    /// As [`create_lora_training_client`](crate::ServiceClient::create_lora_training_client).
    ///
    /// # Errors
    /// As there.
    pub fn create_lora_training_client(
        &self,
        base_model: impl Into<String>,
        options: impl Into<TrainingOptions>,
    ) -> Result<TrainingClient> {
        let (base_model, options) = (base_model.into(), options.into());
        let inner = self.inner.clone();
        let create = async move { inner.create_lora_training_client(base_model, options).await };
        self.training_client(create)
    }

    /// As [`create_training_client_from_state`](
    /// crate::ServiceClient::create_training_client_from_state).
    ///
    /// # Errors
    /// As there.
    pub fn create_training_client_from_state(
        &self,
        path: &TinkerPath,
        options: StateOptions,
    ) -> Result<TrainingClient> {
        let (inner, path) = (self.inner.clone(), path.clone());
        let create = async move {
            inner
                .create_training_client_from_state(&path, options)
                .await
        };
        self.training_client(create)
    }

    /// As [`create_training_client_from_state_with_optimizer`](
    /// crate::ServiceClient::create_training_client_from_state_with_optimizer).
    ///
    /// # Errors
    /// As there.
    pub fn create_training_client_from_state_with_optimizer(
        &self,
        path: &TinkerPath,
        options: StateOptions,
    ) -> Result<TrainingClient> {
        let (inner, path) = (self.inner.clone(), path.clone());
        let create = async move {
            inner
                .create_training_client_from_state_with_optimizer(&path, options)
                .await
        };
        self.training_client(create)
    }

    fn training_client(
        &self,
        create: impl Future<Output = Result<crate::TrainingClient>> + Send + 'static,
    ) -> Result<TrainingClient> {
        let inner = self.wait_for(create)?;
        Ok(TrainingClient::new(&self.background, inner))
    }

    /// As [`create_sampling_client`](crate::ServiceClient::create_sampling_client).
    ///
    /// # Errors
    /// As there.
    pub fn create_sampling_client(
        &self,
        source: impl Into<SamplingSource>,
    ) -> Result<SamplingClient> {
        let (inner, source) = (self.inner.clone(), source.into());
        let create = async move { inner.create_sampling_client(source).await };
        Ok(SamplingClient::new(
            &self.background,
            self.wait_for(create)?,
        ))
    }

    /// As [`close`](crate::ServiceClient::close). Results that are awaited still come.
    ///
    /// # Errors
    /// As there.
    pub fn close(&self, reason: FinishReason, detail: Option<String>) -> Result<()> {
        let inner = self.inner.clone();
        self.wait_for(async move { inner.close(reason, detail).await })
    }
}
