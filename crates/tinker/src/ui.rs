//! Standard error: notes, warnings, questions and progress. Data never comes here.

use std::fmt::{Display, Write as _};
use std::io::{self, BufRead, IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::{Failure, Result};

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();

/// Whether notes and progress are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Verbosity {
    /// Errors and warnings alone.
    Quiet,
    /// Everything.
    #[default]
    Normal,
}

/// The terminal beside the data. Clones share the progress bar, so that what any of them says does
/// not tear it.
#[derive(Debug, Clone)]
pub(crate) struct Ui {
    verbosity: Verbosity,
    is_terminal: bool,
    bar: Arc<Mutex<Option<ProgressBar>>>,
}

impl Ui {
    /// Standard error as it is.
    pub(crate) fn new(verbosity: Verbosity) -> Self {
        Self {
            verbosity,
            is_terminal: io::stderr().is_terminal(),
            bar: Arc::default(),
        }
    }

    /// Says something worth knowing; nothing when quiet.
    pub(crate) fn note(&self, text: impl Display) {
        if self.verbosity == Verbosity::Normal {
            self.write_line(&text.to_string());
        }
    }

    /// Says something that may go wrong.
    pub(crate) fn warn(&self, text: impl Display) {
        self.write_line(&format!("{WARNING}warning:{WARNING:#} {text}"));
    }

    /// Says how the command failed.
    pub(crate) fn failure(&self, failure: &Failure) {
        let mut painted = String::new();
        for line in failure.to_string().lines() {
            let (style, word) = match line.split_once(": ") {
                Some((word @ "error", _)) => (ERROR, word),
                Some((word @ "hint", _)) => (HINT, word),
                _ => (Style::new(), ""),
            };
            let rest = &line[word.len()..];
            let _ = writeln!(painted, "{style}{word}{style:#}{rest}");
        }
        self.write_line(painted.trim_end());
    }

    /// Asks a question whose answer is no unless it starts with `y`.
    ///
    /// # Errors
    /// Standard input is no terminal, so that nobody can answer.
    pub(crate) fn confirm(&self, question: &str) -> Result<bool> {
        if !io::stdin().is_terminal() {
            return Err(
                Failure::usage(format!("{question} Nobody is here to answer"))
                    .hint("pass --yes to go on without being asked"),
            );
        }
        self.ask(&format!("{question} [y/N] "));
        Ok(is_yes(io::stdin().lock()))
    }

    /// Says something that the answer follows on the same line.
    pub(crate) fn ask(&self, text: &str) {
        let mut stderr = anstream::stderr();
        let _ = write!(stderr, "{text}").and_then(|()| stderr.flush());
    }

    /// A bar of `total` steps on a terminal; elsewhere a line now and then.
    pub(crate) fn progress(&self, total: u64) -> Progress {
        let bar = if self.is_terminal && self.verbosity == Verbosity::Normal {
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {wide_msg}") {
            bar.set_style(style.progress_chars("━╸─"));
        }
        *self.lock() = Some(bar.clone());
        Progress {
            bar,
            ui: self.clone(),
            total,
        }
    }

    /// A line at the bottom that changes; `None` unless this is a terminal that is to say things.
    pub(crate) fn status(&self) -> Option<Status> {
        if !self.is_terminal || self.verbosity == Verbosity::Quiet {
            return None;
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
            bar.set_style(style);
        }
        *self.lock() = Some(bar.clone());
        Some(Status {
            bar,
            ui: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        // A panic elsewhere does not make the bar unusable.
        self.bar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line on standard error, colours only where they are wanted; a closed standard error loses
    /// it.
    fn write_line(&self, text: &str) {
        self.beside_bar(|| {
            let _ = writeln!(anstream::stderr(), "{text}");
        });
    }

    /// Writes to standard error while no bar is drawn.
    fn beside_bar<T>(&self, write: impl FnOnce() -> T) -> T {
        let bar = self.lock().clone();
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

/// Standard error for logs, whose lines a progress bar or a status line makes room for.
impl io::Write for Ui {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.beside_bar(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A line that changes; goes when dropped.
#[derive(Debug)]
pub(crate) struct Status {
    bar: ProgressBar,
    ui: Ui,
}

impl Status {
    /// Says something else.
    pub(crate) fn set(&self, text: String) {
        self.bar.set_message(text);
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        *self.ui.lock() = None;
        self.bar.finish_and_clear();
    }
}

/// Progress over a known number of steps; ends when dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    ui: Ui,
    total: u64,
}

impl Progress {
    /// Step `done` is finished; `message` says how it went.
    pub(crate) fn step(&self, done: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_owned());
        // Twenty lines tell the story of a run in a log file; a line per step drowns it.
        let every = (self.total / 20).max(1);
        if !self.ui.is_terminal && (done == 1 || done == self.total || done.is_multiple_of(every)) {
            self.ui
                .note(format_args!("step {done}/{} {message}", self.total));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        *self.ui.lock() = None;
        let (done, message) = (self.bar.position(), self.bar.message());
        // What a finished bar leaves has no line break; a line of our own has.
        self.bar.finish_and_clear();
        if self.ui.is_terminal && done > 0 {
            self.ui
                .note(format_args!("step {done}/{} {message}", self.total));
        }
    }
}

/// Whether the next line says yes. No line at all, as after Ctrl-D, does not.
fn is_yes(mut lines: impl BufRead) -> bool {
    let mut answer = String::new();
    let n_read = lines.read_line(&mut answer).unwrap_or(0);
    n_read > 0 && answer.trim().to_ascii_lowercase().starts_with('y')
}

#[cfg(test)]
mod tests {
    use super::is_yes;

    #[test]
    fn no_answer_at_a_prompt_is_no() {
        for (answer, expected) in [
            ("", false),
            ("\n", false),
            ("nay\n", false),
            ("y\n", true),
            (" Yes \n", true),
            ("y", true),
        ] {
            assert_eq!(is_yes(answer.as_bytes()), expected, "{answer:?}");
        }
        assert!(!is_yes(&b"\xff\xfe\n"[..]), "no text at all");
    }
}
