//! External weights: checkpoints in files, for use outside the service, and their way in and out.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tags::type_tag;
use crate::{LoraConfig, ProjectId, Timestamp, TinkerPath, TrainingRunId};

type_tag!(SaveWeightsExternalTag, "save_weights_external");

/// Request of `POST /api/v1/save_weights_external`; answered by a future of
/// [`SaveWeightsExternalResponse`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveWeightsExternalRequest {
    /// The training run.
    pub model_id: TrainingRunId,
    /// Checkpoint name.
    pub path: String,
    /// Position in the run's order of operations.
    #[serde(default)]
    pub seq_id: u64,
    /// Seconds until it is deleted, 3600 to ten years; absent keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
    /// Encrypt the files for these, at most ten: age recipients (`age1…`) or SSH public keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_encryption_recipients: Option<Vec<String>>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SaveWeightsExternalTag,
}

/// Result of [`SaveWeightsExternalRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveWeightsExternalResponse {
    /// The checkpoint: `tinker://<run>/external_weights/<name>`. Servers must send it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<TinkerPath>,
    /// Size of the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Literal tag.
    #[serde(rename = "type", default)]
    pub tag: SaveWeightsExternalTag,
}

/// An address that lets whoever knows it read or write one file for a while. `Debug` and `Display`
/// leave its signature out.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SignedUrl(String);

impl SignedUrl {
    /// The address as it was given.
    #[must_use]
    pub const fn new(url: String) -> Self {
        Self(url)
    }

    /// The whole address, signature included: for a request, not for a log.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SignedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.split_once(['?', '#']) {
            Some((address, _)) => write!(f, "{address}?***"),
            None => f.write_str(&self.0),
        }
    }
}

impl fmt::Debug for SignedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignedUrl({self})")
    }
}

/// Answer of `GET /api/v1/training_runs/{id}/checkpoints/{checkpoint}/external_weights_urls`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalWeightsUrls {
    /// Where to read each file, by its relative path. The paths come from the server: check them
    /// before a file is written.
    pub urls: BTreeMap<String, SignedUrl>,
    /// When the addresses cease to work.
    pub expires: Timestamp,
}

/// Answer of `GET /api/v1/training_runs/{id}/checkpoints/{checkpoint}/archive`, which servers for
/// older clients have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointArchive {
    /// Where to read the archive.
    pub url: SignedUrl,
    /// When the address ceases to work; a quarter of an hour from now if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
}

/// Request of `POST /api/v1/external_weights_upload_start` (SDK 0.39, experimental).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartUploadRequest {
    /// Base model of the adapter.
    pub base_model: String,
    /// The adapter.
    pub lora_config: LoraConfig,
    /// Project to file the checkpoint under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_project_id: Option<ProjectId>,
}

/// Answer of `POST /api/v1/external_weights_upload_start`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartUploadResponse {
    /// Names the upload.
    pub upload_id: String,
    /// Where to `PUT` each file, by its name.
    pub urls: BTreeMap<String, SignedUrl>,
    /// When the addresses cease to work.
    pub expires: Timestamp,
}

/// Request of `POST /api/v1/external_weights_upload_finish` (SDK 0.39, experimental).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishUploadRequest {
    /// The upload whose files have all been sent.
    pub upload_id: String,
}

/// Answer of `POST /api/v1/external_weights_upload_finish`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishUploadResponse {
    /// The new checkpoint.
    pub tinker_path: TinkerPath,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_not_printed() {
        let url = SignedUrl::new("https://store/a.bin?sig=secret".into());

        assert_eq!(format!("{url}"), "https://store/a.bin?***");
        assert_eq!(format!("{url:?}"), "SignedUrl(https://store/a.bin?***)");
        assert_eq!(url.expose(), "https://store/a.bin?sig=secret");
    }
}
