//! Uploading losses.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tinker_types::{
    CreateCustomLossRequest, CreateCustomLossResponse, RequestId, TypeError, UntypedFuture,
};

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Parsed, blocking};
use crate::custom_loss::loss_id;
use crate::error::Error;
use crate::operation::Outcome;

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Parsed<CreateCustomLossRequest>,
) -> ApiResult<Json<UntypedFuture>> {
    blocking(&app, move |app| accept(app, &request.value))
        .await
        .map(Json)
}

/// Checks and keeps a loss at once; clients wait for a future all the same.
fn accept(app: &App, request: &CreateCustomLossRequest) -> ApiResult<UntypedFuture> {
    app.check_open()?;
    let session = &request.session_id;
    app.core.catalog.session(session)?;
    let malformed = |error: TypeError| ApiError::bad_request(error.to_string());
    let id: RequestId = loss_id(session, request.custom_loss_seq_id)
        .parse()
        .map_err(malformed)?;
    let room = |n_bytes| app.core.quota.check(n_bytes, "the loss");
    let outcome = match app.core.custom_losses.create(request, room) {
        Ok(loss_id) => Outcome::json(&CreateCustomLossResponse {
            loss_id,
            tag: Default::default(),
        }),
        Err(error @ Error::Invalid(_)) => Outcome::from(error),
        Err(error @ Error::Conflict(_)) => return Err(ApiError::unprocessable(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    app.core.futures.insert_in_memory(id.clone());
    app.core.futures.complete(&id, outcome, None);
    Ok(UntypedFuture {
        request_id: id,
        model_id: None,
        sample_sequence_ids: None,
    })
}
