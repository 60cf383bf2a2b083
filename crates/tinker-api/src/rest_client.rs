//! Runs, checkpoints, sessions and samplers as the server lists them. Needs no session.

use tinker_http::{AccessScope, Client, Download, Page};
use tinker_types::{
    BackupImage, Checkpoint, CheckpointsResponse, Cursor, ProjectId, SamplerInfo,
    SamplingSessionId, ServerCapabilities, TinkerPath, TrainingRun, TrainingRunId,
    TrainingRunsResponse, WeightsInfo,
};

use crate::error::Result;

mod sessions;
mod sharing;

/// Rows fetched at a time when all are wanted.
const PAGE: u64 = 100;

/// Looks things up on a server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RestClient {
    http: Client,
}

impl RestClient {
    /// A client over a transport; see also
    /// [`ServiceClient::rest_client`](crate::ServiceClient::rest_client).
    #[must_use]
    pub const fn new(http: Client) -> Self {
        Self { http }
    }

    /// Downloads weights into folders; see [`download`](crate::download).
    #[must_use]
    pub fn download(&self) -> Download {
        self.http.download()
    }

    /// Lists the base models on offer.
    ///
    /// Endpoint: `GET /api/v1/get_server_capabilities`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_server_capabilities(&self) -> Result<ServerCapabilities> {
        Ok(self.http.get_server_capabilities().await?)
    }

    /// Has the embedded server take an image of its files: a directory on its machine, which the caller
    /// copies and removes. `tinker serve backup` does both.
    ///
    /// Endpoint: `POST /api/v1/backup`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn take_backup_image(&self) -> Result<BackupImage> {
        Ok(self.http.take_backup_image().await?)
    }

    /// Lists one page of one's training runs, newest first.
    ///
    /// Endpoint: `GET /api/v1/training_runs`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_training_runs(&self, page: Page) -> Result<TrainingRunsResponse> {
        self.list_training_runs_in(page, AccessScope::Owned, None)
            .await
    }

    /// Lists one page of training runs, newest first, by owner and project.
    ///
    /// Endpoint: `GET /api/v1/training_runs`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_training_runs_in(
        &self,
        page: Page,
        scope: AccessScope,
        project: Option<&ProjectId>,
    ) -> Result<TrainingRunsResponse> {
        Ok(self.http.list_training_runs(page, scope, project).await?)
    }

    /// Lists one's training runs, newest first, page by page up to `limit`; all if absent.
    ///
    /// # Errors
    /// If a call fails.
    pub async fn list_all_training_runs(&self, limit: Option<u64>) -> Result<Vec<TrainingRun>> {
        let mut runs = Vec::new();
        while let Some(page) = next_page(runs.len(), limit) {
            let answer = self.list_training_runs(page).await?;
            let is_last = is_last(page, answer.training_runs.len(), Some(&answer.cursor));
            runs.extend(answer.training_runs);
            if is_last {
                break;
            }
        }
        Ok(runs)
    }

    /// Describes a training run.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is none.
    pub async fn get_training_run(&self, id: &TrainingRunId) -> Result<TrainingRun> {
        self.get_training_run_in(id, AccessScope::Owned).await
    }

    /// Describes a training run that need not be one's own.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is none.
    pub async fn get_training_run_in(
        &self,
        id: &TrainingRunId,
        scope: AccessScope,
    ) -> Result<TrainingRun> {
        Ok(self.http.get_training_run(id, scope).await?)
    }

    /// Describes the training run that wrote a checkpoint.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is none.
    pub async fn get_training_run_by_tinker_path(
        &self,
        path: &TinkerPath,
        scope: AccessScope,
    ) -> Result<TrainingRun> {
        self.get_training_run_in(&path.run, scope).await
    }

    /// Lists the checkpoints of a training run, all of them.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_checkpoints(&self, run: &TrainingRunId) -> Result<Vec<Checkpoint>> {
        Ok(self.http.list_checkpoints(run).await?.checkpoints)
    }

    /// Lists one page of the checkpoints of all one's runs, newest first.
    ///
    /// Endpoint: `GET /api/v1/checkpoints`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn list_user_checkpoints(&self, page: Page) -> Result<CheckpointsResponse> {
        Ok(self.http.list_user_checkpoints(page).await?)
    }

    /// Lists the checkpoints of all one's runs, newest first, page by page up to `limit`; all if
    /// absent.
    ///
    /// # Errors
    /// If a call fails.
    pub async fn list_all_user_checkpoints(&self, limit: Option<u64>) -> Result<Vec<Checkpoint>> {
        let mut checkpoints = Vec::new();
        let mut n_seen = 0;
        while let Some(page) = next_page(n_seen, limit) {
            let answer = self.list_user_checkpoints(page).await?;
            let n_rows = answer.checkpoints.len() + answer.n_left_out;
            let is_last = is_last(page, n_rows, answer.cursor.as_ref());
            checkpoints.extend(answer.checkpoints);
            n_seen += n_rows;
            if is_last {
                break;
            }
        }
        Ok(checkpoints)
    }

    /// Describes a checkpoint: its row in the run's list.
    ///
    /// Endpoint: `GET /api/v1/training_runs/{id}/checkpoints`.
    ///
    /// # Errors
    /// If the call fails; `None` if the run has no such checkpoint.
    pub async fn get_checkpoint(&self, path: &TinkerPath) -> Result<Option<Checkpoint>> {
        let checkpoints = self.list_checkpoints(&path.run).await?;
        Ok(checkpoints
            .into_iter()
            .find(|row| row.checkpoint_id == path.checkpoint))
    }

    /// Deletes a checkpoint.
    ///
    /// Endpoint: `DELETE /api/v1/training_runs/{id}/checkpoints/{checkpoint}`.
    ///
    /// # Errors
    /// If the call fails; of kind `NotFound` if there is none.
    pub async fn delete_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        Ok(self.http.delete_checkpoint(path).await?)
    }

    /// Describes the weights of a checkpoint: base model and adapter.
    ///
    /// Endpoint: `POST /api/v1/weights_info`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_weights_info_by_tinker_path(&self, path: &TinkerPath) -> Result<WeightsInfo> {
        Ok(self.http.weights_info(path).await?)
    }

    /// Describes a sampler.
    ///
    /// Endpoint: `GET /api/v1/samplers/{id}`.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get_sampler(&self, id: &SamplingSessionId) -> Result<SamplerInfo> {
        Ok(self.http.get_sampler(id).await?)
    }
}

/// The page after `n_rows`, or none if `limit` is reached.
fn next_page(n_rows: usize, limit: Option<u64>) -> Option<Page> {
    let offset = n_rows as u64;
    let rest = limit.map_or(PAGE, |limit| limit.saturating_sub(offset));
    (rest > 0).then(|| Page {
        limit: rest.min(PAGE),
        offset,
    })
}

/// Whether nothing follows a page of `n_rows`. Servers may give fewer rows than asked for; without
/// a cursor, a page that is not full is the last.
fn is_last(page: Page, n_rows: usize, cursor: Option<&Cursor>) -> bool {
    let n_rows = n_rows as u64;
    let is_short = match cursor {
        Some(cursor) => page.offset + n_rows >= cursor.total_count,
        None => n_rows < page.limit,
    };
    n_rows == 0 || is_short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_end_at_the_total_or_at_an_empty_page() {
        let page = |offset| Page { limit: 100, offset };
        for (page, n_rows, total_count, expected) in [
            (page(0), 100, None, false),
            (page(0), 99, None, true),
            (page(0), 0, None, true),
            (page(0), 50, Some(120), false),
            (page(50), 50, Some(120), false),
            (page(100), 20, Some(120), true),
            (page(100), 0, Some(120), true),
            (page(0), 100, Some(100), true),
            (page(0), 0, Some(0), true),
        ] {
            let cursor = total_count.map(|total_count| Cursor {
                offset: page.offset,
                limit: 50,
                total_count,
            });
            assert_eq!(
                is_last(page, n_rows, cursor.as_ref()),
                expected,
                "{page:?} {n_rows} {total_count:?}"
            );
        }
    }

    #[test]
    fn pages_end_at_the_limit() {
        let page = |limit, offset| Some(Page { limit, offset });

        assert_eq!(next_page(0, None), page(100, 0));
        assert_eq!(next_page(300, None), page(100, 300));
        assert_eq!(next_page(0, Some(20)), page(20, 0));
        assert_eq!(next_page(100, Some(130)), page(30, 100));
        assert_eq!(next_page(130, Some(130)), None);
        assert_eq!(next_page(0, Some(0)), None);
    }
}
