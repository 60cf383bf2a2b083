//! What work takes on the CPU beyond what is held already.

use super::Cpu;
use super::attention::Heads;
use super::buffer::round_up;
use super::gemm::PANEL;
use super::keeping::{self, Keeping};
use super::lora::Adapter;
use super::train::Workspace;
use crate::memory::Work;

/// Buffers of an adapter: weights, the same turned, gradient, two moments.
const ADAPTER_BUFFERS: usize = 5;

/// Buffers of one that is sampled from: what was read, and the weights.
const WEIGHTS_BUFFERS: usize = 2;

impl Cpu {
    /// See [`crate::Backend::memory_for`].
    pub(super) fn memory_of(&self, work: Work<'_>) -> usize {
        let arch = &self.model.arch;
        match work {
            // What cannot be made is refused when it is.
            Work::Adapter(spec) => {
                Adapter::n_floats(arch, spec).map_or(0, |n| ADAPTER_BUFFERS * n * size_of::<f32>())
            }
            Work::Weights(spec) => {
                Adapter::n_floats(arch, spec).map_or(0, |n| WEIGHTS_BUFFERS * n * size_of::<f32>())
            }
            Work::Pass {
                adapter,
                n,
                longest,
            } => match self.held.adapter(adapter).ok() {
                Some(adapter) => self.memory_of_pass(adapter, n, longest),
                None => 0,
            },
            Work::Forward {
                adapter,
                n,
                longest,
            } => match self.held.adapter(adapter).ok() {
                Some(adapter) => self.memory_of_forward(adapter, n, longest),
                None => 0,
            },
            Work::Slots { n, capacity } => {
                let positions = round_up(capacity, PANEL);
                let floats = 2 * arch.n_layers * Heads::of(arch).kv_width() * positions;
                n * floats * size_of::<f32>()
            }
        }
    }

    fn memory_of_pass(&self, adapter: &Adapter, n: usize, longest: usize) -> usize {
        let (arch, n_threads) = (&self.model.arch, self.workspaces.len());
        let (n_at_once, rank) = (n.min(n_threads), adapter.padded_rank());
        let room = self.memory / n_threads;
        let keeping = Keeping::within(room, arch, longest, rank);
        let each = keeping.bytes(arch, longest, rank);
        let held = self.workspaces.iter().map(|w| w.len() * size_of::<f32>());
        let activations: usize = held
            .map(|held| each.saturating_sub(held))
            .take(n_at_once)
            .sum();
        // A sum beside the one that there is, and those of sequences that wait for their turn to be added.
        let n_sums = usize::from(!adapter.gradient.is_empty());
        let n_gradients = n_sums + n.min(2 * n_threads);
        let len = adapter.gradient_len();
        let n_spare = self.spare.iter().filter(|spare| spare.len() == len).count();
        let gradients = n_gradients.saturating_sub(n_spare) * len;
        activations + gradients * size_of::<f32>() + self.model.bytes_to_turn()
    }

    fn memory_of_forward(&self, adapter: &Adapter, n: usize, longest: usize) -> usize {
        let rank = adapter.padded_rank();
        let each = keeping::floats_forward(&self.model.arch, longest, rank);
        let held = self.workspaces.iter().map(Workspace::len_forward);
        let floats = held.map(|held| each.saturating_sub(held)).take(n);
        floats.sum::<usize>() * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use crate::adapter::LoraSpec;
    use crate::backend::{Backend, CpuOptions, Precision, Quantization};
    use crate::cpu::model::{Form, Model};
    use crate::cpu::{Cpu, units};
    use crate::loss::{Loss, TrainSequence};
    use crate::memory::{Work, estimate_load};

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/numerics/llama")
    }

    fn load() -> Box<dyn Backend> {
        crate::load_cpu(&fixture(), 2).unwrap()
    }

    fn spec(rank: usize) -> LoraSpec {
        LoraSpec {
            rank,
            seed: 1,
            train_attn: true,
            train_mlp: true,
            train_unembed: true,
        }
    }

    fn adam() -> crate::AdamW {
        crate::AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.0,
            grad_clip_norm: 0.0,
        }
    }

    fn sequence(tokens: &[u32]) -> TrainSequence {
        TrainSequence {
            tokens: tokens.to_vec(),
            targets: tokens.to_vec(),
            k: 1,
            loss: Loss::CrossEntropy {
                weights: vec![1.0; tokens.len()],
            },
        }
    }

    /// Asserts that an estimate is a few per cent off at most.
    #[track_caller]
    fn check(estimated: u64, taken: usize) {
        let ratio = estimated as f64 / taken as f64;
        assert!((0.95..1.1).contains(&ratio), "{estimated} for {taken}");
    }

    #[test]
    fn a_model_takes_what_its_files_let_expect() {
        for weights in [None, Some(Quantization::Int8), Some(Quantization::Nf4)] {
            for precision in Precision::ALL {
                for vectors_only in [true, false] {
                    let options = CpuOptions {
                        weights,
                        precision,
                        vectors_only,
                        ..CpuOptions::default()
                    };
                    let form = Form {
                        units: units(&options),
                        quantization: weights,
                        precision,
                    };
                    let model = Model::load_as(&fixture(), form).unwrap();

                    check(estimate_load(&fixture(), &options).unwrap(), model.bytes());
                }
            }
        }
    }

    #[test]
    fn an_adapter_takes_its_weights_its_gradient_and_its_moments() {
        let mut backend = load();
        let estimated = backend.memory_for(Work::Adapter(&spec(8)));
        let adapter = backend.create_adapter(&spec(8)).unwrap();
        let sequence = sequence(&[1, 2, 3]);
        backend.forward_backward(adapter, &[sequence]).unwrap();
        let step = crate::Optimizer::AdamW(adam());
        backend.optim_step(adapter, &step).unwrap();

        let taken = backend.adapter_bytes(adapter);

        assert!(estimated as usize >= taken, "{estimated} for {taken}");
        assert_eq!(backend.memory_for(Work::Adapter(&spec(100_000))), 0);
    }

    #[test]
    fn a_pass_takes_more_the_longer_it_is_and_nothing_twice() {
        let mut backend = load();
        let adapter = backend.create_adapter(&spec(8)).unwrap();
        let of = |backend: &dyn Backend, n, longest| {
            backend.memory_for(Work::Pass {
                adapter,
                n,
                longest,
            })
        };
        let (short, long) = (of(&*backend, 1, 32), of(&*backend, 1, 320));
        assert!(long > short, "{long} {short}");
        assert!(of(&*backend, 2, 320) > long, "each thread has its own");

        let tokens: Vec<u32> = (0..320).map(|i| i % 300).collect();
        let sequence = sequence(&tokens);
        backend.forward_backward(adapter, &[sequence]).unwrap();

        assert!(
            of(&*backend, 1, 320) < long,
            "what is held is not taken again"
        );
    }

    #[test]
    fn what_a_small_adapter_left_is_nothing_to_a_large_one() {
        let mut backend = crate::load_cpu(&fixture(), 1).unwrap();
        let [small, large] = [1, 32].map(|rank| backend.create_adapter(&spec(rank)).unwrap());
        let pass = |adapter| Work::Pass {
            adapter,
            n: 4,
            longest: 3,
        };
        let batch = [1, 2, 3, 4].map(|token| sequence(&[token; 3]));
        // Rows and ranks that workspaces have room for, so that gradients are all that differs.
        backend.forward_backward(large, &batch).unwrap();
        backend.free_kept();
        let estimated = backend.memory_for(pass(large));

        backend.forward_backward(small, &batch).unwrap();

        assert!(backend.kept_bytes() > 0);
        assert_eq!(backend.memory_for(pass(large)), estimated);
    }

    #[test]
    fn a_pass_without_gradient_takes_what_it_is_said_to_and_nothing_twice() {
        let form = Form::of_file(units(&CpuOptions::default()));
        let mut cpu = Cpu::new(Model::load_as(&fixture(), form).unwrap(), 1, form);
        let adapter = cpu.create_adapter(&spec(8)).unwrap();
        let work = |n, longest| Work::Forward {
            adapter,
            n,
            longest,
        };
        let estimated = cpu.memory_for(work(1, 320));
        let shorter = cpu.memory_for(work(1, 160));
        assert_eq!(cpu.memory_for(work(9, 320)), estimated, "one after another");

        let tokens: Vec<u32> = (0..320).map(|i| i % 300).collect();
        cpu.forward(Some(adapter), &[sequence(&tokens)]).unwrap();

        check(estimated, cpu.workspaces[0].len() * size_of::<f32>());
        assert!(
            (1..estimated).contains(&shorter),
            "{shorter} of {estimated}"
        );
        assert_eq!(cpu.memory_for(work(1, 320)), 0, "it is held already");
    }

    #[test]
    fn a_cached_sequence_takes_what_it_is_said_to() {
        let mut backend = load();
        let estimated = backend.memory_for(Work::Slots { n: 3, capacity: 64 });
        let slot = backend.open_slot(None, 64).unwrap();
        backend.prefill(slot, &[5; 64], false).unwrap();

        check(estimated, 3 * backend.slot_bytes(slot));
    }
}
