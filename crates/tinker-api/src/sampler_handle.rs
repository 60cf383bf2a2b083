//! A text by which another process opens the same sampler, in the official client's format.

use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine as _, alphabet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tinker_types::{ClientConfig, DynamicConfig, SamplingSessionId, SessionId};

use crate::error::{Error, Result};

/// Longest handle that is read, in bytes.
const MAX_BYTES: usize = 1 << 16;

/// What another process needs to sample from a sampler of this one; it holds no key.
///
/// `Display` writes it as text (base64 of JSON) that the official client reads, and `FromStr` reads
/// that client's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplerHandle {
    pub(crate) session_id: SessionId,
    pub(crate) sampling_session_id: SamplingSessionId,
    pub(crate) holder: Holder,
    pub(crate) base_model: String,
    #[serde(default)]
    pub(crate) record_stability_info: bool,
}

/// Where the sampler is, and the settings that its server gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Holder {
    pub(crate) base_url: String,
    #[serde(default)]
    pub(crate) default_headers_overrides: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    pub(crate) client_config: ClientConfig,
    #[serde(default)]
    pub(crate) client_dynamic_config: DynamicConfig,
    // A key of a foreign handle is not read: nothing is sent with a key that nobody gave here.
}

impl SamplerHandle {
    /// The sampler.
    #[must_use]
    pub const fn sampling_session_id(&self) -> &SamplingSessionId {
        &self.sampling_session_id
    }

    /// Where its server is.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.holder.base_url
    }

    /// Name of its base model.
    #[must_use]
    pub fn base_model(&self) -> &str {
        &self.base_model
    }

    /// Checks that a client's server is the one of the sampler.
    pub(crate) fn check_server(&self, base_url: &str) -> Result<()> {
        let theirs = self.base_url().trim_end_matches('/');
        if theirs == base_url.trim_end_matches('/') {
            return Ok(());
        }
        Err(Error::InvalidRequest(format!(
            "the sampler is at {theirs} and this client at {base_url}: build a client of that server"
        )))
    }
}

impl fmt::Display for SamplerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let json = serde_json::to_vec(self).map_err(|_| fmt::Error)?;
        f.write_str(&BASE64.encode(&json))
    }
}

impl FromStr for SamplerHandle {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let fault = |why: &str| Error::InvalidRequest(format!("not a sampler handle: {why}"));
        let text = text.trim();
        if text.len() > MAX_BYTES {
            return Err(fault("it is longer than 64 KiB"));
        }
        let json = BASE64
            .decode(text)
            .map_err(|_| fault("it is not url-safe base64"))?;
        serde_json::from_slice(&json).map_err(|error| fault(&error.to_string()))
    }
}

/// URL-safe base64 (RFC 4648, section 5), with padding when written and with or without when read.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Made with `SamplingClient.get_sampler_handle()` of the official Python SDK 0.38.0.
    const OFFICIAL: &str = "eyJzZXNzaW9uX2lkIjoiUzEiLCJzYW1wbGluZ19zZXNzaW9uX2lkIjoiUzE6c2FtcGxlOjAiLCJob2xkZXIiOnsiYmFzZV91cmwiOiJodHRwOi8vMTI3LjAuMC4xOjM5MDA1IiwiZGVmYXVsdF9oZWFkZXJzX292ZXJyaWRlcyI6e30sImNsaWVudF9jb25maWciOnsicGp3dF9hdXRoX2VuYWJsZWQiOmZhbHNlLCJjcmVkZW50aWFsX2RlZmF1bHRfc291cmNlIjoiYXBpX2tleSIsInNhbXBsZV9kaXNwYXRjaF9ieXRlc19zZW1hcGhvcmVfc2l6ZSI6MTA0ODU3NjAsImluZmxpZ2h0X3Jlc3BvbnNlX2J5dGVzX3NlbWFwaG9yZV9zaXplIjo1MjQyODgwMCwicGFyYWxsZWxfZndkYndkX2NodW5rcyI6dHJ1ZSwicHJvdG9fY29tcHJlc3NfZndkYndkIjpmYWxzZSwiZndkYndkX21heF9jaHVua19sZW4iOjEwMjQsImZ3ZGJ3ZF9tYXhfY2h1bmtfYnl0ZXNfY291bnQiOjUwMDAwMDAsImZ3ZGJ3ZF9kaXNwYXRjaF9ieXRlc19zZW1hcGhvcmVfc2l6ZSI6NTAwMDAwMDAsImJpbGxpbmdfZXhjZXB0aW9uX21heF9wYXVzZV9kdXJhdGlvbl9zZWMiOjM2MDAsInNhbXBsZV9ub19yZXRyaWVzIjpmYWxzZSwic2FtcGxlX2VuYWJsZV9zdHVja19kZXRlY3Rpb24iOnRydWUsInNhbXBsZV9tYXhfY29uY3VycmVudF9yZXF1ZXN0cyI6MjAwMCwidXNlX3B5cXdlc3RfdHJhbnNwb3J0Ijp0cnVlLCJzYW1wbGVfdXNlX3JldHJpZXZlX2Z1dHVyZXMiOmZhbHNlLCJjdXN0b21fbG9zc19zZXJ2ZXJfc2lkZSI6ZmFsc2UsInNhbXBsZV9qb2luX3NhbXBsaW5nX3Nlc3Npb24iOmZhbHNlfSwiY2xpZW50X2R5bmFtaWNfY29uZmlnIjp7InJlZnJlc2hfaW50ZXJ2YWxfc2VjIjozMDAsInNhbXBsZV9jYW5jZWxfZW5hYmxlZCI6ZmFsc2UsInNhbXBsZV9jYW5jZWxfbWF4X2JhdGNoX3NpemUiOjY0fSwiYXBpX2tleSI6bnVsbH0sImJhc2VfbW9kZWwiOiJ0aW5rZXIvbmFubyIsInJlY29yZF9zdGFiaWxpdHlfaW5mbyI6ZmFsc2V9";

    #[test]
    fn handles_of_the_official_client_are_read_and_written_again() {
        let handle: SamplerHandle = OFFICIAL.parse().unwrap();

        assert_eq!(handle.sampling_session_id().as_str(), "S1:sample:0");
        assert_eq!(handle.base_model(), "tinker/nano");
        assert_eq!(handle.holder.client_config, ClientConfig::default());
        assert_eq!(handle.to_string().parse::<SamplerHandle>().unwrap(), handle);
        handle.check_server("http://127.0.0.1:39005/").unwrap();
        let error = handle.check_server("http://127.0.0.1:1").unwrap_err();
        assert!(
            error.to_string().contains("http://127.0.0.1:39005"),
            "{error}"
        );
    }

    #[test]
    fn every_length_of_bytes_survives_the_text() {
        for n in 0..10_u8 {
            let bytes: Vec<u8> = (0..n).map(|i| i.wrapping_mul(251)).collect();
            assert_eq!(BASE64.decode(BASE64.encode(&bytes)), Ok(bytes));
        }
    }

    #[test]
    fn what_is_no_handle_is_refused_with_the_reason() {
        let long = "A".repeat(MAX_BYTES + 1);
        for (text, reason) in [
            ("tml-not-a-handle!", "base64"),
            ("A", "base64"),
            (long.as_str(), "64 KiB"),
            ("e30=", "missing field `session_id`"),
            ("", "EOF"),
        ] {
            let error = text.parse::<SamplerHandle>().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
