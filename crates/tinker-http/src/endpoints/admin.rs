//! Administration: the audit log, and what was used.

use tinker_types::{
    AUDIT, AuditEventType, AuditLog, BACKUP, BILLING_USAGE, BackupImage, BillingUsage,
    CheckpointStorageUsage, ProjectId, STORAGE_USAGE, Timestamp,
};

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

impl Client {
    /// Reads the audit log of one UTC day, `YYYY-MM-DD`; of today if absent. Servers may point to
    /// where the log lies; it is fetched from there without the key.
    ///
    /// Endpoint: `GET /api/v1/audit`.
    ///
    /// # Errors
    /// If a call fails; of kind `PermissionDenied` if the key is not an administrator's.
    pub async fn get_audit_log(
        &self,
        events: &AuditEventType,
        day: Option<&str>,
    ) -> Result<AuditLog> {
        let mut url = self.base_url().join(AUDIT, []);
        url.query_pairs_mut()
            .append_pair("event_type", events.as_str());
        if let Some(day) = day {
            url.query_pairs_mut().append_pair("day", day);
        }
        let call = Call::get(self, TrafficClass::Rest, url).surface_redirect();
        let answer = self.send(call).await?;
        match answer.location.clone() {
            Some(place) if answer.is_redirect() => self.fetch_document(&place).await?.json(),
            _ => answer.json(),
        }
    }

    /// Reads what was used from one full hour to another, both UTC, at most 14 days apart.
    ///
    /// Endpoint: `GET /api/v1/billing/usage/events`.
    ///
    /// # Errors
    /// If the call fails; of kind `InvalidRequest` if the hours are not full or too far apart.
    pub async fn get_billing_usage(
        &self,
        starting_on: &Timestamp,
        ending_before: &Timestamp,
    ) -> Result<BillingUsage> {
        let mut url = self.base_url().join(BILLING_USAGE, []);
        url.query_pairs_mut()
            .append_pair("starting_on", &starting_on.0)
            .append_pair("ending_before", &ending_before.0);
        let call = Call::get(self, TrafficClass::Rest, url);
        self.send(call).await?.json()
    }

    /// Has the embedded server take an image of its files: a directory on its machine, which the caller
    /// copies and removes.
    ///
    /// Endpoint: `POST /api/v1/backup`.
    ///
    /// # Errors
    /// If the call fails; of kind `Unsupported` if the server takes none.
    pub async fn take_backup_image(&self) -> Result<BackupImage> {
        let nothing = std::collections::BTreeMap::<String, String>::new();
        let call = Call::post(self, TrafficClass::Rest, BACKUP, &nothing)?;
        self.send(call).await?.json()
    }

    /// Reads what stored checkpoints take and cost now.
    ///
    /// Endpoint: `GET /api/v1/billing/usage/checkpoints/current`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_checkpoint_storage_usage(
        &self,
        project: Option<&ProjectId>,
    ) -> Result<CheckpointStorageUsage> {
        let mut url = self.base_url().join(STORAGE_USAGE, []);
        if let Some(project) = project {
            url.query_pairs_mut()
                .append_pair("project_id", project.as_str());
        }
        let call = Call::get(self, TrafficClass::Rest, url);
        self.send(call).await?.json()
    }
}
