//! Operations that make few values of many.

use super::super::args::Args;
use super::super::tape::Tape;
use super::super::value::{Kind, Tensor, Value, offsets, strides};
use super::{Op, Outcome};

/// Reductions, and what is made of them.
pub(super) fn lookup(name: &str) -> Option<Op> {
    Some(Op::Call(match name {
        "sum" => sum,
        "mean" => mean,
        "nansum" => nansum,
        "var" => variance,
        "std" => deviation,
        "norm" => norm,
        "logsumexp" => log_sum_exp,
        "softmax" => softmax,
        "log_softmax" => log_softmax,
        "cumsum" => running_sum,
        "dot" | "inner" => dot,
        "any" => any,
        "all" => all,
        "count_nonzero" => count_nonzero,
        "max" => |t, a| extremum(t, a, |x, y| x > y),
        "min" => |t, a| extremum(t, a, |x, y| x < y),
        "amax" => |t, a| outermost(t, a, |x, y| x > y),
        "amin" => |t, a| outermost(t, a, |x, y| x < y),
        "argmax" => |t, a| place_of(t, a, |x, y| x > y),
        "argmin" => |t, a| place_of(t, a, |x, y| x < y),
        _ => return None,
    }))
}

/// What a reduction goes over.
struct Plan {
    /// Shape of the result, with dimensions of 1 where it reduces.
    kept: Vec<usize>,
    /// Shape of the result as asked for.
    shape: Vec<usize>,
    /// For each value its place in the result.
    to: Vec<usize>,
    /// Values that one value of the result is made of.
    n: usize,
}

impl Plan {
    fn new(x: &Tensor, dims: Option<Vec<i64>>, keep: bool) -> Result<Self, String> {
        let dims = dims.filter(|dims| !dims.is_empty());
        let mut reduced = vec![dims.is_none(); x.shape.len()];
        for dim in dims.iter().flatten() {
            let dim = x.dim(*dim)?;
            if let Some(reduced) = reduced.get_mut(dim) {
                *reduced = true;
            }
        }
        let sizes = || x.shape.iter().zip(&reduced);
        let kept: Vec<usize> = sizes().map(|(n, r)| if *r { 1 } else { *n }).collect();
        let own: Vec<usize> = strides(&kept);
        let own: Vec<usize> = own
            .iter()
            .zip(&reduced)
            .map(|(s, r)| if *r { 0 } else { *s })
            .collect();
        let left = sizes().filter(|(_, r)| !**r).map(|(n, _)| *n).collect();
        Ok(Self {
            shape: if keep { kept.clone() } else { left },
            to: offsets(&x.shape, &own),
            n: sizes().filter(|(_, r)| **r).map(|(n, _)| *n).product(),
            kept,
        })
    }

    /// The plan of the arguments `dim` and `keepdim`, the first of which is at position `i`.
    fn of(x: &Tensor, args: &Args, i: usize) -> Result<Self, String> {
        Self::new(x, args.dims(i, "dim")?, args.flag(i + 1, "keepdim", false)?)
    }

    fn sum(&self, tape: &mut Tape, x: &Tensor) -> Result<Tensor, String> {
        tape.sum_to(x, &self.shape, self.to.clone())
    }

    fn mean(&self, tape: &mut Tape, x: &Tensor) -> Result<Tensor, String> {
        let sum = self.sum(tape, x)?;
        let n = self.n as f64;
        tape.map(&sum, Kind::Float, |v| (v / n, 1.0 / n))
    }

    /// A result in the shape that it can be broadcast with what it was made of.
    fn keep(&self, mut reduced: Tensor) -> Tensor {
        reduced.shape.clone_from(&self.kept);
        reduced
    }

    /// Where the value is that comes `before` all others, for each value of the result.
    fn first(&self, x: &Tensor, before: fn(f64, f64) -> bool) -> Result<Vec<usize>, String> {
        let n_results = self.kept.iter().product();
        let mut found = vec![usize::MAX; n_results];
        for (i, (to, v)) in self.to.iter().zip(x.data.iter()).enumerate() {
            let known = found[*to];
            let is_first = known == usize::MAX || {
                let best = x.data[known];
                !best.is_nan() && (v.is_nan() || before(*v, best))
            };
            if is_first {
                found[*to] = i;
            }
        }
        if found.contains(&usize::MAX) {
            return Err(format!("a tensor of shape {:?} has no such value", x.shape));
        }
        Ok(found)
    }
}

fn sum(tape: &mut Tape, args: &Args) -> Outcome {
    args.dtype()?;
    let x = args.tensor(tape, 0, "input")?;
    Plan::of(&x, args, 1)?.sum(tape, &x).map(Value::Tensor)
}

fn mean(tape: &mut Tape, args: &Args) -> Outcome {
    args.dtype()?;
    let x = args.tensor(tape, 0, "input")?;
    Plan::of(&x, args, 1)?.mean(tape, &x).map(Value::Tensor)
}

fn nansum(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let clean = tape.map(
        &x,
        x.kind,
        |v| if v.is_nan() { (0.0, 0.0) } else { (v, 1.0) },
    )?;
    Plan::of(&x, args, 1)?.sum(tape, &clean).map(Value::Tensor)
}

/// Variance with Bessel's correction, unless the arguments say otherwise.
fn variance_of(tape: &mut Tape, args: &Args) -> Result<Tensor, String> {
    let x = args.tensor(tape, 0, "input")?;
    let (mut at, mut unbiased) = (1, true);
    if let Some(Value::Number(flag, Kind::Bool)) = args.get(1, "unbiased") {
        (at, unbiased) = (2, *flag != 0.0);
    }
    let correction = args.keyword("correction").map(Value::number);
    let correction = correction
        .transpose()?
        .unwrap_or(f64::from(u8::from(unbiased)));
    let plan = Plan::new(
        &x,
        args.dims(at, "dim")?,
        args.flag(at + 1, "keepdim", false)?,
    )?;
    let mean = plan.mean(tape, &x)?;
    let mean = plan.keep(mean);
    let squares = tape.zip(&x, &mean, Kind::Float, |a, m| {
        let d = a - m;
        [d * d, 2.0 * d, -2.0 * d]
    })?;
    let sum = plan.sum(tape, &squares)?;
    let scale = 1.0 / (plan.n as f64 - correction).max(0.0);
    tape.map(&sum, Kind::Float, |v| (v * scale, scale))
}

fn variance(tape: &mut Tape, args: &Args) -> Outcome {
    variance_of(tape, args).map(Value::Tensor)
}

fn deviation(tape: &mut Tape, args: &Args) -> Outcome {
    let variance = variance_of(tape, args)?;
    let root = |v: f64| (v.sqrt(), 0.5 / v.sqrt());
    tape.map(&variance, Kind::Float, root).map(Value::Tensor)
}

fn norm(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let p = match args.get(1, "p") {
        None => 2.0,
        Some(Value::Text(name)) if name == "fro" => 2.0,
        Some(p) => p.number()?,
    };
    if p != 1.0 && p != 2.0 {
        return Err(format!("norms of order {p} are not supported: take 1 or 2"));
    }
    let plan = Plan::of(&x, args, 2)?;
    let powers = tape.map(&x, Kind::Float, |v| {
        if p == 1.0 {
            (v.abs(), if v == 0.0 { 0.0 } else { v.signum() })
        } else {
            (v * v, 2.0 * v)
        }
    })?;
    let sum = plan.sum(tape, &powers)?;
    if p == 1.0 {
        return Ok(Value::Tensor(sum));
    }
    let root = |v: f64| {
        let root = v.sqrt();
        (root, if root == 0.0 { 0.0 } else { 0.5 / root })
    };
    tape.map(&sum, Kind::Float, root).map(Value::Tensor)
}

/// Log of the sum of exponentials, kept in the shape to be broadcast.
fn log_sum_exp_of(tape: &mut Tape, x: &Tensor, plan: &Plan) -> Result<Tensor, String> {
    let places = plan.first(x, |a, b| a > b)?;
    let high = tape.gather(&Tape::detach(x), &plan.kept, places)?;
    let high = tape.map(&high, Kind::Float, |v| {
        (if v.is_finite() { v } else { 0.0 }, 0.0)
    })?;
    let shifted = tape.zip(x, &high, Kind::Float, |v, h| {
        let e = (v - h).exp();
        [e, e, 0.0]
    })?;
    let sum = tape.sum_to(&shifted, &plan.kept, plan.to.clone())?;
    tape.zip(&sum, &high, Kind::Float, |s, h| [s.ln() + h, 1.0 / s, 0.0])
}

fn log_sum_exp(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let plan = Plan::of(&x, args, 1)?;
    let mut reduced = log_sum_exp_of(tape, &x, &plan)?;
    reduced.shape = plan.shape;
    Ok(Value::Tensor(reduced))
}

fn log_softmax_of(tape: &mut Tape, args: &Args) -> Result<Tensor, String> {
    args.dtype()?;
    args.ignore(&["_stacklevel"]);
    let x = args.tensor(tape, 0, "input")?;
    let dim = args.integer(1, "dim")?.unwrap_or(-1);
    let plan = Plan::new(&x, Some(vec![dim]), true)?;
    let total = log_sum_exp_of(tape, &x, &plan)?;
    tape.zip(&x, &total, Kind::Float, |v, t| [v - t, 1.0, -1.0])
}

fn log_softmax(tape: &mut Tape, args: &Args) -> Outcome {
    log_softmax_of(tape, args).map(Value::Tensor)
}

fn softmax(tape: &mut Tape, args: &Args) -> Outcome {
    let logs = log_softmax_of(tape, args)?;
    tape.map(&logs, Kind::Float, |v| (v.exp(), v.exp()))
        .map(Value::Tensor)
}

fn running_sum(tape: &mut Tape, args: &Args) -> Outcome {
    args.dtype()?;
    let x = args.tensor(tape, 0, "input")?;
    let dim = x.dim(
        args.integer(1, "dim")?
            .ok_or("the argument \"dim\" is missing")?,
    )?;
    let (Some(n), Some(stride)) = (x.shape.get(dim), strides(&x.shape).get(dim).copied()) else {
        return Ok(Value::Tensor(x));
    };
    tape.running_sum(&x, (*n).max(1), stride.max(1))
        .map(Value::Tensor)
}

fn dot(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let y = args.tensor(tape, 1, "other")?;
    if x.shape.len() != 1 || x.shape != y.shape {
        return Err(format!(
            "shapes {:?} and {:?} have no dot product",
            x.shape, y.shape
        ));
    }
    let products = tape.zip(&x, &y, x.kind.max(y.kind), |a, b| [a * b, b, a])?;
    Plan::new(&products, None, false)?
        .sum(tape, &products)
        .map(Value::Tensor)
}

fn truth(tape: &mut Tape, args: &Args, name: &str) -> Result<(Tensor, Plan), String> {
    let x = Tape::detach(&args.tensor(tape, 0, "input")?);
    let marked = tape.map(&x, Kind::Bool, |v| (f64::from(u8::from(v != 0.0)), 0.0))?;
    let plan = Plan::new(&x, args.dims(1, name)?, args.flag(2, "keepdim", false)?)?;
    Ok((plan.sum(tape, &marked)?, plan))
}

fn any(tape: &mut Tape, args: &Args) -> Outcome {
    let (count, _) = truth(tape, args, "dim")?;
    let f = |v: f64| (f64::from(u8::from(v > 0.0)), 0.0);
    tape.map(&count, Kind::Bool, f).map(Value::Tensor)
}

fn all(tape: &mut Tape, args: &Args) -> Outcome {
    let (count, plan) = truth(tape, args, "dim")?;
    let n = plan.n as f64;
    let f = |v: f64| (f64::from(u8::from(v == n)), 0.0);
    tape.map(&count, Kind::Bool, f).map(Value::Tensor)
}

fn count_nonzero(tape: &mut Tape, args: &Args) -> Outcome {
    Ok(Value::Tensor(truth(tape, args, "dim")?.0))
}

/// `max` and `min`: of all values, along a dimension with their places, or of two tensors.
fn extremum(tape: &mut Tape, args: &Args, before: fn(f64, f64) -> bool) -> Outcome {
    if let Some(Value::Tensor(y)) = args.get(1, "other").cloned() {
        let x = args.tensor(tape, 0, "input")?;
        let kind = x.kind.max(y.kind);
        let larger = |a: f64, b: f64| match (a == b, before(a, b)) {
            (true, _) => [a, 0.5, 0.5],
            (_, true) => [a, 1.0, 0.0],
            _ => [b, 0.0, 1.0],
        };
        return tape.zip(&x, &y, kind, larger).map(Value::Tensor);
    }
    let Some(dim) = args.integer(1, "dim")? else {
        return outermost(tape, args, before);
    };
    let x = args.tensor(tape, 0, "input")?;
    let plan = Plan::new(&x, Some(vec![dim]), args.flag(2, "keepdim", false)?)?;
    let places = plan.first(&x, before)?;
    let along = coordinates(&x, dim, &places)?;
    let values = tape.gather(&x, &plan.shape, places)?;
    let indices = tape.constant(&plan.shape, Kind::Int, along)?;
    Ok(Value::List(vec![
        Value::Tensor(values),
        Value::Tensor(indices),
    ]))
}

/// The coordinates along a dimension of these places.
fn coordinates(x: &Tensor, dim: i64, places: &[usize]) -> Result<Vec<f64>, String> {
    let dim = x.dim(dim)?;
    let stride = strides(&x.shape).get(dim).copied().unwrap_or(1).max(1);
    let n = x.shape.get(dim).copied().unwrap_or(1).max(1);
    Ok(places.iter().map(|p| (p / stride % n) as f64).collect())
}

/// `amax` and `amin`, whose derivative is shared between all values that are the largest.
fn outermost(tape: &mut Tape, args: &Args, before: fn(f64, f64) -> bool) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let plan = Plan::of(&x, args, 1)?;
    let places = plan.first(&x, before)?;
    let best = tape.gather(&Tape::detach(&x), &plan.kept, places)?;
    let mut ties = vec![0.0; best.data.len()];
    for (v, to) in x.data.iter().zip(&plan.to) {
        if *v == best.data[*to] {
            ties[*to] += 1.0;
        }
    }
    let ties = tape.constant(&plan.kept, Kind::Float, ties)?;
    let best = tape.zip(&best, &ties, Kind::Float, |b, _| [b, 0.0, 0.0])?;
    let is_best = tape.zip(&Tape::detach(&x), &best, Kind::Bool, |v, b| {
        [f64::from(u8::from(v == b)), 0.0, 0.0]
    })?;
    let shares = tape.zip(&is_best, &ties, Kind::Float, |is, n| {
        [if is == 0.0 { 0.0 } else { is / n }, 0.0, 0.0]
    })?;
    let parts = tape.zip(&x, &shares, x.kind, |v, s| {
        if s == 0.0 { [0.0; 3] } else { [v * s, s, v] }
    })?;
    plan.sum(tape, &parts).map(Value::Tensor)
}

fn place_of(tape: &mut Tape, args: &Args, before: fn(f64, f64) -> bool) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dim = args.integer(1, "dim")?;
    let plan = Plan::new(&x, dim.map(|d| vec![d]), args.flag(2, "keepdim", false)?)?;
    let places = plan.first(&x, before)?;
    let along = match dim {
        Some(dim) => coordinates(&x, dim, &places)?,
        None => places.iter().map(|p| *p as f64).collect(),
    };
    tape.constant(&plan.shape, Kind::Int, along)
        .map(Value::Tensor)
}
