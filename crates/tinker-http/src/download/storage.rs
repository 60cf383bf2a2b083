//! One ranged request to a storage, and what its answer means.

use std::ops::Range;
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, LAST_MODIFIED, RANGE,
};
use reqwest::{Response, Url};
use tinker_types::SignedUrl;

use super::journal::Identity;
use super::parts::{parse_content_range, range_header};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{Failure, parse_retry_after};
use crate::send::no_answer;

/// What a storage sends.
#[derive(Debug)]
pub(super) enum Sent {
    /// Bytes of the range that was asked for, from its start.
    Part(Identity, Response),
    /// The file from its start: the storage knows no ranges. Its size, if it says.
    Whole(Option<u64>, Response),
    /// Nothing: the file is empty.
    Empty,
}

/// Why there is nothing.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The address does not work, or no longer.
    Refused(Error),
    /// The attempt failed.
    Failed {
        failure: Failure,
        retry_after: Option<Duration>,
        error: Error,
    },
    /// The disk failed, or the answer makes no sense: no repetition helps.
    Final(Error),
}

/// Checks a signed address.
///
/// # Errors
/// If it is none, or if it is not encrypted although it has to be.
pub(super) fn address(name: &str, url: &SignedUrl, may_be_plain: bool) -> Result<Url> {
    // The error of the parser would show the address.
    let fault = |why: &str| {
        Error::new(
            ErrorKind::Untrusted,
            format!("the address of {name}, {url}, {why}"),
        )
    };
    let parsed = Url::parse(url.expose()).map_err(|_| fault("is malformed"))?;
    match parsed.scheme() {
        "https" => Ok(parsed),
        "http" if may_be_plain => Ok(parsed),
        _ => Err(fault("is not encrypted")),
    }
}

/// Asks for bytes of a file.
pub(super) async fn get(
    client: &reqwest::Client,
    url: Url,
    range: &Range<u64>,
) -> Result<Sent, Trouble> {
    let request = client
        .get(url)
        .header(RANGE, range_header(range))
        // Parts of a compressed file make no file.
        .header(ACCEPT_ENCODING, "identity");
    let response = request.send().await.map_err(lost)?;
    let status = response.status().as_u16();
    let said = response.headers().get(CONTENT_RANGE);
    let said = said.and_then(|text| parse_content_range(text.to_str().ok()?));
    match (status, said) {
        (206, Some(said)) => {
            let sent = said.range.unwrap_or_default();
            if sent.start != range.start || sent.end > range.end {
                let text = format!("the storage sent bytes {sent:?} when asked for {range:?}");
                return Err(Trouble::Final(Error::new(ErrorKind::Decode, text)));
            }
            let identity = Identity {
                size_bytes: said.size_bytes,
                validator: validator(response.headers()),
            };
            Ok(Sent::Part(identity, response))
        }
        (200, _) => Ok(Sent::Whole(length(response.headers()), response)),
        (416, Some(said)) if said.size_bytes == 0 => Ok(Sent::Empty),
        _ => Err(refusal(status, response).await),
    }
}

fn text(headers: &HeaderMap, name: impl reqwest::header::AsHeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn length(headers: &HeaderMap) -> Option<u64> {
    text(headers, CONTENT_LENGTH)?.parse().ok()
}

/// What changes when the file does. Weak tags do not promise the same bytes.
fn validator(headers: &HeaderMap) -> Option<String> {
    let tag = text(headers, ETAG).filter(|tag| !tag.starts_with("W/"));
    tag.or_else(|| text(headers, LAST_MODIFIED))
        .map(str::to_owned)
}

async fn refusal(status: u16, response: Response) -> Trouble {
    let headers = response.headers();
    let (ms, secs) = (
        text(headers, "retry-after-ms"),
        text(headers, "retry-after"),
    );
    let retry_after = parse_retry_after(ms, secs, Clock::wall());
    // Its body may repeat the address, so it is not shown.
    let error = Error::of_status(status, b"the storage refuses", retry_after);
    match status {
        // What storages say of signatures that have expired or do not fit.
        400 | 401 | 403 | 410 => Trouble::Refused(error),
        _ => Trouble::Failed {
            failure: Failure::Status {
                code: status,
                empty_body: false,
            },
            retry_after,
            error,
        },
    }
}

/// A connection that was not made, or broke.
pub(super) fn lost(error: reqwest::Error) -> Trouble {
    if error.is_redirect() {
        let text = "the storage redirects too often, or to where it is not encrypted";
        let error = Error::new(ErrorKind::Untrusted, text).with_source(error.without_url());
        return Trouble::Final(error);
    }
    let none = no_answer(error);
    Trouble::Failed {
        failure: none.failure,
        retry_after: None,
        error: none.error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_encrypted_unless_the_server_is_not() {
        let check = |url: &str, may_be_plain| {
            let url = SignedUrl::new(url.to_owned());
            address("a.bin", &url, may_be_plain).map_err(|error| error.message().to_owned())
        };

        assert!(check("https://store/a?sig=s", false).is_ok());
        assert!(check("http://store/a?sig=s", true).is_ok());
        for (url, expected) in [
            (
                "http://store/a?sig=s",
                "the address of a.bin, http://store/a?***, is not encrypted",
            ),
            (
                "file:///etc/passwd",
                "the address of a.bin, file:///etc/passwd, is not encrypted",
            ),
            ("store", "the address of a.bin, store, is malformed"),
        ] {
            assert_eq!(check(url, false).unwrap_err(), expected);
        }
    }
}
