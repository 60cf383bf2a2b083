//! Training runs.

use tinker_types::{ProjectId, TRAINING_RUNS, TrainingRun, TrainingRunId, TrainingRunsResponse};
use url::Url;

use crate::call::Call;
use crate::client::Client;
use crate::error::Result;
use crate::pools::TrafficClass;

/// Which rows of a list to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Most rows.
    pub limit: u64,
    /// Rows to skip.
    pub offset: u64,
}

impl Page {
    /// The first `limit` rows.
    #[must_use]
    pub const fn first(limit: u64) -> Self {
        Self { limit, offset: 0 }
    }

    pub(crate) fn write(self, url: &mut Url) {
        url.query_pairs_mut()
            .append_pair("limit", &self.limit.to_string())
            .append_pair("offset", &self.offset.to_string());
    }
}

/// Whose rows to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccessScope {
    /// One's own.
    #[default]
    Owned,
    /// All that one may read.
    Accessible,
}

impl AccessScope {
    pub(crate) fn write(self, url: &mut Url) {
        let text = match self {
            Self::Owned => "owned",
            Self::Accessible => "accessible",
        };
        url.query_pairs_mut().append_pair("access_scope", text);
    }
}

impl Client {
    /// Lists training runs, newest first.
    ///
    /// Endpoint: `GET /api/v1/training_runs`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_training_runs(
        &self,
        page: Page,
        scope: AccessScope,
        project: Option<&ProjectId>,
    ) -> Result<TrainingRunsResponse> {
        let mut url = self.base_url().join(TRAINING_RUNS, []);
        page.write(&mut url);
        scope.write(&mut url);
        if let Some(project) = project {
            url.query_pairs_mut()
                .append_pair("project_id", project.as_str());
        }
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }

    /// Describes a training run.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_training_run(
        &self,
        id: &TrainingRunId,
        scope: AccessScope,
    ) -> Result<TrainingRun> {
        let mut url = self.base_url().join(TRAINING_RUNS, [id.as_str()]);
        scope.write(&mut url);
        self.send(Call::get(self, TrafficClass::Rest, url))
            .await?
            .json()
    }
}
