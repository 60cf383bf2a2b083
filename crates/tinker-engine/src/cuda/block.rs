//! One decoder block: its forward pass around attention, and its backward pass.

use super::adapter::{Adapter, Site};
use super::call::Angles;
use super::linear::{Backward, Batch};
use super::memory::{Buffer, Carver, Floats};
use super::model::{Layer, Linear, Model};
use super::ops::{Heads, Ops};
use crate::arch::{Activation, Arch};
use crate::cpu::lora::Group;
use crate::error::Result;

/// Layers of each group.
const GROUP_SIZES: [usize; 4] = [3, 1, 2, 1];

/// What one block computes for its rows; kept for the backward pass in training.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activations {
    /// `1 / rms` of the norms before attention and MLP and of those after them, `[rows]`.
    inverse: [Floats; 4],
    /// Output of the attention norm, `[rows, hidden]`.
    normed: Floats,
    /// Queries and keys before their norm and rotation; only with `qk_norm`.
    q_raw: Floats,
    k_raw: Floats,
    /// `1 / rms` of query and key heads, `[rows * heads]`; only with `qk_norm`.
    q_inverse: Floats,
    k_inverse: Floats,
    /// Rotated queries `[rows, q_width]` and keys `[rows, kv_width]`.
    pub(super) q: Floats,
    pub(super) k: Floats,
    /// `[rows, kv_width]`.
    pub(super) v: Floats,
    /// Log of the normaliser of each row's attention, `[heads, rows]`.
    pub(super) logs: Floats,
    /// Output of attention, `[rows, q_width]`.
    pub(super) attended: Floats,
    /// What attention and MLP add, before their norms, `[rows, hidden]`; only with `post_norms`.
    attention_out: Floats,
    mlp_out: Floats,
    /// Residual stream between attention and MLP, `[rows, hidden]`.
    middle: Floats,
    /// Output of the MLP norm, `[rows, hidden]`.
    mlp_normed: Floats,
    /// `[rows, mlp]`.
    gate: Floats,
    up: Floats,
    /// `act(gate) * up`.
    activated: Floats,
    /// `scale * A x` of each group, `[rows, layers * rank]`.
    u: [Floats; 4],
}

impl Activations {
    /// Takes the memory of `rows` rows.
    pub(super) fn carve(carver: &mut Carver, arch: &Arch, rows: usize, rank: usize) -> Self {
        let (hidden, mlp) = (rows * arch.hidden_size, rows * arch.intermediate_size);
        let [heads, kv_heads] = [arch.n_heads, arch.n_kv_heads].map(|n| rows * n);
        let [q, kv] = [heads, kv_heads].map(|n| n * arch.head_dim);
        let if_normed = |len: usize| if arch.qk_norm { len } else { 0 };
        let if_post_norms = |len: usize| if arch.post_norms { len } else { 0 };
        let mut take = |len: usize| carver.take(len);
        Self {
            inverse: std::array::from_fn(|_| take(rows)),
            normed: take(hidden),
            q_raw: take(if_normed(q)),
            k_raw: take(if_normed(kv)),
            q_inverse: take(if_normed(heads)),
            k_inverse: take(if_normed(kv_heads)),
            q: take(q),
            k: take(kv),
            v: take(kv),
            logs: take(heads),
            attended: take(q),
            attention_out: take(if_post_norms(hidden)),
            mlp_out: take(if_post_norms(hidden)),
            middle: take(hidden),
            mlp_normed: take(hidden),
            gate: take(mlp),
            up: take(mlp),
            activated: take(mlp),
            u: GROUP_SIZES.map(|layers| take(rows * layers * rank)),
        }
    }
}

/// Scratch of the backward pass, shared by all blocks of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deltas {
    /// Gradient of the residual stream, `[rows, hidden]`.
    pub(super) x: Floats,
    /// Gradient of a norm's output, `[rows, hidden]`.
    pub(super) normed: Floats,
    /// Gradient of a norm's input, where attention or MLP ends in one, `[rows, hidden]`.
    raw: Floats,
    /// Gradient of an activation, `[rows, max(mlp, q_width)]`.
    wide: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    /// `dO . O` of each row's attention, `[heads, rows]`.
    dots: Floats,
    /// Gradient of `u`, `[rows, layers * rank]`.
    pub(super) u: Floats,
}

impl Deltas {
    /// Takes the memory of `rows` rows.
    pub(super) fn carve(carver: &mut Carver, arch: &Arch, rows: usize, rank: usize) -> Self {
        let hidden = rows * arch.hidden_size;
        let [q, kv] = [arch.n_heads, arch.n_kv_heads].map(|n| rows * n * arch.head_dim);
        let mut take = |len: usize| carver.take(len);
        Self {
            x: take(hidden),
            normed: take(hidden),
            raw: take(if arch.post_norms { hidden } else { 0 }),
            wide: take(q.max(rows * arch.intermediate_size)),
            q: take(q),
            k: take(kv),
            v: take(kv),
            dots: take(rows * arch.n_heads),
            u: take(rows * rank * GROUP_SIZES[Group::Qkv as usize]),
        }
    }
}

/// What the backward pass of every block of a sequence reads and writes.
#[derive(Debug)]
pub(super) struct BackwardPass<'a> {
    pub(super) rows: usize,
    pub(super) adapter: &'a Adapter,
    pub(super) angles: &'a Angles,
    pub(super) deltas: &'a Deltas,
    /// Of the whole adapter, flat; added to.
    pub(super) gradient: Floats,
    /// Rows of a tile of attention.
    pub(super) tile: usize,
}

/// The last layer of what a block adds to the residual stream, and the norm after it, if there is one.
struct Branch<'a> {
    site: Site,
    layer: &'a Linear,
    norm: Option<&'a Buffer>,
    /// What goes into the norm, and `1 / rms` of it.
    raw: (Floats, Floats),
}

/// One layer of a model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) arch: &'a Arch,
    pub(super) layer: &'a Layer,
    pub(super) index: usize,
    pub(super) heads: Heads,
}

impl<'a> Block<'a> {
    pub(super) fn of(model: &'a Model, index: usize) -> Self {
        Self {
            arch: &model.arch,
            layer: &model.layers[index],
            index,
            heads: model.heads(index),
        }
    }

    fn site(&self, group: Group) -> Site {
        Site::Block(self.index, group)
    }

    /// Turns the heads of `x` by the block's rope, if it has one; `direction` -1 turns back.
    fn rotate(
        &self,
        ops: &Ops,
        angles: &Angles,
        rows: usize,
        (x, n): (Floats, usize),
        direction: f32,
    ) -> Result<()> {
        let rope = self.arch.layers[self.index].rope;
        let Some((half, angles)) = rope.and_then(|rope| angles.ropes.get(rope)) else {
            return Ok(());
        };
        let heads = (n, self.heads.size, *half);
        ops.rope(rows, x, heads, *angles, direction)
    }

    /// From the residual stream `x [rows, hidden]` to queries, keys and values, not yet turned.
    pub(super) fn project(
        &self,
        ops: &mut Ops,
        batch: &Batch<'_>,
        x: Floats,
        acts: &Activations,
    ) -> Result<()> {
        let (layer, rows, heads) = (self.layer, batch.rows, &self.heads);
        let (eps, norm) = (self.arch.rms_eps, layer.attention_norm.floats());
        let normed = acts.normed;
        ops.rms_norm((rows, eps), x, norm, normed, acts.inverse[0])?;
        let (q, k) = (acts.q, acts.k);
        let raw = match &layer.qk_norm {
            Some(_) => [acts.q_raw, acts.k_raw],
            None => [q, k],
        };
        let outputs = [(&layer.q, raw[0]), (&layer.k, raw[1]), (&layer.v, acts.v)];
        let u = acts.u[Group::Qkv as usize];
        batch.forward(ops, self.site(Group::Qkv), (normed, u, None), &outputs)?;
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            let inverse = [acts.q_inverse, acts.k_inverse];
            let of_q = (rows * heads.n, eps);
            ops.rms_norm(of_q, raw[0], q_norm.floats(), q, inverse[0])?;
            let of_k = (rows * heads.n_kv, eps);
            ops.rms_norm(of_k, raw[1], k_norm.floats(), k, inverse[1])?;
        }
        Ok(())
    }

    /// Turns the queries and keys of [`Block::project`].
    pub(super) fn turn(
        &self,
        ops: &Ops,
        rows: usize,
        angles: &Angles,
        acts: &Activations,
    ) -> Result<()> {
        self.rotate(ops, angles, rows, (acts.q, self.heads.n), 1.0)?;
        self.rotate(ops, angles, rows, (acts.k, self.heads.n_kv), 1.0)
    }

    /// As [`Block::turn`], with keys and values into the caches that `places` on the device says.
    pub(super) fn place(
        &self,
        ops: &Ops,
        (rows, places): (usize, u64),
        angles: &Angles,
        acts: &Activations,
    ) -> Result<()> {
        let rope = self.arch.layers[self.index].rope;
        let rope = rope.and_then(|rope| angles.ropes.get(rope)).copied();
        let rows = (rows, self.index);
        ops.place_rows(&self.heads, rows, [acts.q, acts.k, acts.v], places, rope)
    }

    /// From attention's output to the residual stream after the block: `x` is the block's input,
    /// `out` becomes its output, both `[rows, hidden]`.
    pub(super) fn finish(
        &self,
        ops: &mut Ops,
        batch: &Batch<'_>,
        x: Floats,
        out: Floats,
        acts: &Activations,
    ) -> Result<()> {
        let (layer, rows, eps) = (self.layer, batch.rows, self.arch.rms_eps);
        let attention = Branch {
            site: self.site(Group::O),
            layer: &layer.o,
            norm: layer.post_attention_norm.as_ref(),
            raw: (acts.attention_out, acts.inverse[2]),
        };
        let middle = acts.middle;
        let u = acts.u[Group::O as usize];
        self.add_branch(ops, batch, &attention, (acts.attended, u), (x, middle))?;
        let (norm, inverse) = (layer.mlp_norm.floats(), acts.inverse[1]);
        ops.rms_norm((rows, eps), middle, norm, acts.mlp_normed, inverse)?;
        let [gate, up] = [acts.gate, acts.up];
        let u = acts.u[Group::GateUp as usize];
        let outputs = [(&layer.gate, gate), (&layer.up, up)];
        let from = (acts.mlp_normed, u, None);
        batch.forward(ops, self.site(Group::GateUp), from, &outputs)?;
        let (kernel, _) = self.activation();
        let n = rows * self.arch.intermediate_size;
        ops.activate(kernel, n, gate, up, acts.activated)?;
        let mlp = Branch {
            site: self.site(Group::Down),
            layer: &layer.down,
            norm: layer.post_mlp_norm.as_ref(),
            raw: (acts.mlp_out, acts.inverse[3]),
        };
        let u = acts.u[Group::Down as usize];
        self.add_branch(ops, batch, &mlp, (acts.activated, u), (middle, out))
    }

    /// `out = stream + branch(input)`, the branch with a norm after its last layer where it has one.
    fn add_branch(
        &self,
        ops: &mut Ops,
        batch: &Batch<'_>,
        branch: &Branch<'_>,
        (input, u): (Floats, Floats),
        (stream, out): (Floats, Floats),
    ) -> Result<()> {
        let Some(norm) = branch.norm else {
            let from = (input, u, Some(stream));
            return batch.forward(ops, branch.site, from, &[(branch.layer, out)]);
        };
        let (raw, inverse) = branch.raw;
        let from = (input, u, None);
        batch.forward(ops, branch.site, from, &[(branch.layer, raw)])?;
        let sizes = (batch.rows, self.arch.rms_eps);
        ops.rms_norm(sizes, raw, norm.floats(), out, inverse)?;
        ops.add(batch.rows * self.arch.hidden_size, stream, out)
    }

    /// The kernels of the activation and of its gradient.
    fn activation(&self) -> (&'static str, &'static str) {
        match self.arch.activation {
            Activation::Silu => ("swiglu", "swiglu_backward"),
            Activation::GeluTanh => ("geglu", "geglu_backward"),
        }
    }

    /// Turns the gradient of the block's output in `deltas.x` into that of its input `x`, adding the
    /// adapter's gradients. Overwrites `acts`. Below the first block nothing is trained, so its
    /// input's gradient is left unfinished.
    pub(super) fn backward(
        &self,
        ops: &mut Ops,
        pass: &BackwardPass<'_>,
        x: Floats,
        acts: &Activations,
    ) -> Result<()> {
        self.backward_mlp(ops, pass, acts)?;
        self.backward_attention(ops, pass, x, acts)
    }

    /// The gradient of what attention or MLP adds, taken back through the norm it ends in, if any.
    fn before_norm(
        &self,
        ops: &Ops,
        pass: &BackwardPass<'_>,
        norm: Option<&Buffer>,
        (x, inverse): (Floats, Floats),
    ) -> Result<Floats> {
        let dy = pass.deltas.x;
        let Some(norm) = norm else { return Ok(dy) };
        let raw = pass.deltas.raw;
        ops.rms_norm_backward((pass.rows, false), x, norm.floats(), inverse, dy, raw)?;
        Ok(raw)
    }

    fn backward_mlp(
        &self,
        ops: &mut Ops,
        pass: &BackwardPass<'_>,
        acts: &Activations,
    ) -> Result<()> {
        let (layer, rows, deltas) = (self.layer, pass.rows, pass.deltas);
        let (wide, normed, du) = (deltas.wide, deltas.normed, deltas.u);
        let raw = (acts.mlp_out, acts.inverse[3]);
        let d_out = self.before_norm(ops, pass, layer.post_mlp_norm.as_ref(), raw)?;
        let down = Backward {
            lora: pass.adapter.lora(self.site(Group::Down)),
            x: acts.activated,
            u: acts.u[Group::Down as usize],
            layers: &[(&layer.down, d_out)],
        };
        down.run(ops, rows, Some(wide), pass.gradient, du)?;
        let [gate, up] = [acts.gate, acts.up];
        let (_, kernel) = self.activation();
        ops.activate_backward(kernel, rows * self.arch.intermediate_size, wide, gate, up)?;
        let gate_up = Backward {
            lora: pass.adapter.lora(self.site(Group::GateUp)),
            x: acts.mlp_normed,
            u: acts.u[Group::GateUp as usize],
            layers: &[(&layer.gate, gate), (&layer.up, up)],
        };
        gate_up.run(ops, rows, Some(normed), pass.gradient, du)?;
        ops.rms_norm_backward(
            (rows, true),
            acts.middle,
            layer.mlp_norm.floats(),
            acts.inverse[1],
            normed,
            deltas.x,
        )
    }

    fn backward_attention(
        &self,
        ops: &mut Ops,
        pass: &BackwardPass<'_>,
        x: Floats,
        acts: &Activations,
    ) -> Result<()> {
        let (layer, rows, deltas) = (self.layer, pass.rows, pass.deltas);
        let raw = (acts.attention_out, acts.inverse[2]);
        let d_out = self.before_norm(ops, pass, layer.post_attention_norm.as_ref(), raw)?;
        let (wide, du) = (deltas.wide, deltas.u);
        let attended = acts.attended;
        let o = Backward {
            lora: pass.adapter.lora(self.site(Group::O)),
            x: attended,
            u: acts.u[Group::O as usize],
            layers: &[(&layer.o, d_out)],
        };
        o.run(ops, rows, Some(wide), pass.gradient, du)?;
        let [q, k, v] = [acts.q, acts.k, acts.v];
        let [dq, dk, dv] = [deltas.q, deltas.k, deltas.v];
        ops.attention_backward(
            &self.heads,
            (rows, pass.tile),
            [q, k, v, attended, wide, acts.logs],
            [dq, dk, dv, deltas.dots],
        )?;
        let [dq, dk] = self.backward_rotation(ops, pass, acts, [dq, dk])?;
        let qkv = Backward {
            lora: pass.adapter.lora(self.site(Group::Qkv)),
            x: acts.normed,
            u: acts.u[Group::Qkv as usize],
            layers: &[(&layer.q, dq), (&layer.k, dk), (&layer.v, dv)],
        };
        if self.index == 0 {
            return qkv.run(ops, rows, None, pass.gradient, du);
        }
        let normed = deltas.normed;
        qkv.run(ops, rows, Some(normed), pass.gradient, du)?;
        ops.rms_norm_backward(
            (rows, true),
            x,
            layer.attention_norm.floats(),
            acts.inverse[0],
            normed,
            deltas.x,
        )
    }

    /// Back through rotation and head norms of queries and keys; returns where the gradients then are.
    fn backward_rotation(
        &self,
        ops: &Ops,
        pass: &BackwardPass<'_>,
        acts: &Activations,
        [dq, dk]: [Floats; 2],
    ) -> Result<[Floats; 2]> {
        let (rows, heads) = (pass.rows, &self.heads);
        self.rotate(ops, pass.angles, rows, (dq, heads.n), -1.0)?;
        self.rotate(ops, pass.angles, rows, (dk, heads.n_kv), -1.0)?;
        let Some((q_norm, k_norm)) = &self.layer.qk_norm else {
            return Ok([dq, dk]);
        };
        // The rotated values are not needed any more; the gradients are built in their place.
        let [q, k] = [acts.q, acts.k];
        let [q_raw, k_raw] = [acts.q_raw, acts.k_raw];
        let [q_inverse, k_inverse] = [acts.q_inverse, acts.k_inverse];
        let of_q = (rows * heads.n, false);
        ops.rms_norm_backward(of_q, q_raw, q_norm.floats(), q_inverse, dq, q)?;
        let of_k = (rows * heads.n_kv, false);
        ops.rms_norm_backward(of_k, k_raw, k_norm.floats(), k_inverse, dk, k)?;
        Ok([q, k])
    }
}
