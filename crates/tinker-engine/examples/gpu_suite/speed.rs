//! Tokens per second of a device, of the CPU and of PyTorch, which must do the same work.

use std::path::Path;

use tinker_engine::{Backend, load_cpu};

use super::Suite;
use super::shape::Shape;
use super::timed::{self, Failure, Report};
use super::torch::Torch;

/// Steps or passes that count, after one to warm up.
pub(super) const REPEATS: usize = 3;

/// What is timed: a task, and its sequences.
pub(super) const TASKS: [(&str, usize); 3] = [("train", 1), ("decode", 1), ("decode", 8)];

/// Greedy tokens that must agree; after them two may be as good but for rounding.
const SAME_TOKENS: usize = 16;

/// Largest difference of log-probabilities, and relative difference of losses.
const TOLERANCE: f64 = 1e-4;

/// Reports of all of [`TASKS`].
pub(super) type Reports = [Report; TASKS.len()];

/// Prints tokens per second of training and of decoding one and eight sequences; returns whether PyTorch
/// came to the same losses and tokens as ours, where it was run.
pub(super) fn speed(suite: &Suite, work: &Path, torch: Option<&Torch>) -> Result<bool, Failure> {
    println!("tokens per second, best of {REPEATS}; decoding is greedy, with log-probabilities");
    println!(
        "{:<6} {:<44} {:>10} {:>10} {:>10}  same losses and tokens as PyTorch",
        "shape", "engine", "training", "decoding 1", "decoding 8"
    );
    let mut agrees = true;
    for shape in suite.shapes {
        let dir = work.join(shape.name);
        shape.write(&dir)?;
        let mut ours = Vec::new();
        if !shape.gpu_alone {
            ours.push(run(&mut *load_cpu(&dir, suite.threads)?, &dir)?);
        }
        ours.push(run(&mut *suite.load(&dir)?, &dir)?);
        // In float32 results are the same; in bf16 they are near, and its times are to be seen.
        let exact = torch.and_then(|torch| said(shape, torch.run(suite, &dir, "f32")));
        for reports in &ours {
            let outcome = exact.as_ref().map(|exact| compare(reports, exact));
            agrees &= !matches!(outcome, Some(Err(_)));
            let same = match outcome {
                None => "not compared".to_owned(),
                Some(Ok(())) => "yes".to_owned(),
                Some(Err(what)) => format!("NO: {what}"),
            };
            print_row(shape, reports, &same);
        }
        let near = torch.and_then(|torch| said(shape, torch.run(suite, &dir, "bf16")));
        for reports in exact.iter().chain(&near) {
            print_row(shape, reports, "");
        }
    }
    Ok(agrees)
}

/// The reports, or says why there are none.
fn said(shape: &Shape, outcome: Result<Reports, Failure>) -> Option<Reports> {
    match outcome {
        Ok(reports) => Some(reports),
        Err(error) => {
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default();
            println!("{:<6} PyTorch did not run: {last}", shape.name);
            None
        }
    }
}

fn print_row(shape: &Shape, reports: &Reports, same: &str) {
    let figures = reports.each_ref().map(|report| {
        let best = report.seconds.iter().copied().fold(f64::MAX, f64::min);
        format!("{:>10.0}", report.n_tokens as f64 / best)
    });
    let (name, figures) = (&reports[0].name, figures.join(" "));
    println!("{:<6} {name:<44} {figures}  {same}", shape.name);
}

/// Does all tasks, as PyTorch's program does them.
fn run(backend: &mut dyn Backend, dir: &Path) -> Result<Reports, Failure> {
    let work = timed::read_work(dir)?;
    // Each from the adapter of the file, which training changes.
    let mut task = |(task, sequences): (&str, usize)| -> Result<Report, Failure> {
        let adapter = timed::import(backend, dir)?;
        let report = match task {
            "train" => timed::train(backend, adapter, &work["train"], REPEATS),
            _ => timed::decode(backend, adapter, &work, sequences, REPEATS),
        };
        backend.drop_adapter(adapter);
        report
    };
    let [train, one, eight] = TASKS;
    Ok([task(train)?, task(one)?, task(eight)?])
}

/// What is not the same in two engines' results, if something is not.
fn compare(ours: &Reports, theirs: &Reports) -> Result<(), String> {
    for ((ours, theirs), (task, sequences)) in ours.iter().zip(theirs).zip(TASKS) {
        match task {
            "train" => same_losses(&ours.losses, &theirs.losses)?,
            _ => same_tokens(ours, theirs, sequences)?,
        }
    }
    Ok(())
}

fn same_losses(ours: &[f64], theirs: &[f64]) -> Result<(), String> {
    if ours.is_empty() || ours.len() != theirs.len() {
        return Err(format!("{} losses and {}", ours.len(), theirs.len()));
    }
    let near = |(a, b): (&f64, &f64)| (a / b - 1.0).abs() < TOLERANCE;
    match ours.iter().zip(theirs).position(|pair| !near(pair)) {
        None => Ok(()),
        Some(step) => Err(format!(
            "step {step}: loss {} and {}",
            ours[step], theirs[step]
        )),
    }
}

fn same_tokens(ours: &Report, theirs: &Report, sequences: usize) -> Result<(), String> {
    let (n, other) = (ours.tokens.len(), theirs.tokens.len());
    if n == 0 || [other, ours.logprobs.len(), theirs.logprobs.len()] != [n; 3] {
        return Err(format!("{n} tokens and {other}"));
    }
    let each = n / sequences;
    for start in (0..n).step_by(each) {
        let same = (start..start + each).take_while(|i| ours.tokens[*i] == theirs.tokens[*i]);
        let same = same.count();
        if same < SAME_TOKENS.min(each) {
            return Err(format!("tokens differ from number {same} on"));
        }
        let off = |i: usize| (ours.logprobs[i] - theirs.logprobs[i]).abs();
        let worst = (start..start + same).map(off).fold(0.0, f64::max);
        if worst.is_nan() || worst >= TOLERANCE {
            return Err(format!("log-probabilities are {worst:.1e} apart"));
        }
    }
    Ok(())
}
