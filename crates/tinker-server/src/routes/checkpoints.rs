//! Checkpoints: lists, deletion, publication and time to live.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use tinker_types::{
    CheckpointKind, CheckpointsResponse, ExternalWeightsUrls, TinkerPath, TypeError,
};

use super::Page;
use super::training_runs::run_id;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Params, Parsed, blocking};
use crate::catalog::SavedCheckpoint;
use crate::clock::{http_date, timestamp};
use crate::engine::expiry;
use crate::links::{LinkMaker, Scheme};

pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Params(page): Params<Page>,
) -> Json<CheckpointsResponse> {
    let (checkpoints, cursor) = page.cut(app.core.catalog.checkpoints(), 100);
    Json(CheckpointsResponse {
        n_left_out: 0,
        checkpoints: checkpoints.iter().map(SavedCheckpoint::listed).collect(),
        cursor: Some(cursor),
    })
}

pub(crate) async fn list_of_run(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> ApiResult<Json<CheckpointsResponse>> {
    let run = app.core.catalog.run(&run_id(&id)?)?;
    let of_run = app.core.catalog.checkpoints_of(&run.id);
    Ok(Json(CheckpointsResponse {
        n_left_out: 0,
        checkpoints: of_run.iter().map(SavedCheckpoint::listed).collect(),
        cursor: None,
    }))
}

/// Where a checkpoint is in a URL: run, segment, name.
type Address = Path<(String, String, String)>;

pub(crate) async fn delete(State(app): State<Arc<App>>, address: Address) -> ApiResult<StatusCode> {
    let path = tinker_path(address)?;
    blocking(&app, move |app| Ok(app.core.delete_checkpoint(&path)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What is published can be loaded, sampled and downloaded with every key of this server. Setting it
/// twice is fine: a refusal with 409 would be retried for minutes.
pub(crate) async fn publish(
    State(app): State<Arc<App>>,
    address: Address,
) -> ApiResult<StatusCode> {
    change(&app, address, "checkpoint_published", |checkpoint| {
        checkpoint.public = true;
        Ok(())
    })
    .await
}

pub(crate) async fn unpublish(
    State(app): State<Arc<App>>,
    address: Address,
) -> ApiResult<StatusCode> {
    change(&app, address, "checkpoint_unpublished", |checkpoint| {
        checkpoint.public = false;
        Ok(())
    })
    .await
}

/// Body of `PUT …/ttl`; null keeps the checkpoint for good.
#[derive(Debug, Deserialize)]
pub(crate) struct TtlRequest {
    ttl_seconds: Option<u64>,
}

pub(crate) async fn set_ttl(
    State(app): State<Arc<App>>,
    address: Address,
    request: Parsed<TtlRequest>,
) -> ApiResult<StatusCode> {
    change(&app, address, "checkpoint_ttl_set", move |checkpoint| {
        checkpoint.expires_at = expiry(request.value.ttl_seconds)?;
        Ok(())
    })
    .await
}

/// Links to the files of an external checkpoint.
pub(crate) async fn external_weights_urls(
    State(app): State<Arc<App>>,
    address: Address,
    scheme: Scheme,
    headers: HeaderMap,
    uri: Uri,
) -> ApiResult<Json<ExternalWeightsUrls>> {
    let path = tinker_path(address)?;
    if path.checkpoint.kind != CheckpointKind::External {
        return Err(ApiError::bad_request(format!(
            "{path} is no external checkpoint: save_weights_external makes one"
        )));
    }
    let of = path.clone();
    let (_, manifest) = blocking(&app, move |app| Ok(app.core.saved_bundle(&of)?)).await?;
    let links = LinkMaker::of_request(app.token(), (scheme, &headers, &uri))?;
    let link = |file: &String| {
        let (run, segment) = (path.run.as_str(), path.checkpoint.kind.segment());
        links.link(&["files", run, segment, path.checkpoint.name(), file])
    };
    Ok(Json(ExternalWeightsUrls {
        urls: manifest
            .files
            .keys()
            .map(|f| (f.clone(), link(f)))
            .collect(),
        expires: timestamp(links.expires_at),
    }))
}

/// Leads old clients, which read the `Location` themselves, to an archive of a checkpoint's files.
pub(crate) async fn archive(
    State(app): State<Arc<App>>,
    address: Address,
    scheme: Scheme,
    headers: HeaderMap,
    uri: Uri,
) -> ApiResult<Response> {
    let path = tinker_path(address)?;
    if app.core.catalog.find_checkpoint(&path).is_none() {
        return Err(app.core.catalog.no_checkpoint(&path).into());
    }
    let links = LinkMaker::of_request(app.token(), (scheme, &headers, &uri))?;
    let (run, segment) = (path.run.as_str(), path.checkpoint.kind.segment());
    let link = links.link(&["archives", run, segment, path.checkpoint.name()]);
    let location = [
        (header::LOCATION, link.expose().to_owned()),
        (header::EXPIRES, http_date(links.expires_at)),
    ];
    Ok((StatusCode::FOUND, location).into_response())
}

async fn change(
    app: &Arc<App>,
    address: Address,
    event: &'static str,
    edit: impl FnOnce(&mut SavedCheckpoint) -> ApiResult<()> + Send + 'static,
) -> ApiResult<StatusCode> {
    let path = tinker_path(address)?;
    blocking(app, move |app| {
        let catalog = &app.core.catalog;
        let _changing = app.core.change_checkpoints();
        let Some(mut checkpoint) = catalog.find_own_checkpoint(&path) else {
            return Err(catalog.no_checkpoint(&path).into());
        };
        edit(&mut checkpoint)?;
        catalog.put_checkpoint(checkpoint)?;
        app.core.note_checkpoint(event, &path);
        Ok(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) fn tinker_path(Path((run, segment, name)): Address) -> ApiResult<TinkerPath> {
    let checkpoint = format!("{segment}/{name}")
        .parse()
        .map_err(|e: TypeError| ApiError::bad_request(e.to_string()))?;
    Ok(TinkerPath {
        run: run_id(&run)?,
        checkpoint,
    })
}
