//! What a run leaves behind: its paths, and the commands that come next.

use serde_json::json;
use tinker_recipes::sft::Outcome;

use crate::context::Ctx;
use crate::failure::{Failure, FailureKind, Result};
use crate::output::Output;

/// What the report needs to know of a run beside its outcome.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// How this program was called, so that the commands printed for later work as they are.
    pub(super) program: String,
    /// Name of the run, or its folder where that is elsewhere: what `tinker resume` takes.
    pub(super) run: String,
    /// The run folder.
    pub(super) folder: String,
    /// Flags that later commands need to reach the same server, with a space before each.
    pub(super) server_flags: String,
    /// A message like those of the data, to try the result with.
    pub(super) prompt: String,
}

/// Turns the outcome into data, or into the failure that an interrupted run is.
///
/// # Errors
/// The run was interrupted.
pub(super) fn report(ctx: &Ctx, facts: &Facts, outcome: Outcome) -> Result<Output> {
    match outcome {
        Outcome::Finished {
            n_steps,
            state,
            sampler,
            first_nll,
            last_nll,
        } => {
            if let (Some(first), Some(last)) = (first_nll, last_nll) {
                let change = 100.0 * (last / first - 1.0);
                ctx.ui.note(format_args!(
                    "held-out NLL {first:.3} before, {last:.3} after ({change:+.0}%)"
                ));
            }
            let next = next_commands(facts, &sampler.to_string());
            let text = format!("state    {state}\nsampler  {sampler}\n");
            let json = json!({
                "run": facts.run,
                "folder": facts.folder,
                "n_steps": n_steps,
                "state_path": state,
                "sampler_path": sampler,
                "held_out_nll_before": first_nll,
                "held_out_nll_after": last_nll,
            });
            Ok(Output::text(text, json).with_note(next))
        }
        Outcome::Interrupted {
            resume_from,
            n_steps,
            state,
        } => {
            let what =
                format!("interrupted before step {resume_from} of {n_steps}; saved as {state}");
            Err(Failure::new(FailureKind::Interrupted, what).hint(resume_hint(facts)))
        }
    }
}

/// How to go on with a run that stopped.
pub(super) fn resume_hint(facts: &Facts) -> String {
    format!(
        "go on with: {} resume{} {}",
        facts.program,
        facts.server_flags,
        shell_quote(&facts.run)
    )
}

fn next_commands(facts: &Facts, sampler: &str) -> String {
    let Facts {
        program,
        server_flags,
        ..
    } = facts;
    let prompt = shell_quote(&facts.prompt);
    format!(
        "next\n  {program} sample{server_flags} -m {sampler} -p {prompt}\n  \
         {program} chat{server_flags} -m {sampler}"
    )
}

/// How this program was called: by its name if the shell found it, else by its path.
pub(super) fn program() -> String {
    let called = std::env::args_os().next().unwrap_or_default();
    let called = called.to_string_lossy();
    if called.contains(std::path::MAIN_SEPARATOR) {
        shell_quote(&called)
    } else {
        "tinker".to_owned()
    }
}

/// `text` as one word of a POSIX shell.
fn shell_quote(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@=".contains(c);
    let is_quotable = |c: char| is_plain(c) || c.is_alphanumeric() || " ,;?'()".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else if text.chars().all(is_quotable) {
        format!("\"{text}\"")
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_only_what_a_shell_would_read_otherwise() {
        let check = |text, quoted| assert_eq!(shell_quote(text), quoted);

        check("pirate-1", "pirate-1");
        check("Who are you?", "\"Who are you?\"");
        check("It's me", "\"It's me\"");
        check("cost $5", "'cost $5'");
        check("it's $5", r"'it'\''s $5'");
        check("", "\"\"");
    }

    #[test]
    fn next_commands_carry_the_path_and_the_flags() {
        let facts = Facts {
            program: "tinker".to_owned(),
            run: "r".to_owned(),
            folder: "/h/runs/r".to_owned(),
            server_flags: " --local".to_owned(),
            prompt: "Who are you?".to_owned(),
        };

        assert_eq!(resume_hint(&facts), "go on with: tinker resume --local r");
        let text = next_commands(&facts, "tinker://S:train:0/sampler_weights/final");

        assert_eq!(
            text,
            "next\n  tinker sample --local -m tinker://S:train:0/sampler_weights/final -p \"Who are you?\"\n  tinker chat --local -m tinker://S:train:0/sampler_weights/final"
        );
    }
}
