//! Losses of `torch.nn.functional`, and products of matrices.

use super::super::args::Args;
use super::super::tape::Tape;
use super::super::value::{Kind, Tensor, Value, offsets};
use super::{Op, Outcome};

/// Losses and products.
pub(super) fn lookup(name: &str) -> Option<Op> {
    Some(Op::Call(match name {
        "mse_loss" => |t, a| {
            pointwise(t, a, |x, y| {
                [(x - y) * (x - y), 2.0 * (x - y), 2.0 * (y - x)]
            })
        },
        "l1_loss" => |t, a| {
            pointwise(t, a, |x, y| {
                let sign = if x == y { 0.0 } else { (x - y).signum() };
                [(x - y).abs(), sign, -sign]
            })
        },
        "huber_loss" => |t, a| bent(t, a, "delta", false),
        "smooth_l1_loss" => |t, a| bent(t, a, "beta", true),
        "matmul" | "mv" | "mm" => matmul,
        _ => return None,
    }))
}

fn reduced(tape: &mut Tape, args: &Args, all: &Tensor) -> Outcome {
    args.ignore(&["reduction", "size_average", "reduce"]);
    let how = match args.keyword("reduction") {
        None => "mean",
        Some(Value::Text(how)) => how.as_str(),
        Some(other) => return Err(format!("reduction is {}", other.name())),
    };
    let n = all.data.len();
    let scale = match how {
        "none" => return Ok(Value::Tensor(all.clone())),
        "sum" => 1.0,
        "mean" => 1.0 / n as f64,
        other => return Err(format!("reduction {other:?} is not mean, sum or none")),
    };
    let sum = tape.sum_to(all, &[], vec![0; n])?;
    tape.map(&sum, Kind::Float, |v| (v * scale, scale))
        .map(Value::Tensor)
}

fn pointwise(tape: &mut Tape, args: &Args, f: impl Fn(f64, f64) -> [f64; 3]) -> Outcome {
    let (x, y) = (
        args.tensor(tape, 0, "input")?,
        args.tensor(tape, 1, "target")?,
    );
    let all = tape.zip(&x, &y, Kind::Float, f)?;
    reduced(tape, args, &all)
}

/// Quadratic up to a bound and linear beyond it; scaled down by the bound if `smooth`.
fn bent(tape: &mut Tape, args: &Args, name: &str, smooth: bool) -> Outcome {
    let bound = args.keyword(name).map(Value::number);
    let bound = bound.transpose()?.unwrap_or(1.0);
    let scale = if smooth { 1.0 / bound } else { 1.0 };
    pointwise(tape, args, |x, y| {
        let d = x - y;
        if d.abs() < bound {
            [0.5 * d * d * scale, d * scale, -d * scale]
        } else {
            let slope = bound * d.signum() * scale;
            [bound * (d.abs() - 0.5 * bound) * scale, slope, -slope]
        }
    })
}

/// Products of vectors and matrices.
fn matmul(tape: &mut Tape, args: &Args) -> Outcome {
    let (x, y) = (
        args.tensor(tape, 0, "input")?,
        args.tensor(tape, 1, "other")?,
    );
    let (m, k) = match *x.shape {
        [k] => (None, k),
        [m, k] => (Some(m), k),
        _ => return Err(format!("a tensor of shape {:?} is no matrix", x.shape)),
    };
    let (inner, n) = match *y.shape {
        [inner] => (inner, None),
        [inner, n] => (inner, Some(n)),
        _ => return Err(format!("a tensor of shape {:?} is no matrix", y.shape)),
    };
    if k != inner {
        return Err(format!(
            "shapes {:?} and {:?} have no product",
            x.shape, y.shape
        ));
    }
    let full = [m.unwrap_or(1), n.unwrap_or(1), k];
    tape.reserve(&full)?;
    let left = tape.gather(&x, &full, offsets(&full, &[k, 0, 1]))?;
    let right = tape.gather(&y, &full, offsets(&full, &[0, 1, full[1]]))?;
    let products = tape.zip(&left, &right, Kind::Float, |a, b| [a * b, b, a])?;
    let shape: Vec<usize> = m.into_iter().chain(n).collect();
    let to = offsets(&full, &[full[1], 1, 0]);
    tape.sum_to(&products, &shape, to).map(Value::Tensor)
}
