//! The engine beside PyTorch: same weights, shapes, threads and work, in alternating rounds.
//!
//! The programs print one [`Report`] per call. They must agree on losses and tokens before their
//! times are compared. Both compute in float32 and in bf16, which is less exact.

mod outcome;
mod report;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use self::outcome::{Goal, Outcome, Row};
use self::report::{Report, Rounds};
use super::machine;
use crate::process::{cargo, check, command, output, target_dir};
use crate::python;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Python with benches/engine/requirements.txt; made under target/ if absent.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Size of the model and of its batch.
    #[arg(long, value_enum, default_value_t)]
    shape: Shape,
    /// Rounds; each runs us and PyTorch, in both precisions, once per task.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Steps (training) or passes of 128 tokens, 32 of the large shape (decoding), per round.
    #[arg(long, default_value_t = 6)]
    repeats: usize,
    /// Threads of either program; all cores if absent.
    #[arg(long)]
    threads: Option<usize>,
    /// Numbers that the model file holds, whatever is computed with.
    #[arg(long, value_enum, default_value_t)]
    weights: Precision,
    /// Keep both programs to 256-bit vectors, as on processors without AVX-512.
    #[arg(long)]
    avx2: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Fail unless both best and median of each ratio reach the goal that the table names.
    #[arg(long)]
    check: bool,
}

/// Sizes, as `SHAPES` of the Python program has them.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Shape {
    /// Hidden 256, 4 layers, vocabulary 4,096; trains on 8 x 256 tokens.
    #[default]
    Small,
    /// Hidden 1,024, 8 layers, vocabulary 32,000; trains on 2 x 512 tokens.
    Large,
}

/// Goals of one shape, each precision beside PyTorch in the same.
struct Goals {
    train: [f64; 2],
    decode: [f64; 2],
    decode_many: [f64; 2],
    /// Of PyTorch's in float32.
    memory: f64,
}

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
        }
    }

    fn goals(self) -> Goals {
        match self {
            Self::Small => Goals {
                train: [3.0, 2.6],
                decode: [6.0, 10.0],
                decode_many: [2.0, 4.0],
                memory: 1.0 / 12.0,
            },
            Self::Large => Goals {
                train: [2.3, 1.6],
                decode: [2.0, 1.5],
                decode_many: [2.0, 2.0],
                memory: 1.0 / 3.0,
            },
        }
    }
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

/// Sequences that are decoded together, beside one alone.
const MANY: usize = 8;

/// What a program is asked to do.
#[derive(Debug, Clone, Copy)]
enum Task {
    Train,
    /// Decode this many sequences together.
    Decode(usize),
}

impl Task {
    fn arguments(self) -> (&'static str, usize) {
        match self {
            Self::Train => ("train", 1),
            Self::Decode(n) => ("decode", n),
        }
    }
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    let threads = match args.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()
            .context("cannot count the cores")?
            .get(),
    };
    let outcome = Programs::prepare(root, args, threads)?.compare()?;
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

/// The programs, built and with their model made.
struct Programs<'a> {
    root: &'a Path,
    args: &'a Args,
    python: PathBuf,
    script: PathBuf,
    example: PathBuf,
    model: PathBuf,
    threads: usize,
}

impl<'a> Programs<'a> {
    fn prepare(root: &'a Path, args: &'a Args, threads: usize) -> Result<Self> {
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
            args,
            python,
            script: root.join("benches/engine/torch_engine.py"),
            example: target.join("release/examples/bench_engine"),
            model: target.join("bench/engine").join(args.shape.name()),
            threads,
        };
        let make = [
            programs.script.as_os_str(),
            "make".as_ref(),
            programs.model.as_os_str(),
            "--shape".as_ref(),
            args.shape.name().as_ref(),
            "--weights".as_ref(),
            args.weights.name().as_ref(),
        ];
        check(&mut command(root, &programs.python, make))?;
        Ok(programs)
    }

    fn compare(&self) -> Result<Outcome> {
        let train = self.rounds(Task::Train)?;
        train.agree_on_losses()?;
        let one = self.rounds(Task::Decode(1))?;
        let many = self.rounds(Task::Decode(MANY))?;
        let same_tokens = one.agree_on_tokens(1)? + many.agree_on_tokens(MANY)?;
        Ok(Outcome {
            machine: machine(),
            shape: self.args.shape.name(),
            weights: self.args.weights.name(),
            threads: self.threads,
            rounds: self.args.rounds,
            repeats: self.args.repeats,
            ours: train.ours.name.clone(),
            torch: train.f32.name.clone(),
            same_tokens,
            n_tokens: one.ours.tokens.len() + many.ours.tokens.len(),
            rows: self.rows(&train, &one, &many),
        })
    }

    fn rows(&self, train: &Rounds, one: &Rounds, many: &Rounds) -> Vec<Row> {
        let goals = self.args.shape.goals();
        let memory = [Goal::AtMost(goals.memory), Goal::Nothing];
        let speed = |goals: [f64; 2]| goals.map(Goal::AtLeast);
        let mut rows = vec![
            Row::tokens_per_second("training tokens/s", train, speed(goals.train)),
            Row::tokens_per_second("decoding 1, tokens/s", one, speed(goals.decode)),
            Row::tokens_per_second("decoding 8, tokens/s", many, speed(goals.decode_many)),
            Row::memory("memory of training, MB", train, memory),
            Row::memory("memory of decoding 8, MB", many, [Goal::Nothing; 2]),
        ];
        if self.threads == 1 {
            // Threads that wait for each other also burn processor time, so only one is compared.
            for (what, rounds) in [
                ("training", train),
                ("decoding 1", one),
                ("decoding 8", many),
            ] {
                let what = format!("{what}, tokens/CPU-second");
                rows.push(Row::per_cpu_second(&what, rounds));
            }
        }
        rows
    }

    fn rounds(&self, task: Task) -> Result<Rounds> {
        let mut rounds = Rounds::default();
        for round in 1..=self.args.rounds {
            eprintln!("{task:?}: round {round} of {}", self.args.rounds);
            rounds.ours.merge(self.ours(task, Precision::F32)?);
            rounds.ours_bf16.merge(self.ours(task, Precision::Bf16)?);
            rounds.f32.merge(self.torch(task, Precision::F32)?);
            rounds.bf16.merge(self.torch(task, Precision::Bf16)?);
        }
        Ok(rounds)
    }

    fn ours(&self, task: Task, compute: Precision) -> Result<Report> {
        let mut program = Command::new(&self.example);
        self.describe(&mut program, task);
        program.args(["--precision", compute.name()]);
        program.args(self.args.avx2.then_some("--avx2"));
        read_report(&mut program)
    }

    fn torch(&self, task: Task, compute: Precision) -> Result<Report> {
        let mut program = Command::new(&self.python);
        program
            .arg(&self.script)
            .env("OMP_NUM_THREADS", self.threads.to_string());
        self.describe(&mut program, task);
        program.args(["--compute", compute.name()]);
        if self.args.avx2 {
            program.envs(AVX2_ONLY);
        }
        read_report(&mut program)
    }

    /// The arguments that all programs understand.
    fn describe(&self, program: &mut Command, task: Task) {
        let (name, sequences) = task.arguments();
        program.current_dir(self.root).arg(name).arg(&self.model);
        program.args(["--sequences", &sequences.to_string()]);
        program.args(["--threads", &self.threads.to_string()]);
        program.args(["--repeats", &self.args.repeats.to_string()]);
    }
}

fn read_report(program: &mut Command) -> Result<Report> {
    let text = output(program)?;
    serde_json::from_str(&text).with_context(|| format!("cannot read the report `{text}`"))
}
