//! LoRA training and sampling of decoder-only transformers on the local machine.
//!
//! The engine speaks tokens, log-probabilities and slots. Everything above it (text, requests,
//! storage) sees one seam, [`Backend`]; everything below it is a device.

pub mod adapter;
pub mod arch;
pub mod backend;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod error;
pub mod fake;
pub mod generate;
mod held;
pub mod load;
pub mod loss;
mod memory;
#[cfg(not(feature = "cuda"))]
mod no_cuda;
pub mod optim;
pub mod peft;
mod prefix_cache;
pub mod prompt;
pub mod rng;
mod runs;
pub mod sampler;

pub use adapter::{AdapterState, HostTensor, LoraSpec};
pub use backend::{
    AdapterId, Backend, BaseInfo, CpuOptions, Precision, Prefill, Quantization, SequenceOutput,
    SlotId, limit_to_avx2, load_cpu, load_cpu_on_vectors, load_cpu_with,
};
#[cfg(feature = "cuda")]
pub use cuda::{is_available as cuda_is_available, load_cuda, takes as cuda_takes};
pub use error::{Error, Result};
pub use fake::{FakeBackend, load_fake};
pub use generate::{
    FinishedGeneration, GenerateRequest, Generation, GenerationId, Generator, Sample, StopCheck,
    StopReason,
};
pub use loss::{Bound, Clip, Computed, Evaluation, Loss, SequenceLoss, TrainSequence};
pub use memory::{Work, estimate_adapter, estimate_load};
#[cfg(not(feature = "cuda"))]
pub use no_cuda::{cuda_is_available, cuda_takes, load_cuda};
pub use optim::{AdamW, Dimuon, Family, OptimReport, Optimizer};
pub use prompt::{Alternatives, PromptScores};
pub use sampler::Sampling;
