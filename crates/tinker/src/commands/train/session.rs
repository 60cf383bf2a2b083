//! From settings to a result: resolves and renders, connects, opens the run folder, and trains.

use std::path::{Path, PathBuf};

use tinker_chat::Role;
use tinker_recipes::sft::{
    self, Dataset, Goodbye, Prepared, SftConfig, SftJob, SftOptions, StopSignal,
};
use tinker_runs::{RunFolder, RunWriter};

use super::drive::{self, Ended};
use super::options;
use super::report::{Facts, program, report, resume_hint};
use super::watch::{Places, Watcher};
use crate::base_model::BaseModel;
use crate::connect::Connection;
use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::keeper::Keeper;
use crate::output::Output;
use crate::settings::Target;
use crate::signals::Interrupts;

/// Longest message of the data that is offered as a prompt to try.
const MAX_PROMPT_CHARS: usize = 60;

/// A run to begin.
pub(super) struct Begin {
    /// Its folder.
    pub(super) folder: PathBuf,
    /// What the person chose.
    pub(super) options: SftOptions,
    /// Where to train.
    pub(super) target: Target,
    /// What to train.
    pub(super) model: BaseModel,
    /// What to train on.
    pub(super) data: Dataset,
}

/// Begins a run and carries it to its end.
///
/// # Errors
/// The data and the settings do not fit the model, the run folder is taken, or training fails.
pub(super) async fn begin(ctx: &Ctx, begin: Begin) -> Result<Output> {
    let Begin {
        folder,
        options,
        target,
        model,
        data,
    } = begin;
    if RunFolder::open(&folder).is_ok() {
        return Err(tinker_runs::Error::AlreadyExists { path: folder }.into());
    }
    let server_context = Connection::context_length(ctx, &target, &model).await?;
    let mut config = options.resolve(&data, &model.facts(), server_context, &model.tokenizer)?;
    config.server = Some(target.to_record());
    let session = Session::prepare(&model, config, data)?;
    let connection = Connection::open_patiently(ctx, target).await?;
    let writer = RunWriter::create(folder)?;
    session.run(ctx, connection, writer, Mode::Begin).await
}

/// A run to go on with.
pub(crate) struct Resume<'a> {
    /// Its folder.
    folder: RunFolder,
    /// Where its data are now, if they moved.
    data: Option<&'a Path>,
    /// Where the model's tokenizer is, if not with the model.
    tokenizer: Option<&'a Path>,
    /// Settings that must be those of the run.
    pub(super) given: Option<options::Given<'a>>,
}

impl<'a> Resume<'a> {
    /// The run in `folder` as it is recorded.
    pub(crate) const fn of(
        folder: RunFolder,
        data: Option<&'a Path>,
        tokenizer: Option<&'a Path>,
    ) -> Self {
        Self {
            folder,
            data,
            tokenizer,
            given: None,
        }
    }
}

/// Goes on with a run.
///
/// # Errors
/// A setting or the server differs from the run's, the data changed, there is no checkpoint left,
/// or training fails.
pub(crate) async fn resume(ctx: &Ctx, resume: Resume<'_>) -> Result<Output> {
    let folder = resume.folder;
    let mut config: SftConfig = folder.read_config()?;
    let path = resume.data.unwrap_or(&config.file_path);
    let data = Dataset::read(path, config.train_on_what).map_err(|error| {
        Failure::from(error).hint(format!(
            "if the file was moved: tinker resume {} --data DATA",
            folder.name()
        ))
    })?;
    config.check_data(&data)?;
    if let Some(given) = resume.given {
        given.check_against(&config, data.rows.len())?;
    }
    if let Some(path) = resume.data {
        config.file_path = std::path::absolute(path).map_err(anyhow::Error::new)?;
    }
    let settings = &ctx.settings;
    let target = settings.target_of_run(config.server.as_ref(), &config.model_name)?;
    let model = BaseModel::find(
        &settings.home,
        &config.model_name,
        &target,
        resume.tokenizer,
    )?;
    let session = Session::prepare(&model, config, data)?;
    let connection = Connection::open_patiently(ctx, target).await?;
    let writer = RunWriter::resume(folder.path())?;
    session.run(ctx, connection, writer, Mode::Resume).await
}

#[derive(Debug, Clone, Copy)]
enum Mode {
    Begin,
    Resume,
}

/// A run whose every setting is decided.
struct Session {
    config: SftConfig,
    prepared: Prepared,
    prompt: String,
}

impl Session {
    fn prepare(model: &BaseModel, config: SftConfig, data: Dataset) -> Result<Self> {
        let renderer = tinker_chat::renderer(config.renderer_name, model.tokenizer.clone())
            .map_err(tinker_recipes::Error::from)?;
        Ok(Self {
            prepared: Prepared::new(&data, &config, renderer.as_ref())?,
            prompt: prompt_like(&data),
            config,
        })
    }

    async fn run(
        self,
        ctx: &Ctx,
        connection: Connection,
        mut writer: RunWriter,
        mode: Mode,
    ) -> Result<Output> {
        let facts = self.facts(ctx, &connection, writer.folder());
        let (stop, goodbye) = (StopSignal::new(), Goodbye::new());
        let mut watcher = Watcher::new(
            &ctx.ui,
            Places {
                folder: facts.folder.clone(),
                server: connection.describe(),
            },
        );
        let keeper = connection
            .embedded()
            .map(|server| Keeper::new(&ctx.settings.home, server, &ctx.ui));
        let job = SftJob {
            config: &self.config,
            prepared: &self.prepared,
            service: connection.service(),
            writer: &mut writer,
            observer: &mut watcher,
            stop: stop.clone(),
            goodbye: goodbye.clone(),
        };
        let job = async {
            match mode {
                Mode::Begin => sft::train(job).await,
                Mode::Resume => sft::resume(job).await,
            }
        };
        let mut interrupts = Interrupts::watch()?;
        let Ended {
            outcome,
            can_resume,
        } = drive::drive(job, stop, &connection, keeper, &mut interrupts, &ctx.ui).await;
        drop(watcher);
        // What the run came to is settled: another Ctrl-C only skips this.
        tokio::select! {
            () = goodbye.say() => {}
            () = interrupts.next() => {}
        }
        let outcome = outcome.map_err(|failure| match failure.kind {
            // Others would fail in the same way again.
            FailureKind::General | FailureKind::Capacity | FailureKind::Interrupted
                if can_resume =>
            {
                failure.then(resume_hint(&facts))
            }
            _ => failure,
        });
        outcome.and_then(|outcome| report(ctx, &facts, outcome))
    }

    fn facts(&self, ctx: &Ctx, connection: &Connection, folder: &RunFolder) -> Facts {
        let is_in_home = folder.path().parent() == Some(super::runs(ctx).root());
        Facts {
            program: program(),
            run: if is_in_home {
                folder.name()
            } else {
                folder.path().display().to_string()
            },
            folder: folder.path().display().to_string(),
            server_flags: ctx.settings.server_flags_to_repeat(connection.target()),
            prompt: self.prompt.clone(),
        }
    }
}

fn is_short(text: &str) -> bool {
    text.chars().count() <= MAX_PROMPT_CHARS && !text.contains('\n')
}

/// The first short user message of the data, to try the result with.
fn prompt_like(data: &Dataset) -> String {
    data.rows
        .iter()
        .flat_map(|row| &row.messages)
        .filter(|message| message.role == Role::User)
        .map(|message| message.content.trim())
        .find(|text| !text.is_empty() && is_short(text))
        .unwrap_or("Hello!")
        .to_owned()
}
