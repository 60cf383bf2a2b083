//! Operations that make tensors of nothing, convert them, or tell about them.

use super::super::args::Args;
use super::super::tape::Tape;
use super::super::value::{Kind, Tensor, Value};
use super::{Op, Outcome};

/// Creation, conversion and attributes.
pub(super) fn lookup(name: &str) -> Option<Op> {
    Some(Op::Call(match name {
        "zeros_like" => |t, a| like(t, a, Some(0.0)),
        "ones_like" => |t, a| like(t, a, Some(1.0)),
        "full_like" => |t, a| like(t, a, None),
        "zeros" => |t, a| filled(t, a, 0.0),
        "ones" => |t, a| filled(t, a, 1.0),
        "full" => full,
        "arange" => arange,
        "tensor" | "as_tensor" | "scalar_tensor" => tensor,
        "detach" => |t, a| Ok(Value::Tensor(Tape::detach(&a.tensor(t, 0, "input")?))),
        "clone" | "contiguous" | "cpu" => same,
        "float" | "double" => |t, a| cast(t, a, Kind::Float),
        "long" | "int" => |t, a| cast(t, a, Kind::Int),
        "bool" => |t, a| cast(t, a, Kind::Bool),
        "to" | "type" => to,
        "type_as" => type_as,
        "size" => size,
        "dim" | "ndimension" => |t, a| Ok(Value::int(a.tensor(t, 0, "input")?.shape.len())),
        "numel" | "nelement" => |t, a| Ok(Value::int(a.tensor(t, 0, "input")?.data.len())),
        "getattr" => attribute,
        _ => return None,
    }))
}

fn converted(tape: &mut Tape, x: &Tensor, kind: Kind) -> Result<Tensor, String> {
    match (x.kind, kind) {
        (from, to) if from == to => Ok(x.clone()),
        (_, Kind::Float) => tape.map(x, kind, |v| (v, 1.0)),
        (_, Kind::Int) => tape.map(&Tape::detach(x), kind, |v| (v.trunc(), 0.0)),
        (_, Kind::Bool) => tape.map(&Tape::detach(x), kind, |v| {
            (f64::from(u8::from(v != 0.0)), 0.0)
        }),
    }
}

fn cast(tape: &mut Tape, args: &Args, kind: Kind) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    converted(tape, &x, kind).map(Value::Tensor)
}

fn same(tape: &mut Tape, args: &Args) -> Outcome {
    args.ignore(&["memory_format"]);
    args.tensor(tape, 0, "input").map(Value::Tensor)
}

/// `to` with a dtype, another tensor or a device, in any order.
fn to(tape: &mut Tape, args: &Args) -> Outcome {
    let mut x = args.tensor(tape, 0, "input")?;
    let named = args.dtype()?;
    args.ignore(&["device", "copy", "non_blocking", "memory_format"]);
    for value in args.rest(1, "other") {
        match value {
            Value::Kind(kind) => x = converted(tape, &x, kind)?,
            Value::Tensor(other) => x = converted(tape, &x, other.kind)?,
            Value::Place | Value::Number(_, Kind::Bool) | Value::None | Value::Text(_) => {}
            other => return Err(format!("a tensor does not become {}", other.name())),
        }
    }
    match named {
        Some(kind) => converted(tape, &x, kind).map(Value::Tensor),
        None => Ok(Value::Tensor(x)),
    }
}

fn type_as(tape: &mut Tape, args: &Args) -> Outcome {
    let (x, other) = (
        args.tensor(tape, 0, "input")?,
        args.tensor(tape, 1, "other")?,
    );
    converted(tape, &x, other.kind).map(Value::Tensor)
}

/// Arguments of a creation that make no difference here.
fn ignore_place(args: &Args) {
    args.ignore(&[
        "device",
        "layout",
        "memory_format",
        "requires_grad",
        "pin_memory",
    ]);
}

fn like(tape: &mut Tape, args: &Args, value: Option<f64>) -> Outcome {
    ignore_place(args);
    let x = args.tensor(tape, 0, "input")?;
    let value = match value {
        Some(value) => value,
        None => args.value(1, "fill_value")?.number()?,
    };
    let kind = args.dtype()?.unwrap_or(x.kind);
    tape.constant(&x.shape, kind, vec![value; x.data.len()])
        .map(Value::Tensor)
}

fn sizes(values: &[Value]) -> Result<Vec<usize>, String> {
    let size = |value: &Value| {
        let n = value.integer()?;
        usize::try_from(n).map_err(|_| format!("size {n} is below 0"))
    };
    values.iter().map(size).collect()
}

fn constant(tape: &mut Tape, shape: &[usize], kind: Kind, value: f64) -> Outcome {
    // Before memory is taken.
    let n = tape.reserve(shape)?;
    tape.constant(shape, kind, vec![value; n])
        .map(Value::Tensor)
}

fn filled(tape: &mut Tape, args: &Args, value: f64) -> Outcome {
    ignore_place(args);
    let shape = sizes(&args.rest(0, "size"))?;
    let kind = args.dtype()?.unwrap_or(Kind::Float);
    constant(tape, &shape, kind, value)
}

fn full(tape: &mut Tape, args: &Args) -> Outcome {
    ignore_place(args);
    let shape = match args.value(0, "size")? {
        Value::List(values) => sizes(values)?,
        one => sizes(std::slice::from_ref(one))?,
    };
    let value = args.value(1, "fill_value")?;
    let natural = match value {
        Value::Number(_, kind) => *kind,
        _ => Kind::Float,
    };
    let kind = args.dtype()?.unwrap_or(natural);
    constant(tape, &shape, kind, value.number()?)
}

fn arange(tape: &mut Tape, args: &Args) -> Outcome {
    ignore_place(args);
    let numbers = args.rest(0, "end");
    let is_float = |v: &Value| matches!(v, Value::Number(_, Kind::Float));
    let natural = if numbers.iter().any(is_float) {
        Kind::Float
    } else {
        Kind::Int
    };
    let values: Vec<f64> = numbers
        .iter()
        .map(Value::number)
        .collect::<Result<_, _>>()?;
    let (start, end, step) = match *values {
        [end] => (0.0, end, 1.0),
        [start, end] => (start, end, 1.0),
        [start, end, step] => (start, end, step),
        _ => return Err("arange takes end, or start, end and step".into()),
    };
    let n = ((end - start) / step).ceil();
    if step == 0.0 || n.is_nan() || n < 0.0 {
        return Err(format!(
            "there is no way from {start} to {end} in steps of {step}"
        ));
    }
    let n = tape.reserve(&[n as usize])?;
    let values = (0..n).map(|i| start + i as f64 * step).collect();
    let kind = args.dtype()?.unwrap_or(natural);
    tape.constant(&[n], kind, values).map(Value::Tensor)
}

fn tensor(tape: &mut Tape, args: &Args) -> Outcome {
    ignore_place(args);
    let dtype = args.dtype()?;
    let made = match args.value(0, "data")?.clone() {
        Value::List(values) => {
            let numbers: Vec<f64> = values.iter().map(Value::number).collect::<Result<_, _>>()?;
            let kind = |v: &Value| match v {
                Value::Number(_, kind) => *kind,
                _ => Kind::Float,
            };
            let kind = values.iter().map(kind).max().unwrap_or(Kind::Float);
            tape.constant(&[numbers.len()], kind, numbers)?
        }
        value => super::super::args::to_tensor(tape, &value)?,
    };
    match dtype {
        Some(kind) => converted(tape, &made, kind).map(Value::Tensor),
        None => Ok(Value::Tensor(made)),
    }
}

fn size(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    match args.integer(1, "dim")? {
        None => Ok(Value::ints(&x.shape)),
        Some(dim) => {
            let dim = x.dim(dim)?;
            let n = x.shape.get(dim).ok_or("a number has no size")?;
            Ok(Value::int(*n))
        }
    }
}

fn attribute(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let name = args.text(1, "name", "")?;
    match name.as_str() {
        "shape" => Ok(Value::ints(&x.shape)),
        "ndim" => Ok(Value::int(x.shape.len())),
        "dtype" => Ok(Value::Kind(x.kind)),
        "device" | "layout" => Ok(Value::Place),
        "T" | "mT" if x.shape.len() < 2 => Ok(Value::Tensor(x)),
        other => Err(format!("the attribute {other:?} is not supported")),
    }
}
