//! Signed links: addresses under `/signed/` that let whoever has one read one thing for a while.
//!
//! The key of the signature follows from the server's token, so links outlive a restart, and a new
//! token makes the old ones void.

use std::convert::Infallible;
use std::fmt::{self, Write as _};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, Uri, header};
use tinker_types::SignedUrl;

use crate::api_error::{ApiError, ApiResult};
use crate::clock::{Millis, now};
use crate::tls::OverTls;
use crate::token::ApiToken;

/// Where signed links lead. Requests below need a signature instead of a key.
pub(crate) const SIGNED: &str = "/signed/";

/// How long a link works.
pub(crate) const LIFE: Millis = 60 * 60 * 1000;

/// Makes links to this server, as the client calls it.
#[derive(Debug)]
pub(crate) struct LinkMaker<'a> {
    token: &'a ApiToken,
    /// `http://host:port`, or `https`.
    origin: String,
    /// When its links cease to work.
    pub(crate) expires_at: Millis,
}

impl<'a> LinkMaker<'a> {
    /// For the host that a request was sent to.
    ///
    /// # Errors
    /// If the request names none.
    pub(crate) fn of_request(
        token: &'a ApiToken,
        (scheme, headers, uri): (Scheme, &HeaderMap, &Uri),
    ) -> ApiResult<Self> {
        let authority = authority(headers, uri)
            .ok_or_else(|| ApiError::bad_request("the request has no Host header"))?;
        Ok(Self {
            token,
            origin: format!("{scheme}://{authority}"),
            expires_at: now() + LIFE,
        })
    }

    /// A link to what the segments name below [`SIGNED`].
    pub(crate) fn link(&self, segments: &[&str]) -> SignedUrl {
        let names: Vec<String> = segments.iter().map(|name| escape(name)).collect();
        let path = format!("{SIGNED}{}", names.join("/"));
        let expires = self.expires_at / 1000;
        let signature = sign(self.token, &path, expires);
        SignedUrl::new(format!(
            "{}{path}?expires={expires}&signature={signature}",
            self.origin
        ))
    }
}

/// By what a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    /// That of a request.
    pub(crate) fn of(extensions: &Extensions) -> Self {
        match extensions.get::<OverTls>() {
            Some(OverTls) => Self::Https,
            None => Self::Http,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::Https => "https",
        })
    }
}

impl<S: Sync> FromRequestParts<S> for Scheme {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.extensions))
    }
}

/// The host and port that a request was sent to.
pub(crate) fn authority<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> Option<&'a str> {
    uri.authority().map(|a| a.as_str()).or_else(|| {
        let host = headers.get(header::HOST)?;
        host.to_str().ok()
    })
}

/// Checks the signature of a request for a signed link.
///
/// # Errors
/// 403 if the link was changed or its time is up.
pub(crate) fn check(token: &ApiToken, uri: &Uri) -> ApiResult<()> {
    let invalid =
        || ApiError::forbidden("this link is not signed by this server: ask for a new one");
    let query = uri.query().unwrap_or_default();
    let value = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let expires: i64 = value("expires")
        .and_then(|text| text.parse().ok())
        .ok_or_else(invalid)?;
    let given = value("signature").ok_or_else(invalid)?;
    let expected = sign(token, uri.path(), expires);
    // Digests compare in constant time.
    if blake3::hash(given.as_bytes()) != blake3::hash(expected.as_bytes()) {
        return Err(invalid());
    }
    if expires.saturating_mul(1000) <= now() {
        return Err(ApiError::forbidden(
            "this link has expired: ask for a new one",
        ));
    }
    Ok(())
}

fn sign(token: &ApiToken, path: &str, expires: i64) -> String {
    let key = blake3::derive_key("tinker-server signed links v1", token.expose().as_bytes());
    blake3::keyed_hash(&key, format!("{path}?{expires}").as_bytes())
        .to_hex()
        .to_string()
}

/// Percent-encodes a path segment (RFC 3986, section 2.3).
fn escape(segment: &str) -> String {
    let mut text = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            text.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use axum::response::IntoResponse as _;

    fn token() -> ApiToken {
        ApiToken::new("tml-x").unwrap()
    }

    fn link(expires_at: Millis) -> Uri {
        let token = token();
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1:8"));
        let maker =
            LinkMaker::of_request(&token, (Scheme::Http, &headers, &Uri::from_static("/a")))
                .unwrap();
        let maker = LinkMaker {
            expires_at,
            ..maker
        };
        maker
            .link(&["files", "s:train:0", "é/x"])
            .expose()
            .parse()
            .unwrap()
    }

    fn status(uri: &Uri, token: &ApiToken) -> u16 {
        match check(token, uri) {
            Ok(()) => 200,
            Err(error) => error.into_response().status().as_u16(),
        }
    }

    #[test]
    fn a_link_opens_what_it_was_made_for_and_nothing_else() {
        let uri = link(now() + 5000);
        assert_eq!(uri.authority().unwrap().as_str(), "127.0.0.1:8");
        assert_eq!(uri.path(), "/signed/files/s%3Atrain%3A0/%C3%A9%2Fx");

        assert_eq!(status(&uri, &token()), 200);
        let text = uri.to_string();
        for changed in [
            text.replace("train%3A0", "train%3A1"),
            text.replace("expires=", "expires=1"),
            text.replace("&signature=", "&signature=0"),
            text.replace("&signature", "&sig"),
            "/signed/files".to_owned(),
        ] {
            assert_eq!(
                status(&changed.parse().unwrap(), &token()),
                403,
                "{changed}"
            );
        }
        assert_eq!(status(&uri, &ApiToken::new("tml-y").unwrap()), 403);
    }

    #[test]
    fn a_link_whose_time_is_up_says_so() {
        let uri = link(now() - 1000);

        let error = check(&token(), &uri).unwrap_err();

        assert!(format!("{error:?}").contains("expired"));
    }
}
