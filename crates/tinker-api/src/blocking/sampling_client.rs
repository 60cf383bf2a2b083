//! A sampler, without async.

use std::sync::Arc;

use tinker_types::{ModelInput, SampleResponse, SamplingParams};

use super::{Background, Pending};
use crate::options::SampleOptions;

/// A [`SamplingClient`](crate::SamplingClient) whose results block. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SamplingClient {
    inner: crate::SamplingClient,
    background: Arc<Background>,
}

impl SamplingClient {
    pub(super) fn new(background: &Arc<Background>, inner: crate::SamplingClient) -> Self {
        Self {
            inner,
            background: Arc::clone(background),
        }
    }

    /// The async client, for what has no method here.
    #[must_use]
    pub const fn inner(&self) -> &crate::SamplingClient {
        &self.inner
    }

    /// As [`sample`](crate::SamplingClient::sample).
    pub fn sample(
        &self,
        prompt: ModelInput,
        params: SamplingParams,
        options: SampleOptions,
    ) -> Pending<SampleResponse> {
        Pending::new(&self.background, self.inner.sample(prompt, params, options))
    }

    /// As [`compute_logprobs`](crate::SamplingClient::compute_logprobs).
    pub fn compute_logprobs(&self, prompt: ModelInput) -> Pending<Vec<Option<f32>>> {
        Pending::new(&self.background, self.inner.compute_logprobs(prompt))
    }
}
