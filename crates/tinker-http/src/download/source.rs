//! Where signed addresses come from.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tinker_types::{CheckpointArchive, ExternalWeightsUrls, SignedUrl, Timestamp};

use crate::error::Result;

/// How long addresses are used that do not say.
const UNKNOWN_LIFETIME: Duration = Duration::from_secs(15 * 60);

/// Addresses of files, and when they cease to work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedFiles {
    /// By name, which may hold folders.
    pub files: BTreeMap<String, RemoteFile>,
    /// When to ask for new ones, at the latest.
    pub expires_at: SystemTime,
}

/// A file at a signed address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Where it is.
    pub url: SignedUrl,
    /// Its SHA-256 sum in hexadecimal, if it is known beforehand.
    pub sha256: Option<String>,
}

impl From<SignedUrl> for RemoteFile {
    fn from(url: SignedUrl) -> Self {
        Self { url, sha256: None }
    }
}

impl SignedFiles {
    /// The files of an external checkpoint, by an answer that came at `now`.
    #[must_use]
    pub fn of_external_weights(answer: ExternalWeightsUrls, now: SystemTime) -> Self {
        let files = answer.urls.into_iter();
        Self {
            files: files.map(|(name, url)| (name, url.into())).collect(),
            expires_at: expiry(Some(&answer.expires), now),
        }
    }

    /// One archive called `name`, by an answer that came at `now`.
    #[must_use]
    pub fn of_archive(name: &str, answer: CheckpointArchive, now: SystemTime) -> Self {
        Self {
            files: [(name.to_owned(), answer.url.into())].into(),
            expires_at: expiry(answer.expires.as_ref(), now),
        }
    }
}

/// The time that a server names; times without a zone are UTC. A quarter of an hour from now if it
/// names none that can be read.
fn expiry(said: Option<&Timestamp>, now: SystemTime) -> SystemTime {
    let read = said.and_then(|said| {
        let text = said.0.as_str();
        let zoned = text.parse::<jiff::Timestamp>().ok();
        zoned.or_else(|| {
            let civil = text.parse::<jiff::civil::DateTime>().ok()?;
            Some(civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp())
        })
    });
    read.map_or(now + UNKNOWN_LIFETIME, SystemTime::from)
}

type Signing = Pin<Box<dyn Future<Output = Result<SignedFiles>> + Send>>;

/// Asks for signed addresses: at the start, before they expire, and when the storage refuses them.
/// The names must be the same each time.
#[derive(Clone)]
pub struct Source(Arc<dyn Fn() -> Signing + Send + Sync>);

impl Source {
    /// A source that calls `sign`.
    pub fn new<F, S>(sign: F) -> Self
    where
        F: Fn() -> S + Send + Sync + 'static,
        S: Future<Output = Result<SignedFiles>> + Send + 'static,
    {
        Self(Arc::new(move || Box::pin(sign())))
    }

    pub(super) async fn sign(&self) -> Result<SignedFiles> {
        (self.0)().await
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Source")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_with_and_without_zone_are_read_and_nonsense_is_a_quarter_of_an_hour() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (text, expected_s) in [
            ("2026-01-02T03:04:05Z", 1_767_323_045),
            ("2026-01-02T04:04:05.000+01:00", 1_767_323_045),
            ("2026-01-02T03:04:05", 1_767_323_045),
            ("soon", 1_000_900),
        ] {
            let read = expiry(Some(&Timestamp(text.into())), now);
            let secs = read.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            assert_eq!(secs.as_secs(), expected_s, "{text}");
        }
        assert_eq!(expiry(None, now), now + UNKNOWN_LIFETIME);
    }
}
