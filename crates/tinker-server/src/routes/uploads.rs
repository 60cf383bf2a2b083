//! Bringing weights in from outside.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use tinker_types::{
    FinishUploadRequest, FinishUploadResponse, StartUploadRequest, StartUploadResponse,
};

use super::sessions::session_id;
use crate::api_error::ApiResult;
use crate::app::App;
use crate::body::{Body, Parsed, blocking};
use crate::clock::timestamp;
use crate::imports::FILES;
use crate::links::{LinkMaker, Scheme};

pub(crate) async fn start(
    State(app): State<Arc<App>>,
    scheme: Scheme,
    headers: HeaderMap,
    uri: Uri,
    request: Parsed<StartUploadRequest>,
) -> ApiResult<Json<StartUploadResponse>> {
    let upload = blocking(&app, move |app| app.start_upload(&request.value)).await?;
    let links = LinkMaker::of_request(app.token(), (scheme, &headers, &uri))?;
    let link = |file: &str| links.link(&["uploads", upload.as_str(), file]);
    Ok(Json(StartUploadResponse {
        urls: FILES
            .into_iter()
            .map(|file| (file.to_owned(), link(file)))
            .collect(),
        upload_id: upload.to_string(),
        expires: timestamp(links.expires_at),
    }))
}

/// Takes a file at its signed address.
pub(crate) async fn receive(
    State(app): State<Arc<App>>,
    Path((upload, file)): Path<(String, String)>,
    body: Body,
) -> ApiResult<StatusCode> {
    let upload = session_id(&upload)?;
    blocking(&app, move |app| {
        app.receive_upload(&upload, &file, &body.bytes)
    })
    .await?;
    Ok(StatusCode::OK)
}

pub(crate) async fn finish(
    State(app): State<Arc<App>>,
    request: Parsed<FinishUploadRequest>,
) -> ApiResult<Json<FinishUploadResponse>> {
    let upload = session_id(&request.value.upload_id)?;
    let tinker_path = blocking(&app, move |app| app.finish_upload(&upload)).await?;
    Ok(Json(FinishUploadResponse { tinker_path }))
}
