//! One numbered request on its way through the ledger: noted, sent, accepted, answered.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tinker_http::{Error as HttpError, ErrorKind, RequestType, Resolved};
use tinker_types::{FailedFuture, RequestId, TrainingRunId, UntypedFuture};

use super::error::LedgerError;
use super::index::{End, Operation};
use super::record::{Digest, Record};
use super::{Ledger, Result};
use crate::error::Error;
use crate::turns::{Fate, is_save};

/// Results above this size stay with the server: a restarted program fetches them again.
const MAX_RESULT_BYTES: usize = 64 << 10;

/// A request's place in its run, and the ledger that knows of it, if there is one.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    pub(crate) ledger: Option<Arc<Ledger>>,
    pub(crate) run: TrainingRunId,
    pub(crate) seq_id: u64,
    pub(crate) operation: RequestType,
}

/// What is to be done about a request.
#[derive(Debug)]
pub(crate) enum Begun {
    /// It is to be sent.
    Send(Earlier),
    /// It was answered before.
    Known(Known),
}

/// What an earlier process did about a request that is to be sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Earlier {
    /// Nothing.
    Nothing,
    /// It may have sent it.
    Noted,
    /// It sent it, and the server answered with this future.
    Accepted(RequestId),
}

/// The answer of a request of an earlier process.
#[derive(Debug)]
pub(crate) enum Known {
    /// Its result.
    Result(serde_json::Value),
    /// Its result is with the server.
    There(RequestId),
    /// It failed.
    Failed(FailedFuture, RequestId),
}

/// A request that the server has.
#[derive(Debug)]
pub(crate) enum Pending {
    /// Sent, within this time.
    Sent(Ticket, RequestId, Duration),
    /// Sent by an earlier process.
    Known(Known),
}

impl Ticket {
    /// Whether requests are noted.
    pub(crate) const fn is_noted(&self) -> bool {
        self.ledger.is_some()
    }

    /// Notes the request durably, unless an earlier process did.
    pub(crate) async fn begin(&self, digest: impl FnOnce() -> Digest) -> Result<Begun> {
        let Some(ledger) = &self.ledger else {
            return Ok(Begun::Send(Earlier::Nothing));
        };
        let digest = digest();
        if let Some(before) = ledger.take(&self.run, self.seq_id, self.operation, digest)? {
            return self.known(ledger, before);
        }
        let record = Record::Sending {
            run: self.run.clone(),
            seq_id: self.seq_id,
            operation: self.operation.as_str().to_owned(),
            digest,
        };
        ledger.writer.sync(record).await?;
        Ok(Begun::Send(Earlier::Nothing))
    }

    fn known(&self, ledger: &Ledger, before: Operation) -> Result<Begun> {
        let Some(end) = before.end else {
            let earlier = before.request_id.map_or(Earlier::Noted, Earlier::Accepted);
            return Ok(Begun::Send(earlier));
        };
        if let End::Refused(message) = end {
            return Err(LedgerError::RefusedBefore {
                operation: self.operation,
                seq_id: self.seq_id,
                message,
            });
        }
        let Some(request_id) = before.request_id else {
            return Ok(Begun::Send(Earlier::Noted));
        };
        Ok(Begun::Known(match end {
            End::Failed(category, error) => {
                Known::Failed(FailedFuture { error, category }, request_id)
            }
            End::Here(place) => match ledger.result_at(place)? {
                Some(result) => Known::Result(result),
                None => Known::There(request_id),
            },
            End::There | End::Refused(_) => Known::There(request_id),
        }))
    }

    /// Takes note of what became of the submission; `earlier` is what was done about it before.
    pub(crate) async fn submitted(
        &self,
        earlier: Earlier,
        outcome: std::result::Result<UntypedFuture, HttpError>,
    ) -> (Fate, std::result::Result<RequestId, Error>) {
        let fate = Fate::of(self.operation, &outcome);
        let Some(ledger) = &self.ledger else {
            return match outcome {
                Ok(future) => (fate, Ok(future.request_id)),
                Err(error) => self.failed(fate, error),
            };
        };
        let is_taken =
            |error: &HttpError| is_save(self.operation) && *error.kind() == ErrorKind::Conflict;
        match (outcome, earlier) {
            (Ok(future), Earlier::Accepted(before)) if future.request_id != before => {
                let now = &future.request_id;
                self.differs(format!("{} was {before} and is {now} now", self.name()))
            }
            (Ok(future), _) => {
                let request_id = future.request_id;
                ledger
                    .writer
                    .note(Record::Accepted {
                        run: self.run.clone(),
                        seq_id: self.seq_id,
                        request_id: request_id.clone(),
                    })
                    .await;
                (fate, Ok(request_id))
            }
            // The name is taken by this very operation, on a server that does not number saves.
            (Err(error), Earlier::Accepted(before)) if is_taken(&error) => {
                tracing::info!(operation = %self.operation, %before, %error, "saved before the restart");
                (Fate::Accepted, Ok(before))
            }
            // Perhaps it is: the answer was lost with the earlier process.
            (Err(error), Earlier::Noted) if is_taken(&error) => {
                self.failed(Fate::MaybeSaved, error)
            }
            (Err(error), Earlier::Accepted(_))
                if fate == Fate::Refused && is_about_the_request(&error) =>
            {
                self.differs(format!(
                    "{} was accepted and is refused: {error}",
                    self.name()
                ))
            }
            (Err(error), _) => {
                if fate == Fate::Refused {
                    let record = Record::Refused {
                        run: self.run.clone(),
                        seq_id: self.seq_id,
                        message: error.to_string(),
                    };
                    ledger.writer.note(record).await;
                }
                self.failed(fate, error)
            }
        }
    }

    /// A submission that failed, and what a caller should know of it.
    fn failed<T>(&self, fate: Fate, source: HttpError) -> (Fate, std::result::Result<T, Error>) {
        let operation = self.operation;
        let error = match fate {
            Fate::MaybeSaved => Error::MaybeSaved { operation, source },
            _ => source.into(),
        };
        (fate, Err(error))
    }

    fn name(&self) -> String {
        format!("{} (seq_id {})", self.operation, self.seq_id)
    }

    fn differs<T>(&self, detail: String) -> (Fate, std::result::Result<T, Error>) {
        let run = self.run.clone();
        let error = LedgerError::ServerDiffers { run, detail };
        (Fate::Unknown(error.to_string()), Err(error.into()))
    }

    /// Notes the result of the operation.
    pub(crate) async fn note<T: Serialize + DeserializeOwned + PartialEq>(
        &self,
        resolved: &Resolved<T>,
    ) {
        let Some(ledger) = &self.ledger else { return };
        let (run, seq_id) = (self.run.clone(), self.seq_id);
        let record = match resolved {
            Resolved::Ready(result) => Record::Done {
                run,
                seq_id,
                result: as_json(result),
            },
            Resolved::Failed(failure) => Record::Failed {
                run,
                seq_id,
                category: failure.category.clone(),
                message: failure.error.clone(),
            },
        };
        ledger.writer.note(record).await;
    }
}

/// Whether the server has looked at the request, as opposed to the key.
fn is_about_the_request(error: &HttpError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidRequest | ErrorKind::NotFound | ErrorKind::Expired
    )
}

/// The result in JSON, if it is small and survives it: numbers that are not finite do not.
fn as_json<T: Serialize + DeserializeOwned + PartialEq>(result: &T) -> Option<serde_json::Value> {
    let mut text = Bounded(Vec::new());
    serde_json::to_writer(&mut text, result).ok()?;
    let read: T = serde_json::from_slice(&text.0).ok()?;
    let value = || serde_json::from_slice(&text.0).ok();
    (read == *result).then(value).flatten()
}

/// Takes so many bytes and no more, so that a large result is not written to learn its size.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RESULT_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tinker_types::OptimStepResponse;

    use super::*;

    #[test]
    fn results_that_json_cannot_hold_stay_with_the_server() {
        let result = |x: f64| OptimStepResponse {
            metrics: Some([("grad_norm".to_owned(), x)].into()),
        };

        assert!(as_json(&result(0.1)).is_some());
        assert_eq!(as_json(&result(f64::NAN)), None);
        assert_eq!(as_json(&result(f64::INFINITY)), None);
        let large = OptimStepResponse {
            metrics: Some((0..9999).map(|i| (i.to_string(), 1.0)).collect()),
        };
        assert_eq!(as_json(&large), None);
    }
}
