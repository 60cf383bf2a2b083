//! Which device base models are loaded onto.

use std::path::Path;

use tinker_engine::{
    Backend, CpuOptions, Precision, cuda_is_available, cuda_takes, estimate_load, load_cpu_with,
    load_cuda,
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

    /// What serves as it on this machine.
    ///
    /// # Errors
    /// If a GPU is asked for and does not answer, or cannot do what `options` ask for.
    pub(crate) fn find(self, options: &CpuOptions) -> Result<Loader> {
        self.find_with(options, cuda_is_available)
    }

    fn find_with(
        self,
        options: &CpuOptions,
        is_available: impl Fn() -> tinker_engine::Result<()>,
    ) -> Result<Loader> {
        let loader = |device| Loader {
            device,
            options: *options,
        };
        // To ask is to start the GPU's driver.
        if self == Self::Cpu {
            return Ok(loader(Self::Cpu));
        }
        let Some(choice) = only_of_the_cpu(options) else {
            return match (self, is_available()) {
                (Self::Cuda, Err(error)) => Err(error.into()),
                (_, Err(error)) => {
                    if cfg!(feature = "cuda") {
                        tracing::info!("computing on the CPU: {error}");
                    }
                    Ok(loader(Self::Cpu))
                }
                (wanted, Ok(())) => Ok(loader(wanted)),
            };
        };
        if self == Self::Cuda {
            return Err(Error::Invalid(format!(
                "{choice} is for the CPU: the GPU holds weights as their files do and computes in f32, \
                 leave it out or use --device cpu"
            )));
        }
        Ok(loader(Self::Cpu))
    }
}

/// The option that no GPU follows, if one is set.
fn only_of_the_cpu(options: &CpuOptions) -> Option<String> {
    let weights = options.weights.map(|w| format!("--weights {}", w.name()));
    let precision = options.precision;
    weights.or((precision != Precision::F32).then(|| format!("--precision {}", precision.name())))
}

/// Loads base models onto what was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loader {
    /// [`Device::Auto`] is a GPU, with the CPU for what it does not take.
    device: Device,
    options: CpuOptions,
}

impl Loader {
    /// Loads the model in `dir`; `threads` are of the CPU.
    pub(crate) fn load(
        &self,
        dir: &Path,
        threads: usize,
    ) -> tinker_engine::Result<Box<dyn Backend>> {
        let options = CpuOptions {
            threads,
            ..self.options
        };
        if self.device == Device::Cpu {
            return load_cpu_with(dir, &options);
        }
        match load_cuda(dir, options.training_memory) {
            Err(error) if self.device == Device::Auto => {
                tracing::info!("computing on the CPU: {error}");
                load_cpu_with(dir, &options)
            }
            loaded => loaded,
        }
    }

    /// About how many bytes of this machine's memory loading the model in `dir` takes; 0 where it goes to
    /// a GPU, which has its own and says itself what does not fit.
    pub(crate) fn estimate(&self, dir: &Path) -> tinker_engine::Result<u64> {
        match self.device {
            Device::Cpu => estimate_load(dir, &self.options),
            Device::Auto if cuda_takes(dir).is_err() => estimate_load(dir, &self.options),
            Device::Auto | Device::Cuda => Ok(0),
        }
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
            found.map(|loader| loader.device).map_err(|e| e.to_string())
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

            assert_eq!(auto.device, Device::Cpu);
            assert!(
                error
                    .to_string()
                    .contains(&format!("{named} is for the CPU"))
            );
        }
    }

    #[test]
    fn a_model_that_no_gpu_takes_is_measured_for_the_cpu_it_goes_to() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics");
        let estimate = |device, name: &str| {
            let options = CpuOptions::default();
            let loader = Loader { device, options };
            loader.estimate(&root.join(name)).unwrap()
        };

        let of_experts = estimate(Device::Auto, "qwen3_moe");

        assert!(of_experts > 0);
        assert_eq!(of_experts, estimate(Device::Cpu, "qwen3_moe"));
        assert_eq!(estimate(Device::Cuda, "llama"), 0);
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
