//! From what the transport reports of a future to the library's result.

use tinker_http::{RequestType, Resolved};
use tinker_types::RequestId;

use crate::error::{Error, Result};

/// The result of an operation, or its failure as an error.
pub(crate) fn resolve<T>(
    operation: RequestType,
    request_id: &RequestId,
    resolved: Resolved<T>,
) -> Result<T> {
    match resolved {
        Resolved::Ready(result) => Ok(result),
        Resolved::Failed(failure) => Err(Error::RequestFailed {
            operation,
            category: failure.category,
            message: failure.error,
            request_id: request_id.clone(),
        }),
    }
}
