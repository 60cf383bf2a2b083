//! The kernels as functions: launches with their sizes checked.

mod products;

use std::sync::Arc;

use super::device::{Arg, Device, Launch, Number, fault};
use super::memory::{Buffer, Floats, Table};
use super::tiles::Tiles;
use crate::error::Result;
use crate::optim::AdamW;

pub(super) use self::products::{Job, Target, Weights};

/// Threads of a block of kernels that take numbers one by one.
const THREADS: u32 = 256;

/// Threads of a block that takes a row, as the kernels have it.
const ROW_THREADS: u32 = 128;

/// Numbers that one block adds the squares of.
const SQUARES: usize = 1 << 14;

/// What attention needs to know of a block of the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) n: usize,
    pub(super) n_kv: usize,
    pub(super) size: usize,
    pub(super) window: Option<usize>,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
}

impl Heads {
    pub(super) fn q_width(&self) -> usize {
        self.n * self.size
    }

    pub(super) fn kv_width(&self) -> usize {
        self.n_kv * self.size
    }

    fn args(&self) -> Result<[Arg; 6]> {
        Ok([
            u32_arg(self.n)?,
            u32_arg(self.n_kv)?,
            u32_arg(self.size)?,
            u32_arg(self.window.unwrap_or(0))?,
            Arg::F32(self.scale),
            Arg::F32(self.softcap.unwrap_or(0.0)),
        ])
    }
}

fn address(x: Floats) -> Arg {
    Arg::Address(x.address())
}

fn u32_arg(n: usize) -> Result<Arg> {
    let n = u32::try_from(n).map_err(|_| fault(format!("{n} is too large for a kernel")))?;
    Ok(Arg::U32(n))
}

fn u64_arg(n: usize) -> Arg {
    Arg::U64(n as u64)
}

fn fits(ranges: &[(Floats, usize)]) -> Result<()> {
    match ranges.iter().find(|(range, n)| range.len() < *n) {
        None => Ok(()),
        Some((range, n)) => Err(fault(format!(
            "a kernel would touch {n} of {} floats",
            range.len()
        ))),
    }
}

/// A device with the scratch of its kernels.
#[derive(Debug)]
pub(super) struct Ops {
    pub(super) device: Arc<dyn Device>,
    segments: Buffer,
    /// Zeros, which every launch leaves as such.
    counters: Buffer,
    partial: Buffer,
    parts: Table,
    sums: Table,
    flags: Table,
    after: Buffer,
}

impl Ops {
    pub(super) fn new(device: &Arc<dyn Device>) -> Self {
        Self {
            device: Arc::clone(device),
            segments: Buffer::empty(device),
            counters: Buffer::empty(device),
            partial: Buffer::empty(device),
            parts: Table::empty(device),
            sums: Table::empty(device),
            flags: Table::empty(device),
            after: Buffer::empty(device),
        }
    }

    fn run(
        &self,
        kernel: &'static str,
        grid: [usize; 3],
        threads: u32,
        args: &[Arg],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        const MOST: [usize; 3] = [i32::MAX as usize, 65_535, 65_535];
        if grid.iter().zip(MOST).any(|(n, most)| *n > most) {
            return Err(fault(format!("{kernel}: {grid:?} blocks are too many")));
        }
        let launch = Launch {
            kernel,
            grid: grid.map(|n| n as u32),
            threads,
            args,
        };
        // SAFETY: each function below passes the arguments of its kernel and has checked their sizes.
        unsafe { self.device.launch(&launch) }
    }

    /// A kernel over `n` numbers.
    fn each(&self, kernel: &'static str, n: usize, args: &[Arg]) -> Result<()> {
        self.run(kernel, [n.div_ceil(THREADS as usize), 1, 1], THREADS, args)
    }

    /// A kernel with a block for each row.
    fn each_row(&self, kernel: &'static str, rows: usize, args: &[Arg]) -> Result<()> {
        self.run(kernel, [rows, 1, 1], ROW_THREADS, args)
    }

    /// Embeds the tokens at `tokens`, which are below the table's rows.
    pub(super) fn embed(
        &self,
        table: Weights,
        (tokens, rows): (u64, usize),
        scale: f32,
        out: Floats,
    ) -> Result<()> {
        let n = table.inner;
        fits(&[(out, rows * n)])?;
        let kernel = match table.numbers {
            Number::F32 => "embed_f32",
            Number::Bf16 => "embed_bf16",
        };
        let args = [
            Arg::Address(table.address),
            Arg::Address(tokens),
            Arg::F32(scale),
            u32_arg(n)?,
            address(out),
        ];
        self.each_row(kernel, rows, &args)
    }

    /// `y = norm(x)` for `rows` rows of `weight.len()`.
    pub(super) fn rms_norm(
        &self,
        (rows, eps): (usize, f32),
        x: Floats,
        weight: Floats,
        y: Floats,
        inverse: Floats,
    ) -> Result<()> {
        let n = weight.len();
        fits(&[(x, rows * n), (y, rows * n), (inverse, rows)])?;
        let args = [
            address(x),
            address(weight),
            Arg::F32(eps),
            u32_arg(n)?,
            address(y),
            address(inverse),
        ];
        self.each_row("rms_norm", rows, &args)
    }

    /// The gradient of [`Ops::rms_norm`] for its input, into `dx` or onto it.
    pub(super) fn rms_norm_backward(
        &self,
        (rows, adds): (usize, bool),
        x: Floats,
        weight: Floats,
        inverse: Floats,
        dy: Floats,
        dx: Floats,
    ) -> Result<()> {
        let n = weight.len();
        let len = rows * n;
        fits(&[(x, len), (dy, len), (dx, len), (inverse, rows)])?;
        let args = [
            address(x),
            address(weight),
            address(inverse),
            address(dy),
            u32_arg(n)?,
            u32_arg(usize::from(adds))?,
            address(dx),
        ];
        self.each_row("rms_norm_backward", rows, &args)
    }

    /// `y += x`.
    pub(super) fn add(&self, n: usize, x: Floats, y: Floats) -> Result<()> {
        fits(&[(x, n), (y, n)])?;
        self.each("add", n, &[address(x), u64_arg(n), address(y)])
    }

    /// Adds `bias` to each row of `y`.
    pub(super) fn add_bias(&self, rows: usize, bias: Floats, y: Floats) -> Result<()> {
        let (n, len) = (bias.len(), rows * bias.len());
        fits(&[(y, len)])?;
        let args = [address(bias), u64_arg(len), u32_arg(n)?, address(y)];
        self.each("add_bias", len, &args)
    }

    /// Rotates `heads` heads of `size` in each row by `angles [2, rows, half]`.
    pub(super) fn rope(
        &self,
        rows: usize,
        x: Floats,
        (heads, size, half): (usize, usize, usize),
        angles: Floats,
        direction: f32,
    ) -> Result<()> {
        fits(&[(x, rows * heads * size), (angles, 2 * rows * half)])?;
        let args = [
            address(x),
            u32_arg(heads)?,
            u32_arg(size)?,
            u32_arg(half)?,
            address(angles),
            Arg::F32(direction),
        ];
        self.each_row("rope", rows, &args)
    }

    /// `out = act(gate) * up`, by the kernel of the activation.
    pub(super) fn activate(
        &self,
        kernel: &'static str,
        n: usize,
        gate: Floats,
        up: Floats,
        out: Floats,
    ) -> Result<()> {
        fits(&[(gate, n), (up, n), (out, n)])?;
        let args = [address(gate), address(up), u64_arg(n), address(out)];
        self.each(kernel, n, &args)
    }

    /// Turns `gate` and `up` into their gradients.
    pub(super) fn activate_backward(
        &self,
        kernel: &'static str,
        n: usize,
        dy: Floats,
        gate: Floats,
        up: Floats,
    ) -> Result<()> {
        fits(&[(gate, n), (up, n), (dy, n)])?;
        let args = [address(dy), u64_arg(n), address(gate), address(up)];
        self.each(kernel, n, &args)
    }

    /// `x = cap * tanh(x / cap)`.
    pub(super) fn softcap(&self, cap: f32, n: usize, x: Floats) -> Result<()> {
        fits(&[(x, n)])?;
        self.each("softcap", n, &[Arg::F32(cap), u64_arg(n), address(x)])
    }

    /// The square of the norm of the first `n` floats, in double precision.
    pub(super) fn sum_of_squares(&mut self, n: usize, x: Floats) -> Result<f64> {
        fits(&[(x, n)])?;
        let blocks = n.div_ceil(SQUARES);
        let sums = self.sums.reserve::<f64>(blocks)?;
        let args = [address(x), u64_arg(n), u64_arg(SQUARES), Arg::Address(sums)];
        self.each_row("sum_of_squares", blocks, &args)?;
        Ok(self.sums.to_host::<f64>(blocks)?.iter().sum())
    }

    /// Attention of `rows` rows in tiles that lie at `place`, whose keys and values begin at `bases`.
    pub(super) fn attention(
        &mut self,
        heads: &Heads,
        [q, out, logs]: [Floats; 3],
        (tiles, place): (&Tiles, u64),
        bases: [u64; 2],
        (layer, rows): (usize, usize),
    ) -> Result<()> {
        fits(&[
            (q, rows * heads.q_width()),
            (out, rows * heads.q_width()),
            (logs, rows * heads.n),
        ])?;
        let partial = tiles.partial(rows, heads);
        self.partial.reserve(partial)?;
        let [partial, chunks] = match partial {
            0 => [0, 1],
            _ => [self.partial.floats().address(), tiles.chunks as u64],
        };
        let mut args = vec![address(q), Arg::Address(place)];
        args.extend(bases.map(Arg::Address));
        args.push(u32_arg(layer)?);
        args.extend(heads.args()?);
        args.extend([u32_arg(rows)?, Arg::Address(partial)]);
        args.extend([out, logs].map(address));
        let kernel = match tiles.is_narrow {
            true => "attention_narrow",
            false => "attention_wide",
        };
        let grid = [tiles.n(), heads.n_kv * tiles.parts, chunks as usize];
        self.run(kernel, grid, ROW_THREADS, &args)?;
        if partial == 0 {
            return Ok(());
        }
        let [n, _, size, window, ..] = heads.args()?;
        let args = [
            Arg::Address(partial),
            Arg::Address(place),
            n,
            size,
            window,
            u32_arg(rows)?,
            address(out),
            address(logs),
        ];
        let grid = [tiles.n(), heads.n, 1];
        self.run("attention_join", grid, ROW_THREADS, &args)
    }

    /// The backward pass of a whole sequence's attention.
    pub(super) fn attention_backward(
        &self,
        heads: &Heads,
        (rows, tile): (usize, usize),
        [q, k, v, out, d_out, logs]: [Floats; 6],
        [dq, dk, dv, dots]: [Floats; 4],
    ) -> Result<()> {
        let (wide, narrow) = (rows * heads.q_width(), rows * heads.kv_width());
        fits(&[(q, wide), (out, wide), (d_out, wide), (dq, wide)])?;
        fits(&[(k, narrow), (v, narrow), (dk, narrow), (dv, narrow)])?;
        fits(&[(logs, rows * heads.n), (dots, rows * heads.n)])?;
        let args = [
            address(d_out),
            address(out),
            u32_arg(rows)?,
            u32_arg(heads.n)?,
            u32_arg(heads.size)?,
            address(dots),
        ];
        self.each("attention_dots", rows * heads.n, &args)?;
        let mut args = [q, k, v, d_out, logs, dots].map(address).to_vec();
        args.push(u32_arg(rows)?);
        args.extend(heads.args()?);
        let tiles = rows.div_ceil(tile);
        let with = |last: &[Floats]| {
            [
                &args[..],
                &last.iter().map(|x| address(*x)).collect::<Vec<_>>(),
            ]
            .concat()
        };
        self.run(
            "attention_backward_q",
            [tiles, heads.n, 1],
            ROW_THREADS,
            &with(&[dq]),
        )?;
        let grid = [tiles, heads.n_kv, 1];
        self.run("attention_backward_kv", grid, ROW_THREADS, &with(&[dk, dv]))
    }

    /// Rotates the queries of `rows` rows, and writes rotated keys, and values, where `places` on the
    /// device says; `rope` is half of what is rotated of a head, and the angles `[2, rows, half]`.
    pub(super) fn place_rows(
        &self,
        heads: &Heads,
        (rows, layer): (usize, usize),
        [q, k, v]: [Floats; 3],
        places: u64,
        rope: Option<(usize, Floats)>,
    ) -> Result<()> {
        let narrow = rows * heads.kv_width();
        fits(&[(q, rows * heads.q_width()), (k, narrow), (v, narrow)])?;
        let (half, angles) = match rope {
            Some((half, angles)) => {
                fits(&[(angles, 2 * rows * half)])?;
                (half, angles.address())
            }
            None => (0, 0),
        };
        let args = [
            address(q),
            address(k),
            address(v),
            Arg::Address(places),
            u32_arg(layer)?,
            u32_arg(heads.n)?,
            u32_arg(heads.n_kv)?,
            u32_arg(heads.size)?,
            u32_arg(half)?,
            Arg::Address(angles),
        ];
        self.each_row("place_rows", rows, &args)
    }

    /// For each row of logits the log of its normaliser, and the logits of its `k` targets.
    pub(super) fn head_scores(
        &self,
        (rows, vocab, k): (usize, usize, usize),
        logits: Floats,
        targets: u64,
        log_sum: Floats,
        chosen: Floats,
    ) -> Result<()> {
        fits(&[(logits, rows * vocab), (log_sum, rows), (chosen, rows * k)])?;
        let args = [
            address(logits),
            u32_arg(vocab)?,
            Arg::Address(targets),
            u32_arg(k)?,
            address(log_sum),
            address(chosen),
        ];
        self.each_row("head_scores", rows, &args)
    }

    /// Turns logits into the gradient of the loss, given that of the targets' log-probabilities.
    pub(super) fn head_gradient(
        &self,
        (rows, vocab, k): (usize, usize, usize),
        logits: Floats,
        (targets, coefficients): (u64, u64),
        log_sum: Floats,
        cap: Option<f32>,
    ) -> Result<()> {
        fits(&[(logits, rows * vocab), (log_sum, rows)])?;
        let args = [
            address(logits),
            u32_arg(vocab)?,
            Arg::Address(targets),
            Arg::Address(coefficients),
            u32_arg(k)?,
            address(log_sum),
            Arg::F32(cap.unwrap_or(0.0)),
        ];
        self.run("head_gradient", [rows, 1, 1], THREADS, &args)
    }

    /// Takes an AdamW step in place; returns false and changes nothing if a number would not be finite.
    pub(super) fn adamw(
        &mut self,
        params: &AdamW,
        (clip, next): (f32, u64),
        [w, g, m, v]: [Floats; 4],
    ) -> Result<bool> {
        let n = w.len();
        fits(&[(g, n), (m, n), (v, n)])?;
        self.after.reserve(3 * n)?;
        let blocks = n.div_ceil(THREADS as usize);
        let flags = self.flags.reserve::<u32>(blocks)?;
        let after = self.after.floats();
        let correction1 = params.correction(params.beta1, next) as f32;
        let root2 = params.correction(params.beta2, next).sqrt() as f32;
        let numbers = [
            clip,
            1.0 - params.learning_rate * params.weight_decay,
            params.learning_rate / correction1,
            1.0 - params.beta1,
            params.beta2,
            1.0 - params.beta2,
            root2,
            params.eps,
        ];
        let mut args = [w, g, m, v].map(address).to_vec();
        args.push(u64_arg(n));
        args.extend(numbers.map(Arg::F32));
        args.extend([address(after), Arg::Address(flags)]);
        self.each("adamw", n, &args)?;
        if self
            .flags
            .to_host::<u32>(blocks)?
            .iter()
            .any(|bad| *bad != 0)
        {
            return Ok(false);
        }
        for (part, to) in [w, m, v].into_iter().enumerate() {
            to.copy_from(&self.device, after.range(part * n, n))?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::u32_arg;

    #[test]
    fn sizes_that_no_kernel_takes_are_refused() {
        assert!(u32_arg(u32::MAX as usize).is_ok());

        let error = u32_arg(u32::MAX as usize + 1).unwrap_err();

        assert!(
            error.to_string().contains("4294967296 is too large"),
            "{error}"
        );
    }
}
