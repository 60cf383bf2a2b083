//! The engine beside PyTorch: same weights, shapes, threads and work, in alternating rounds.
//!
//! Both programs print one [`Report`] per call. They must agree on losses and tokens before their
//! times are compared.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::machine;
use crate::process::{cargo, check, command, output, target_dir};
use crate::python;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Python with benches/engine/requirements.txt; made under target/ if absent.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Rounds; each runs us and PyTorch once per task.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Steps (training) or passes of 128 tokens (decoding) per round.
    #[arg(long, default_value_t = 6)]
    repeats: usize,
    /// Threads of either program; all cores if absent.
    #[arg(long)]
    threads: Option<usize>,
    /// Numbers that the model file holds; the computation is float32 either way.
    #[arg(long, value_enum, default_value_t)]
    weights: Precision,
    /// Keep both programs to 256-bit vectors, as on processors without AVX-512.
    #[arg(long)]
    avx2: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Fail unless both best and median keep the promised ratios (training 2.5, or 1.5 without
    /// AVX-512; decoding 4; memory 1/8).
    #[arg(long)]
    check: bool,
}

/// Precision of the weights in the file.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Precision {
    /// As models are published.
    #[default]
    Bf16,
    F32,
}

impl Precision {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// What keeps PyTorch's own kernels, MKL and oneDNN to 256-bit vectors.
const AVX2_ONLY: [(&str, &str); 3] = [
    ("ATEN_CPU_CAPABILITY", "avx2"),
    ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2"),
];

/// What one program printed about one task.
#[derive(Debug, Default, Deserialize)]
struct Report {
    name: String,
    /// Seconds per step or pass, warm-up left out.
    seconds: Vec<f64>,
    /// Processor time of all of these together.
    cpu_seconds: f64,
    /// Tokens per step or pass.
    n_tokens: usize,
    /// Largest resident memory of the process.
    peak_bytes: u64,
    /// Loss of each training step.
    #[serde(default)]
    losses: Vec<f64>,
    /// Greedy tokens.
    #[serde(default)]
    tokens: Vec<u32>,
    /// Log-probability of each greedy token.
    #[serde(default)]
    logprobs: Vec<f64>,
}

/// One line of the result: tokens/s (more is better) or bytes (less is better).
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    ours_best: f64,
    ours_median: f64,
    torch_best: f64,
    torch_median: f64,
    ratio_best: f64,
    ratio_median: f64,
}

#[derive(Debug, Serialize)]
struct Outcome {
    machine: String,
    weights: &'static str,
    threads: usize,
    rounds: usize,
    repeats: usize,
    ours: String,
    torch: String,
    same_tokens: usize,
    rows: Vec<Row>,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let threads = match args.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()
            .context("cannot count the cores")?
            .get(),
    };
    let programs = Programs::prepare(root, args, threads)?;
    let train = programs.rounds("train", args)?;
    let decode = programs.rounds("decode", args)?;
    agree_on_losses(&train)?;
    let same_tokens = agree_on_tokens(&decode)?;
    let mut rows = vec![
        tokens_per_second("training tokens/s", &train),
        tokens_per_second("greedy decoding tokens/s, batch 1", &decode),
        memory("peak memory of training, MB", &train),
        memory("peak memory of decoding, MB", &decode),
    ];
    if threads == 1 {
        // Threads that wait for each other also burn processor time, so only one is compared.
        rows.push(per_cpu_second("training tokens/CPU-second", &train));
        rows.push(per_cpu_second("greedy decoding tokens/CPU-second", &decode));
    }
    let outcome = Outcome {
        machine: machine(),
        weights: args.weights.name(),
        threads,
        rounds: args.rounds,
        repeats: args.repeats,
        ours: train.ours.name.clone(),
        torch: train.torch.name.clone(),
        same_tokens,
        rows,
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

/// The two programs, built and with their model made.
struct Programs<'a> {
    root: &'a Path,
    python: PathBuf,
    script: PathBuf,
    example: PathBuf,
    model: PathBuf,
    threads: usize,
}

/// All rounds of one task put together.
#[derive(Debug, Default)]
struct Pair {
    ours: Report,
    torch: Report,
}

impl<'a> Programs<'a> {
    fn prepare(root: &'a Path, args: &Args, threads: usize) -> Result<Self> {
        let requirements = root.join("benches/engine/requirements.txt");
        let python = match &args.python {
            Some(python) => python.clone(),
            None => python::environment(root, "venv-bench", &requirements)?,
        };
        let example = [
            "build",
            "--release",
            "--package",
            "tinker-engine",
            "--example",
            "bench_engine",
        ];
        check(&mut cargo(root, example))?;
        let target = target_dir(root);
        let programs = Self {
            root,
            python,
            script: root.join("benches/engine/torch_engine.py"),
            example: target.join("release/examples/bench_engine"),
            model: target.join("bench/engine"),
            threads,
        };
        let make = [
            programs.script.as_os_str(),
            "make".as_ref(),
            programs.model.as_os_str(),
            "--weights".as_ref(),
            args.weights.name().as_ref(),
        ];
        check(&mut command(root, &programs.python, make))?;
        Ok(programs)
    }

    fn rounds(&self, task: &str, args: &Args) -> Result<Pair> {
        let mut pair = Pair::default();
        for round in 1..=args.rounds {
            eprintln!("{task}: round {round} of {}", args.rounds);
            let ours = Command::new(&self.example);
            let avx2 = args.avx2.then_some("--avx2");
            pair.ours.merge(self.report(ours, task, args, avx2)?);
            let mut torch = Command::new(&self.python);
            torch
                .arg(&self.script)
                .env("OMP_NUM_THREADS", self.threads.to_string());
            if args.avx2 {
                torch.envs(AVX2_ONLY);
            }
            pair.torch.merge(self.report(torch, task, args, None)?);
        }
        Ok(pair)
    }

    fn report(
        &self,
        mut program: Command,
        task: &str,
        args: &Args,
        option: Option<&str>,
    ) -> Result<Report> {
        program.current_dir(self.root).arg(task).arg(&self.model);
        program.args(option);
        program.args(["--threads", &self.threads.to_string()]);
        program.args(["--repeats", &args.repeats.to_string()]);
        let text = output(&mut program)?;
        serde_json::from_str(&text).with_context(|| format!("cannot read the report `{text}`"))
    }
}

impl Report {
    /// Adds the times of another round; the results are the same in each.
    fn merge(&mut self, mut round: Self) {
        let mut seconds = std::mem::take(&mut self.seconds);
        seconds.append(&mut round.seconds);
        let cpu_seconds = self.cpu_seconds + round.cpu_seconds;
        let peak_bytes = self.peak_bytes.max(round.peak_bytes);
        *self = Self {
            seconds,
            cpu_seconds,
            peak_bytes,
            ..round
        };
    }
}

/// Losses of all steps agree to 1e-4, so both did the same work.
fn agree_on_losses(pair: &Pair) -> Result<()> {
    let (ours, torch) = (&pair.ours.losses, &pair.torch.losses);
    ensure!(!ours.is_empty(), "there are no losses to compare");
    ensure!(
        ours.len() == torch.len(),
        "{} losses against {}",
        ours.len(),
        torch.len()
    );
    for (step, (a, b)) in ours.iter().zip(torch).enumerate() {
        ensure!(
            (a / b - 1.0).abs() < 1e-4,
            "step {step}: loss {a} against {b} of PyTorch"
        );
    }
    Ok(())
}

/// How many greedy tokens agree from the start, with log-probabilities equal to 1e-4; two nearly
/// equal best tokens may end it.
fn agree_on_tokens(pair: &Pair) -> Result<usize> {
    let (ours, torch) = (&pair.ours.tokens, &pair.torch.tokens);
    let same = ours.iter().zip(torch).take_while(|(a, b)| a == b).count();
    ensure!(
        same >= 16,
        "greedy tokens differ from token {same} on: {ours:?} against {torch:?}"
    );
    for (i, report) in [&pair.ours, &pair.torch].into_iter().enumerate() {
        let (n, tokens) = (report.logprobs.len(), report.tokens.len());
        let who = ["ours", "PyTorch"][i];
        ensure!(n == tokens, "{who}: {n} log-probs of {tokens} tokens");
    }
    let logprobs = pair.ours.logprobs.iter().zip(&pair.torch.logprobs);
    for (i, (a, b)) in logprobs.take(same).enumerate() {
        ensure!(
            (a - b).abs() < 1e-4,
            "token {i}: log-prob {a} against {b} of PyTorch"
        );
    }
    Ok(same)
}

fn tokens_per_second(what: &'static str, pair: &Pair) -> Row {
    let rate = |report: &Report, seconds: f64| report.n_tokens as f64 / seconds;
    let (ours_best, ours_median) = best_and_median(&pair.ours.seconds);
    let (torch_best, torch_median) = best_and_median(&pair.torch.seconds);
    Row {
        what,
        ours_best: rate(&pair.ours, ours_best),
        ours_median: rate(&pair.ours, ours_median),
        torch_best: rate(&pair.torch, torch_best),
        torch_median: rate(&pair.torch, torch_median),
        ratio_best: rate(&pair.ours, ours_best) / rate(&pair.torch, torch_best),
        ratio_median: rate(&pair.ours, ours_median) / rate(&pair.torch, torch_median),
    }
}

/// As good on a loaded machine as on a quiet one.
fn per_cpu_second(what: &'static str, pair: &Pair) -> Row {
    let rate = |r: &Report| (r.n_tokens * r.seconds.len()) as f64 / r.cpu_seconds;
    one_figure(what, rate(&pair.ours), rate(&pair.torch))
}

fn memory(what: &'static str, pair: &Pair) -> Row {
    let megabytes = |report: &Report| report.peak_bytes as f64 / 1e6;
    one_figure(what, megabytes(&pair.ours), megabytes(&pair.torch))
}

/// A row whose best and median are the same.
fn one_figure(what: &'static str, ours: f64, torch: f64) -> Row {
    Row {
        what,
        ours_best: ours,
        ours_median: ours,
        torch_best: torch,
        torch_median: torch,
        ratio_best: ours / torch,
        ratio_median: ours / torch,
    }
}

/// Smallest and middle value; 0 for none.
fn best_and_median(seconds: &[f64]) -> (f64, f64) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |i: usize| sorted.get(i).copied().unwrap_or_default();
    (at(0), at(sorted.len() / 2))
}

fn print_table(outcome: &Outcome) {
    let Outcome {
        machine,
        weights,
        threads,
        rounds,
        repeats,
        ours,
        torch,
        same_tokens,
        rows,
    } = outcome;
    println!("{machine}; {threads} threads; {rounds} rounds of {repeats}, alternating");
    println!("float32 on both sides, weights in {weights}");
    println!("ours: {ours}; beside it: {torch}; {same_tokens} greedy tokens the same\n");
    println!("| | ours best | median | PyTorch best | median | ratio best | median |");
    println!("|---|---|---|---|---|---|---|");
    for row in rows {
        println!(
            "| {} | {:.0} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} |",
            row.what,
            row.ours_best,
            row.ours_median,
            row.torch_best,
            row.torch_median,
            row.ratio_best,
            row.ratio_median,
        );
    }
}

/// Least ratio of training; the engine's report tells which instructions it used.
fn promised_training(ours: &str) -> f64 {
    if ours.contains("avx512") { 2.5 } else { 1.5 }
}

fn hold_to_promise(outcome: &Outcome) -> Result<()> {
    let [train, decode, memory, _] = &outcome.rows[..] else {
        bail!("{} rows instead of 4", outcome.rows.len());
    };
    for (row, least) in [(train, promised_training(&outcome.ours)), (decode, 4.0)] {
        for (which, ratio) in [("best", row.ratio_best), ("median", row.ratio_median)] {
            // Written so that a NaN fails.
            ensure!(
                ratio >= least,
                "{}: the {which} is {ratio:.2} times PyTorch's, promised is {least}",
                row.what
            );
        }
    }
    ensure!(
        memory.ratio_best <= 0.125,
        "{}: {:.3} of PyTorch's, promised is 0.125",
        memory.what,
        memory.ratio_best
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_put_together() {
        let mut report = Report::default();

        report.merge(Report {
            seconds: vec![3.0, 1.0],
            peak_bytes: 7,
            ..Report::default()
        });
        report.merge(Report {
            seconds: vec![2.0],
            peak_bytes: 5,
            ..Report::default()
        });

        assert_eq!(best_and_median(&report.seconds), (1.0, 2.0));
        assert_eq!(report.peak_bytes, 7);
    }

    #[test]
    fn different_work_is_refused() {
        let report = |loss: f64, tokens: [u32; 16]| Report {
            losses: vec![loss],
            tokens: tokens.to_vec(),
            logprobs: vec![-loss; 16],
            ..Report::default()
        };
        let pair = Pair {
            ours: report(2.0, [1; 16]),
            torch: report(2.001, [2; 16]),
        };

        assert!(
            agree_on_losses(&pair)
                .unwrap_err()
                .to_string()
                .contains("step 0: loss 2 against")
        );
        assert!(agree_on_tokens(&pair).is_err());
    }

    #[test]
    fn no_work_and_other_logprobs_are_refused() {
        let error = agree_on_losses(&Pair::default()).unwrap_err().to_string();
        assert_eq!(error, "there are no losses to compare");
        let report = |logprobs: Vec<f64>| Report {
            tokens: vec![1; 16],
            logprobs,
            ..Report::default()
        };
        let agree = |ours, torch| {
            agree_on_tokens(&Pair {
                ours: report(ours),
                torch: report(torch),
            })
        };

        assert_eq!(agree(vec![-1.0; 16], vec![-1.00001; 16]).unwrap(), 16);
        let error = agree(vec![-1.0; 16], vec![-1.001; 16]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "token 0: log-prob -1 against -1.001 of PyTorch"
        );
        assert!(agree(vec![], vec![]).is_err());
    }

    #[test]
    fn best_and_median_must_both_keep_the_promise() {
        let row = |what, ratio_best, ratio_median| Row {
            what,
            ours_best: 1.0,
            ours_median: 1.0,
            torch_best: 1.0,
            torch_median: 1.0,
            ratio_best,
            ratio_median,
        };
        let hold = |ours: &str, train: (f64, f64), decode: (f64, f64), memory| {
            hold_to_promise(&Outcome {
                machine: String::new(),
                weights: "bf16",
                threads: 1,
                rounds: 1,
                repeats: 1,
                ours: ours.into(),
                torch: String::new(),
                same_tokens: 16,
                rows: vec![
                    row("train", train.0, train.1),
                    row("decode", decode.0, decode.1),
                    row("memory", memory, memory),
                    row("memory", memory, memory),
                ],
            })
        };
        let (wide, narrow) = ("cpu avx512 f32", "cpu avx2 f32");
        let good = (4.0, 4.0);
        assert!(hold(wide, (2.5, 2.5), good, 0.1).is_ok());
        assert!(hold(narrow, (1.5, 1.5), good, 0.1).is_ok());
        for (ours, train, decode, memory) in [
            (wide, (2.4, 2.5), good, 0.1),
            (wide, (2.5, 2.4), good, 0.1),
            (narrow, (1.5, 1.4), good, 0.1),
            (wide, (2.5, 2.5), (4.0, 3.9), 0.1),
            (wide, (2.5, 2.5), (f64::NAN, 4.0), 0.1),
            (wide, (2.5, 2.5), good, 0.2),
        ] {
            assert!(hold(ours, train, decode, memory).is_err());
        }
    }
}
