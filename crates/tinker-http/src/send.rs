//! Sending a call until it succeeds or its policy gives up.

use std::error::Error as _;

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use tinker_types::ClientConfig;
use tracing::Instrument as _;

use crate::call::{Answer, Call, Credential, Origin};
use crate::client::Client;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::in_flight::FlightState;
use crate::machine::{
    Class, Decision, Failure, RetryPolicy, RetryState, classify, parse_retry_after,
};
use crate::pools::Lease;
use crate::spans;

/// Largest answer that is read.
const MAX_ANSWER_BYTES: usize = 1 << 30;

/// Why an attempt brought no answer.
#[derive(Debug)]
pub(crate) struct NoAnswer {
    pub(crate) failure: Failure,
    pub(crate) error: Error,
}

impl Client {
    /// Sends a call; a 2xx answer or an error that names the call and the effort made.
    pub(crate) async fn send(&self, call: Call) -> Result<Answer> {
        match call.credential {
            Credential::RawKey => self.repeat(call, false).await,
            Credential::TokenOrKey => {
                // Without settings the call itself is not sent.
                let setup = self.setup().await.map_err(|e| e.with_arrival(false))?;
                let exchange = setup.config.pjwt_auth_enabled;
                self.repeat(call, exchange).await
            }
        }
    }

    /// Sends a call while start-up is under way.
    pub(crate) async fn send_configured(
        &self,
        call: Call,
        config: &ClientConfig,
    ) -> Result<Answer> {
        self.repeat(call, config.pjwt_auth_enabled).await
    }

    async fn repeat(&self, call: Call, exchange: bool) -> Result<Answer> {
        let started = self.now();
        let n_bytes = call.body.as_ref().map_or(0, |body| body.bytes.len());
        let flights = &self.inner().flights;
        let flight = flights.call(started, call.url.path(), n_bytes);
        let mut state = RetryState::new(RetryPolicy {
            billing_pause: self.billing_pause(call.retry.billing_pause),
            ..call.retry.clone()
        });
        let mut attempts = 0;
        let (mut may_have_arrived, mut may_have_been_taken) = (false, false);
        loop {
            let outcome = self.attempt(&call, exchange, attempts).await;
            attempts += 1;
            let (class, retry_after, error) = match outcome {
                Ok(mut answer)
                    if answer.is_success() || (call.surface_redirect && answer.is_redirect()) =>
                {
                    answer.origin = Some(Origin {
                        method: call.method,
                        route: call.url.path().to_owned(),
                        attempts,
                        elapsed: self.now().saturating_sub(started),
                    });
                    return Ok(answer);
                }
                Ok(answer) => {
                    let failure = Failure::Status {
                        code: answer.status,
                        empty_body: answer.has_empty_body(),
                    };
                    let class = match answer.status {
                        429 if call.surface_throttling => Class::Permanent,
                        409 if call.surface_conflict => Class::Permanent,
                        _ => classify(failure, answer.should_retry),
                    };
                    may_have_arrived |= failure.may_have_arrived();
                    may_have_been_taken |= failure.may_have_arrived() && answer.status != 409;
                    (class, answer.retry_after, answer.error())
                }
                Err(none) => {
                    may_have_arrived |= none.failure.may_have_arrived();
                    may_have_been_taken |= none.failure.may_have_arrived();
                    (classify(none.failure, None), None, none.error)
                }
            };
            match state.on_failure(self.now(), class, retry_after, Clock::draw()) {
                Decision::GiveUp => {
                    let error = error
                        .with_credential(self.credential_origin())
                        .with_call(call.method.as_str(), call.url.path())
                        .with_arrival(may_have_arrived)
                        .with_taking(may_have_been_taken)
                        .with_effort(attempts, self.now().saturating_sub(started));
                    // Calls that are made once are those that one can do without.
                    if call.retry.max_attempts > 1 {
                        self.report_call(&error);
                    }
                    return Err(error);
                }
                Decision::RetryAfter(wait) => {
                    self.tell(&Event::Retrying {
                        route: call.url.path().to_owned(),
                        reason: error.to_string(),
                        attempts,
                        wait,
                    });
                    flight.retry();
                    flight.state(FlightState::Retrying {
                        reason: error.to_string(),
                    });
                    self.sleep(wait).await;
                    flight.state(FlightState::Sending);
                }
            }
        }
    }

    /// Sends a call once, and once more if its token was refused.
    pub(crate) async fn attempt(
        &self,
        call: &Call,
        exchange: bool,
        retry_count: u32,
    ) -> Result<Answer, NoAnswer> {
        if !exchange {
            let key = self.credential().await.map_err(no_token)?;
            return self.exchange(call, &key, retry_count).await;
        }
        let apart = call.apart.as_ref();
        let token = self.token(None, apart).await.map_err(no_token)?;
        let answer = self.exchange(call, &token, retry_count).await?;
        if !answer.token_refused {
            return Ok(answer);
        }
        let token = self.token(Some(&token), apart).await.map_err(no_token)?;
        self.exchange(call, &token, retry_count).await
    }

    async fn exchange(
        &self,
        call: &Call,
        credential: &str,
        retry_count: u32,
    ) -> Result<Answer, NoAnswer> {
        let recorder = self.inner().recorder.as_ref();
        let take = recorder.map(|r| r.begin(self, call, credential, retry_count));
        let span = spans::attempt(call, retry_count);
        let result = self
            .send_once(call, credential, retry_count)
            .instrument(span.clone())
            .await;
        spans::note_outcome(&span, &result);
        if let Some(take) = take {
            take.end(&result).await;
        }
        match &result {
            Ok(_) => self.note_reached(),
            Err(none) if none.failure == Failure::Unreadable => self.note_reached(),
            // A slow answer is no sign that the server is gone.
            Err(none) if matches!(none.failure, Failure::Local | Failure::TimedOut) => {}
            Err(none) => self.note_lost(&none.error.to_string()),
        }
        result
    }

    /// Sends a call and reads the answer.
    async fn send_once(
        &self,
        call: &Call,
        credential: &str,
        retry_count: u32,
    ) -> Result<Answer, NoAnswer> {
        let (request, _lease) = self.request(call, credential, retry_count)?;
        let response = request.send().await.map_err(no_answer)?;
        read(response).await
    }

    fn request(
        &self,
        call: &Call,
        credential: &str,
        retry_count: u32,
    ) -> Result<(reqwest::RequestBuilder, Lease), NoAnswer> {
        let refuse = |error| NoAnswer {
            failure: Failure::Local,
            error,
        };
        let inner = self.inner();
        // reqwest panics without one.
        if tokio::runtime::Handle::try_current().is_err() {
            let text = "the clients need a tokio runtime: call them from within one";
            return Err(refuse(Error::new(ErrorKind::InvalidRequest, text)));
        }
        let lease = match &call.apart {
            Some(pool) => Lease::apart(pool.clone()),
            None => inner.pools.get(call.class).map_err(refuse)?,
        };
        let mut key = HeaderValue::try_from(credential).map_err(|_| {
            refuse(Error::new(
                ErrorKind::Unauthenticated,
                "the server's token cannot stand in a header",
            ))
        })?;
        key.set_sensitive(true);
        let mut request = lease
            .client
            .request(call.method.clone(), self.place(&call.url))
            .headers(inner.headers.clone())
            .header("x-api-key", key)
            .header("x-stainless-retry-count", retry_count.to_string())
            .header(ACCEPT, call.accept);
        for (name, value) in &call.headers {
            request = request.header(*name, value);
        }
        if let Some(timeout) = call.timeout {
            request = request.timeout(timeout);
        }
        if let Some(body) = &call.body {
            request = request
                .header(CONTENT_TYPE, body.content_type)
                .body(body.bytes.clone());
            if body.zstd {
                request = request.header(CONTENT_ENCODING, "zstd");
            }
        }
        Ok((request, lease))
    }
}

/// Reads an answer within bounds.
pub(crate) async fn read(mut response: reqwest::Response) -> Result<Answer, NoAnswer> {
    let status = response.status().as_u16();
    let location = response.headers().get(LOCATION);
    let location = location.and_then(|place| response.url().join(place.to_str().ok()?).ok());
    let mut answer = Answer {
        status,
        body: Bytes::new(),
        location_host: location
            .as_ref()
            .and_then(|url| url.host_str().map(str::to_owned)),
        location,
        ..read_head(status, response.headers())
    };
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(no_answer)? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(NoAnswer {
                failure: Failure::Unreadable,
                error: Error::new(ErrorKind::Decode, "the answer is larger than 1 GiB"),
            });
        }
        body.extend_from_slice(&chunk);
    }
    answer.body = body.freeze();
    Ok(answer)
}

fn read_head(status: u16, headers: &HeaderMap) -> Answer {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(note) = text("x-deprecation-note") {
        tracing::warn!(note, "the server calls this request deprecated: {note}");
    }
    let refused = text("www-authenticate").is_some_and(|v| v.contains("error=\"invalid_token\""));
    Answer {
        status,
        content_type: text("content-type")
            .unwrap_or_default()
            .to_ascii_lowercase(),
        body: Bytes::new(),
        retry_after: parse_retry_after(text("retry-after-ms"), text("retry-after"), Clock::wall()),
        should_retry: match text("x-should-retry") {
            Some("true") => Some(true),
            Some("false") => Some(false),
            _ => None,
        },
        token_refused: status == 401 && refused,
        request_id: text("x-request-id").map(str::to_owned),
        location_host: None,
        location: None,
        origin: None,
    }
}

/// Sorts what reqwest reports. The address is taken out: it may hold what should not be shown.
pub(crate) fn no_answer(error: reqwest::Error) -> NoAnswer {
    let error = error.without_url();
    let (failure, kind, message) = if error.is_connect() {
        (
            Failure::Unsent,
            ErrorKind::Connect,
            "cannot connect to the server",
        )
    } else if error.is_timeout() {
        (
            Failure::TimedOut,
            ErrorKind::Timeout,
            "the server did not answer in time",
        )
    } else if error.is_decode() && !was_cut_off(&error) {
        (
            Failure::Unreadable,
            ErrorKind::Decode,
            "the answer is corrupt",
        )
    } else if error.is_builder() {
        (
            Failure::Local,
            ErrorKind::InvalidRequest,
            "the request cannot be built",
        )
    } else {
        (
            Failure::Interrupted,
            ErrorKind::Connect,
            "the connection to the server broke",
        )
    };
    NoAnswer {
        failure,
        error: Error::new(kind, message).with_source(error),
    }
}

/// Whether an answer ended early, which reqwest reports like a corrupt one.
fn was_cut_off(error: &reqwest::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let mut cause = error.source();
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>();
        let kind = io.map(std::io::Error::kind);
        if let Some(BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof) = kind {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A call that could not be sent for want of a token; the exchange has had its own retries.
fn no_token(error: Error) -> NoAnswer {
    NoAnswer {
        failure: Failure::Local,
        error,
    }
}
