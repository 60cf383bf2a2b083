//! One training run, without async.

use std::sync::Arc;

use tinker_types::{
    Datum, ForwardBackwardOutput, OptimStepResponse, OptimizerParams, SamplerKind, TinkerPath,
};

use super::{Background, Pending, SamplingClient};
use crate::custom_loss::{CustomLossError, Logprobs, LossAndGradient};
use crate::error::Result;
use crate::loss::Loss;
use crate::options::SaveOptions;

/// A [`TrainingClient`](crate::TrainingClient) whose results block. Cheap to clone; clones share one
/// order of operations.
#[derive(Debug, Clone)]
pub struct TrainingClient {
    inner: crate::TrainingClient,
    background: Arc<Background>,
}

impl TrainingClient {
    pub(super) fn new(background: &Arc<Background>, inner: crate::TrainingClient) -> Self {
        Self {
            inner,
            background: Arc::clone(background),
        }
    }

    /// The async client, for what has no method here.
    #[must_use]
    pub const fn inner(&self) -> &crate::TrainingClient {
        &self.inner
    }

    /// As [`forward`](crate::TrainingClient::forward).
    pub fn forward(
        &self,
        data: Vec<Datum>,
        loss: impl Into<Loss>,
    ) -> Pending<ForwardBackwardOutput> {
        Pending::new(&self.background, self.inner.forward(data, loss))
    }

    /// As [`forward_backward`](crate::TrainingClient::forward_backward).
    pub fn forward_backward(
        &self,
        data: Vec<Datum>,
        loss: impl Into<Loss>,
    ) -> Pending<ForwardBackwardOutput> {
        Pending::new(&self.background, self.inner.forward_backward(data, loss))
    }

    /// As [`forward_backward_custom`](crate::TrainingClient::forward_backward_custom).
    pub fn forward_backward_custom<F>(
        &self,
        data: Vec<Datum>,
        loss: F,
    ) -> Pending<ForwardBackwardOutput>
    where
        F: FnOnce(&[Datum], &[Logprobs]) -> Result<LossAndGradient, CustomLossError>
            + Send
            + 'static,
    {
        let future = self.inner.forward_backward_custom(data, loss);
        Pending::new(&self.background, future)
    }

    /// As [`optim_step`](crate::TrainingClient::optim_step).
    pub fn optim_step(&self, params: impl Into<OptimizerParams>) -> Pending<OptimStepResponse> {
        Pending::new(&self.background, self.inner.optim_step(params))
    }

    /// As [`save_state`](crate::TrainingClient::save_state).
    pub fn save_state(&self, name: impl AsRef<str>, options: SaveOptions) -> Pending<TinkerPath> {
        Pending::new(&self.background, self.inner.save_state(name, options))
    }

    /// As [`save_weights_for_sampler`](crate::TrainingClient::save_weights_for_sampler).
    pub fn save_weights_for_sampler(
        &self,
        name: impl AsRef<str>,
        options: SaveOptions,
    ) -> Pending<TinkerPath> {
        let future = self.inner.save_weights_for_sampler(name, options);
        Pending::new(&self.background, future)
    }

    /// As [`save_weights_and_get_sampling_client`](
    /// crate::TrainingClient::save_weights_and_get_sampling_client).
    ///
    /// # Errors
    /// As there.
    pub fn save_weights_and_get_sampling_client(
        &self,
        kind: SamplerKind,
    ) -> Result<SamplingClient> {
        let future = self.inner.save_weights_and_get_sampling_client(kind);
        let inner = self.background.wait_for(future)?;
        Ok(SamplingClient::new(&self.background, inner))
    }
}
