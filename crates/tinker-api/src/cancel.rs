//! Telling the server which samples nobody waits for any more, where servers want to know.

use futures_util::future::join_all;
use tinker_http::Client;
use tinker_types::RequestId;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Cancels abandoned samples in batches; it goes on until all are told, then ends with its sampler.
#[derive(Debug)]
pub(crate) struct Canceller(mpsc::UnboundedSender<RequestId>);

impl Canceller {
    /// Starts the task on a runtime.
    pub(crate) fn start(runtime: &Handle, http: Client) -> Self {
        // Unbounded, since it is filled from destructors; what waits here were samples in flight.
        let (sender, abandoned) = mpsc::unbounded_channel();
        runtime.spawn(cancel_all(http, abandoned));
        Self(sender)
    }

    /// Cancels a sample when the guard is dropped, unless it was disarmed.
    pub(crate) fn unless_disarmed(&self, request_id: &RequestId) -> CancelOnDrop<'_> {
        CancelOnDrop {
            canceller: self,
            request_id: Some(request_id.clone()),
        }
    }
}

/// Gives a sample up on drop.
#[derive(Debug)]
pub(crate) struct CancelOnDrop<'a> {
    canceller: &'a Canceller,
    request_id: Option<RequestId>,
}

impl CancelOnDrop<'_> {
    /// The sample is not given up.
    pub(crate) fn disarm(mut self) {
        self.request_id = None;
    }
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(request_id) = self.request_id.take() {
            // Fails if the runtime has stopped; then nobody can be told.
            self.canceller.0.send(request_id).ok();
        }
    }
}

async fn cancel_all(http: Client, mut abandoned: mpsc::UnboundedReceiver<RequestId>) {
    loop {
        let Some(first) = abandoned.recv().await else {
            return;
        };
        let config = http.dynamic_config().await.unwrap_or_default();
        let most = usize::try_from(config.sample_cancel_max_batch_size).unwrap_or(usize::MAX);
        let mut batch = vec![first];
        while batch.len() < most
            && let Ok(next) = abandoned.try_recv()
        {
            batch.push(next);
        }
        if config.sample_cancel_enabled {
            join_all(batch.iter().map(|id| cancel(&http, id))).await;
        }
    }
}

async fn cancel(http: &Client, request_id: &RequestId) {
    if let Err(error) = http.cancel_future(request_id).await {
        tracing::debug!(request.id = %request_id, %error, "a sample was not cancelled");
    }
}
