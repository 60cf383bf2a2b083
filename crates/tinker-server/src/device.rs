//! Which device base models are loaded onto.

use std::path::Path;
use std::sync::Arc;

use tinker_engine::{
    Backend, CpuOptions, Precision, cuda_is_available, estimate_load, load_cpu_with, load_cuda,
};

use crate::error::{Error, Result};

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU for the models that it takes, if there is one; else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first NVIDIA GPU, and nothing else.
    Cuda,
}

impl Device {
    /// Its name in settings and records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// What serves as it on this machine: [`Device::Auto`] is a GPU, with the CPU for what that does not take.
    ///
    /// # Errors
    /// If a GPU is asked for and does not answer, or cannot do what `options` ask for.
    pub(crate) fn find(self, options: &CpuOptions) -> Result<Self> {
        self.find_with(options, cuda_is_available)
    }

    fn find_with(
        self,
        options: &CpuOptions,
        is_available: impl Fn() -> tinker_engine::Result<()>,
    ) -> Result<Self> {
        // To ask is to start the GPU's driver.
        if self == Self::Cpu {
            return Ok(Self::Cpu);
        }
        let Some(choice) = only_of_the_cpu(options) else {
            return match (self, is_available()) {
                (Self::Cuda, Err(error)) => Err(error.into()),
                (_, Err(error)) => {
                    if cfg!(feature = "cuda") {
                        tracing::info!("computing on the CPU: {error}");
                    }
                    Ok(Self::Cpu)
                }
                (wanted, Ok(())) => Ok(wanted),
            };
        };
        if self == Self::Cuda {
            return Err(Error::Invalid(format!(
                "{choice} is for the CPU: the GPU holds weights as their files do and computes in f32, \
                 leave it out or use --device cpu"
            )));
        }
        Ok(Self::Cpu)
    }

    /// How base models get onto it, and, if that may fail, where they go then.
    pub(crate) fn loaders(self, options: &CpuOptions) -> (Loader, Option<Loader>) {
        match self {
            Self::Cpu => (Loader::cpu(*options), None),
            Self::Cuda => (Loader::cuda(*options), None),
            Self::Auto => (Loader::cuda(*options), Some(Loader::cpu(*options))),
        }
    }
}

/// The option that no GPU follows, if one is set.
fn only_of_the_cpu(options: &CpuOptions) -> Option<String> {
    let weights = options.weights.map(|w| format!("--weights {}", w.name()));
    let precision = options.precision;
    weights.or((precision != Precision::F32).then(|| format!("--precision {}", precision.name())))
}

/// Loads a model directory onto a device, with a number of threads (0: one per core).
pub type LoadBackend =
    Arc<dyn Fn(&Path, usize) -> tinker_engine::Result<Box<dyn Backend>> + Send + Sync>;

/// Says how many bytes a model directory takes once it is loaded.
pub type EstimateLoad = Arc<dyn Fn(&Path) -> tinker_engine::Result<u64> + Send + Sync>;

/// How base models get onto a device.
#[derive(Clone)]
pub struct Loader {
    /// Loads one.
    pub load: LoadBackend,
    /// About how much of this machine's memory that takes.
    pub estimate: EstimateLoad,
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").finish_non_exhaustive()
    }
}

impl Loader {
    /// As `load` does it, with memory that is not this machine's.
    pub fn new(
        load: impl Fn(&Path, usize) -> tinker_engine::Result<Box<dyn Backend>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            load: Arc::new(load),
            estimate: Arc::new(|_| Ok(0)),
        }
    }

    /// Onto the CPU; its threads are said when a model is loaded.
    #[must_use]
    pub fn cpu(options: CpuOptions) -> Self {
        Self {
            load: Arc::new(move |dir, threads| {
                let options = CpuOptions { threads, ..options };
                load_cpu_with(dir, &options)
            }),
            estimate: Arc::new(move |dir| estimate_load(dir, &options)),
        }
    }

    /// Onto a GPU, which has its own memory and says itself what does not fit.
    fn cuda(options: CpuOptions) -> Self {
        Self::new(move |dir, _threads| load_cuda(dir, options.training_memory))
    }
}

#[cfg(test)]
mod tests {
    use tinker_engine::{Error as Engine, Quantization};

    use super::*;

    const ABSENT: fn() -> tinker_engine::Result<()> = || Err(Engine::Device("no GPU".into()));

    #[test]
    fn a_gpu_that_is_asked_for_and_absent_is_an_error_and_auto_takes_the_cpu() {
        let options = CpuOptions::default();
        let found = |device: Device, answer: fn() -> tinker_engine::Result<()>| {
            let found = device.find_with(&options, answer);
            found.map_err(|e| e.to_string())
        };

        assert_eq!(found(Device::Auto, ABSENT), Ok(Device::Cpu));
        assert_eq!(found(Device::Auto, || Ok(())), Ok(Device::Auto));
        let unasked: fn() -> tinker_engine::Result<()> = || panic!("a GPU is asked for");
        assert_eq!(found(Device::Cpu, unasked), Ok(Device::Cpu));
        assert_eq!(found(Device::Cuda, || Ok(())), Ok(Device::Cuda));
        assert_eq!(found(Device::Cuda, ABSENT), Err("no GPU".into()));
    }

    #[test]
    fn fewer_bits_are_for_the_cpu() {
        let int8 = CpuOptions {
            weights: Some(Quantization::Int8),
            ..CpuOptions::default()
        };
        let bf16 = CpuOptions {
            precision: Precision::Bf16,
            ..CpuOptions::default()
        };

        for (options, named) in [(int8, "--weights int8"), (bf16, "--precision bf16")] {
            let auto = Device::Auto.find_with(&options, || Ok(())).unwrap();
            let error = Device::Cuda.find_with(&options, || Ok(())).unwrap_err();

            assert_eq!(auto, Device::Cpu);
            assert!(
                error
                    .to_string()
                    .contains(&format!("{named} is for the CPU"))
            );
        }
    }

    #[test]
    fn what_a_gpu_does_not_take_is_measured_for_the_cpu_it_goes_to() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/llama");
        let options = CpuOptions::default();
        let estimate = |loader: &Loader| (loader.estimate)(&model).unwrap();

        let (gpu, other) = Device::Auto.loaders(&options);
        let (cpu, none) = Device::Cpu.loaders(&options);

        assert_eq!(estimate(&gpu), 0);
        assert!(estimate(&cpu) > 0 && none.is_none());
        assert_eq!(other.map(|other| estimate(&other)), Some(estimate(&cpu)));
        assert!(Device::Cuda.loaders(&options).1.is_none());
    }

    /// A build without the feature, or a machine without a GPU, says what to do.
    #[test]
    fn the_error_for_an_absent_gpu_has_a_next_step() {
        if let Err(error) = Device::Cuda.find(&CpuOptions::default()) {
            let text = error.to_string();
            assert!(
                ["--features cuda", "--device cpu", "LD_LIBRARY_PATH"]
                    .iter()
                    .any(|step| text.contains(step)),
                "{text}"
            );
        }
    }
}
