//! Whether the server still has what the ledger says that it acknowledged.

use serde::Serialize;
use tinker_http::{Client, Error as HttpError, ErrorKind, RequestType, Resolved};
use tinker_types::{GetInfoResponse, RequestId, TrainingRunId};

use super::{Answered, Ledger, LedgerError};
use crate::error::{Error, Result};

/// Describes a run that an earlier process created, and asks for its newest result again: a server
/// that was put back to an older state would wait for operations that will not come.
pub(crate) async fn check_view(
    http: &Client,
    ledger: &Ledger,
    run: &TrainingRunId,
) -> Result<GetInfoResponse> {
    let answered = ledger.newest_answered(run)?;
    let info = match http.get_info(run).await {
        // Every server can describe a run, so that an endpoint it does not know is the run itself.
        Err(error) if is_unknown(&error) || *error.kind() == ErrorKind::Expired => {
            return Err(differs(run, lost(answered.as_ref(), &error)));
        }
        info => info?,
    };
    if let Some(answered) = answered {
        check_answer(http, run, answered).await?;
    }
    Ok(info)
}

/// What is gone with a run.
fn lost(answered: Option<&Answered>, error: &HttpError) -> String {
    let results = answered.map_or_else(String::new, |newest| {
        let Answered {
            operation, seq_id, ..
        } = newest;
        format!(", nor what it answered up to {operation} (seq_id {seq_id})")
    });
    format!("it does not have the run any more{results}: {error}")
}

async fn check_answer(http: &Client, run: &TrainingRunId, answered: Answered) -> Result<()> {
    let Answered {
        seq_id,
        operation,
        request_id,
        result,
    } = answered;
    let now = match ask(http, &operation, &request_id).await {
        Ok(now) => now,
        // A server need not keep results for ever.
        Err(error) if *error.kind() == ErrorKind::Expired => return Ok(()),
        Err(error) if is_unknown(&error) => {
            let detail = format!("it acknowledged {operation} (seq_id {seq_id}) and says: {error}");
            return Err(differs(run, detail));
        }
        Err(error) => return Err(error.into()),
    };
    match (result, now) {
        (Some(before), Some(now)) if before != now => Err(differs(
            run,
            format!("its result of {operation} (seq_id {seq_id}) is another one now"),
        )),
        _ => Ok(()),
    }
}

/// The result in JSON; `None` if it is a failure, or of an operation that is not asked for here.
async fn ask(
    http: &Client,
    operation: &str,
    id: &RequestId,
) -> Result<Option<serde_json::Value>, HttpError> {
    let is = |kind: RequestType| kind.as_str() == operation;
    Ok(if is(RequestType::OptimStep) {
        json(http.retrieve_optim_step(id, None).await?)
    } else if is(RequestType::ForwardBackward) {
        json(http.retrieve_forward_backward(id, None).await?)
    } else if is(RequestType::Forward) {
        json(http.retrieve_forward(id, None).await?)
    } else if is(RequestType::SaveWeights) {
        json(http.retrieve_save_weights(id, None).await?)
    } else if is(RequestType::SaveWeightsForSampler) {
        json(http.retrieve_save_weights_for_sampler(id, None).await?)
    } else {
        None
    })
}

/// As a ledger has it after it was read back.
fn json<T: Serialize>(resolved: Resolved<T>) -> Option<serde_json::Value> {
    match resolved {
        Resolved::Ready(result) => {
            let text = serde_json::to_vec(&result).ok()?;
            serde_json::from_slice(&text).ok()
        }
        Resolved::Failed(_) => None,
    }
}

/// Whether the server knows nothing of what it was asked for; some say so in the words for an
/// endpoint that they lack.
fn is_unknown(error: &HttpError) -> bool {
    error.status() == Some(404)
}

fn differs(run: &TrainingRunId, detail: String) -> Error {
    let run = run.clone();
    LedgerError::ServerDiffers { run, detail }.into()
}
