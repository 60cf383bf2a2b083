//! Holds the GPU to the CPU, then times both; `cargo xtask gpu` packs it for a machine without Rust.
//!
//! `gpu_suite FIXTURES WORK [--torch PYTHON SCRIPT] [--threads N] [--rehearse]`: `FIXTURES` has the
//! reference models, each with `reference/adapter.safetensors`; random models to time are written into
//! `WORK`. Threads, all cores if not given, are those of the CPU's engine and of PyTorch. Exits with 0 if
//! everything agrees, 1 if not, and 3 if there is no GPU to run on. A rehearsal puts the CPU in the GPU's
//! place, on the smallest model: it shows that the program works, and nothing about a GPU.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the result of the program"
)]

mod parity;
mod shape;
mod speed;
#[path = "../timed/mod.rs"]
mod timed;
mod torch;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tinker_engine::{Backend, cuda_is_available, load_cpu, load_cuda};

use self::shape::{SHAPES, Shape};
use self::timed::Failure;
use self::torch::Torch;

const USAGE: &str =
    "usage: gpu_suite FIXTURES WORK [--torch PYTHON SCRIPT] [--threads N] [--rehearse]";

/// What the command line says.
#[derive(Debug, Default)]
struct Arguments {
    folders: Vec<PathBuf>,
    torch: Option<Torch>,
    threads: Option<usize>,
    rehearses: bool,
}

impl Arguments {
    /// `None` if they make no sense.
    fn read(mut given: impl Iterator<Item = String>) -> Option<Self> {
        let mut arguments = Self::default();
        while let Some(argument) = given.next() {
            match argument.as_str() {
                "--rehearse" => arguments.rehearses = true,
                "--threads" => arguments.threads = Some(given.next()?.parse().ok()?),
                "--torch" => {
                    let (python, script) = (given.next()?, given.next()?);
                    arguments.torch = Some(Torch { python, script });
                }
                folder if !folder.starts_with('-') => arguments.folders.push(folder.into()),
                _ => return None,
            }
        }
        Some(arguments)
    }
}

/// What is held to the CPU, and what it is timed on.
struct Suite {
    is_rehearsal: bool,
    /// Of engines on the CPU.
    threads: usize,
    shapes: &'static [Shape],
    /// As PyTorch's program calls it.
    device: &'static str,
}

impl Suite {
    /// Loads a model onto what is tested.
    fn load(&self, dir: &Path) -> Result<Box<dyn Backend>, Failure> {
        Ok(match self.is_rehearsal {
            true => load_cpu(dir, self.threads)?,
            false => load_cuda(dir, None)?,
        })
    }
}

fn main() -> ExitCode {
    let Some(arguments) = Arguments::read(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let [fixtures, work] = &arguments.folders[..] else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let is_rehearsal = arguments.rehearses;
    if is_rehearsal {
        println!("a rehearsal: the CPU is in the GPU's place\n");
    } else if let Err(error) = cuda_is_available() {
        eprintln!("no GPU was tried: {error}");
        return ExitCode::from(3);
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let suite = Suite {
        is_rehearsal,
        threads: arguments.threads.unwrap_or(cores),
        shapes: if is_rehearsal { &SHAPES[..1] } else { &SHAPES },
        device: if is_rehearsal { "cpu" } else { "cuda" },
    };
    let outcome = parity::parity(&suite, fixtures, work).and_then(|agrees| {
        let same = speed::speed(&suite, work, arguments.torch.as_ref())?;
        Ok(agrees && same)
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
