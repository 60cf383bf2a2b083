//! One decoder block: its forward pass around attention; the backward pass is in [`backward`].

mod again;
mod backward;
mod experts;

use super::attention::{self, Heads, KeysValues};
use super::buffer::Buffer;
use super::elementwise;
use super::linear::{Batch, Forward, Output, Site};
use super::lora::Group;
use super::model::{Gated, Layer, Mlp, Model};
use super::pool::SharedMut;
use crate::arch::{Activation, Arch, Rope};

pub(crate) use self::backward::{BackwardPass, Deltas};
use self::experts::Routing;

/// Cosine and sine of each row's rotary angles, for each of the model's ropes.
#[derive(Debug)]
pub(crate) struct Angles {
    ropes: Vec<Turns>,
    rows: usize,
}

/// The angles of one rope, `[rows, half]`.
#[derive(Debug)]
struct Turns {
    /// Pairs of a head that are rotated.
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// The angles of no row.
    pub(crate) fn none(arch: &Arch) -> Self {
        let turns = |rope: &Rope| Turns {
            half: rope.frequencies.len(),
            cos: Vec::new(),
            sin: Vec::new(),
        };
        Self {
            ropes: arch.ropes.iter().map(turns).collect(),
            rows: 0,
        }
    }

    /// The angles of rows at `positions`.
    pub(crate) fn new(arch: &Arch, positions: impl Iterator<Item = usize> + Clone) -> Self {
        let mut angles = Self::none(arch);
        angles.extend(arch, positions);
        angles
    }

    /// Makes them reach to row `rows`, each at its own position.
    pub(crate) fn reach(&mut self, arch: &Arch, rows: usize) {
        if self.rows < rows {
            self.extend(arch, self.rows..rows);
        }
    }

    /// Appends rows at `positions`.
    fn extend(&mut self, arch: &Arch, positions: impl Iterator<Item = usize> + Clone) {
        for (turns, rope) in self.ropes.iter_mut().zip(&arch.ropes) {
            for position in positions.clone() {
                for frequency in &rope.frequencies {
                    let (s, c) = (position as f32 * frequency).sin_cos();
                    turns.cos.push(c * rope.amplitude);
                    turns.sin.push(s * rope.amplitude);
                }
            }
        }
        self.rows += positions.count();
    }

    /// Rotates the heads of `x [rows, width]` by one of the ropes, if any; `direction` -1 turns back.
    fn rotate(&self, rope: Option<usize>, x: &mut [f32], heads: (usize, usize), direction: f32) {
        if let Some(Turns { half, cos, sin }) = rope.and_then(|rope| self.ropes.get(rope)) {
            let (width, size) = heads;
            elementwise::rope(x, width, size, *half, (cos, sin), direction);
        }
    }
}

/// What one block computes for its rows; kept for the backward pass in training.
#[derive(Debug)]
pub(crate) struct Activations {
    /// `1 / rms` of the norms before attention and MLP and of those after them, `[rows]`.
    inverse: [Buffer; 4],
    /// What follows from the rest without a product.
    pub(crate) derived: Derived,
    /// Queries and keys before their norm and rotation; only with `qk_norm`.
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
    /// `[heads, rows]`.
    log_normaliser: Buffer,
    /// Output of attention, `[rows, q_width]`.
    pub(crate) attended: Buffer,
    /// What attention and MLP add, before their norms, `[rows, hidden]`; only with `post_norms`.
    attention_out: Buffer,
    mlp_out: Buffer,
    /// Residual stream between attention and MLP, `[rows, hidden]`.
    middle: Buffer,
    /// `[rows, mlp]`.
    gate: Buffer,
    up: Buffer,
    /// Where rows go in a mixture of experts.
    routing: Routing,
    /// `scale * A x` of each group, `[rows, layers * rank]`.
    u: [Buffer; 4],
}

/// Layers of each group.
const GROUP_SIZES: [usize; 4] = [3, 1, 2, 1];

impl Activations {
    pub(crate) fn new() -> Self {
        let none = || Buffer::zeros(0);
        Self {
            inverse: std::array::from_fn(|_| none()),
            derived: Derived::new(),
            q_raw: none(),
            k_raw: none(),
            q_inverse: none(),
            k_inverse: none(),
            q: none(),
            k: none(),
            v: none(),
            log_normaliser: none(),
            attended: none(),
            attention_out: none(),
            mlp_out: none(),
            middle: none(),
            gate: none(),
            up: none(),
            routing: Routing::new(),
            u: std::array::from_fn(|_| none()),
        }
    }

    /// Each buffer with the floats that `rows` rows take in it, but for what is derived.
    fn room(&mut self, arch: &Arch, rows: usize, rank: usize) -> [(&mut Buffer, usize); 22] {
        let heads = Heads::of(arch);
        let (hidden, mlp) = (rows * arch.hidden_size, mlp_len(arch, rows));
        let (q, kv) = (rows * heads.q_width(), rows * heads.kv_width());
        let if_normed = |n| if arch.qk_norm { n } else { 0 };
        let post = if arch.post_norms { hidden } else { 0 };
        let per_token = arch.moe.as_ref().map_or(1, |moe| moe.per_token);
        let [u0, u1, u2, u3] = &mut self.u;
        let u = GROUP_SIZES.map(|layers| rows * per_token * layers * rank);
        let [i0, i1, i2, i3] = &mut self.inverse;
        [
            (i0, rows),
            (i1, rows),
            (i2, rows),
            (i3, rows),
            (&mut self.q_raw, if_normed(q)),
            (&mut self.k_raw, if_normed(kv)),
            (&mut self.q_inverse, if_normed(rows * heads.n)),
            (&mut self.k_inverse, if_normed(rows * heads.n_kv)),
            (&mut self.q, q),
            (&mut self.k, kv),
            (&mut self.v, kv),
            (&mut self.log_normaliser, rows * heads.n),
            (&mut self.attended, q),
            (&mut self.attention_out, post),
            (&mut self.mlp_out, post),
            (&mut self.middle, hidden),
            (&mut self.gate, mlp),
            (&mut self.up, mlp),
            (u0, u[0]),
            (u1, u[1]),
            (u2, u[2]),
            (u3, u[3]),
        ]
    }

    /// Makes room for `rows` rows, but for what is derived.
    pub(crate) fn reserve(&mut self, arch: &Arch, rows: usize, rank: usize) {
        for (buffer, len) in self.room(arch, rows, rank) {
            buffer.reserve(len);
        }
        if let Some(moe) = &arch.moe {
            self.routing.reserve(arch, moe, rows);
        }
    }

    /// Floats that `rows` rows take, but for what is derived.
    pub(crate) fn floats(arch: &Arch, rows: usize, rank: usize) -> usize {
        let mut none = Self::new();
        let buffers = none.room(arch, rows, rank).map(|(_, len)| len);
        let routing = arch.moe.as_ref().map(|moe| Routing::room(arch, moe, rows));
        buffers.iter().chain(routing.iter().flatten()).sum()
    }

    /// Floats it holds, but for what is derived.
    pub(crate) fn len(&self) -> usize {
        let single = [
            &self.q_raw,
            &self.k_raw,
            &self.q_inverse,
            &self.k_inverse,
            &self.q,
            &self.k,
            &self.v,
            &self.log_normaliser,
            &self.attended,
            &self.attention_out,
            &self.mlp_out,
            &self.middle,
            &self.gate,
            &self.up,
        ];
        let all = single.into_iter().chain(&self.inverse).chain(&self.u);
        all.map(|buffer| buffer.len()).sum::<usize>() + self.routing.len()
    }
}

/// What a block computes from its other activations without a product: norms, the activation of the
/// MLP, and copies in another order.
#[derive(Debug)]
pub(crate) struct Derived {
    /// Output of the attention norm, `[rows, hidden]`.
    normed: Buffer,
    /// Key panels of a training sequence.
    panels: Buffer,
    /// Output of the MLP norm, `[rows, hidden]`.
    mlp_normed: Buffer,
    /// `act(gate) * up`, `[rows, mlp]`.
    activated: Buffer,
    /// Input of each assignment to an expert, `[assignments, hidden]`.
    routed: Buffer,
}

impl Derived {
    pub(crate) fn new() -> Self {
        let none = || Buffer::zeros(0);
        Self {
            normed: none(),
            panels: none(),
            mlp_normed: none(),
            activated: none(),
            routed: none(),
        }
    }

    /// Each buffer with the floats that `rows` rows take in it.
    fn room(&mut self, arch: &Arch, rows: usize) -> [(&mut Buffer, usize); 5] {
        let hidden = rows * arch.hidden_size;
        let per_token = arch.moe.as_ref().map_or(0, |moe| moe.per_token);
        [
            (&mut self.normed, hidden),
            (&mut self.panels, Heads::of(arch).panels_len(rows)),
            (&mut self.mlp_normed, hidden),
            (&mut self.activated, mlp_len(arch, rows)),
            (&mut self.routed, hidden * per_token),
        ]
    }

    /// Makes room for `rows` rows.
    pub(crate) fn reserve(&mut self, arch: &Arch, rows: usize) {
        for (buffer, len) in self.room(arch, rows) {
            buffer.reserve(len);
        }
    }

    /// Floats that `rows` rows take.
    pub(crate) fn floats(arch: &Arch, rows: usize) -> usize {
        let mut none = Self::new();
        none.room(arch, rows).map(|(_, len)| len).iter().sum()
    }

    /// Floats it holds.
    pub(crate) fn len(&self) -> usize {
        let buffers = [
            &self.normed,
            &self.panels,
            &self.mlp_normed,
            &self.activated,
            &self.routed,
        ];
        buffers.iter().map(|buffer| buffer.len()).sum()
    }
}

/// Elements of the widest activation of an MLP or of all experts that rows go to.
fn mlp_len(arch: &Arch, rows: usize) -> usize {
    let sparse = arch.moe.as_ref().map_or(0, |moe| moe.per_token * moe.width);
    rows * arch.intermediate_size.max(sparse)
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

    fn heads(&self) -> Heads {
        Heads::of_layer(self.arch, self.index)
    }

    /// Which rope turns this block's heads.
    fn rope(&self) -> Option<usize> {
        self.arch.layers[self.index].rope
    }

    fn site(&self, group: Group) -> Site {
        Site::Block(self.index, group)
    }

    /// From the residual stream `x [rows, hidden]` to rotated queries and keys, and values.
    pub(crate) fn project(
        &self,
        batch: &Batch<'_>,
        x: &[f32],
        angles: &Angles,
        acts: &mut Activations,
    ) {
        self.norm_attention(batch.rows, x, acts);
        let (of, mut outputs) = self.qkv(batch.rows, acts);
        batch.forward(of, &mut outputs);
        self.turn_heads(batch.rows, angles, acts);
    }

    /// Queries, keys and values of what the attention norm gave.
    pub(crate) fn qkv<'f>(
        &self,
        rows: usize,
        acts: &'f mut Activations,
    ) -> (Forward<'f>, [Output<'f>; 3])
    where
        'a: 'f,
    {
        let (width, layer) = (self.arch.hidden_size, self.layer);
        let of = Forward {
            site: self.site(Group::Qkv),
            x: &acts.derived.normed[..rows * width],
            width,
            u: &mut acts.u[Group::Qkv as usize],
        };
        let sides = [
            (&layer.q, &mut acts.q),
            (&layer.k, &mut acts.k),
            (&layer.v, &mut acts.v),
        ];
        (of, sides.map(|(linear, y)| Output { linear, y }))
    }

    /// Norms and rotates query and key heads.
    pub(crate) fn turn_heads(&self, rows: usize, angles: &Angles, acts: &mut Activations) {
        let heads = self.heads();
        self.norm_heads(rows, &heads, acts);
        let sides = [
            (&mut acts.q, heads.q_width()),
            (&mut acts.k, heads.kv_width()),
        ];
        for (x, width) in sides {
            let x = &mut x[..rows * width];
            angles.rotate(self.rope(), x, (width, heads.size), 1.0);
        }
    }

    /// Norms of query and key heads, where the architecture has them.
    fn norm_heads(&self, rows: usize, heads: &Heads, acts: &mut Activations) {
        let Some((q_norm, k_norm)) = &self.layer.qk_norm else {
            return;
        };
        let sides = [
            (
                q_norm,
                heads.n,
                &mut acts.q,
                &mut acts.q_raw,
                &mut acts.q_inverse,
            ),
            (
                k_norm,
                heads.n_kv,
                &mut acts.k,
                &mut acts.k_raw,
                &mut acts.k_inverse,
            ),
        ];
        for (norm, n_heads, x, raw, inverse) in sides {
            let n = rows * n_heads * heads.size;
            let inverse = &mut inverse[..rows * n_heads];
            raw[..n].copy_from_slice(&x[..n]);
            elementwise::rms_norm(&raw[..n], norm, self.arch.rms_eps, x, inverse);
        }
    }

    fn pack_keys(&self, rows: usize, acts: &mut Activations) {
        let heads = self.heads();
        let keys = &acts.k[..rows * heads.kv_width()];
        heads.pack_keys(keys, 0, &mut acts.derived.panels);
    }

    /// Attention of a whole sequence to itself, keeping what its backward pass needs.
    pub(crate) fn attend_sequence(&self, rows: usize, acts: &mut Activations) {
        let heads = self.heads();
        self.pack_keys(rows, acts);
        let kv = KeysValues {
            keys: &acts.derived.panels,
            values: &acts.v,
        };
        let logs = acts.log_normaliser[..rows * heads.n].chunks_exact_mut(rows);
        let out = SharedMut::new(&mut acts.attended);
        for (head, log) in logs.enumerate() {
            // SAFETY: the output is borrowed for the whole loop, and nobody shares it.
            unsafe { attention::forward(&heads, head, 0, &acts.q, kv, (&out, 0), log) };
        }
    }

    /// From attention's output to the residual stream after the block: `x` is the block's input,
    /// `out` becomes its output, both `[rows, hidden]`.
    pub(crate) fn finish(
        &self,
        batch: &Batch<'_>,
        x: &[f32],
        out: &mut [f32],
        acts: &mut Activations,
    ) {
        let n = batch.rows * self.arch.hidden_size;
        self.finish_attention(batch, x, acts);
        self.norm_mlp(batch.rows, acts);
        self.mlp(batch, &mut out[..n], acts);
        elementwise::add(&acts.middle[..n], &mut out[..n]);
    }

    /// As the end of [`Block::finish`], once `out` is what the down projection gives.
    pub(crate) fn add_mlp(&self, rows: usize, out: &mut [f32], acts: &mut Activations) {
        let out = &mut out[..rows * self.arch.hidden_size];
        self.norm_after_mlp(rows, out, acts);
        elementwise::add(&acts.middle[..out.len()], out);
    }

    pub(crate) fn norm_attention(&self, rows: usize, x: &[f32], acts: &mut Activations) {
        let (eps, inverse) = (self.arch.rms_eps, &mut acts.inverse[0][..rows]);
        let (x, norm) = (
            &x[..rows * self.arch.hidden_size],
            &self.layer.attention_norm,
        );
        elementwise::rms_norm(x, norm, eps, &mut acts.derived.normed, inverse);
    }

    pub(crate) fn norm_mlp(&self, rows: usize, acts: &mut Activations) {
        let (eps, inverse) = (self.arch.rms_eps, &mut acts.inverse[1][..rows]);
        let (middle, norm) = (
            &acts.middle[..rows * self.arch.hidden_size],
            &self.layer.mlp_norm,
        );
        elementwise::rms_norm(middle, norm, eps, &mut acts.derived.mlp_normed, inverse);
    }

    /// `middle = x + o(attended)`.
    fn finish_attention(&self, batch: &Batch<'_>, x: &[f32], acts: &mut Activations) {
        let (of, output) = self.o(batch.rows, acts);
        batch.forward(of, &mut [output]);
        self.add_attention(batch.rows, x, acts);
    }

    /// The output projection of attention.
    pub(crate) fn o<'f>(&self, rows: usize, acts: &'f mut Activations) -> (Forward<'f>, Output<'f>)
    where
        'a: 'f,
    {
        let out = match self.layer.post_attention_norm {
            Some(_) => &mut acts.attention_out,
            None => &mut acts.middle,
        };
        let of = Forward {
            site: self.site(Group::O),
            x: &acts.attended,
            width: self.heads().q_width(),
            u: &mut acts.u[Group::O as usize],
        };
        let output = Output {
            linear: &self.layer.o,
            y: &mut out[..rows * self.arch.hidden_size],
        };
        (of, output)
    }

    /// Adds attention's output, normed where the architecture does that, to the residual stream.
    pub(crate) fn add_attention(&self, rows: usize, x: &[f32], acts: &mut Activations) {
        let n = rows * self.arch.hidden_size;
        if let Some(norm) = &self.layer.post_attention_norm {
            let (raw, inverse) = (&acts.attention_out[..n], &mut acts.inverse[2][..rows]);
            elementwise::rms_norm(raw, norm, self.arch.rms_eps, &mut acts.middle, inverse);
        }
        elementwise::add(&x[..n], &mut acts.middle[..n]);
    }

    /// `out = mlp(mlp_normed)`, with the norm after it where there is one.
    fn mlp(&self, batch: &Batch<'_>, out: &mut [f32], acts: &mut Activations) {
        match &self.layer.mlp {
            Mlp::Dense(gated) => self.gated(batch, gated, out, acts),
            Mlp::Sparse(experts) => self.mix(batch, experts, out, acts),
        }
        self.norm_after_mlp(batch.rows, out, acts);
    }

    /// The norm of what the MLP gave, where the architecture has one.
    fn norm_after_mlp(&self, rows: usize, out: &mut [f32], acts: &mut Activations) {
        if let Some(norm) = &self.layer.post_mlp_norm {
            let (raw, inverse) = (&mut acts.mlp_out[..out.len()], &mut acts.inverse[3]);
            raw.copy_from_slice(out);
            let inverse = &mut inverse[..rows];
            elementwise::rms_norm(raw, norm, self.arch.rms_eps, out, inverse);
        }
    }

    /// `out = down(act(gate(mlp_normed)) * up(mlp_normed))`.
    fn gated(&self, batch: &Batch<'_>, gated: &Gated, out: &mut [f32], acts: &mut Activations) {
        self.gate_up(batch, gated, acts);
        let output = Output {
            linear: &gated.down,
            y: out,
        };
        batch.forward(self.down(acts), &mut [output]);
    }

    /// `activated = act(gate(mlp_normed)) * up(mlp_normed)`.
    fn gate_up(&self, batch: &Batch<'_>, gated: &Gated, acts: &mut Activations) {
        let (of, mut outputs) = self.gate_and_up(batch.rows, gated, acts);
        batch.forward(of, &mut outputs);
        self.activate(batch.rows * self.arch.intermediate_size, acts);
    }

    /// The gate and up projections of what the MLP's norm gave.
    pub(crate) fn gate_and_up<'f>(
        &self,
        rows: usize,
        gated: &'f Gated,
        acts: &'f mut Activations,
    ) -> (Forward<'f>, [Output<'f>; 2]) {
        let width = self.arch.hidden_size;
        let of = Forward {
            site: self.site(Group::GateUp),
            x: &acts.derived.mlp_normed[..rows * width],
            width,
            u: &mut acts.u[Group::GateUp as usize],
        };
        let sides = [(&gated.gate, &mut acts.gate), (&gated.up, &mut acts.up)];
        (of, sides.map(|(linear, y)| Output { linear, y }))
    }

    /// What the down projection reads.
    pub(crate) fn down<'f>(&self, acts: &'f mut Activations) -> Forward<'f> {
        Forward {
            site: self.site(Group::Down),
            x: &acts.derived.activated,
            width: self.arch.intermediate_size,
            u: &mut acts.u[Group::Down as usize],
        }
    }

    /// `activated = act(gate) * up`, the first `n` of each.
    pub(crate) fn activate(&self, n: usize, acts: &mut Activations) {
        let (gate, up) = (&acts.gate[..n], &acts.up[..n]);
        let out = &mut acts.derived.activated[..n];
        match self.arch.activation {
            Activation::Silu => elementwise::swiglu(gate, up, out),
            Activation::GeluTanh => elementwise::geglu(gate, up, out),
        }
    }

    /// Turns `gate` and `up` into their gradients, given that of [`Block::activate`]'s output.
    fn activate_backward(&self, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        match self.arch.activation {
            Activation::Silu => elementwise::swiglu_backward(gate, up, dy),
            Activation::GeluTanh => elementwise::geglu_backward(gate, up, dy),
        }
    }
}
