//! `tinker run --prompt ...`: Tinkex's sampling command, with its flags, its raw prompt and its
//! blocks of output, for scripts that were written for it.

use std::path::PathBuf;

use super::answer::{Answer, Sequence};
use super::prompt::Prompt;
use super::{Request, deliver};
use crate::context::Ctx;
use crate::failure::{Failure, Result};
use crate::numbers::positive;
use crate::out_file;
use crate::output::Output;
use crate::settings::DEFAULT_MODEL;
use crate::speaker::{Flags, SamplingFlags, Speaker};

/// Tinkex's flags; hidden, since `tinker sample` is the command to learn.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[arg(long, hide = true, group = "tinkex")]
    prompt: Option<String>,
    #[arg(long, hide = true, group = "tinkex")]
    prompt_file: Option<PathBuf>,
    #[arg(long, hide = true, requires = "tinkex")]
    base_model: Option<String>,
    #[arg(short, long, visible_alias = "model", hide = true, requires = "tinkex")]
    model_path: Option<String>,
    #[arg(long, hide = true, requires = "tinkex", default_value_t = 1, value_parser = positive)]
    num_samples: u32,
    #[arg(short, long, hide = true, requires = "tinkex")]
    output: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingFlags,
}

pub(crate) async fn run(ctx: &Ctx, args: Args) -> Result<Output> {
    let text = match (args.prompt, args.prompt_file) {
        (Some(text), _) => text,
        (None, Some(path)) => std::fs::read_to_string(&path).map_err(|error| {
            Failure::usage(format!(
                "cannot read prompt file {}: {error}",
                path.display()
            ))
        })?,
        (None, None) => {
            return Err(Failure::usage("`tinker run` needs a command or a prompt")
                .hint("`tinker run list` shows training runs; `tinker sample -p TEXT` samples"));
        }
    };
    args.output.as_deref().map_or(Ok(()), out_file::prepare)?;
    ctx.ui.note("Starting sampling...");
    let model = args.model_path.or(args.base_model);
    let speaker = Speaker::open(
        ctx,
        &Flags {
            model: model.unwrap_or_else(|| DEFAULT_MODEL.to_owned()),
            renderer: None,
            tokenizer: None,
        },
    )
    .await?;
    let request = Request {
        prompt: Prompt::Raw(text),
        sampling: &args.sampling,
        num_samples: args.num_samples,
        prompt_logprobs: false,
    };
    let answer = request.ask(&speaker).await?;
    speaker.close().await;
    let output = Output::text(blocks(&answer), answer.json(false)?);
    ctx.ui.note(format_args!(
        "Sampling complete ({} sequences)",
        answer.sequences.len()
    ));
    deliver(ctx, output, args.output.as_deref())
}

fn blocks(answer: &Answer) -> String {
    let block = |(i, sequence): (usize, &Sequence)| {
        format!(
            "Sample {}:\n{}\n{}\n",
            i + 1,
            sequence.text,
            summary(sequence)
        )
    };
    let blocks: Vec<String> = answer.sequences.iter().enumerate().map(block).collect();
    blocks.join("\n")
}

/// As in `stop_reason=length | avg_logprob=-1.234`.
fn summary(sequence: &Sequence) -> String {
    let reason = format!("stop_reason={}", sequence.sampled.stop_reason);
    match sequence.sampled.logprobs.as_deref() {
        None | Some([]) => reason,
        Some(logprobs) => {
            let mean = logprobs.iter().sum::<f32>() / logprobs.len() as f32;
            format!("{reason} | avg_logprob={mean:.3}")
        }
    }
}
