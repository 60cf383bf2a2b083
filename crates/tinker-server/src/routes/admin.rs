//! The audit log and billing, answered from the server's own counters: nothing costs anything here.
//! And the first half of a backup.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::Deserialize;
use tinker_types::{
    AuditEventType, AuditLog, BackupImage, BillingUsage, CheckpointStorageUsage, ProjectId,
    StorageRow, UsageEvent, UsageSession,
};

use crate::accounts::{HOUR, UsageKey};
use crate::api_error::{ApiError, ApiResult};
use crate::app::App;
use crate::body::{Params, blocking};
use crate::caller;
use crate::catalog::Catalog;
use crate::clock::{Millis, now, timestamp};
use crate::identity;

/// Longest time that usage can be asked for at once: 14 days.
const MAX_SPAN: Millis = 14 * 24 * HOUR;
const DAY: Millis = 24 * HOUR;

/// Takes an image of the server's files, for whoever can read them: it stays on this machine.
pub(crate) async fn backup(State(app): State<Arc<App>>) -> ApiResult<Json<BackupImage>> {
    blocking(&app, |app| {
        let image = app.core.stage_backup()?;
        Ok(BackupImage {
            dir: image.display().to_string(),
        })
    })
    .await
    .map(Json)
}

/// Which events of which day.
#[derive(Debug, Deserialize)]
pub(crate) struct AuditQuery {
    #[serde(default)]
    event_type: Option<AuditEventType>,
    /// `YYYY-MM-DD`, UTC; today if absent.
    #[serde(default)]
    day: Option<String>,
}

pub(crate) async fn audit(
    State(app): State<Arc<App>>,
    Params(query): Params<AuditQuery>,
) -> ApiResult<Json<AuditLog>> {
    let from = start_of(query.day.as_deref())?;
    let resource = match query.event_type {
        None | Some(AuditEventType::All) => "",
        Some(AuditEventType::Checkpoints) => "checkpoint_",
        Some(AuditEventType::Projects) => "project_",
        Some(AuditEventType::Teams) => "team_",
        Some(AuditEventType::Organizations) => "organization_",
        Some(other) => {
            return Err(ApiError::unprocessable(format!(
                "event_type {:?} is unknown: take all, checkpoints, projects, teams or organizations",
                other.as_str()
            )));
        }
    };
    blocking(&app, move |app| {
        let entries = app.core.accounts.events(from, from + DAY, resource)?;
        Ok(AuditLog { entries })
    })
    .await
    .map(Json)
}

fn start_of(day: Option<&str>) -> ApiResult<Millis> {
    let Some(text) = day else {
        let at = now();
        return Ok(at - at.rem_euclid(DAY));
    };
    let start = text
        .parse::<Date>()
        .and_then(|date| date.to_zoned(TimeZone::UTC));
    match start {
        Ok(start) => Ok(start.timestamp().as_millisecond()),
        Err(_) => Err(ApiError::unprocessable(format!(
            "day {text:?} must be a date such as 2026-01-31"
        ))),
    }
}

/// From when until when, RFC 3339.
#[derive(Debug, Deserialize)]
pub(crate) struct UsageQuery {
    starting_on: String,
    ending_before: String,
}

pub(crate) async fn usage(
    State(app): State<Arc<App>>,
    Params(query): Params<UsageQuery>,
) -> ApiResult<Json<BillingUsage>> {
    let from = full_hour("starting_on", &query.starting_on)?;
    let until = full_hour("ending_before", &query.ending_before)?;
    if until <= from || until - from > MAX_SPAN {
        return Err(ApiError::unprocessable(format!(
            "ending_before {} must be after starting_on {} by at most 14 days",
            query.ending_before, query.starting_on
        )));
    }
    blocking(&app, move |app| {
        let rows = app.core.accounts.usage(from, until)?;
        Ok(billing(&app.core.catalog, rows))
    })
    .await
    .map(Json)
}

fn full_hour(name: &str, text: &str) -> ApiResult<Millis> {
    let moment: Option<jiff::Timestamp> = text.parse().ok();
    let moment = moment.map(|moment| moment.as_millisecond());
    moment.filter(|at| at.rem_euclid(HOUR) == 0).ok_or_else(|| {
        ApiError::unprocessable(format!(
            "{name} {text:?} must be a full hour such as 2026-01-31T15:00:00Z"
        ))
    })
}

fn billing(catalog: &Catalog, rows: Vec<(UsageKey, u64)>) -> BillingUsage {
    let mut usage = BillingUsage {
        cost_data_through: Some(timestamp(now())),
        ..BillingUsage::default()
    };
    for (key, amount) in rows {
        let session = catalog.session(&key.session).ok();
        if session.is_none() && !caller::may_see(None) {
            continue;
        }
        usage.data.push(UsageEvent {
            bucket_start: timestamp(key.hour),
            bucket_end: timestamp(key.hour + HOUR),
            base_model: Some(key.base_model),
            user_id: Some(
                session
                    .as_ref()
                    .map_or_else(|| identity::user(None), |s| s.user()),
            ),
            user_name: None,
            project_id: session.as_ref().and_then(|s| catalog.project_of(s)),
            session_id: Some(key.session.clone()),
            estimated_cost_usd: Some(0.0),
            effective_rate_usd_per_million_tokens: None,
            effective_rate_usd_per_gigabyte_month: None,
            event_info: key.counter.info(amount),
        });
        let metadata = session.map(|session| session.request.user_metadata);
        let described = UsageSession {
            user_metadata: metadata,
        };
        usage.sessions.insert(key.session, described);
    }
    usage
}

/// Which project's checkpoints.
#[derive(Debug, Deserialize)]
pub(crate) struct StorageQuery {
    #[serde(default)]
    project_id: Option<ProjectId>,
}

pub(crate) async fn storage(
    State(app): State<Arc<App>>,
    Params(query): Params<StorageQuery>,
) -> Json<CheckpointStorageUsage> {
    let catalog = &app.core.catalog;
    let mut totals = std::collections::BTreeMap::<(Option<ProjectId>, String), (u64, u64)>::new();
    for checkpoint in catalog.checkpoints() {
        let session = catalog.session_of_run(&checkpoint.path.run);
        let project = session.as_ref().and_then(|s| catalog.project_of(s));
        if query.project_id.is_some() && project != query.project_id {
            continue;
        }
        let user = session.map_or_else(|| identity::user(None), |s| s.user());
        let (count, n_bytes) = totals.entry((project, user)).or_default();
        *count += 1;
        *n_bytes += checkpoint.size_bytes;
    }
    let row = |((project_id, user), (checkpoint_count, size_bytes))| StorageRow {
        project_id,
        org_user_urn: Some(user),
        user_email: None,
        user_name: None,
        checkpoint_count,
        size_bytes,
        size_gigabytes: size_bytes as f64 / 1e9,
        estimated_monthly_cost_usd: Some(0.0),
    };
    Json(CheckpointStorageUsage {
        effective_rate_usd_per_gigabyte_month: None,
        data: totals.into_iter().map(row).collect(),
    })
}
