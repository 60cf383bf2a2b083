//! Operations on each value, or on pairs of values, alone.

use super::super::args::{Args, to_tensor};
use super::super::tape::Tape;
use super::super::value::{Kind, Tensor, Value, broadcast_offsets};
use super::{Gives, Op, Outcome};

/// Derivative of an extremum: shared where both arguments are one.
fn pick(first: bool, tie: bool) -> [f64; 2] {
    match (tie, first) {
        (true, _) => [0.5, 0.5],
        (_, true) => [1.0, 0.0],
        (_, false) => [0.0, 1.0],
    }
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `ln(1 + e^x)` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Nearest whole number, halves to even, as PyTorch rounds.
fn round(x: f64) -> f64 {
    x.round_ties_even()
}

/// Functions of one value.
pub(super) fn unary(name: &str) -> Option<Op> {
    let float = |f| Some(Op::Unary(f, Gives::Float));
    let same = |f| Some(Op::Unary(f, Gives::Same));
    match name {
        "exp" => float(|x| (x.exp(), x.exp())),
        "exp2" => float(|x| (x.exp2(), x.exp2() * std::f64::consts::LN_2)),
        "expm1" => float(|x| (x.exp_m1(), x.exp())),
        "log" => float(|x| (x.ln(), 1.0 / x)),
        "log1p" => float(|x| (x.ln_1p(), 1.0 / (1.0 + x))),
        "log2" => float(|x| (x.log2(), 1.0 / (x * std::f64::consts::LN_2))),
        "log10" => float(|x| (x.log10(), 1.0 / (x * std::f64::consts::LN_10))),
        "sqrt" => float(|x| (x.sqrt(), 0.5 / x.sqrt())),
        "rsqrt" => float(|x| (1.0 / x.sqrt(), -0.5 / (x * x.sqrt()))),
        "reciprocal" => float(|x| (1.0 / x, -1.0 / (x * x))),
        "sin" => float(|x| (x.sin(), x.cos())),
        "cos" => float(|x| (x.cos(), -x.sin())),
        "tanh" => float(|x| (x.tanh(), 1.0 - x.tanh() * x.tanh())),
        "atan" => float(|x| (x.atan(), 1.0 / (1.0 + x * x))),
        "sigmoid" | "expit" | "special_expit" => float(|x| (sigmoid(x), sigmoid(x) * sigmoid(-x))),
        "logsigmoid" | "log_sigmoid" => float(|x| (-softplus(-x), sigmoid(-x))),
        "silu" => float(|x| {
            let s = sigmoid(x);
            (x * s, s + x * s * (1.0 - s))
        }),
        "relu" => same(|x| (x.max(0.0), f64::from(u8::from(x > 0.0)))),
        "neg" | "negative" => same(|x| (-x, -1.0)),
        "pos" | "positive" => same(|x| (x, 1.0)),
        "abs" | "absolute" => same(|x| (x.abs(), if x == 0.0 { 0.0 } else { x.signum() })),
        "square" => same(|x| (x * x, 2.0 * x)),
        "sign" | "sgn" => same(|x| (if x == 0.0 { 0.0 } else { x.signum() }, 0.0)),
        "floor" => same(|x| (x.floor(), 0.0)),
        "ceil" => same(|x| (x.ceil(), 0.0)),
        "trunc" => same(|x| (x.trunc(), 0.0)),
        "round" => same(|x| (round(x), 0.0)),
        _ => None,
    }
}

/// Functions of two values.
pub(super) fn binary(name: &str) -> Option<Op> {
    let same = |f| Some(Op::Binary(f, Gives::Same));
    let float = |f| Some(Op::Binary(f, Gives::Float));
    match name {
        "mul" | "multiply" => same(|x, y| [x * y, y, x]),
        "truediv" | "div" | "divide" | "true_divide" => {
            float(|x, y| [x / y, 1.0 / y, -x / (y * y)])
        }
        "floordiv" | "floor_divide" => same(|x, y| [(x / y).floor(), 0.0, 0.0]),
        "mod" | "remainder" => same(|x, y| [x - y * (x / y).floor(), 1.0, -(x / y).floor()]),
        "pow" => same(power),
        "maximum" => same(|x, y| {
            let [dx, dy] = pick(x > y, x == y);
            [if x.is_nan() { x } else { x.max(y) }, dx, dy]
        }),
        "minimum" => same(|x, y| {
            let [dx, dy] = pick(x < y, x == y);
            [if x.is_nan() { x } else { x.min(y) }, dx, dy]
        }),
        "logaddexp" => float(|x, y| {
            let high = x.max(y);
            if high.is_infinite() {
                return [high, f64::NAN, f64::NAN];
            }
            let s = sigmoid(x - y);
            [high + (-(x - y).abs()).exp().ln_1p(), s, 1.0 - s]
        }),
        "atan2" => float(|x, y| {
            let squares = x * x + y * y;
            [x.atan2(y), y / squares, -x / squares]
        }),
        _ => None,
    }
}

fn power(x: f64, y: f64) -> [f64; 3] {
    let value = x.powf(y);
    let by_base = if y == 0.0 { 0.0 } else { y * x.powf(y - 1.0) };
    let by_exponent = if x == 0.0 && y >= 0.0 {
        0.0
    } else {
        value * x.ln()
    };
    [value, by_base, by_exponent]
}

/// Tests, comparisons and logic, whose results are truth values.
pub(super) fn logical(name: &str) -> Option<Op> {
    Some(match name {
        "gt" | "greater" => Op::Compare(|x, y| x > y),
        "ge" | "greater_equal" => Op::Compare(|x, y| x >= y),
        "lt" | "less" => Op::Compare(|x, y| x < y),
        "le" | "less_equal" => Op::Compare(|x, y| x <= y),
        "eq" => Op::Compare(|x, y| x == y),
        "ne" | "not_equal" => Op::Compare(|x, y| x != y),
        "and_" | "logical_and" | "bitwise_and" => Op::Compare(|x, y| x != 0.0 && y != 0.0),
        "or_" | "logical_or" | "bitwise_or" => Op::Compare(|x, y| x != 0.0 || y != 0.0),
        "xor" | "logical_xor" | "bitwise_xor" => Op::Compare(|x, y| (x != 0.0) != (y != 0.0)),
        "invert" | "logical_not" | "bitwise_not" | "not_" => Op::Test(|x| x == 0.0),
        "isnan" => Op::Test(f64::is_nan),
        "isinf" => Op::Test(f64::is_infinite),
        "isfinite" => Op::Test(f64::is_finite),
        "add" => Op::Call(add),
        "sub" | "subtract" => Op::Call(sub),
        "clamp" | "clip" => Op::Call(clamp),
        "clamp_min" => Op::Call(clamp_min),
        "clamp_max" => Op::Call(clamp_max),
        "where" => Op::Call(select),
        "masked_fill" => Op::Call(masked_fill),
        "nan_to_num" => Op::Call(nan_to_num),
        "softplus" => Op::Call(call_softplus),
        "leaky_relu" => Op::Call(leaky_relu),
        _ => return None,
    })
}

pub(super) fn call_unary(
    tape: &mut Tape,
    args: &Args,
    f: fn(f64) -> (f64, f64),
    gives: Gives,
) -> Outcome {
    // The result is the same.
    args.ignore(&["inplace"]);
    if args.are_numbers(1)
        && let Value::Number(x, kind) = args.value(0, "input")?
    {
        return Ok(Value::Number(f(*x).0, gives.kind(*kind)));
    }
    let x = args.tensor(tape, 0, "input")?;
    tape.map(&x, gives.kind(x.kind), f).map(Value::Tensor)
}

pub(super) fn call_binary(
    tape: &mut Tape,
    args: &Args,
    f: fn(f64, f64) -> [f64; 3],
    gives: Gives,
) -> Outcome {
    args.ignore(&["rounding_mode"]);
    if args.get(2, "rounding_mode").is_some() {
        return Err("rounding_mode is not supported: use floor_divide".into());
    }
    combine(tape, args, f, gives)
}

fn combine(
    tape: &mut Tape,
    args: &Args,
    f: impl Fn(f64, f64) -> [f64; 3],
    gives: Gives,
) -> Outcome {
    if args.are_numbers(2)
        && let (Value::Number(x, a), Value::Number(y, b)) =
            (args.value(0, "input")?, args.value(1, "other")?)
    {
        return Ok(Value::Number(f(*x, *y)[0], gives.kind(*a.max(b))));
    }
    let x = args.tensor(tape, 0, "input")?;
    let name = if args.get(1, "exponent").is_some() {
        "exponent"
    } else {
        "other"
    };
    let y = args.tensor(tape, 1, name)?;
    let kind = gives.kind(x.kind.max(y.kind));
    tape.zip(&x, &y, kind, f).map(Value::Tensor)
}

pub(super) fn call_test(tape: &mut Tape, args: &Args, f: fn(f64) -> bool) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let data = x.data.iter().map(|v| f64::from(u8::from(f(*v)))).collect();
    tape.constant(&x.shape, Kind::Bool, data).map(Value::Tensor)
}

pub(super) fn call_compare(tape: &mut Tape, args: &Args, f: fn(f64, f64) -> bool) -> Outcome {
    let truth = |x, y| [f64::from(u8::from(f(x, y))), 0.0, 0.0];
    if args.are_numbers(2) {
        return combine(tape, args, truth, Gives::Same);
    }
    let x = Tape::detach(&args.tensor(tape, 0, "input")?);
    let y = Tape::detach(&args.tensor(tape, 1, "other")?);
    tape.zip(&x, &y, Kind::Bool, truth).map(Value::Tensor)
}

fn add(tape: &mut Tape, args: &Args) -> Outcome {
    if let (Some(Value::List(a)), Some(Value::List(b))) =
        (args.get(0, "input"), args.get(1, "other"))
    {
        return Value::list(a.iter().chain(b).cloned().collect());
    }
    let alpha = args.number(2, "alpha")?.unwrap_or(1.0);
    combine(tape, args, |x, y| [x + alpha * y, 1.0, alpha], Gives::Same)
}

fn sub(tape: &mut Tape, args: &Args) -> Outcome {
    let alpha = args.number(2, "alpha")?.unwrap_or(1.0);
    combine(tape, args, |x, y| [x - alpha * y, 1.0, -alpha], Gives::Same)
}

/// A bound that is missing, a number, or a tensor.
fn bounded(tape: &mut Tape, x: Value, args: &Args, i: usize, name: &str, low: bool) -> Outcome {
    let Some(bound) = args.get(i, name).cloned() else {
        return Ok(x);
    };
    let x = to_tensor(tape, &x)?;
    let bound = to_tensor(tape, &bound)?;
    let kind = x.kind.max(bound.kind);
    let clamped = tape.zip(&x, &bound, kind, |x, b| {
        // Where both are one, the derivative is that of the value.
        let outside = if low { x < b } else { x > b };
        if outside {
            [b, 0.0, 1.0]
        } else {
            [x, 1.0, 0.0]
        }
    })?;
    Ok(Value::Tensor(clamped))
}

fn clamp(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.value(0, "input")?.clone();
    let x = bounded(tape, x, args, 1, "min", true)?;
    bounded(tape, x, args, 2, "max", false)
}

fn clamp_min(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.value(0, "input")?.clone();
    bounded(tape, x, args, 1, "min", true)
}

fn clamp_max(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.value(0, "input")?.clone();
    bounded(tape, x, args, 1, "max", false)
}

fn select(tape: &mut Tape, args: &Args) -> Outcome {
    let condition = args.tensor(tape, 0, "condition")?;
    let x = args.tensor(tape, 1, "input")?;
    let y = args.tensor(tape, 2, "other")?;
    choose(tape, &condition, &x, &y)
}

fn masked_fill(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let mask = args.tensor(tape, 1, "mask")?;
    let value = args.tensor(tape, 2, "value")?;
    choose(tape, &mask, &value, &x)
}

/// `x` where the condition holds, otherwise `y`; an infinity that is not chosen does no harm.
fn choose(tape: &mut Tape, condition: &Tensor, x: &Tensor, y: &Tensor) -> Outcome {
    let condition = Tape::detach(condition);
    let kind = x.kind.max(y.kind);
    let blank = |_: f64, v: f64| [v, 0.0, 1.0];
    // Everything is brought to one shape first, so that values can be picked by place.
    let (x, y) = (
        tape.zip(&condition, x, kind, blank)?,
        tape.zip(&condition, y, kind, blank)?,
    );
    let (x, y) = (
        tape.zip(&y, &x, kind, |_, v| [v, 0.0, 1.0])?,
        tape.zip(&x, &y, kind, |_, v| [v, 0.0, 1.0])?,
    );
    let shape = x.shape.clone();
    let at = broadcast_offsets(&condition.shape, &shape);
    let n = at.len();
    let places = at.iter().enumerate();
    let places = places.map(|(i, c)| if condition.data[*c] == 0.0 { i + n } else { i });
    let places = places.collect();
    let both = tape.chain(&[x, y])?;
    tape.gather(&both, &shape, places).map(Value::Tensor)
}

fn nan_to_num(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let nan = args.number(1, "nan")?.unwrap_or(0.0);
    let high = args.number(2, "posinf")?.unwrap_or(f64::from(f32::MAX));
    let low = args.number(3, "neginf")?.unwrap_or(f64::from(f32::MIN));
    let f = |v: f64| match v {
        v if v.is_nan() => (nan, 0.0),
        f64::INFINITY => (high, 0.0),
        f64::NEG_INFINITY => (low, 0.0),
        v => (v, 1.0),
    };
    tape.map(&x, x.kind, f).map(Value::Tensor)
}

fn call_softplus(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let beta = args.number(1, "beta")?.unwrap_or(1.0);
    let threshold = args.number(2, "threshold")?.unwrap_or(20.0);
    let f = |v: f64| {
        if v * beta > threshold {
            (v, 1.0)
        } else {
            (softplus(v * beta) / beta, sigmoid(v * beta))
        }
    };
    tape.map(&x, Kind::Float, f).map(Value::Tensor)
}

fn leaky_relu(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    args.ignore(&["inplace"]);
    let slope = args.number(1, "negative_slope")?.unwrap_or(0.01);
    let f = |v: f64| {
        if v > 0.0 {
            (v, 1.0)
        } else {
            (v * slope, slope)
        }
    };
    tape.map(&x, Kind::Float, f).map(Value::Tensor)
}
