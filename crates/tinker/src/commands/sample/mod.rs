//! `tinker sample`: one prompt, one or more answers.

mod answer;
mod prompt;
pub(crate) mod tinkex;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tinker_api::SampleOptions;
use tinker_types::ModelInput;

use crate::context::Ctx;
use crate::failure::Result;
use crate::numbers::positive;
use crate::out_file;
use crate::output::Output;
use crate::speaker::{Flags, SamplingFlags, Speaker};

use self::answer::Answer;
use self::prompt::Prompt;

/// Sample from a model: a chat reply by default, plain continuation with --raw
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    prompt: prompt::Flags,
    #[command(flatten)]
    speaker: Flags,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// How many answers to draw
    #[arg(short, long, alias = "num", value_name = "N", default_value_t = 1, value_parser = positive)]
    num_samples: u32,
    /// Show the log-probability of each token
    #[arg(long)]
    logprobs: bool,
    /// Show the log-probability of each token of the prompt
    #[arg(long)]
    prompt_logprobs: bool,
    /// Write to this file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let prompt = args.prompt.read()?;
    args.output.as_deref().map_or(Ok(()), out_file::prepare)?;
    let speaker = Speaker::open(ctx, &args.speaker).await?;
    let request = Request {
        prompt,
        sampling: &args.sampling,
        num_samples: args.num_samples,
        prompt_logprobs: args.prompt_logprobs,
    };
    let answer = request.ask(&speaker).await?;
    speaker.close().await;
    let output = answer.output(args.logprobs, args.prompt_logprobs)?;
    deliver(ctx, output, args.output.as_deref())
}

/// What is asked of a speaker.
struct Request<'a> {
    prompt: Prompt,
    sampling: &'a SamplingFlags,
    num_samples: u32,
    prompt_logprobs: bool,
}

impl Request<'_> {
    async fn ask(&self, speaker: &Speaker) -> Result<Answer> {
        let renderer = match self.prompt.is_chat() {
            true => Some(speaker.renderer()?),
            false => None,
        };
        let tokens = self.prompt.tokens(&speaker.model, renderer.as_deref())?;
        let params = speaker.params(self.sampling, renderer.as_deref())?;
        let options = SampleOptions {
            num_samples: self.num_samples,
            prompt_logprobs: self.prompt_logprobs,
            ..SampleOptions::default()
        };
        let input = ModelInput::from_tokens(tokens.clone());
        let response = speaker.sampler.sample(input, params, options).await?;
        Answer::read(
            speaker,
            renderer.as_deref(),
            tokens,
            response,
            &self.sampling.stop,
        )
    }
}

/// Hands the data to the caller, or writes it to `file` and says so.
fn deliver(ctx: &Ctx, output: Output, file: Option<&Path>) -> Result<Output> {
    let Some(file) = file else {
        return Ok(output);
    };
    let text = output.to_text(ctx.format).context("cannot write JSON")?;
    out_file::write(file, &text)?;
    ctx.ui.note(format_args!("wrote {}", file.display()));
    Ok(Output::none())
}
