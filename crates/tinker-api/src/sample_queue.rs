//! Samples that wait to be submitted: a queue per sampler, so that a waiting sample costs no task.

use std::sync::Arc;

use tinker_http::{Event, Place};
use tinker_types::{SampleRequest, SampleResponse};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::api_future::Promise;
use crate::error::Error;
use crate::sampler::Sampler;

/// A sample to draw, and where to put it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: SampleRequest,
    pub(crate) promise: Promise<SampleResponse>,
}

/// The waiting samples of a sampler, first come, first served.
///
/// When it is dropped, those in it are still drawn.
#[derive(Debug)]
pub(crate) struct SampleQueue(mpsc::UnboundedSender<Job>);

impl SampleQueue {
    /// Starts drawing samples on the session's runtime.
    pub(crate) fn start(sampler: Arc<Sampler>) -> Self {
        // Unbounded, since callers queue without waiting; each entry is a future in their hands.
        let (sender, jobs) = mpsc::unbounded_channel();
        let runtime = sampler.session.runtime.clone();
        runtime.spawn(submit_in_order(sampler, jobs));
        Self(sender)
    }

    /// Puts a sample at the end.
    pub(crate) fn push(&self, job: Job) {
        if let Err(mpsc::error::SendError(job)) = self.0.send(job) {
            let stopped = Error::InvalidRequest("the runtime of the sampler has ended".into());
            job.promise.send(Err(stopped)).ok();
        }
    }
}

async fn submit_in_order(sampler: Arc<Sampler>, mut jobs: mpsc::UnboundedReceiver<Job>) {
    let n_slots = sampler.max_in_flight().min(Semaphore::MAX_PERMITS);
    let slots = Arc::new(Semaphore::new(n_slots));
    while let Some(job) = jobs.recv().await {
        if job.promise.is_closed() {
            continue;
        }
        // Never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let place = sampler.session.http.sample_gate().enter().await;
        let sampler = Arc::clone(&sampler);
        let runtime = sampler.session.runtime.clone();
        runtime.spawn(draw(sampler, job, place, slot));
    }
}

/// Draws a sample for as long as somebody waits for it.
async fn draw(sampler: Arc<Sampler>, job: Job, place: Place, slot: OwnedSemaphorePermit) {
    let Job {
        request,
        mut promise,
    } = job;
    let result = tokio::select! {
        biased;
        () = promise.closed() => return,
        result = sampler.draw(request) => result,
    };
    if result.is_ok()
        && let Some(limit) = place.succeed()
    {
        let http = &sampler.session.http;
        http.tell(&Event::SamplingLimit { limit });
    }
    drop(slot);
    // Nobody listens any more if this fails.
    promise.send(result).ok();
}
