//! A connection to the server of a command, and what commands ask of it.

use std::path::PathBuf;
use std::time::Duration;

use tinker_api::{
    ApiKey, BaseUrl, RestClient, SamplingClient, SamplingSource, ServiceClient, TrainingClient,
};
use tinker_recipes::Service;
use tinker_server::LockInfo;
use tinker_types::{
    Checkpoint, FinishReason, LoraConfig, SupportedModel, TinkerPath, TrainingRun, TrainingRunId,
    WeightsInfo,
};

use crate::base_model::BaseModel;
use crate::commands::train;
use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::local;
use crate::settings::Target;
use crate::waiting::teller;

/// The run that was used last.
const LAST: &str = "@last";
/// How long a question waits for a server that cannot be reached.
const SHORT: Duration = Duration::from_secs(5);
/// How long training does: a server that restarts, a network that comes back.
const LONG: Duration = Duration::from_secs(600);
/// How long the server is waited for when all is done.
const GOODBYE: Duration = Duration::from_secs(2);

/// A server to talk to.
#[derive(Debug)]
pub(crate) struct Connection {
    service: ServiceClient,
    rest: RestClient,
    target: Target,
    /// The embedded server, if it is that.
    embedded: Option<LockInfo>,
}

impl Connection {
    /// Connects to `target`, starting the embedded server if that is it and it does not run.
    ///
    /// # Errors
    /// The embedded server cannot be started, or the address or the key is malformed.
    pub(crate) async fn open(ctx: &Ctx, target: Target) -> Result<Self> {
        Self::open_with(ctx, target, SHORT).await
    }

    /// As [`Self::open`], for work that outlasts an outage of the server.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) async fn open_patiently(ctx: &Ctx, target: Target) -> Result<Self> {
        Self::open_with(ctx, target, LONG).await
    }

    async fn open_with(ctx: &Ctx, target: Target, patience: Duration) -> Result<Self> {
        let embedded = match &target {
            Target::Embedded => Some(local::ensure(&ctx.settings.home, &ctx.ui).await?),
            Target::Remote { .. } => None,
        };
        let (base_url, credentials) = match (&target, &embedded) {
            (Target::Embedded, Some(server)) => (server.base_url(), key_of(server)?.into()),
            (Target::Embedded, None) => return Err(Failure::usage("there is no server")),
            (
                Target::Remote {
                    base_url,
                    credentials,
                },
                _,
            ) => (base_url.clone(), credentials.clone()),
        };
        let builder = ServiceClient::builder(base_url)
            .credentials(credentials)
            .user_agent(concat!("tinker/", env!("CARGO_PKG_VERSION")))
            .wait_for_server(patience)
            .observer(teller(&ctx.ui));
        let service = ctx.settings.configure(&target, builder).build()?;
        Ok(Self {
            rest: service.rest_client(),
            service,
            target,
            embedded,
        })
    }

    /// Longest sequence that `model` takes on `target`.
    ///
    /// # Errors
    /// The server does not offer the model, or nobody says how long a sequence may be.
    pub(crate) async fn context_length(
        ctx: &Ctx,
        target: &Target,
        model: &BaseModel,
    ) -> Result<usize> {
        let length = match target {
            Target::Embedded => model.context_length(),
            Target::Remote { .. } => {
                let connection = Self::open(ctx, target.clone()).await?;
                let offered = connection.model(&model.name).await?.max_context_length;
                let length = offered.and_then(|length| usize::try_from(length).ok());
                length.or(model.context_length())
            }
        };
        length.ok_or_else(|| {
            Failure::usage(format!(
                "nobody says how long a sequence `{}` takes",
                model.name
            ))
            .hint("pass --tokenizer DIR with the model's config.json beside its tokenizer")
        })
    }

    /// The server this talks to.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// The embedded server, if it is that.
    pub(crate) fn embedded(&self) -> Option<&LockInfo> {
        self.embedded.as_ref()
    }

    /// Makes sure that the embedded server is there, if it is that: started again if it has ended
    /// since, found where it is now if somebody else did.
    ///
    /// # Errors
    /// It does not come up, or has another key now.
    pub(crate) async fn mend(&self, ctx: &Ctx) -> Result<()> {
        let Some(earlier) = &self.embedded else {
            return Ok(());
        };
        let home = &ctx.settings.home;
        let server = local::find_or_start(home, Some(earlier), &ctx.ui).await?;
        if server.token != earlier.token {
            return Err(local::another_key(&server));
        }
        self.follow(&server)
    }

    /// Goes on at another address of the embedded server, which took its state and its key there.
    ///
    /// # Errors
    /// The address is malformed.
    pub(crate) fn follow(&self, server: &LockInfo) -> Result<()> {
        let base_url: BaseUrl = server
            .base_url()
            .parse()
            .map_err(tinker_api::Error::Transport)?;
        self.service.move_to(base_url);
        Ok(())
    }

    /// Where recipes train.
    pub(crate) fn service(&self) -> &dyn Service {
        &self.service
    }

    /// Which server it is, in a few words.
    pub(crate) fn describe(&self) -> String {
        match (&self.target, &self.embedded) {
            (Target::Remote { base_url, .. }, _) => base_url.clone(),
            (Target::Embedded, Some(server)) => format!("embedded, {}", server.base_url()),
            (Target::Embedded, None) => "embedded".to_owned(),
        }
    }

    /// Ends the session, so that the server frees what it holds for it. A server that cannot be
    /// told soon will find out by the missing heartbeat.
    pub(crate) async fn close(&self, reason: FinishReason) {
        let _ = tokio::time::timeout(GOODBYE, self.service.close(reason, None)).await;
    }

    /// As [`Self::close`], for the reason that `result` is.
    pub(crate) async fn close_after<T>(&self, result: &Result<T>) {
        self.close(reason_of(result)).await;
    }

    /// The base models on offer.
    pub(crate) async fn models(&self) -> Result<Vec<SupportedModel>> {
        Ok(self.rest.get_server_capabilities().await?.supported_models)
    }

    async fn model(&self, name: &str) -> Result<SupportedModel> {
        let models = self.models().await?;
        let known: Vec<String> = models.iter().filter_map(|m| m.model_name.clone()).collect();
        models
            .into_iter()
            .find(|model| model.model_name.as_deref() == Some(name))
            .ok_or_else(|| {
                Failure::not_found(format!("the server has no base model `{name}`"))
                    .hint(format!("it has: {}", known.join(", ")))
            })
    }

    /// Has the embedded server take an image of its files; the directory that it is in.
    ///
    /// # Errors
    /// The server cannot take one.
    pub(crate) async fn take_backup_image(&self) -> Result<PathBuf> {
        Ok(self.rest.take_backup_image().await?.dir.into())
    }

    /// Training runs, newest first, at most `limit`.
    pub(crate) async fn list_runs(&self, limit: Option<u64>) -> Result<Vec<TrainingRun>> {
        Ok(self.rest.list_all_training_runs(limit).await?)
    }

    /// The run that `text` means: its id or a beginning that only it has, `@last`, or the name of a
    /// run folder on this machine.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub(crate) async fn find_run(&self, ctx: &Ctx, text: &str) -> Result<TrainingRun> {
        if text != LAST
            && let Ok(id) = recorded_id(ctx, text).map_or_else(|| text.parse(), Ok)
        {
            match self.rest.get_training_run(&id).await {
                Ok(run) => return Ok(run),
                Err(error) if error.kind() == Some(&tinker_api::ErrorKind::NotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut runs = self.list_runs(None).await?;
        if text != LAST {
            runs.retain(|run| run.training_run_id.as_str().starts_with(text));
        } else {
            runs.truncate(1);
        }
        match runs.len() {
            0 => Err(
                Failure::not_found(format!("there is no training run `{text}`"))
                    .hint("`tinker run list` shows the runs of this server"),
            ),
            1 => Ok(runs.swap_remove(0)),
            n => Err(
                Failure::usage(format!("`{text}` begins the ids of {n} training runs"))
                    .hint("write more of the id"),
            ),
        }
    }

    /// The checkpoints of a run, newest first.
    pub(crate) async fn list_checkpoints(&self, run: &TrainingRunId) -> Result<Vec<Checkpoint>> {
        self.rest
            .list_checkpoints(run)
            .await
            .map_err(|error| match error.kind() {
                Some(tinker_api::ErrorKind::NotFound) => {
                    Failure::from(error).hint("`tinker run list` shows the runs of this server")
                }
                _ => error.into(),
            })
    }

    /// The checkpoints of all runs, newest first, at most `limit`.
    pub(crate) async fn list_all_checkpoints(&self, limit: Option<u64>) -> Result<Vec<Checkpoint>> {
        Ok(self.rest.list_all_user_checkpoints(limit).await?)
    }

    /// What a checkpoint holds.
    ///
    /// # Errors
    /// It does not exist; the failure lists what the run has.
    pub(crate) async fn weights_info(&self, path: &TinkerPath) -> Result<WeightsInfo> {
        match self.rest.get_weights_info_by_tinker_path(path).await {
            Ok(info) => Ok(info),
            Err(error) => Err(self.explain_missing(error.into(), path).await),
        }
    }

    /// Deletes a checkpoint.
    pub(crate) async fn delete_checkpoint(&self, path: &TinkerPath) -> Result<()> {
        Ok(self.rest.delete_checkpoint(path).await?)
    }

    /// A training run of a new adapter.
    ///
    /// # Errors
    /// The server does not offer the model.
    pub(crate) async fn create_lora(
        &self,
        model: &str,
        lora: LoraConfig,
    ) -> Result<TrainingClient> {
        let created = self.service.create_lora_training_client(model, lora);
        Ok(created.await?)
    }

    /// A sampler of a base model.
    ///
    /// # Errors
    /// The server does not offer it.
    pub(crate) async fn sampler_of_base(&self, name: &str) -> Result<SamplingClient> {
        let source = SamplingSource::BaseModel(name.to_owned());
        Ok(self.service.create_sampling_client(source).await?)
    }

    /// A sampler of a checkpoint.
    ///
    /// # Errors
    /// It does not exist; the failure lists what the run has.
    pub(crate) async fn sampler_of_checkpoint(&self, path: &TinkerPath) -> Result<SamplingClient> {
        match self.service.create_sampling_client(path).await {
            Ok(sampler) => Ok(sampler),
            Err(error) => Err(self.explain_missing(error.into(), path).await),
        }
    }

    /// Adds to "not found" what there is instead.
    async fn explain_missing(&self, failure: Failure, path: &TinkerPath) -> Failure {
        if failure.kind != FailureKind::NotFound {
            return failure;
        }
        let known = self
            .rest
            .list_checkpoints(&path.run)
            .await
            .unwrap_or_default();
        let known: Vec<String> = known.iter().map(|c| c.checkpoint_id.to_string()).collect();
        match known.as_slice() {
            // Our own server has listed them already.
            [first, ..] if failure.what().contains(first) => failure,
            [] => failure.hint("`tinker checkpoint list` shows what this server has"),
            known => failure.hint(format!("run {} has: {}", path.run, known.join(", "))),
        }
    }
}

fn reason_of<T>(result: &Result<T>) -> FinishReason {
    match result {
        Ok(_) => FinishReason::Success,
        Err(failure) if failure.kind == FailureKind::Interrupted => FinishReason::Interrupted,
        Err(_) => FinishReason::Errored,
    }
}

fn key_of(server: &LockInfo) -> Result<ApiKey> {
    Ok(server.token.parse().map_err(tinker_api::Error::Transport)?)
}

/// The training run that the run folder called `name` was trained as.
fn recorded_id(ctx: &Ctx, name: &str) -> Option<TrainingRunId> {
    let runs = train::runs(ctx);
    let folder = tinker_runs::RunFolder::open(runs.path_of(name)).ok()?;
    let last = folder.read_checkpoints().ok()?.pop()?;
    Some(last.state_path.or(last.sampler_path)?.run)
}
