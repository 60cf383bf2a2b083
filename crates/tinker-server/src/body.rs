//! Reading request bodies and answering with results: sizes bounded, every refusal explained.

use std::io::Read;
use std::sync::Arc;

use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName};
use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::caller;

/// Bodies beyond this many bytes are read, and results written, off the event loop, which others wait
/// for.
pub(crate) const LARGE_BODY: usize = 64 << 10;

/// How large the bodies of a route may be. A route that does not say (by an `Extension` layer) takes
/// small ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum BodySize {
    /// Ids, names, settings, lists of ids: 2 MiB.
    #[default]
    Small,
    /// Prompts, chats, programs: 32 MiB.
    Medium,
    /// Training data and weights: as the limits of the server have it.
    Large,
}

impl BodySize {
    /// Bytes, before and after decompression, where the largest bodies have `max_bytes`.
    fn limit(self, max_bytes: usize) -> usize {
        match self {
            Self::Small => max_bytes.min(2 << 20),
            Self::Medium => max_bytes.min(32 << 20),
            Self::Large => max_bytes,
        }
    }
}

/// Windows that every level of compression may ask for, as a power of two (8 MiB).
const MIN_WINDOW_LOG: u32 = 23;

/// A body as it came, decompressed.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: Bytes,
    /// Whether it says it is protobuf.
    pub(crate) is_protobuf: bool,
}

impl FromRequest<Arc<App>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> ApiResult<Self> {
        let size = request.extensions().get::<BodySize>();
        let size = size.copied().unwrap_or_default();
        let limit = size.limit(app.core.limits.max_body_bytes);
        let (parts, body) = request.into_parts();
        let is_protobuf = header(&parts.headers, &CONTENT_TYPE)
            .is_some_and(|t| t.starts_with(tinker_types::PROTOBUF));
        let bytes = to_bytes(body, limit).await.map_err(|error| {
            let cause = std::error::Error::source(&error);
            if cause.is_some_and(|c| c.to_string().contains("length limit")) {
                too_large(limit)
            } else {
                ApiError::bad_request(format!("the request body ended early: {error}"))
            }
        })?;
        let bytes = match header(&parts.headers, &CONTENT_ENCODING) {
            None | Some("identity" | "") => bytes,
            // A small one may become large.
            Some("zstd") => off_loop(move || decompress(&bytes, limit)).await?.into(),
            Some(other) => {
                return Err(ApiError::bad_request(format!(
                    "content encoding {other:?} is not supported: send zstd or none"
                )));
            }
        };
        Ok(Self { bytes, is_protobuf })
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn too_large(limit: usize) -> ApiError {
    ApiError::too_large(format!(
        "the request body is larger than {} MB: send fewer data at once",
        limit >> 20
    ))
}

fn decompress(bytes: &[u8], limit: usize) -> ApiResult<Vec<u8>> {
    let fault = |error| ApiError::bad_request(format!("the body is not valid zstd: {error}"));
    let mut plain = Vec::new();
    let mut decoder = zstd::Decoder::new(bytes).map_err(fault)?;
    // The decoder allocates the window that the frame names before it has read any of it.
    let window = limit.next_power_of_two().ilog2().clamp(MIN_WINDOW_LOG, 27);
    decoder.window_log_max(window).map_err(fault)?;
    decoder
        .take(limit as u64 + 1)
        .read_to_end(&mut plain)
        .map_err(fault)?;
    if plain.len() > limit {
        return Err(too_large(limit));
    }
    Ok(plain)
}

/// A JSON body with the bytes it was read from.
#[derive(Debug)]
pub(crate) struct Parsed<T> {
    pub(crate) value: T,
    pub(crate) bytes: Bytes,
}

impl<T: DeserializeOwned + Send + 'static> FromRequest<Arc<App>> for Parsed<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> ApiResult<Self> {
        let bytes = Body::from_request(request, app).await?.bytes;
        let read = bytes.clone();
        let value = if bytes.len() > LARGE_BODY {
            off_loop(move || parse_json(&read)).await?
        } else {
            parse_json(&read)?
        };
        Ok(Self { value, bytes })
    }
}

/// Reads JSON.
///
/// # Errors
/// 400 if it is not JSON, 422 if it has other fields than the endpoint takes.
pub(crate) fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        let message = format!("request body: {error}");
        if error.is_data() {
            ApiError::unprocessable(message)
        } else {
            ApiError::bad_request(message)
        }
    })
}

/// Query parameters.
#[derive(Debug)]
pub(crate) struct Params<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<App>> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> ApiResult<Self> {
        match Query::from_request_parts(parts, app).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(ApiError::bad_request(rejection.body_text())),
        }
    }
}

/// Runs work that touches disk or database off the event loop.
pub(crate) async fn blocking<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    let app = Arc::clone(app);
    off_loop(move || work(&app)).await
}

/// Runs work that takes a while off the event loop, for the same caller.
pub(crate) async fn off_loop<T: Send + 'static>(
    work: impl FnOnce() -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    tokio::task::spawn_blocking(caller::carried(work))
        .await
        .map_err(|error| {
            ApiError::internal("internal error; see the server's log", error.to_string())
        })?
}
