//! One decoder block: its forward pass around attention, and its backward pass.

use super::attention::{self, Attended, Gradients, Heads, KeysValues};
use super::buffer::Buffer;
use super::elementwise;
use super::gemm::Store;
use super::linear::{Backward, Batch, Output, Site};
use super::lora::{Adapter, Projection};
use super::model::{Layer, Model};
use crate::arch::Arch;

/// Cosine and sine of each row's rotary angles.
#[derive(Debug)]
pub(crate) struct Angles {
    /// `[rows, head_dim / 2]`.
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl Angles {
    /// The angles of rows at `positions`.
    pub(crate) fn new(arch: &Arch, positions: impl Iterator<Item = usize>) -> Self {
        let mut angles = Self {
            cos: Vec::new(),
            sin: Vec::new(),
        };
        for position in positions {
            for frequency in &arch.inverse_frequencies {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                angles.cos.push(cos);
                angles.sin.push(sin);
            }
        }
        angles
    }
}

/// What one block computes for its rows; kept for the backward pass in training.
#[derive(Debug)]
pub(crate) struct Activations {
    /// Input of the block, `[rows, hidden]`.
    x: Buffer,
    /// `1 / rms` of the two norms, `[rows]`.
    inverse: [Buffer; 2],
    /// Output of the attention norm, `[rows, hidden]`.
    normed: Buffer,
    /// Queries, keys and values before their norm and rotation; only with `qk_norm`.
    q_raw: Buffer,
    k_raw: Buffer,
    /// `1 / rms` of query and key heads, `[rows * heads]`.
    q_inverse: Buffer,
    k_inverse: Buffer,
    /// Rotated queries `[rows, q_width]` and keys `[rows, kv_width]`.
    pub(crate) q: Buffer,
    pub(crate) k: Buffer,
    /// `[rows, kv_width]`.
    pub(crate) v: Buffer,
    /// Key panels of a training sequence.
    panels: Buffer,
    /// `[heads, rows]`.
    log_normaliser: Buffer,
    /// Output of attention, `[rows, q_width]`.
    pub(crate) attended: Buffer,
    /// Residual stream between attention and MLP, `[rows, hidden]`.
    middle: Buffer,
    /// Output of the MLP norm, `[rows, hidden]`.
    mlp_normed: Buffer,
    /// `[rows, mlp]`.
    gate: Buffer,
    up: Buffer,
    activated: Buffer,
    /// `scale * A x` of each projection, `[rows, rank]`.
    u: [Buffer; 7],
}

impl Activations {
    pub(crate) fn new() -> Self {
        let none = || Buffer::zeros(0);
        Self {
            x: none(),
            inverse: [none(), none()],
            normed: none(),
            q_raw: none(),
            k_raw: none(),
            q_inverse: none(),
            k_inverse: none(),
            q: none(),
            k: none(),
            v: none(),
            panels: none(),
            log_normaliser: none(),
            attended: none(),
            middle: none(),
            mlp_normed: none(),
            gate: none(),
            up: none(),
            activated: none(),
            u: std::array::from_fn(|_| none()),
        }
    }

    /// Makes room for `rows` rows.
    pub(crate) fn reserve(&mut self, arch: &Arch, rows: usize, rank: usize) {
        let heads = Heads::of(arch);
        let (hidden, mlp) = (rows * arch.hidden_size, rows * arch.intermediate_size);
        let (q, kv) = (rows * heads.q_width(), rows * heads.kv_width());
        for buffer in [
            &mut self.x,
            &mut self.normed,
            &mut self.middle,
            &mut self.mlp_normed,
        ] {
            buffer.reserve(hidden);
        }
        for buffer in [&mut self.gate, &mut self.up, &mut self.activated] {
            buffer.reserve(mlp);
        }
        if arch.qk_norm {
            self.q_raw.reserve(q);
            self.k_raw.reserve(kv);
            self.q_inverse.reserve(rows * heads.n);
            self.k_inverse.reserve(rows * heads.n_kv);
        }
        self.q.reserve(q);
        self.k.reserve(kv);
        self.v.reserve(kv);
        self.panels.reserve(heads.panels_len(rows));
        self.attended.reserve(q);
        self.log_normaliser.reserve(rows * heads.n);
        self.inverse.iter_mut().for_each(|b| b.reserve(rows));
        self.u.iter_mut().for_each(|b| b.reserve(rows * rank));
    }
}

/// One layer of a model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block<'a> {
    pub(crate) arch: &'a Arch,
    pub(crate) layer: &'a Layer,
    pub(crate) index: usize,
}

impl<'a> Block<'a> {
    pub(crate) fn of(model: &'a Model, index: usize) -> Self {
        Self {
            arch: &model.arch,
            layer: &model.layers[index],
            index,
        }
    }

    fn site(&self, projection: Projection) -> Site {
        Site::Block(self.index, projection)
    }

    /// From the residual stream `x [rows, hidden]` to rotated queries and keys, and values.
    pub(crate) fn project(
        &self,
        batch: &Batch<'_>,
        x: &[f32],
        angles: &Angles,
        acts: &mut Activations,
    ) {
        let (rows, hidden, heads) = (batch.rows, self.arch.hidden_size, Heads::of(self.arch));
        let (q_len, kv_len) = (rows * heads.q_width(), rows * heads.kv_width());
        let x = &x[..rows * hidden];
        acts.x[..x.len()].copy_from_slice(x);
        let eps = self.arch.rms_eps;
        let norm = &self.layer.attention_norm;
        elementwise::rms_norm(x, norm, eps, &mut acts.normed, &mut acts.inverse[0][..rows]);
        let [u_q, u_k, u_v, ..] = &mut acts.u;
        let mut outputs = [
            Output {
                linear: &self.layer.q,
                site: self.site(Projection::Q),
                y: &mut acts.q,
                u: u_q,
            },
            Output {
                linear: &self.layer.k,
                site: self.site(Projection::K),
                y: &mut acts.k,
                u: u_k,
            },
            Output {
                linear: &self.layer.v,
                site: self.site(Projection::V),
                y: &mut acts.v,
                u: u_v,
            },
        ];
        batch.forward(&acts.normed[..rows * hidden], hidden, &mut outputs);
        if let Some((q_norm, k_norm)) = &self.layer.qk_norm {
            acts.q_raw[..q_len].copy_from_slice(&acts.q[..q_len]);
            acts.k_raw[..kv_len].copy_from_slice(&acts.k[..kv_len]);
            let (q, k) = (&acts.q_raw[..q_len], &acts.k_raw[..kv_len]);
            elementwise::rms_norm(
                q,
                q_norm,
                eps,
                &mut acts.q,
                &mut acts.q_inverse[..rows * heads.n],
            );
            elementwise::rms_norm(
                k,
                k_norm,
                eps,
                &mut acts.k,
                &mut acts.k_inverse[..rows * heads.n_kv],
            );
        }
        let (cos, sin) = (&angles.cos, &angles.sin);
        elementwise::rope(
            &mut acts.q[..q_len],
            heads.q_width(),
            heads.size,
            cos,
            sin,
            1.0,
        );
        elementwise::rope(
            &mut acts.k[..kv_len],
            heads.kv_width(),
            heads.size,
            cos,
            sin,
            1.0,
        );
    }

    /// Attention of a whole sequence to itself, keeping what its backward pass needs.
    pub(crate) fn attend_sequence(&self, rows: usize, acts: &mut Activations) {
        let heads = Heads::of(self.arch);
        heads.pack_keys(&acts.k[..rows * heads.kv_width()], 0, &mut acts.panels);
        let kv = KeysValues {
            keys: &acts.panels,
            values: &acts.v,
        };
        for (head, log) in acts.log_normaliser[..rows * heads.n]
            .chunks_exact_mut(rows)
            .enumerate()
        {
            attention::forward(&heads, head, 0, &acts.q, kv, &mut acts.attended, log);
        }
    }

    /// From attention's output to the residual stream `x` after the block; `branch` is scratch,
    /// `[rows, hidden]`.
    pub(crate) fn finish(
        &self,
        batch: &Batch<'_>,
        x: &mut [f32],
        branch: &mut [f32],
        acts: &mut Activations,
    ) {
        let (rows, hidden) = (batch.rows, self.arch.hidden_size);
        let (q_width, mlp) = (Heads::of(self.arch).q_width(), self.arch.intermediate_size);
        let (x, branch) = (&mut x[..rows * hidden], &mut branch[..rows * hidden]);
        let [_, _, _, u_o, u_gate, u_up, u_down] = &mut acts.u;
        let site = self.site(Projection::O);
        let output = Output {
            linear: &self.layer.o,
            site,
            y: branch,
            u: u_o,
        };
        batch.forward(&acts.attended[..rows * q_width], q_width, &mut [output]);
        elementwise::add(branch, x);
        acts.middle[..x.len()].copy_from_slice(x);
        let (eps, norm) = (self.arch.rms_eps, &self.layer.mlp_norm);
        elementwise::rms_norm(
            x,
            norm,
            eps,
            &mut acts.mlp_normed,
            &mut acts.inverse[1][..rows],
        );
        let (gate, up) = (self.site(Projection::Gate), self.site(Projection::Up));
        let mut outputs = [
            Output {
                linear: &self.layer.gate,
                site: gate,
                y: &mut acts.gate,
                u: u_gate,
            },
            Output {
                linear: &self.layer.up,
                site: up,
                y: &mut acts.up,
                u: u_up,
            },
        ];
        batch.forward(&acts.mlp_normed[..rows * hidden], hidden, &mut outputs);
        let n = rows * mlp;
        elementwise::swiglu(&acts.gate[..n], &acts.up[..n], &mut acts.activated[..n]);
        let site = self.site(Projection::Down);
        let output = Output {
            linear: &self.layer.down,
            site,
            y: branch,
            u: u_down,
        };
        batch.forward(&acts.activated[..n], mlp, &mut [output]);
        elementwise::add(branch, x);
    }
}

/// Scratch of the backward pass, shared by all blocks of one sequence.
#[derive(Debug)]
pub(crate) struct Deltas {
    /// Gradient of the residual stream, `[rows, hidden]`.
    pub(crate) x: Buffer,
    /// Gradient of a norm's output, `[rows, hidden]`.
    normed: Buffer,
    /// Gradient of an activation, `[rows, max(mlp, q_width)]`.
    wide: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// Gradient of `u`, `[rows, rank]`.
    u: Buffer,
}

impl Deltas {
    pub(crate) fn new() -> Self {
        let none = || Buffer::zeros(0);
        Self {
            x: none(),
            normed: none(),
            wide: none(),
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
        self.wide
            .reserve(rows * arch.intermediate_size.max(heads.q_width()));
        self.q.reserve(rows * heads.q_width());
        self.k.reserve(rows * heads.kv_width());
        self.v.reserve(rows * heads.kv_width());
        self.u.reserve(rows * rank);
    }
}

impl Block<'_> {
    /// Turns the gradient of the block's output in `deltas.x` into that of its input, adding the
    /// adapter's gradients to `gradient`. Overwrites `acts`. Below the first block nothing is trained,
    /// so its input's gradient is left unfinished.
    pub(crate) fn backward(
        &self,
        rows: usize,
        adapter: &Adapter,
        angles: &Angles,
        acts: &mut Activations,
        deltas: &mut Deltas,
        gradient: &mut [f32],
    ) {
        self.backward_mlp(rows, adapter, acts, deltas, gradient);
        self.backward_attention(rows, adapter, angles, acts, deltas, gradient);
    }

    fn backward_mlp(
        &self,
        rows: usize,
        adapter: &Adapter,
        acts: &mut Activations,
        deltas: &mut Deltas,
        gradient: &mut [f32],
    ) {
        let (layer, n) = (self.layer, rows * self.arch.intermediate_size);
        let hidden = rows * self.arch.hidden_size;
        let lora = |projection| adapter.lora(self.index, projection);
        let u = |projection: Projection| projection as usize;
        let down = Backward {
            linear: &layer.down,
            lora: lora(Projection::Down),
            x: &acts.activated,
            u: &acts.u[u(Projection::Down)],
            dy: &deltas.x,
        };
        let into = Some((&mut *deltas.wide, Store::Replace));
        down.run(rows, into, gradient, &mut deltas.u);
        elementwise::swiglu_backward(&mut acts.gate[..n], &mut acts.up[..n], &deltas.wide[..n]);
        let branches = [
            (&layer.gate, Projection::Gate, &acts.gate, Store::Replace),
            (&layer.up, Projection::Up, &acts.up, Store::Add),
        ];
        for (linear, projection, dy, store) in branches {
            let (lora, u) = (lora(projection), &acts.u[u(projection)]);
            let branch = Backward {
                linear,
                lora,
                x: &acts.mlp_normed,
                u,
                dy,
            };
            branch.run(
                rows,
                Some((&mut *deltas.normed, store)),
                gradient,
                &mut deltas.u,
            );
        }
        elementwise::rms_norm_backward(
            &acts.middle[..hidden],
            &layer.mlp_norm,
            &acts.inverse[1][..rows],
            &deltas.normed[..hidden],
            &mut deltas.x[..hidden],
        );
    }

    fn backward_attention(
        &self,
        rows: usize,
        adapter: &Adapter,
        angles: &Angles,
        acts: &mut Activations,
        deltas: &mut Deltas,
        gradient: &mut [f32],
    ) {
        let (layer, heads) = (self.layer, Heads::of(self.arch));
        let lora = |projection| adapter.lora(self.index, projection);
        let o = Backward {
            linear: &layer.o,
            lora: lora(Projection::O),
            x: &acts.attended,
            u: &acts.u[Projection::O as usize],
            dy: &deltas.x,
        };
        o.run(
            rows,
            Some((&mut *deltas.wide, Store::Replace)),
            gradient,
            &mut deltas.u,
        );
        let attended = Attended {
            rows,
            q: &acts.q,
            k: &acts.k,
            kv: KeysValues {
                keys: &acts.panels,
                values: &acts.v,
            },
            out: &acts.attended,
            log_normaliser: &acts.log_normaliser,
        };
        let mut gradients = Gradients {
            q: &mut deltas.q,
            k: &mut deltas.k,
            v: &mut deltas.v,
        };
        attention::backward(&heads, attended, &deltas.wide, &mut gradients);
        self.backward_rotation(rows, &heads, angles, acts, deltas);
        let is_first = self.index == 0;
        let branches = [
            (&layer.q, Projection::Q, &deltas.q, Store::Replace),
            (&layer.k, Projection::K, &deltas.k, Store::Add),
            (&layer.v, Projection::V, &deltas.v, Store::Add),
        ];
        for (linear, projection, dy, store) in branches {
            let (lora, u) = (lora(projection), &acts.u[projection as usize]);
            let branch = Backward {
                linear,
                lora,
                x: &acts.normed,
                u,
                dy,
            };
            let into = (!is_first).then_some((&mut *deltas.normed, store));
            branch.run(rows, into, gradient, &mut deltas.u);
        }
        let hidden = rows * self.arch.hidden_size;
        if !is_first {
            elementwise::rms_norm_backward(
                &acts.x[..hidden],
                &layer.attention_norm,
                &acts.inverse[0][..rows],
                &deltas.normed[..hidden],
                &mut deltas.x[..hidden],
            );
        }
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
        let (cos, sin) = (&angles.cos, &angles.sin);
        elementwise::rope(
            &mut deltas.q[..q_len],
            heads.q_width(),
            heads.size,
            cos,
            sin,
            -1.0,
        );
        elementwise::rope(
            &mut deltas.k[..kv_len],
            heads.kv_width(),
            heads.size,
            cos,
            sin,
            -1.0,
        );
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
