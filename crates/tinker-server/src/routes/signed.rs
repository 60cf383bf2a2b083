//! What signed links lead to: files of checkpoints, archives and traces.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use tinker_types::SessionId;

use super::checkpoints::tinker_path;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::blob::Blob;
use crate::body::blocking;
use crate::bundle;
use crate::trace;

type FileAddress = Path<(String, String, String, String)>;

pub(crate) async fn file(
    State(app): State<Arc<App>>,
    Path((run, segment, name, file)): FileAddress,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let path = tinker_path(Path((run, segment, name)))?;
    let blob = blocking(&app, move |app| {
        let (dir, manifest) = app.core.saved_bundle(&path)?;
        Blob::of_file(&dir, &manifest, &file)
            .ok_or_else(|| ApiError::not_found(format!("{path} has no file {file:?}")))
    })
    .await?;
    Ok(blob.respond(&headers))
}

pub(crate) async fn archive(
    State(app): State<Arc<App>>,
    address: Path<(String, String, String)>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let path = tinker_path(address)?;
    let blob = blocking(&app, move |app| {
        let (dir, manifest) = app.core.saved_bundle(&path)?;
        Ok(Blob::archive(&dir, &manifest))
    })
    .await?;
    Ok(blob.respond(&headers))
}

pub(crate) async fn trace(
    State(app): State<Arc<App>>,
    Path(session): Path<String>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let session: SessionId = super::sessions::session_id(&session)?;
    let text = blocking(&app, move |app| Ok(trace::of_session(&app.core, &session)?)).await?;
    Ok(Blob::of_json(text).respond(&headers))
}

impl crate::core::Core {
    /// Directory and manifest of a checkpoint.
    pub(crate) fn saved_bundle(
        &self,
        path: &tinker_types::TinkerPath,
    ) -> crate::error::Result<(std::path::PathBuf, bundle::Manifest)> {
        if self.catalog.find_checkpoint(path).is_none() {
            return Err(self.catalog.no_checkpoint(path));
        }
        let dir = self.paths.checkpoint(path);
        let manifest = bundle::present_manifest(self.disk.as_ref(), &dir)?;
        Ok((dir, manifest))
    }
}
