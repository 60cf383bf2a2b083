//! Bringing weights in from outside.

use std::sync::Arc;

use axum::Json;
use axum::body::HttpBody as _;
use axum::extract::{FromRequest as _, Path, Request, State};
use axum::http::header::CONTENT_ENCODING;
use axum::http::{HeaderMap, StatusCode, Uri};
use bytes::BytesMut;
use futures_util::StreamExt as _;
use tinker_types::{
    FinishUploadRequest, FinishUploadResponse, StartUploadRequest, StartUploadResponse,
};

use super::sessions::session_id;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Body, Parsed, blocking};
use crate::clock::timestamp;
use crate::imports::{FILES, too_long};
use crate::links::{LinkMaker, Scheme};
use crate::receiving::PIECE;

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

/// Takes a file at its signed address, of any length that an adapter can have: it is never in memory as a whole.
pub(crate) async fn receive(
    State(app): State<Arc<App>>,
    Path((upload, file)): Path<(String, String)>,
    request: Request,
) -> ApiResult<StatusCode> {
    let upload = session_id(&upload)?;
    // What is compressed has the bounds of other bodies.
    let body = match request.headers().contains_key(CONTENT_ENCODING) {
        true => Body::from_request(request, &app).await?.bytes.into(),
        false => request.into_body(),
    };
    let n_bytes = body.size_hint().exact();
    let name = file.clone();
    let (mut receiving, most) = blocking(&app, move |app| {
        app.begin_receiving(&upload, &name, n_bytes)
    })
    .await?;
    let mut pieces = body.into_data_stream();
    let mut gathered = BytesMut::new();
    loop {
        let piece = pieces.next().await.transpose().map_err(|error| {
            ApiError::bad_request(format!("the request body ended early: {error}"))
        })?;
        let is_last = piece.is_none();
        gathered.extend_from_slice(&piece.unwrap_or_default());
        let n_so_far = receiving.n_bytes() + gathered.len() as u64;
        if n_so_far > most {
            return Err(too_long(&file, n_so_far, most));
        }
        if gathered.len() >= PIECE || is_last {
            let (piece, name) = (gathered.split(), file.clone());
            receiving = blocking(&app, move |app| {
                app.check_piece(&name, piece.len() as u64)?;
                receiving.add(&piece)?;
                Ok(receiving)
            })
            .await?;
        }
        if is_last {
            break;
        }
    }
    blocking(&app, move |_| Ok(receiving.finish()?)).await?;
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
