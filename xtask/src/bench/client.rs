//! The client beside the official SDK, against one server that computes nothing, in alternating runs.
//!
//! Both programs print one [`Report`] per run. The server tells how many samples were in flight and
//! what it cost itself, so that a result that measures the server is noticed.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::machine;
use crate::process::{cargo, check, output, target_dir};
use crate::python;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Python with the official SDK 0.38; made under target/ if absent.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Rounds; each runs us and the official SDK once per task.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Samples queued at once: 64 prompt and 64 sampled tokens each.
    #[arg(long, default_value_t = 10_000)]
    samples: usize,
    /// Samples queued at once of which only our peak memory and the order of results are looked at.
    #[arg(long, default_value_t = 100_000)]
    queued: usize,
    /// Data of 1,024 tokens in one pass.
    #[arg(long, default_value_t = 1024)]
    data: usize,
    /// Time from the acceptance of a sample to its result.
    #[arg(long, default_value_t = 200)]
    latency_ms: u64,
    /// Have the server ask for a poll of each sample, at most 2,000 at once, instead of one poll of
    /// all (`retrieve_futures`). The promised memory is that of the latter: over HTTP/1.1 each poll
    /// takes a connection.
    #[arg(long)]
    poll_each: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Fail unless the promised ratios hold: CPU 20, memory 5, throughput 10, CPU of a pass 4;
    /// and the queued samples stay under 400 MB.
    #[arg(long)]
    check: bool,
}

/// What one program printed about one run.
#[derive(Debug, Clone, Deserialize)]
struct Report {
    name: String,
    /// From the first call to the last result.
    seconds: f64,
    /// Processor time of these.
    cpu_seconds: f64,
    /// Tokens received or sent.
    n_tokens: usize,
    /// Largest resident memory of the process.
    peak_bytes: u64,
}

/// What the server tells about one run.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Stats {
    peak_in_flight: u64,
    cpu_seconds: f64,
}

/// The medians of one side's runs of one task.
#[derive(Debug, Default, Serialize)]
struct Side {
    name: String,
    seconds: f64,
    cpu_seconds: f64,
    peak_mb: f64,
    /// Most samples in flight at the server.
    peak_in_flight: u64,
    /// The server's own processor time over its wall time: near 1, it would be the bottleneck.
    server_load: f64,
}

/// Most memory that all queued samples may take, in megabytes.
const QUEUED_MB: f64 = 400.0;

/// The result: first what is promised.
#[derive(Debug, Serialize)]
struct Outcome {
    /// Processor time of the samples, theirs over ours.
    cpu_ratio: f64,
    /// Peak memory of the samples, theirs over ours.
    memory_ratio: f64,
    /// Samples per second, ours over theirs.
    throughput_ratio: f64,
    /// Processor time of the pass, theirs over ours.
    pass_cpu_ratio: f64,
    /// Our peak memory with all queued samples, in megabytes.
    queued_peak_mb: f64,
    machine: String,
    rounds: usize,
    samples: usize,
    queued: usize,
    data: usize,
    latency_ms: u64,
    poll_each: bool,
    ours: Side,
    official: Side,
    ours_pass: Side,
    official_pass: Side,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let programs = Programs::prepare(root, args)?;
    let (ours, official) = programs.rounds("sample", args.samples, args)?;
    let (ours_pass, official_pass) = programs.rounds("forward_backward", args.data, args)?;
    eprintln!("queue: {} samples", args.queued);
    let program = Command::new(&programs.client);
    let (queue, _) = programs.measure(program, "sample", args.queued, args)?;
    let outcome = Outcome {
        cpu_ratio: official.cpu_seconds / ours.cpu_seconds,
        memory_ratio: official.peak_mb / ours.peak_mb,
        throughput_ratio: official.seconds / ours.seconds,
        pass_cpu_ratio: official_pass.cpu_seconds / ours_pass.cpu_seconds,
        queued_peak_mb: queue.peak_bytes as f64 / 1e6,
        machine: machine(),
        rounds: args.rounds,
        samples: args.samples,
        queued: args.queued,
        data: args.data,
        latency_ms: args.latency_ms,
        poll_each: args.poll_each,
        ours,
        official,
        ours_pass,
        official_pass,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&outcome)?);
    } else {
        print_table(&outcome);
    }
    if args.check {
        hold_to_promise(&outcome)
    } else {
        Ok(())
    }
}

/// The three programs, built.
struct Programs<'a> {
    root: &'a Path,
    python: PathBuf,
    script: PathBuf,
    client: PathBuf,
    double: PathBuf,
}

impl<'a> Programs<'a> {
    fn prepare(root: &'a Path, args: &Args) -> Result<Self> {
        let python = match &args.python {
            Some(python) => python.clone(),
            None => python::environment(root, "venv", &root.join("xtask/requirements-test.txt"))?,
        };
        let build = ["build", "--release", "--package", "tinker-api"];
        let examples = ["--example", "bench_client", "--example", "bench_double"];
        check(&mut cargo(root, build.into_iter().chain(examples)))?;
        let examples = target_dir(root).join("release/examples");
        Ok(Self {
            root,
            python,
            script: root.join("benches/client/official_client.py"),
            client: examples.join("bench_client"),
            double: examples.join("bench_double"),
        })
    }

    /// The medians of both sides, each run against a server of its own.
    fn rounds(&self, task: &str, n: usize, args: &Args) -> Result<(Side, Side)> {
        let (mut ours, mut official) = (Vec::new(), Vec::new());
        for round in 1..=args.rounds {
            eprintln!("{task}: round {round} of {}", args.rounds);
            ours.push(self.measure(Command::new(&self.client), task, n, args)?);
            let mut sdk = Command::new(&self.python);
            sdk.arg(&self.script).env("TINKER_TELEMETRY", "0");
            official.push(self.measure(sdk, task, n, args)?);
        }
        let tokens: Vec<_> = ours.iter().chain(&official).map(|r| r.0.n_tokens).collect();
        ensure!(
            tokens.iter().all(|n| *n == tokens[0]),
            "the programs did different work: {tokens:?} tokens"
        );
        Ok((Side::of(&ours), Side::of(&official)))
    }

    fn measure(
        &self,
        mut program: Command,
        task: &str,
        n: usize,
        args: &Args,
    ) -> Result<(Report, Stats)> {
        let double = Double::start(&self.double, args)?;
        program.current_dir(self.root);
        program.args([task, &double.url, &n.to_string()]);
        let text = output(&mut program)?;
        let report = serde_json::from_str(&text)
            .with_context(|| format!("cannot read the report `{text}`"))?;
        Ok((report, double.stats()?))
    }
}

/// The running server; it ends with this.
struct Double {
    child: Child,
    url: String,
}

impl Double {
    fn start(program: &Path, args: &Args) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(["--latency-ms", &args.latency_ms.to_string()]);
        command.args((!args.poll_each).then_some("--session-poller"));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let stdout = child.stdout.take().context("the server has no output")?;
        let mut url = String::new();
        BufReader::new(stdout).read_line(&mut url)?;
        let url = url.trim().to_owned();
        ensure!(!url.is_empty(), "the server did not tell its address");
        Ok(Self { child, url })
    }

    fn stats(&self) -> Result<Stats> {
        let host = self.url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(host).context("cannot reach the server")?;
        stream.write_all(b"GET /stats HTTP/1.1\r\n\r\n")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        Ok(serde_json::from_str(body)?)
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Side {
    fn of(runs: &[(Report, Stats)]) -> Self {
        let middle = |of: &dyn Fn(&(Report, Stats)) -> f64| median(runs.iter().map(of).collect());
        Self {
            name: runs.first().map(|r| r.0.name.clone()).unwrap_or_default(),
            seconds: middle(&|r| r.0.seconds),
            cpu_seconds: middle(&|r| r.0.cpu_seconds),
            peak_mb: middle(&|r| r.0.peak_bytes as f64 / 1e6),
            peak_in_flight: runs.iter().map(|r| r.1.peak_in_flight).max().unwrap_or(0),
            server_load: middle(&|r| r.1.cpu_seconds / r.0.seconds),
        }
    }
}

/// The middle value; 0 for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn print_table(outcome: &Outcome) {
    let Outcome {
        machine,
        rounds,
        samples,
        data,
        ours,
        official,
        ours_pass,
        official_pass,
        ..
    } = outcome;
    println!("{machine}; medians of {rounds} rounds, alternating");
    println!("ours: {}; beside it: {}", ours.name, official.name);
    println!(
        "in flight at the server: {} and {}; its load: {:.2} and {:.2}\n",
        ours.peak_in_flight, official.peak_in_flight, ours.server_load, official.server_load
    );
    println!("| | ours | official | ratio |");
    println!("|---|---|---|---|");
    let row = |what: &str, ours: f64, theirs: f64, ratio: f64| {
        println!("| {what} | {ours:.3} | {theirs:.3} | {ratio:.1} |");
    };
    let n = *samples as f64;
    row(
        &format!("CPU seconds of {samples} samples"),
        ours.cpu_seconds,
        official.cpu_seconds,
        outcome.cpu_ratio,
    );
    row(
        "peak memory, MB",
        ours.peak_mb,
        official.peak_mb,
        outcome.memory_ratio,
    );
    row(
        "samples/s",
        n / ours.seconds,
        n / official.seconds,
        outcome.throughput_ratio,
    );
    row(
        &format!("CPU seconds of a pass of {data} x 1024 tokens"),
        ours_pass.cpu_seconds,
        official_pass.cpu_seconds,
        outcome.pass_cpu_ratio,
    );
    println!(
        "\nours with {} samples queued at once: {:.0} MB, results in the order asked",
        outcome.queued, outcome.queued_peak_mb
    );
}

fn hold_to_promise(outcome: &Outcome) -> Result<()> {
    let promises = [
        ("CPU of samples", outcome.cpu_ratio, 20.0),
        ("memory of samples", outcome.memory_ratio, 5.0),
        ("throughput of samples", outcome.throughput_ratio, 10.0),
        ("CPU of a pass", outcome.pass_cpu_ratio, 4.0),
    ];
    for (what, ratio, least) in promises {
        // Written so that a NaN fails.
        ensure!(
            ratio >= least,
            "{what}: {ratio:.1} times better than the official SDK, promised is {least}"
        );
    }
    let mb = outcome.queued_peak_mb;
    ensure!(
        mb < QUEUED_MB,
        "queued samples: {mb:.0} MB, promised is less than {QUEUED_MB}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(cpu_ratio: f64, pass_cpu_ratio: f64, queued_peak_mb: f64) -> Outcome {
        Outcome {
            queued_peak_mb,
            queued: 1,
            cpu_ratio,
            memory_ratio: 5.0,
            throughput_ratio: 10.0,
            pass_cpu_ratio,
            machine: String::new(),
            rounds: 1,
            samples: 1,
            data: 1,
            latency_ms: 0,
            poll_each: false,
            ours: Side::default(),
            official: Side::default(),
            ours_pass: Side::default(),
            official_pass: Side::default(),
        }
    }

    #[test]
    fn promises_hold_from_their_limits_on() {
        hold_to_promise(&outcome(20.0, 4.0, 399.0)).unwrap();

        for broken in [
            outcome(19.9, 4.0, 399.0),
            outcome(20.0, 3.9, 399.0),
            outcome(f64::NAN, 4.0, 399.0),
            outcome(20.0, 4.0, 400.0),
        ] {
            assert!(hold_to_promise(&broken).is_err(), "{broken:?}");
        }
    }

    #[test]
    fn the_median_is_the_middle_run() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![]), 0.0);
    }
}
