//! Waits for a future: does what [`FuturePoll`] says and tells it what happened.

use std::time::Duration;

use tinker_types::{FailedFuture, RequestId};

use crate::client::Client;
use crate::clock::Clock;
use crate::endpoints::FutureResult;
use crate::error::Result;
use crate::inquiry::Inquiry;
use crate::machine::{FuturePoll, PollEvent, PollStep};
use crate::request_type::RequestType;

/// How an operation ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Resolved<T> {
    /// With its result.
    Ready(T),
    /// With a failure that the server recorded; asking again gives the same.
    Failed(FailedFuture),
}

pub(crate) async fn retrieve<T: FutureResult>(
    client: &Client,
    request_id: &RequestId,
    request_type: RequestType,
    submitted_in: Option<Duration>,
) -> Result<Resolved<T>> {
    let mut poll = FuturePoll::new(client.poll_policy().clone());
    let mut inquiry = Inquiry::new(client, request_id, request_type, submitted_in);
    let mut event = PollEvent::Started;
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
