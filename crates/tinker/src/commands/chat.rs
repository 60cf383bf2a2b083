//! `tinker chat`: a conversation, line by line.

use std::io::{BufRead as _, IsTerminal as _, stdin};

use anyhow::Context as _;
use serde_json::json;
use tinker_api::SampleOptions;
use tinker_chat::{Message, Renderer, Role};
use tinker_types::ModelInput;

use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::human;
use crate::output::{Format, Output, write_quietly};
use crate::speaker::{Flags, SamplingFlags, Speaker, without_stop};

/// Talk to a model
///
/// Type a line to say it. /reset forgets the conversation, /system TEXT sets instructions and
/// begins anew, /exit or Ctrl-D leaves.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    speaker: Flags,
    /// Instructions that stand before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Say(&'a str),
    Reset,
    System(&'a str),
    Exit,
    Unknown(&'a str),
    Empty,
}

pub(crate) async fn run(ctx: &Ctx, args: &Args) -> Result<Output> {
    let speaker = Speaker::open(ctx, &args.speaker).await?;
    let renderer = speaker.renderer()?;
    ctx.ui.note(format_args!(
        "talking to {}; /exit leaves, /reset forgets, /system TEXT instructs",
        speaker.label
    ));
    let mut messages = opening(args.system.as_deref());
    let mut n_failed = 0;
    while let Some(line) = read_line(ctx).await? {
        match parse(&line) {
            Line::Say(text) => {
                messages.push(Message::user(text));
                let asking = async {
                    // It may have left since the last line, or died.
                    speaker.mend(ctx).await?;
                    reply(&speaker, renderer.as_ref(), &messages, &args.sampling).await
                };
                match asking.await {
                    Ok(reply) => {
                        show(ctx, &reply)?;
                        messages.push(reply);
                    }
                    // What was said before is worth more than the line, which can be said again.
                    Err(failure) => {
                        messages.pop();
                        n_failed += 1;
                        ctx.ui.failure(&failure);
                    }
                }
            }
            Line::Reset => {
                messages.retain(|message| message.role == Role::System);
                ctx.ui.note("forgotten");
            }
            Line::System(text) => {
                messages = opening(Some(text).filter(|text| !text.is_empty()));
                ctx.ui.note("begun anew");
            }
            Line::Unknown(command) => {
                ctx.ui.warn(format_args!(
                    "no command {command}; there are /exit, /reset, /system"
                ));
            }
            Line::Empty => {}
            Line::Exit => break,
        }
    }
    speaker.close().await;
    let json = json!({ "model": args.speaker.model, "messages": messages });
    let output = Output::text("", json);
    if n_failed == 0 || stdin().is_terminal() {
        return Ok(output);
    }
    // Whoever typed has seen it; a script must be told.
    output
        .print(ctx.format)
        .context("cannot write to standard output")?;
    let what = format!("{} not answered", human::counted(n_failed, "line"));
    Err(Failure::new(FailureKind::General, what))
}

/// Replies are for people as they come; programs get the conversation when it is over.
fn show(ctx: &Ctx, reply: &Message) -> Result<()> {
    if ctx.format == Format::Table {
        write_quietly(&format!("{}\n", reply.content)).map_err(anyhow::Error::new)?;
    }
    Ok(())
}

fn opening(system: Option<&str>) -> Vec<Message> {
    system.map(Message::system).into_iter().collect()
}

async fn reply(
    speaker: &Speaker,
    renderer: &dyn Renderer,
    messages: &[Message],
    flags: &SamplingFlags,
) -> Result<Message> {
    let tokens = renderer
        .build_generation_prompt(messages, Role::Assistant)
        .map_err(anyhow::Error::new)?;
    let params = speaker.params(flags, Some(renderer))?;
    let input = ModelInput::from_tokens(tokens);
    let response = speaker
        .sampler
        .sample(input, params, SampleOptions::default())
        .await?;
    let tokens = response.sequences.into_iter().next().map(|s| s.tokens);
    let (mut message, _) = renderer
        .parse_response(&tokens.unwrap_or_default())
        .map_err(anyhow::Error::new)?;
    message.content = without_stop(message.content, &flags.stop);
    Ok(message)
}

/// The next line, after a prompt where a person types; `None` at the end of the input.
///
/// It is waited for on a thread of its own, so that the session's heartbeat goes on.
async fn read_line(ctx: &Ctx) -> Result<Option<String>> {
    if stdin().is_terminal() {
        ctx.ui.ask("> ");
    }
    let reading = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        let n_read = stdin().lock().read_line(&mut line)?;
        Ok::<_, std::io::Error>((n_read > 0).then_some(line))
    });
    let line = reading.await.context("cannot wait for standard input")?;
    Ok(line.context("cannot read standard input")?)
}

fn parse(line: &str) -> Line<'_> {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match word {
        "" => Line::Empty,
        "/exit" | "/quit" => Line::Exit,
        "/reset" => Line::Reset,
        "/system" => Line::System(rest.trim()),
        word if word.starts_with('/') => Line::Unknown(word),
        _ => Line::Say(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_words() {
        let check = |line, expected| assert_eq!(parse(line), expected);

        check("  hello there\n", Line::Say("hello there"));
        check(
            "/system Speak like a pirate. \n",
            Line::System("Speak like a pirate."),
        );
        check("/reset\n", Line::Reset);
        check("/exit", Line::Exit);
        check("/dance now", Line::Unknown("/dance"));
        check("\n", Line::Empty);
    }
}
