//! Asking for one future: sends, sorts and remembers answers. When to ask is not decided here.

use std::time::Duration;

use tinker_types::{
    FailedFuture, FutureReply, RETRIEVE_FUTURE, RequestId, RetrieveFutureRequest, TryAgain,
};

use crate::call::{Answer, Call};
use crate::client::Client;
use crate::endpoints::FutureResult;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::future_driver::Resolved;
use crate::in_flight::{Flight, FlightState};
use crate::limits::BytePermit;
use crate::machine::{
    Failure, PollEnd, PollEvent, QueueWatch, RetryPolicy, SilenceNews, SilenceWatch,
};
use crate::pools::TrafficClass;
use crate::request_type::RequestType;
use crate::spans;

/// The asking for one future: sends, sorts and remembers answers.
pub(crate) struct Inquiry<'a> {
    client: &'a Client,
    request_id: &'a RequestId,
    request_type: RequestType,
    submitted_in: Option<Duration>,
    started: Duration,
    n_asks: u32,
    queue: QueueWatch,
    silence: SilenceWatch,
    flight: Flight,
    /// Held until the result is decoded.
    permit: Option<BytePermit>,
    last: Option<Last>,
}

/// What the last ask brought.
enum Last {
    Answer(Box<Answer>),
    Failure(FailedFuture),
    Trouble(Error),
}

impl<'a> Inquiry<'a> {
    pub(crate) fn new(
        client: &'a Client,
        request_id: &'a RequestId,
        request_type: RequestType,
        submitted_in: Option<Duration>,
    ) -> Self {
        let started = client.now();
        let flights = &client.inner().flights;
        Self {
            client,
            request_id,
            request_type,
            submitted_in,
            started,
            flight: flights.wait(started, request_type.as_str(), request_id),
            n_asks: 0,
            queue: QueueWatch::default(),
            silence: SilenceWatch::default(),
            permit: None,
            last: None,
        }
    }

    pub(crate) async fn ask<T: FutureResult>(
        &mut self,
        allow_metadata_only: bool,
    ) -> Result<PollEvent> {
        let sent_at = self.client.now();
        let event = self.ask_once::<T>(allow_metadata_only).await?;
        self.note_silence(sent_at, event);
        if let PollEvent::ConnectionLost | PollEvent::Status { .. } = event {
            self.flight.retry();
        }
        Ok(event)
    }

    async fn ask_once<T: FutureResult>(&mut self, allow_metadata_only: bool) -> Result<PollEvent> {
        let call = self.call::<T>(allow_metadata_only)?;
        let exchange = self.client.config().await?.pjwt_auth_enabled;
        self.n_asks += 1;
        spans::note_ask(self.n_asks);
        let answer = match self.client.attempt(&call, exchange, 0).await {
            Ok(answer) => answer,
            Err(none) if none.error.is_retryable() => {
                self.last = Some(Last::Trouble(none.error));
                return Ok(match none.failure {
                    Failure::TimedOut => PollEvent::TimedOut,
                    _ => PollEvent::ConnectionLost,
                });
            }
            Err(none) => return Err(self.explain(none.error)),
        };
        let event = self.sort(&answer)?;
        if !matches!(event, PollEvent::Failed) {
            self.last = Some(Last::Answer(Box::new(answer)));
        }
        Ok(event)
    }

    fn call<T: FutureResult>(&self, allow_metadata_only: bool) -> Result<Call> {
        let request = RetrieveFutureRequest {
            request_id: self.request_id.clone(),
            allow_metadata_only,
        };
        let mut call = Call::post(
            self.client,
            TrafficClass::Retrieve,
            RETRIEVE_FUTURE,
            &request,
        )?
        .retry(RetryPolicy::never())
        .accept(T::ACCEPT)
        .header("x-tinker-request-type", self.request_type.as_str())
        .header("x-tinker-request-iteration", self.n_asks.to_string());
        if let (0, Some(time)) = (self.n_asks, self.submitted_in) {
            let secs = time.as_secs_f64().to_string();
            call = call.header("x-tinker-create-promise-roundtrip-time", secs);
        }
        Ok(call)
    }

    fn sort(&mut self, answer: &Answer) -> Result<PollEvent> {
        if answer.status == 408 {
            if let Ok(again) = serde_json::from_slice(&answer.body) {
                self.note_queue(&again);
            }
            return Ok(PollEvent::TryAgain);
        }
        if !answer.is_success() {
            return Ok(PollEvent::Status {
                code: answer.status,
                empty_body: answer.has_empty_body(),
                retry_after: answer.retry_after,
            });
        }
        if answer.is_protobuf() {
            return Ok(PollEvent::Done);
        }
        let reply = FutureReply::from_json(&answer.body).map_err(|error| {
            let text = format!("the result ({}) was not understood", answer.content_type);
            self.explain(Error::new(ErrorKind::Decode, text).with_source(error))
        })?;
        Ok(match reply {
            FutureReply::TryAgain(again) => {
                self.note_queue(&again);
                PollEvent::TryAgain
            }
            FutureReply::MetadataOnly(size) => {
                PollEvent::MetadataOnly(size.response_payload_size.unwrap_or(0))
            }
            FutureReply::Failed(failure) => {
                self.last = Some(Last::Failure(failure));
                PollEvent::Failed
            }
            FutureReply::Result => PollEvent::Done,
        })
    }

    fn note_queue(&mut self, again: &TryAgain) {
        if let Some((state, reason)) = self.queue.observe(again) {
            spans::note_queue(&state, reason.as_deref());
            self.flight.state(FlightState::Waiting {
                queue: Some(state.clone()),
                reason: reason.clone(),
            });
            self.client.tell(&Event::Queue {
                request_id: self.request_id.clone(),
                request_type: self.request_type,
                state,
                reason,
            });
        }
    }

    fn note_silence(&mut self, sent_at: Duration, event: PollEvent) {
        let request_id = self.request_id.clone();
        match self.silence.observe(sent_at, self.client.now(), event) {
            None => {}
            Some(SilenceNews::Silent(since)) => self.client.tell(&Event::ServerSilent {
                request_id,
                request_type: self.request_type,
                since,
            }),
            Some(SilenceNews::Answers(after)) => {
                self.client
                    .tell(&Event::ServerAnswers { request_id, after });
            }
        }
    }

    pub(crate) async fn reserve(&mut self, n_bytes: u64) -> Result<PollEvent> {
        self.flight.bytes(n_bytes);
        self.flight.state(FlightState::Fetching);
        let gate = &self.client.setup().await?.result_bytes;
        self.permit = Some(gate.acquire(n_bytes).await);
        Ok(PollEvent::Reserved)
    }

    pub(crate) async fn finish<T: FutureResult>(mut self, end: PollEnd) -> Result<Resolved<T>> {
        match (end, self.last.take()) {
            (PollEnd::Done, Some(Last::Answer(answer))) => {
                let result = T::decode(*answer)
                    .await
                    .map_err(|error| self.explain(error))?;
                Ok(Resolved::Ready(result))
            }
            (PollEnd::Failed, Some(Last::Failure(failure))) => Ok(Resolved::Failed(failure)),
            (PollEnd::AnnouncedTwice, _) => Err(self.explain(Error::new(
                ErrorKind::Decode,
                "the server announced the size of a result twice and did not send it",
            ))),
            (_, Some(Last::Answer(answer))) => Err(self.explain(answer.error())),
            (_, Some(Last::Trouble(error))) => Err(self.explain(error)),
            (_, _) => Err(self.explain(Error::new(ErrorKind::Decode, "no answer was kept"))),
        }
    }

    fn explain(&self, error: Error) -> Error {
        error
            .with_credential(self.client.credential_origin())
            .with_call("POST", RETRIEVE_FUTURE)
            .with_request_id(Some(self.request_id.to_string()))
            .with_effort(self.n_asks, self.client.now().saturating_sub(self.started))
    }
}
