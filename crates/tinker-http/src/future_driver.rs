//! Waits for a future: does what [`FuturePoll`] says and tells it what happened.

use std::time::Duration;

use tinker_types::{FailedFuture, RequestId, SampleResponse};
use tracing::Instrument as _;

use crate::client::Client;
use crate::clock::Clock;
use crate::endpoints::FutureResult;
use crate::error::Result;
use crate::inquiry::Inquiry;
use crate::machine::{FuturePoll, PollEvent, PollPolicy, PollStep};
use crate::request_type::RequestType;
use crate::spans;

/// How an operation ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Resolved<T> {
    /// With its result.
    Ready(T),
    /// With a failure that the server recorded; asking again gives the same.
    Failed(FailedFuture),
}

impl Client {
    /// Fetches a sample that a poll of its sampler announced: the bytes are reserved first, and the
    /// first question brings the result.
    ///
    /// Endpoint: `POST /api/v1/retrieve_future`.
    ///
    /// # Errors
    /// As `retrieve_sample`.
    pub async fn retrieve_announced_sample(
        &self,
        request_id: &RequestId,
        n_bytes: u64,
        submitted_in: Option<Duration>,
    ) -> Result<Resolved<SampleResponse>> {
        let announced = PollEvent::MetadataOnly(n_bytes);
        drive(
            self,
            request_id,
            RequestType::Sample,
            submitted_in,
            announced,
        )
        .await
    }
}

pub(crate) async fn retrieve<T: FutureResult>(
    client: &Client,
    request_id: &RequestId,
    request_type: RequestType,
    submitted_in: Option<Duration>,
) -> Result<Resolved<T>> {
    drive(
        client,
        request_id,
        request_type,
        submitted_in,
        PollEvent::Started,
    )
    .await
}

async fn drive<T: FutureResult>(
    client: &Client,
    request_id: &RequestId,
    request_type: RequestType,
    submitted_in: Option<Duration>,
    event: PollEvent,
) -> Result<Resolved<T>> {
    let span = spans::future(request_id, request_type);
    let asked = ask_until_done(client, request_id, request_type, submitted_in, event);
    let result = asked.instrument(span).await;
    client.report_future(request_id, request_type, &result);
    result
}

async fn ask_until_done<T: FutureResult>(
    client: &Client,
    request_id: &RequestId,
    request_type: RequestType,
    submitted_in: Option<Duration>,
    mut event: PollEvent,
) -> Result<Resolved<T>> {
    let mut poll = FuturePoll::new(PollPolicy {
        billing_pause: client.billing_pause(client.poll_policy().billing_pause),
        ..client.poll_policy().clone()
    });
    let mut inquiry = Inquiry::new(client, request_id, request_type, submitted_in);
    loop {
        event = match poll.on(client.now(), event, Clock::draw()) {
            PollStep::Send {
                allow_metadata_only,
            } => inquiry.ask::<T>(allow_metadata_only).await?,
            PollStep::Wait(time) => {
                client.sleep(time).await;
                PollEvent::Elapsed
            }
            PollStep::ReserveBytes(n) => inquiry.reserve(n).await?,
            PollStep::Finish(end) => return inquiry.finish(end).await,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Thousands of results are waited for at once, each by a future of this size.
    #[test]
    fn waiting_for_a_result_takes_little_memory() {
        let client = Client::builder("http://127.0.0.1:9")
            .api_key("tml-secret".parse().unwrap())
            .build()
            .unwrap();
        let id: RequestId = "r1".parse().unwrap();

        let n_bytes = size_of_val(&client.retrieve_sample(&id, None));

        assert!(n_bytes <= 3072, "{n_bytes} bytes");
    }
}
