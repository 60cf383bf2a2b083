//! Our server through the wire: the official SDK trains and samples on `tinker serve`.
//!
//! What the SDK itself costs bounds how many samples a second it can ask for; our client then asks the
//! same server for the same.
//! Each round has a server and a data directory of its own, so that its first requests are the first
//! ones; the figures are medians of the rounds.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::machine;
use crate::process::{cargo, check, command, output, target_dir};
use crate::python;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Python with the official SDK 0.38; made under target/ if absent.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Rounds; each starts a server of its own.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Training steps of 8 x 256 tokens whose speed is measured.
    #[arg(long, default_value_t = 30)]
    steps: usize,
    /// Samples of one token that are asked for at once.
    #[arg(long, default_value_t = 1000)]
    samples: usize,
    /// Adapters that train and sample at once, and do together what one does alone.
    #[arg(long, default_value_t = 64)]
    adapters: usize,
    /// Threads of the server's engine; all cores if absent.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Fail unless every figure reaches the goal that the table names.
    #[arg(long)]
    check: bool,
}

/// What the Python program prints about one round, times in seconds.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Report {
    tokens_per_second: f64,
    first_pass: f64,
    tenth_pass: f64,
    optim_step: f64,
    first_sample: f64,
    tenth_sample: f64,
    one_sample: f64,
    samples_per_second: f64,
    one_adapter: f64,
    many_adapters: f64,
}

/// What our client prints about the same round.
#[derive(Debug, Clone, Copy, Deserialize)]
struct OwnReport {
    one_sample: f64,
    samples_per_second: f64,
}

/// What a figure is to reach.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// Reported only.
    Nothing,
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    /// The median of the rounds.
    value: f64,
    goal: Goal,
}

#[derive(Debug, Serialize)]
struct Outcome {
    machine: String,
    rounds: usize,
    rows: Vec<Row>,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let programs = Programs::prepare(root, args)?;
    let mut reports = Vec::new();
    for round in 1..=args.rounds.max(1) {
        eprintln!("round {round} of {}", args.rounds.max(1));
        reports.push(programs.round(args)?);
    }
    let outcome = Outcome {
        machine: machine(),
        rounds: reports.len(),
        rows: rows(&reports, args),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    } else {
        outcome.print();
    }
    if args.check {
        outcome.hold_to_goals()
    } else {
        Ok(())
    }
}

/// The goals: three times the training speed that was measured of SkyRL's server on such a model and
/// two cores, single calls in milliseconds, no warm-up, and adapters that do not slow each other.
fn rows(reports: &[(Report, OwnReport)], args: &Args) -> Vec<Row> {
    let row = |what: &str, goal, of: &dyn Fn(&Report) -> f64| Row {
        what: what.to_owned(),
        value: median(reports.iter().map(|(official, _)| of(official)).collect()),
        goal,
    };
    let own = |what: &str, goal, of: &dyn Fn(&OwnReport) -> f64| Row {
        what: format!("{what}, our client"),
        value: median(reports.iter().map(|(_, own)| of(own)).collect()),
        goal,
    };
    let many = format!("{} adapters, tokens/s", args.adapters);
    let at_once = format!("samples of one token, {} at once, per second", args.samples);
    let ratio = format!("{} adapters over one", args.adapters);
    vec![
        row("training tokens/s", Goal::AtLeast(9600.0), &|r| {
            r.tokens_per_second
        }),
        row("optim_step, ms", Goal::AtMost(10.0), &|r| {
            1e3 * r.optim_step
        }),
        row("sample of one token, ms", Goal::AtMost(5.0), &|r| {
            1e3 * r.one_sample
        }),
        row(&at_once, Goal::AtLeast(1000.0), &|r| r.samples_per_second),
        own("sample of one token, ms", Goal::AtMost(5.0), &|r| {
            1e3 * r.one_sample
        }),
        own(&at_once, Goal::AtLeast(1000.0), &|r| r.samples_per_second),
        row("first pass, ms", Goal::Nothing, &|r| 1e3 * r.first_pass),
        row("tenth pass, ms", Goal::Nothing, &|r| 1e3 * r.tenth_pass),
        row("first pass over tenth", Goal::AtMost(1.5), &|r| {
            r.first_pass / r.tenth_pass
        }),
        row("first sample, ms", Goal::Nothing, &|r| 1e3 * r.first_sample),
        row("tenth sample, ms", Goal::Nothing, &|r| 1e3 * r.tenth_sample),
        row("one adapter, tokens/s", Goal::Nothing, &|r| r.one_adapter),
        row(&many, Goal::Nothing, &|r| r.many_adapters),
        row(&ratio, Goal::AtLeast(0.8), &|r| {
            r.many_adapters / r.one_adapter
        }),
    ]
}

/// The middle value; NaN for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Goal {
    /// Whether a figure is as promised; a NaN is not.
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
            Self::Nothing => true,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(least) => format!(">= {least}"),
            Self::AtMost(most) => format!("<= {most}"),
            Self::Nothing => "-".to_owned(),
        }
    }
}

impl Outcome {
    fn print(&self) {
        println!("{}; medians of {} rounds\n", self.machine, self.rounds);
        println!("| | measured | goal |\n|---|---|---|");
        for Row { what, value, goal } in &self.rows {
            println!("| {what} | {value:.2} | {} |", goal.text());
        }
    }

    fn hold_to_goals(&self) -> Result<()> {
        let missed = self.rows.iter().filter(|row| !row.goal.is_met(row.value));
        let missed: Vec<String> = missed
            .map(|row| format!("{}: {:.2}, not {}", row.what, row.value, row.goal.text()))
            .collect();
        if missed.is_empty() {
            return Ok(());
        }
        bail!("{}", missed.join("; "))
    }
}

/// The programs, built, and their model.
struct Programs<'a> {
    root: &'a Path,
    python: PathBuf,
    script: PathBuf,
    server: PathBuf,
    client: PathBuf,
    dir: PathBuf,
}

impl<'a> Programs<'a> {
    fn prepare(root: &'a Path, args: &Args) -> Result<Self> {
        let python = match &args.python {
            Some(python) => python.clone(),
            None => python::environment(root, "venv", &root.join("xtask/requirements-test.txt"))?,
        };
        check(&mut cargo(
            root,
            ["build", "--release", "--package", "tinker"],
        ))?;
        let client = ["build", "--release", "--package", "tinker-api"];
        let example = ["--example", "bench_samples"];
        check(&mut cargo(root, client.into_iter().chain(example)))?;
        let target = target_dir(root);
        let programs = Self {
            root,
            python,
            script: root.join("benches/server/official_sdk.py"),
            server: target.join("release/tinker"),
            client: target.join("release/examples/bench_samples"),
            dir: target.join("bench/server"),
        };
        let model = programs.model();
        let make = [
            programs.script.as_os_str(),
            "make".as_ref(),
            model.as_os_str(),
        ];
        check(&mut command(root, &programs.python, make))?;
        Ok(programs)
    }

    fn model(&self) -> PathBuf {
        self.dir.join("model")
    }

    fn round(&self, args: &Args) -> Result<(Report, OwnReport)> {
        let home = self.dir.join("home");
        if home.exists() {
            std::fs::remove_dir_all(&home)
                .with_context(|| format!("cannot remove {}", home.display()))?;
        }
        let server = Serving::start(self, &home, args.threads)?;
        let mut official = Command::new(&self.python);
        official
            .arg(&self.script)
            .args(["run", &server.url])
            .arg(self.model())
            .args(["--steps", &args.steps.to_string()])
            .args(["--samples", &args.samples.to_string()])
            .args(["--adapters", &args.adapters.to_string()]);
        let official = self.report(official, &server)?;
        let mut own = Command::new(&self.client);
        own.arg(&server.url)
            .arg(self.model())
            .arg(args.samples.to_string());
        Ok((official, self.report(own, &server)?))
    }

    fn report<T: DeserializeOwned>(&self, mut program: Command, server: &Serving) -> Result<T> {
        program
            .current_dir(self.root)
            .env("TINKER_API_KEY", &server.key)
            .env("TINKER_TELEMETRY", "0")
            .env("HF_HUB_OFFLINE", "1");
        let text = output(&mut program)?;
        serde_json::from_str(&text).with_context(|| format!("cannot read the report `{text}`"))
    }
}

/// The running server; it ends with this.
struct Serving {
    child: Child,
    url: String,
    key: String,
}

impl Serving {
    fn start(programs: &Programs<'_>, home: &Path, threads: usize) -> Result<Self> {
        let mut child = Command::new(&programs.server)
            .args(["serve", "--port", "0", "--threads", &threads.to_string()])
            .arg("--model")
            .arg(programs.model())
            .env("TINKER_HOME", home)
            .env_remove("TINKER_API_KEY")
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", programs.server.display()))?;
        let stdout = child.stdout.take().context("the server has no output")?;
        // It says where it is in the two lines that a shell takes.
        let mut serving = Self {
            child,
            url: String::new(),
            key: String::new(),
        };
        let mut lines = BufReader::new(stdout).lines();
        serving.url = exported(lines.next(), "TINKER_BASE_URL")?;
        serving.key = exported(lines.next(), "TINKER_API_KEY")?;
        Ok(serving)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The value of a line `export NAME=VALUE`.
fn exported(line: Option<std::io::Result<String>>, name: &str) -> Result<String> {
    let line = line.context("the server ended before it said where it is")??;
    let value = line.strip_prefix(&format!("export {name}="));
    value
        .map(str::to_owned)
        .with_context(|| format!("the server printed `{line}`, not its {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_met_at_their_bound_and_not_by_nothing() {
        assert!(Goal::AtLeast(2.0).is_met(2.0) && !Goal::AtLeast(2.0).is_met(1.9));
        assert!(Goal::AtMost(2.0).is_met(2.0) && !Goal::AtMost(2.0).is_met(2.1));
        assert!(!Goal::AtMost(2.0).is_met(median(Vec::new())));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn the_address_is_read_from_the_exported_line() {
        let line = |text: &str| Some(Ok(text.to_owned()));
        let read = exported(line("export A=http://x"), "A").unwrap();
        assert_eq!(read, "http://x");
        assert!(exported(line("serving"), "A").is_err());
        assert!(exported(None, "A").is_err());
    }
}
