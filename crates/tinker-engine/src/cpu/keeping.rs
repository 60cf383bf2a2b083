//! Which activations of a sequence are kept for its backward pass, and which are computed again.
//!
//! A block keeps its input in any case, and everything else follows from it. What follows without a
//! product is given up first: it costs little to have again. Then blocks, from the first on, are given
//! up whole; what that costs is in `docs/benchmarks.md`. Computing again takes the same steps in
//! the same order, so bits do not change.

use super::block::{Activations, Derived};
use crate::arch::Arch;

/// What a block leaves to its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Keeping {
    /// Blocks, from the first on, of which only the input is kept. They and the next one share a set of
    /// activations.
    pub(crate) again: usize,
    /// Whether all blocks share what is [`Derived`].
    pub(crate) shares_derived: bool,
}

/// Floats that sequences take.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Residual stream before each block and after the last.
    streams: usize,
    /// Activations of one block, without those that are derived.
    kept: usize,
    derived: usize,
}

impl Sizes {
    /// For `rows` rows.
    fn of(arch: &Arch, rows: usize, rank: usize) -> Self {
        Self {
            streams: rows * arch.hidden_size * (arch.n_layers + 1),
            kept: Activations::floats(arch, rows, rank),
            derived: Derived::floats(arch, rows),
        }
    }
}

/// Floats that a sequence of `rows` rows takes without a backward pass.
pub(crate) fn floats_forward(arch: &Arch, rows: usize, rank: usize) -> usize {
    let sizes = Sizes::of(arch, rows, rank);
    2 * rows * arch.hidden_size + sizes.kept + sizes.derived
}

impl Keeping {
    /// Everything.
    pub(crate) const ALL: Self = Self {
        again: 0,
        shares_derived: false,
    };

    /// The most that fits `bytes` for a sequence of `rows` rows; the least there is, if nothing does.
    pub(crate) fn within(bytes: usize, arch: &Arch, rows: usize, rank: usize) -> Self {
        let sizes = Sizes::of(arch, rows, rank);
        let shared = (0..arch.n_layers).map(|again| Self {
            again,
            shares_derived: true,
        });
        let mut ways = std::iter::once(Self::ALL).chain(shared);
        let fits = |way: &Self| way.floats(arch.n_layers, sizes) * size_of::<f32>() <= bytes;
        ways.find(fits).unwrap_or(Self {
            again: arch.n_layers.saturating_sub(1),
            shares_derived: true,
        })
    }

    /// Bytes that a sequence of `rows` rows takes this way, with the deltas of one block.
    pub(crate) fn bytes(self, arch: &Arch, rows: usize, rank: usize) -> usize {
        let sizes = Sizes::of(arch, rows, rank);
        (self.floats(arch.n_layers, sizes) + sizes.kept) * size_of::<f32>()
    }

    fn floats(self, n_layers: usize, sizes: Sizes) -> usize {
        let sets = n_layers - self.again;
        let derived = if self.shares_derived { 1 } else { sets };
        sizes.streams + sets * sizes.kept + derived * sizes.derived
    }

    /// The set of activations that block `layer` uses.
    pub(crate) fn set(self, layer: usize) -> usize {
        layer.saturating_sub(self.again)
    }

    /// Sets for this many blocks.
    pub(crate) fn sets(self, n_layers: usize) -> usize {
        n_layers - self.again
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn arch(model: &str) -> Arch {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        Arch::load(&root.join("../../fixtures/numerics").join(model)).unwrap()
    }

    #[test]
    fn less_memory_keeps_less_and_what_is_kept_fits() {
        let arch = arch("llama");
        let sizes = Sizes::of(&arch, 100, 8);
        let all = 4 * Keeping::ALL.floats(arch.n_layers, sizes);
        assert_eq!(Keeping::within(all, &arch, 100, 8), Keeping::ALL);

        let mut before = all;
        for again in 0..arch.n_layers {
            let way = Keeping::within(before - 1, &arch, 100, 8);
            let wanted = Keeping {
                again,
                shares_derived: true,
            };
            assert_eq!(way, wanted);
            let bytes = 4 * way.floats(arch.n_layers, sizes);
            assert!(bytes < before);
            before = bytes;
        }
        let least = Keeping::within(0, &arch, 100, 8);
        assert_eq!(least.sets(arch.n_layers), 1);
    }

    #[test]
    fn sizes_are_those_of_the_buffers() {
        for model in ["llama", "qwen3", "gemma2", "qwen3_moe_mixed"] {
            let arch = arch(model);
            for rows in [1, 32, 100] {
                let (mut kept, mut derived) = (Activations::new(), Derived::new());
                kept.reserve(&arch, rows, 8);
                derived.reserve(&arch, rows);
                let sizes = Sizes::of(&arch, rows, 8);
                let held = (kept.len(), derived.len());
                assert_eq!((sizes.kept, sizes.derived), held, "{model}");
            }
        }
    }

    #[test]
    fn a_block_shares_its_set_only_with_blocks_that_run_again() {
        let keeping = Keeping {
            again: 2,
            shares_derived: true,
        };
        let sets: Vec<usize> = (0..5).map(|layer| keeping.set(layer)).collect();
        assert_eq!(sets, [0, 0, 0, 1, 2]);
        assert_eq!(keeping.sets(5), 3);
    }
}
