//! Administration of an organization: its audit log, usage and storage. Needs no session.

use tinker_http::Client;
use tinker_types::{
    AuditEventType, AuditLog, BillingUsage, CheckpointStorageUsage, ProjectId, Timestamp,
};

use crate::error::{Error, Result};

/// Looks at what an organization does and uses. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AdminClient {
    http: Client,
}

impl AdminClient {
    /// A client over a transport; see also
    /// [`ServiceClient::admin_client`](crate::ServiceClient::admin_client).
    #[must_use]
    pub const fn new(http: Client) -> Self {
        Self { http }
    }

    /// Reads the audit log of one UTC day, `YYYY-MM-DD`; of today if absent.
    ///
    /// Endpoint: `GET /api/v1/audit`. Where it points to a file, that is read without the key.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the day is no date, and if the call fails; of kind
    /// `PermissionDenied` if the key is not an administrator's.
    pub async fn get_audit_log(
        &self,
        events: AuditEventType,
        day: Option<&str>,
    ) -> Result<AuditLog> {
        if let Some(day) = day.filter(|day| !is_day(day)) {
            return Err(Error::InvalidRequest(format!(
                "day {day:?}: it must be a date such as 2026-11-20"
            )));
        }
        Ok(self.http.get_audit_log(&events, day).await?)
    }

    /// Reads what was used from one full hour to another, RFC 3339 in UTC such as
    /// `2026-11-20T00:00:00Z`, at most 14 days apart.
    ///
    /// Endpoint: `GET /api/v1/billing/usage/events`.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if a time is not of that form, and if the call fails.
    pub async fn get_billing_usage(
        &self,
        starting_on: &str,
        ending_before: &str,
    ) -> Result<BillingUsage> {
        let (from, to) = (hour(starting_on)?, hour(ending_before)?);
        if from >= to {
            return Err(Error::InvalidRequest(format!(
                "usage from {from} to {to}: the end must come after the start"
            )));
        }
        Ok(self.http.get_billing_usage(&from, &to).await?)
    }

    /// Reads what stored checkpoints take and cost now, of one project or of all.
    ///
    /// Endpoint: `GET /api/v1/billing/usage/checkpoints/current`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_current_checkpoint_storage_usage(
        &self,
        project: Option<&ProjectId>,
    ) -> Result<CheckpointStorageUsage> {
        Ok(self.http.get_checkpoint_storage_usage(project).await?)
    }
}

/// Whether a text has the form of a date.
fn is_day(text: &str) -> bool {
    matches_form(text, "dddd-dd-dd")
}

/// A full hour in UTC.
fn hour(text: &str) -> Result<Timestamp> {
    if matches_form(text, "dddd-dd-ddTdd:00:00Z") {
        return Ok(Timestamp(text.to_owned()));
    }
    Err(Error::InvalidRequest(format!(
        "time {text:?}: it must be a full hour in UTC such as 2026-11-20T00:00:00Z"
    )))
}

/// Whether a text has a form, in which `d` stands for a digit.
fn matches_form(text: &str, form: &str) -> bool {
    text.len() == form.len()
        && text.bytes().zip(form.bytes()).all(|(b, f)| match f {
            b'd' => b.is_ascii_digit(),
            literal => b == literal,
        })
}
