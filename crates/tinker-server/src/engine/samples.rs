//! Samples on the engine.

use std::time::Duration;

use tinker_engine::AdapterId;
use tinker_types::RequestId;

use super::Worker;

#[derive(Debug, Default)]
pub(super) struct Sampling {}

impl Sampling {
    pub(super) fn is_active(&self) -> bool {
        false
    }
    pub(super) fn uses(&self, _adapter: AdapterId) -> bool {
        false
    }
}

impl Worker {
    pub(super) fn admit(&mut self, _id: &RequestId) {}
    pub(super) fn cancel(&mut self, _id: &RequestId) {}
    pub(super) fn sample_for(&mut self, _share: Duration) {}
}
