//! `tinker train sft`: supervised fine-tuning on chat data.

use std::path::PathBuf;

use tinker_recipes::sft::Dataset;

use super::session::{self, Begin, Resume};
use super::{folder, options};
use crate::base_model::BaseModel;
use crate::context::Ctx;
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::settings::DEFAULT_MODEL;

/// Fine-tune on conversations: a JSON object per line, {"messages": [...]} or {"prompt", "completion"}
///
/// Says first what it will do: rows, tokens, steps, learning rate. Ctrl-C saves and tells how to
/// resume. At the end it prints where the weights are and how to talk to them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Data file
    #[arg(value_name = "DATA", required_unless_present = "resume")]
    data: Option<PathBuf>,
    /// Base model: a name from `tinker model list`, or a model directory [default: tinker/nano]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Directory with the model's tokenizer, for models that are not on this machine
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    folder: folder::Flags,
    /// Go on with the run of --run or --log-path if there is one, else with the last run
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    options: options::Flags,
}

pub(super) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    if args.resume
        && let Some(folder) = args.folder.existing(ctx)?
    {
        let mut resume = Resume::of(folder, args.data.as_deref(), args.tokenizer.as_deref());
        resume.given = Some(options::Given {
            model: args.model.as_deref(),
            flags: &args.options,
        });
        return session::resume(ctx, resume).await;
    }
    let Some(path) = &args.data else {
        return Err(
            Failure::usage("there is no run to resume, and no data to begin one with")
                .hint("name a data file: tinker train sft DATA.jsonl"),
        );
    };
    // Everything that can be wrong with the data is found before a server is asked for anything.
    let data = Dataset::read(path, args.options.train_on())?;
    let model = args.model.as_deref().unwrap_or(DEFAULT_MODEL);
    let target = ctx.settings.target(Some(model))?;
    let model = BaseModel::find(
        &ctx.settings.home,
        model,
        &target,
        args.tokenizer.as_deref(),
    )?;
    let begin = Begin {
        folder: args.folder.new_path(ctx, path)?,
        options: args.options.options(),
        target,
        model,
        data,
    };
    session::begin(ctx, begin).await
}
