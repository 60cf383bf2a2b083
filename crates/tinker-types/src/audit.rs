//! The audit log: who did what to which checkpoint, project or team.

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::tags::wire_enum;

wire_enum! {
    /// Which events of an audit log to read.
    AuditEventType {
        /// All of them.
        All = "all",
        /// Reads, copies, publications and deletions of checkpoints.
        Checkpoints = "checkpoints",
        /// Changes of projects.
        Projects = "projects",
        /// Changes of teams.
        Teams = "teams",
        /// Changes of the organization.
        Organizations = "organizations",
    }
}

/// Answer of `GET /api/v1/audit`, or of where it redirects to: the events of one UTC day.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct AuditLog {
    /// The events.
    pub entries: Vec<AuditEntry>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// When.
    pub timestamp: Timestamp,
    /// What, as `<resource>_<action>`.
    pub event: String,
    /// Its particulars.
    #[serde(default)]
    pub event_details: serde_json::Map<String, serde_json::Value>,
    /// The training run; older servers put it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_id: Option<String>,
    /// The checkpoint; older servers put it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tinker_path: Option<String>,
    /// What for; older servers put it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purpose: Option<String>,
}
