//! Who may talk to the server: no foreign host name, no web page, nobody without a key.
//!
//! Loopback is not a border. Any page in a browser can send requests to 127.0.0.1, and by DNS
//! rebinding a page's own host name can be made to point there; hence the checks of Host and Origin
//! beside the token.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tinker_types::HEALTHZ;

use crate::access::CallerName;
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::caller::{self, Caller, Scope};
use crate::identity::{self, Holder};
use crate::keys::Keys;
use crate::links::{self, Scheme};
use crate::token::ApiToken;

/// Lets a request through to be answered for its caller, or answers it with 401 or 403.
pub(crate) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let known = Known {
        token: app.token(),
        keys: &app.core.keys,
        scheme: Scheme::of(request.extensions()),
    };
    match check(request.headers(), request.uri(), &known) {
        Ok(caller) => {
            app.touch();
            let Some(caller) = caller else {
                return next.run(request).await;
            };
            let name = CallerName::of(&caller);
            let mut response = caller::answer_for(caller, next.run(request)).await;
            response.extensions_mut().insert(name);
            response
        }
        Err(error) => refusal(request.headers(), error),
    }
}

/// Lets a request through whose caller has a scope, or answers it with 403.
pub(crate) async fn need(State(scope): State<Scope>, request: Request, next: Next) -> Response {
    match caller::check(scope) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// What a request is checked against.
struct Known<'a> {
    /// The data directory's own.
    token: &'a ApiToken,
    keys: &'a Keys,
    /// By what the request came.
    scheme: Scheme,
}

/// A refused short-lived token is named as such, so that clients exchange their key for a new one
/// (RFC 6750, section 3).
fn refusal(headers: &HeaderMap, error: ApiError) -> Response {
    let mut response = error.into_response();
    let is_stale = presented(headers).is_some_and(identity::is_jwt);
    if response.status() == StatusCode::UNAUTHORIZED && is_stale {
        let challenge = HeaderValue::from_static("Bearer error=\"invalid_token\"");
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, challenge);
    }
    response
}

/// Who sends a request; nobody in particular where no key is needed.
fn check(headers: &HeaderMap, uri: &Uri, known: &Known<'_>) -> ApiResult<Option<Caller>> {
    let authority = links::authority(headers, uri)
        .ok_or_else(|| ApiError::bad_request("the request has no Host header"))?;
    // A name that leads here by a trick has no certificate of this server.
    if known.scheme == Scheme::Http && !is_local_name(authority) {
        return Err(ApiError::forbidden(format!(
            "host {authority:?} is not served: use an IP address or localhost"
        )));
    }
    if let Some(origin) = text(headers, header::ORIGIN)
        && origin != format!("{}://{authority}", known.scheme)
    {
        return Err(ApiError::forbidden(format!(
            "requests from web pages of {origin:?} are refused"
        )));
    }
    if uri.path() == HEALTHZ {
        return Ok(None);
    }
    if uri.path().starts_with(links::SIGNED) {
        return links::check(known.token, uri).map(|()| None);
    }
    match presented(headers) {
        Some(jwt) if identity::is_jwt(jwt) => known.of_jwt(jwt).ok_or_else(|| ApiError::unauthenticated(
            "the short-lived token is not valid, or no longer: exchange the API key for a new one at /api/v1/auth/token",
        )),
        Some(key) => known.of_key(key).ok_or_else(|| ApiError::unauthenticated(
            "the API key is none of this server's: on its machine `tinker serve status --export` shows its own for TINKER_API_KEY, and `tinker serve keys list` the others",
        )),
        None => Err(ApiError::unauthenticated(
            "no API key: send one of the server's as X-API-Key; on its machine `tinker serve status --export` shows its own for TINKER_API_KEY",
        )),
    }
    .map(Some)
}

impl Known<'_> {
    fn of_key(&self, presented: &str) -> Option<Caller> {
        if self.token.matches(presented) {
            return Some(Caller::own());
        }
        self.keys.find(presented)
    }

    /// A token dies with the key that it was made for, also if another takes the name.
    fn of_jwt(&self, presented: &str) -> Option<Caller> {
        match identity::holder(self.token, presented)? {
            Holder::Own => Some(Caller::own()),
            Holder::Key { digest } => self.keys.of_digest(&digest),
        }
    }
}

/// The token of a request: `X-API-Key`, or a bearer token.
fn presented(headers: &HeaderMap) -> Option<&str> {
    let bearer = || text(headers, header::AUTHORIZATION)?.strip_prefix("Bearer ");
    headers
        .get("x-api-key")
        .and_then(|value| value.to_str().ok())
        .or_else(bearer)
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Whether an authority is `localhost` or an IP literal, which no DNS answer can redirect.
fn is_local_name(authority: &str) -> bool {
    let host = match authority
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((ip, _port)) => ip,
        None => authority
            .split_once(':')
            .map_or(authority, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(path: &str, headers: &[(&'static str, &'static str)]) -> u16 {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_static(value));
        }
        let (home, token) = (
            tempfile::tempdir().unwrap(),
            ApiToken::new("tml-right").unwrap(),
        );
        let known = Known {
            token: &token,
            keys: &Keys::open(home.path()).unwrap(),
            scheme: Scheme::Http,
        };
        match check(&map, &path.parse().unwrap(), &known) {
            Ok(_) => 200,
            Err(error) => error.into_response().status().as_u16(),
        }
    }

    #[test]
    fn admits_the_token_in_either_header() {
        let host = ("host", "127.0.0.1:80");

        assert_eq!(
            status("/api/v1/x", &[host, ("x-api-key", "tml-right")]),
            200
        );
        assert_eq!(
            status("/api/v1/x", &[host, ("authorization", "Bearer tml-right")]),
            200
        );
        assert_eq!(
            status("/api/v1/x", &[host, ("x-api-key", "tml-wrong")]),
            401
        );
        assert_eq!(status("/api/v1/x", &[host]), 401);
        assert_eq!(status("/api/v1/healthz", &[host]), 200);
    }

    #[test]
    fn refuses_names_that_dns_can_rebind() {
        let key = ("x-api-key", "tml-right");

        for host in ["localhost", "LOCALHOST:9", "[::1]:8080", "192.168.0.7:1"] {
            assert_eq!(status("/api/v1/x", &[("host", host), key]), 200, "{host}");
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example:80",
            "localhost.evil",
            "",
        ] {
            assert_eq!(status("/api/v1/x", &[("host", host), key]), 403, "{host}");
        }
        assert_eq!(status("/api/v1/healthz", &[("host", "evil.example")]), 403);
    }

    #[test]
    fn refuses_pages_of_other_origins() {
        let (host, key) = (("host", "localhost:80"), ("x-api-key", "tml-right"));

        for origin in [
            "http://evil.example",
            "null",
            "https://localhost:80",
            "http://localhost:81",
        ] {
            assert_eq!(
                status("/a", &[host, key, ("origin", origin)]),
                403,
                "{origin}"
            );
        }
        assert_eq!(
            status("/a", &[host, key, ("origin", "http://localhost:80")]),
            200
        );
    }
}
