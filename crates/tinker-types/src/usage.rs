//! Billing: what was used, hour by hour, and what stored checkpoints cost. And backups.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ProjectId, SessionId, Timestamp, UserMetadata};

/// Answer of `GET /api/v1/billing/usage/events`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct BillingUsage {
    /// Usage by hour, model, user, session and kind.
    pub data: Vec<UsageEvent>,
    /// The sessions that the events name.
    #[serde(default)]
    pub sessions: BTreeMap<SessionId, UsageSession>,
    /// Up to when costs are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_data_through: Option<Timestamp>,
}

/// A session that usage is charged to.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct UsageSession {
    /// Annotations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_metadata: Option<UserMetadata>,
}

/// Usage of one kind within one hour.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsageEvent {
    /// Start of the hour, UTC.
    pub bucket_start: Timestamp,
    /// End of the hour, UTC.
    pub bucket_end: Timestamp,
    /// The base model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Who used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// Their name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_name: Option<String>,
    /// In which session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
    /// In which project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ProjectId>,
    /// Cost in US dollars, if it is known already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_cost_usd: Option<f64>,
    /// US dollars per million tokens: cost = rate · tokens / 10⁶.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_rate_usd_per_million_tokens: Option<f64>,
    /// US dollars per gigabyte and month: cost = rate · gigabyte hours / 720.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_rate_usd_per_gigabyte_month: Option<f64>,
    /// What was used.
    pub event_info: UsageInfo,
}

/// What was used, and how much of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum UsageInfo {
    /// Tokens trained on.
    Training {
        /// Tokens.
        token_count: u64,
    },
    /// Prompt tokens read by samplers.
    SamplingPrefill {
        /// Whether they were in the cache.
        #[serde(default)]
        cached: bool,
        /// Tokens.
        token_count: u64,
    },
    /// Tokens sampled.
    SamplingSample {
        /// Tokens.
        token_count: u64,
    },
    /// Checkpoints saved.
    Checkpoint {
        /// Checkpoints.
        count: u64,
    },
    /// Checkpoints kept.
    Storage {
        /// Whether it is free of charge.
        #[serde(default)]
        free: bool,
        /// Gigabytes times hours.
        gigabyte_hours: f64,
    },
    /// A kind this version does not know.
    #[serde(untagged)]
    Unknown(serde_json::Value),
}

/// Answer of `GET /api/v1/billing/usage/checkpoints/current`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct CheckpointStorageUsage {
    /// US dollars per gigabyte and month.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_rate_usd_per_gigabyte_month: Option<f64>,
    /// By project and user.
    pub data: Vec<StorageRow>,
}

/// Answer of `POST /api/v1/backup`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupImage {
    /// The directory on the server's machine that the image is in. Whoever asked for it removes it.
    pub dir: String,
}

/// What the checkpoints of a project or user take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StorageRow {
    /// The project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project_id: Option<ProjectId>,
    /// The user, as a URN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub org_user_urn: Option<String>,
    /// The user's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_email: Option<String>,
    /// The user's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_name: Option<String>,
    /// Checkpoints.
    pub checkpoint_count: u64,
    /// Their size in bytes.
    pub size_bytes: u64,
    /// Their size in gigabytes.
    pub size_gigabytes: f64,
    /// US dollars a month, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_monthly_cost_usd: Option<f64>,
}
