//! A block's activations computed again, to the same bits, where memory did not hold them.

use super::{Activations, Angles, Block};
use crate::cpu::linear::Batch;
use crate::cpu::model::Mlp;

impl Block<'_> {
    /// Fills `acts.derived` from the block's input `x` and what else `acts` holds.
    pub(crate) fn derive(&self, rows: usize, x: &[f32], acts: &mut Activations) {
        self.norm_attention(rows, x, acts);
        self.pack_keys(rows, acts);
        self.norm_mlp(rows, acts);
        match &self.layer.mlp {
            Mlp::Dense(_) => self.activate(rows * self.arch.intermediate_size, acts),
            Mlp::Sparse(experts) => self.derive_mix(&experts.moe, acts),
        }
    }

    /// Fills `acts` from the block's input `x`, as far as the backward pass reads it.
    ///
    /// `out [rows, hidden]` is scratch.
    pub(crate) fn again(
        &self,
        batch: &Batch<'_>,
        x: &[f32],
        angles: &Angles,
        out: &mut [f32],
        acts: &mut Activations,
    ) {
        self.project(batch, x, angles, acts);
        self.attend_sequence(batch.rows, acts);
        self.finish_attention(batch, x, acts);
        self.norm_mlp(batch.rows, acts);
        match (&self.layer.mlp, &self.layer.post_mlp_norm) {
            // Nobody reads what the MLP adds, only what the adapter made of its last input.
            (Mlp::Dense(gated), None) => {
                self.gate_up(batch, gated, acts);
                batch.adapter_input(self.down(acts), &gated.down);
            }
            _ => self.mlp(batch, &mut out[..batch.rows * self.arch.hidden_size], acts),
        }
    }
}
