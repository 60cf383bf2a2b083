//! The backward pass of a block.

use super::{Activations, Angles, Block, GROUP_SIZES, mlp_len};
use crate::arch::Arch;
use crate::cpu::attention::{self, Attended, Gradients, Heads, KeysValues};
use crate::cpu::buffer::Buffer;
use crate::cpu::elementwise;
use crate::cpu::linear::Backward;
use crate::cpu::lora::{Adapter, Group};
use crate::cpu::model::{Gated, Mlp};

/// Scratch of the backward pass, shared by all blocks of one sequence.
#[derive(Debug)]
pub(crate) struct Deltas {
    /// Gradient of the residual stream, `[rows, hidden]`.
    pub(crate) x: Buffer,
    /// Gradient of a norm's output, `[rows, hidden]`.
    pub(crate) normed: Buffer,
    /// Gradient of a norm's input, where attention or MLP ends in one, `[rows, hidden]`.
    raw: Buffer,
    /// Gradient of an activation, `[rows, max(mlp, q_width)]`.
    pub(super) wide: Buffer,
    /// Gradient of what goes to and comes from experts, `[assignments, hidden]`.
    pub(super) routed: Buffer,
    /// Gradient of the router's logits, `[rows, experts]`.
    pub(super) router: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// Gradient of `u`, `[rows, layers * rank]`.
    pub(super) u: Buffer,
}

impl Deltas {
    pub(crate) fn new() -> Self {
        let none = || Buffer::zeros(0);
        Self {
            x: none(),
            normed: none(),
            raw: none(),
            wide: none(),
            routed: none(),
            router: none(),
            q: none(),
            k: none(),
            v: none(),
            u: none(),
        }
    }

    /// Makes room for `rows` rows.
    pub(crate) fn reserve(&mut self, arch: &Arch, rows: usize, rank: usize) {
        let heads = Heads::of(arch);
        self.x.reserve(rows * arch.hidden_size);
        self.normed.reserve(rows * arch.hidden_size);
        if arch.post_norms {
            self.raw.reserve(rows * arch.hidden_size);
        }
        let wide = mlp_len(arch, rows).max(rows * heads.q_width());
        self.wide.reserve(wide);
        if let Some(moe) = &arch.moe {
            self.routed.reserve(rows * moe.per_token * arch.hidden_size);
            self.router.reserve(rows * moe.n_experts);
        }
        self.q.reserve(rows * heads.q_width());
        self.k.reserve(rows * heads.kv_width());
        self.v.reserve(rows * heads.kv_width());
        let per_token = arch.moe.as_ref().map_or(1, |moe| moe.per_token);
        let widest = GROUP_SIZES[Group::Qkv as usize];
        self.u.reserve(rows * per_token * rank * widest);
    }
}

/// What the backward pass of every block of a sequence reads and writes.
#[derive(Debug)]
pub(crate) struct BackwardPass<'a> {
    pub(crate) rows: usize,
    pub(crate) adapter: &'a Adapter,
    pub(crate) angles: &'a Angles,
    pub(crate) deltas: &'a mut Deltas,
    /// Of the whole adapter, flat; added to.
    pub(crate) gradient: &'a mut [f32],
}

/// The gradient `dy` of what attention or MLP adds, taken back through the norm it ends in, if any,
/// into `dx`.
fn before_norm<'a>(
    norm: Option<&[f32]>,
    x: &[f32],
    inverse: &[f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
) -> &'a [f32] {
    let Some(norm) = norm else { return dy };
    let dx = &mut dx[..dy.len()];
    dx.fill(0.0);
    elementwise::rms_norm_backward(&x[..dy.len()], norm, inverse, dy, dx);
    dx
}

impl Block<'_> {
    /// Turns the gradient of the block's output in `deltas.x` into that of its input `x`, adding the
    /// adapter's gradients. Overwrites `acts`. Below the first block nothing is trained, so its
    /// input's gradient is left unfinished.
    pub(crate) fn backward(&self, pass: &mut BackwardPass<'_>, x: &[f32], acts: &mut Activations) {
        self.backward_mlp(pass, acts);
        self.backward_attention(pass, x, acts);
    }

    /// From the gradient of the block's output to that of the residual stream before the MLP.
    fn backward_mlp(&self, pass: &mut BackwardPass<'_>, acts: &mut Activations) {
        let (layer, rows) = (self.layer, pass.rows);
        let n = rows * self.arch.hidden_size;
        match &layer.mlp {
            Mlp::Dense(gated) => self.backward_gated(pass, gated, acts),
            Mlp::Sparse(experts) => self.backward_mix(pass, experts, acts),
        }
        let deltas = &mut *pass.deltas;
        elementwise::rms_norm_backward(
            &acts.middle[..n],
            &layer.mlp_norm,
            &acts.inverse[1][..rows],
            &deltas.normed[..n],
            &mut deltas.x[..n],
        );
    }

    fn backward_gated(&self, pass: &mut BackwardPass<'_>, gated: &Gated, acts: &mut Activations) {
        let rows = pass.rows;
        let (n, hidden) = (
            rows * self.arch.intermediate_size,
            rows * self.arch.hidden_size,
        );
        let deltas = &mut *pass.deltas;
        let norm = self.layer.post_mlp_norm.as_deref();
        let inverse = &acts.inverse[3][..rows];
        let (dy, raw) = (&deltas.x[..hidden], &mut deltas.raw);
        let d_out = before_norm(norm, &acts.mlp_out, inverse, dy, raw);
        let down = Backward {
            lora: pass.adapter.group(self.index, Group::Down),
            x: &acts.derived.activated,
            u: &acts.u[Group::Down as usize],
            layers: &[(&gated.down, d_out)],
        };
        down.run(rows, Some(&mut deltas.wide), pass.gradient, &mut deltas.u);
        let (gate, up) = (&mut acts.gate[..n], &mut acts.up[..n]);
        self.activate_backward(gate, up, &deltas.wide[..n]);
        let gate_up = Backward {
            lora: pass.adapter.group(self.index, Group::GateUp),
            x: &acts.derived.mlp_normed,
            u: &acts.u[Group::GateUp as usize],
            layers: &[(&gated.gate, &acts.gate), (&gated.up, &acts.up)],
        };
        gate_up.run(rows, Some(&mut deltas.normed), pass.gradient, &mut deltas.u);
    }

    fn backward_attention(&self, pass: &mut BackwardPass<'_>, x: &[f32], acts: &mut Activations) {
        let (layer, rows, heads) = (self.layer, pass.rows, self.heads());
        let n = rows * self.arch.hidden_size;
        let deltas = &mut *pass.deltas;
        let (norm, inverse) = (
            layer.post_attention_norm.as_deref(),
            &acts.inverse[2][..rows],
        );
        let (dy, raw) = (&deltas.x[..n], &mut deltas.raw);
        let d_out = before_norm(norm, &acts.attention_out, inverse, dy, raw);
        let o = Backward {
            lora: pass.adapter.group(self.index, Group::O),
            x: &acts.attended,
            u: &acts.u[Group::O as usize],
            layers: &[(&layer.o, d_out)],
        };
        o.run(rows, Some(&mut deltas.wide), pass.gradient, &mut deltas.u);
        let attended = Attended {
            rows,
            q: &acts.q,
            k: &acts.k,
            kv: KeysValues {
                keys: &acts.derived.panels,
                values: &acts.v,
            },
            out: &acts.attended,
            log_normaliser: &acts.log_normaliser,
            rounding: layer.q.rounding(),
        };
        let mut gradients = Gradients {
            q: &mut deltas.q,
            k: &mut deltas.k,
            v: &mut deltas.v,
        };
        attention::backward(&heads, attended, &deltas.wide, &mut gradients);
        self.backward_rotation(rows, &heads, pass.angles, acts, deltas);
        let qkv = Backward {
            lora: pass.adapter.group(self.index, Group::Qkv),
            x: &acts.derived.normed,
            u: &acts.u[Group::Qkv as usize],
            layers: &[
                (&layer.q, &deltas.q),
                (&layer.k, &deltas.k),
                (&layer.v, &deltas.v),
            ],
        };
        if self.index == 0 {
            qkv.run(rows, None, pass.gradient, &mut deltas.u);
            return;
        }
        qkv.run(rows, Some(&mut deltas.normed), pass.gradient, &mut deltas.u);
        elementwise::rms_norm_backward(
            &x[..n],
            &layer.attention_norm,
            &acts.inverse[0][..rows],
            &deltas.normed[..n],
            &mut deltas.x[..n],
        );
    }

    /// Back through rotation and head norms of queries and keys.
    fn backward_rotation(
        &self,
        rows: usize,
        heads: &Heads,
        angles: &Angles,
        acts: &mut Activations,
        deltas: &mut Deltas,
    ) {
        let (q_len, kv_len) = (rows * heads.q_width(), rows * heads.kv_width());
        let size = heads.size;
        let (q, k) = (&mut deltas.q[..q_len], &mut deltas.k[..kv_len]);
        angles.rotate(self.rope(), q, (heads.q_width(), size), -1.0);
        angles.rotate(self.rope(), k, (heads.kv_width(), size), -1.0);
        let Some((q_norm, k_norm)) = &self.layer.qk_norm else {
            return;
        };
        let sides = [
            (
                q_norm,
                &acts.q_raw,
                &acts.q_inverse,
                &mut acts.q,
                &mut deltas.q,
                q_len,
            ),
            (
                k_norm,
                &acts.k_raw,
                &acts.k_inverse,
                &mut acts.k,
                &mut deltas.k,
                kv_len,
            ),
        ];
        for (norm, raw, inverse, scratch, delta, len) in sides {
            // The rotated values are not needed any more; the gradient is built in their place.
            let d_raw = &mut scratch[..len];
            d_raw.fill(0.0);
            let inverse = &inverse[..len / heads.size];
            elementwise::rms_norm_backward(&raw[..len], norm, inverse, &delta[..len], d_raw);
            delta[..len].copy_from_slice(d_raw);
        }
    }
}
