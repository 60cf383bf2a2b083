//! Operations that move values, each of which is one of its argument's.

use super::super::args::{Args, to_tensor};
use super::super::tape::Tape;
use super::super::value::{Kind, Tensor, Value, broadcast, broadcast_offsets, offsets, strides};
use super::{Op, Outcome};

/// Views, pieces and arrangements.
pub(super) fn lookup(name: &str) -> Option<Op> {
    Some(Op::Call(match name {
        "reshape" | "view" => reshape,
        "flatten" | "ravel" => flatten,
        "view_as" | "reshape_as" => view_as,
        "unsqueeze" => unsqueeze,
        "squeeze" => squeeze,
        "transpose" | "swapaxes" => transpose,
        "t" => turn,
        "permute" => permute,
        "expand" => expand,
        "broadcast_to" => expand,
        "expand_as" => expand_as,
        "getitem" => get_item,
        "narrow" => narrow,
        "select" => select,
        "index_select" => index_select,
        "gather" => gather,
        "masked_select" => masked_select,
        "flip" => flip,
        "diff" => diff,
        "stack" => stack,
        "cat" | "concat" | "concatenate" => cat,
        "sort" => sort,
        "topk" => top,
        _ => return None,
    }))
}

/// The same values in another shape.
fn reshaped(tape: &mut Tape, x: &Tensor, shape: &[usize]) -> Result<Tensor, String> {
    let n = shape.iter().copied().fold(1, usize::saturating_mul);
    if n != x.data.len() {
        return Err(format!("shape {:?} cannot be made {shape:?}", x.shape));
    }
    tape.gather(x, shape, (0..n).collect())
}

/// Values at a start, with these distances along the dimensions of `shape`.
fn strided(
    tape: &mut Tape,
    x: &Tensor,
    shape: &[usize],
    distances: &[usize],
    start: usize,
) -> Result<Tensor, String> {
    let places = offsets(shape, distances);
    tape.gather(x, shape, places.iter().map(|i| i + start).collect())
}

fn reshape(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let asked: Vec<i64> = args
        .rest(1, "shape")
        .iter()
        .map(Value::integer)
        .collect::<Result<_, _>>()?;
    let sizes = asked.iter().filter(|n| **n >= 0);
    let known = sizes.fold(1_usize, |all, n| all.saturating_mul(*n as usize));
    let open = asked.iter().filter(|n| **n < 0).count();
    if open > 1 || (open == 1 && known == 0) {
        return Err(format!("shape {asked:?} does not say how large it is"));
    }
    let size = |n: &i64| {
        if *n < 0 {
            x.data.len() / known
        } else {
            *n as usize
        }
    };
    let shape: Vec<usize> = asked.iter().map(size).collect();
    reshaped(tape, &x, &shape).map(Value::Tensor)
}

fn flatten(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    if x.shape.is_empty() {
        return reshaped(tape, &x, &[1]).map(Value::Tensor);
    }
    let from = x.dim(args.integer(1, "start_dim")?.unwrap_or(0))?;
    let to = x.dim(args.integer(2, "end_dim")?.unwrap_or(-1))?;
    if from > to {
        return Err(format!("dimensions {from} to {to} are in the wrong order"));
    }
    let mut shape = x.shape[..from].to_vec();
    shape.push(x.shape[from..=to].iter().product());
    shape.extend_from_slice(&x.shape[to + 1..]);
    reshaped(tape, &x, &shape).map(Value::Tensor)
}

fn view_as(tape: &mut Tape, args: &Args) -> Outcome {
    let (x, other) = (
        args.tensor(tape, 0, "input")?,
        args.tensor(tape, 1, "other")?,
    );
    reshaped(tape, &x, &other.shape).map(Value::Tensor)
}

fn unsqueeze(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dim = args.value(1, "dim")?.integer()?;
    let n = x.shape.len() as i64 + 1;
    if dim < -n || dim >= n {
        return Err(format!(
            "there is no dimension {dim} to add to {:?}",
            x.shape
        ));
    }
    let mut shape = x.shape.clone();
    shape.insert(dim.rem_euclid(n) as usize, 1);
    reshaped(tape, &x, &shape).map(Value::Tensor)
}

fn squeeze(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dims = args.dims(1, "dim")?;
    let dims = dims.map(|dims| {
        dims.iter()
            .map(|d| x.dim(*d))
            .collect::<Result<Vec<_>, _>>()
    });
    let dims = dims.transpose()?;
    let stays =
        |(i, n): &(usize, &usize)| **n != 1 || dims.as_ref().is_some_and(|d| !d.contains(i));
    let shape: Vec<usize> = x
        .shape
        .iter()
        .enumerate()
        .filter(stays)
        .map(|(_, n)| *n)
        .collect();
    reshaped(tape, &x, &shape).map(Value::Tensor)
}

fn permuted(tape: &mut Tape, x: &Tensor, order: &[usize]) -> Outcome {
    let own = strides(&x.shape);
    let shape: Vec<usize> = order.iter().map(|d| x.shape[*d]).collect();
    let distances: Vec<usize> = order.iter().map(|d| own[*d]).collect();
    strided(tape, x, &shape, &distances, 0).map(Value::Tensor)
}

fn swapped(tape: &mut Tape, x: &Tensor, a: i64, b: i64) -> Outcome {
    let (a, b) = (x.dim(a)?, x.dim(b)?);
    let mut order: Vec<usize> = (0..x.shape.len()).collect();
    if a < order.len() && b < order.len() {
        order.swap(a, b);
    }
    permuted(tape, x, &order)
}

fn transpose(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let (a, b) = (
        args.value(1, "dim0")?.integer()?,
        args.value(2, "dim1")?.integer()?,
    );
    swapped(tape, &x, a, b)
}

/// The transpose of a matrix; fewer dimensions stay as they are.
fn turn(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    match x.shape.len() {
        0 | 1 => Ok(Value::Tensor(x)),
        2 => swapped(tape, &x, 0, 1),
        n => Err(format!("a tensor of {n} dimensions has no transpose")),
    }
}

fn permute(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let asked = args.rest(1, "dims");
    let order = asked.iter().map(|d| x.dim(d.integer()?));
    let order: Vec<usize> = order.collect::<Result<_, _>>()?;
    let mut sorted = order.clone();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..x.shape.len()) {
        return Err(format!(
            "{order:?} is no order of the dimensions of {:?}",
            x.shape
        ));
    }
    permuted(tape, &x, &order)
}

fn expanded(tape: &mut Tape, x: &Tensor, shape: &[usize]) -> Outcome {
    if shape.len() < x.shape.len() || broadcast(&x.shape, shape)? != shape {
        return Err(format!(
            "shape {:?} cannot be expanded to {shape:?}",
            x.shape
        ));
    }
    // Before the places are listed, which are as many.
    tape.reserve(shape)?;
    let places = broadcast_offsets(&x.shape, shape);
    tape.gather(x, shape, places).map(Value::Tensor)
}

fn expand(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let asked: Vec<i64> = args
        .rest(1, "size")
        .iter()
        .map(Value::integer)
        .collect::<Result<_, _>>()?;
    let missing = asked.len().saturating_sub(x.shape.len());
    let size = |(i, n): (usize, &i64)| match usize::try_from(*n) {
        Ok(n) => Ok(n),
        Err(_) if i >= missing => Ok(x.shape[i - missing]),
        Err(_) => Err(format!("size {n} of a new dimension is no size")),
    };
    let shape: Vec<usize> = asked
        .iter()
        .enumerate()
        .map(size)
        .collect::<Result<_, _>>()?;
    expanded(tape, &x, &shape)
}

fn expand_as(tape: &mut Tape, args: &Args) -> Outcome {
    let (x, other) = (
        args.tensor(tape, 0, "input")?,
        args.tensor(tape, 1, "other")?,
    );
    expanded(tape, &x, &other.shape)
}

/// A piece of a tensor, or an item of a list.
fn get_item(tape: &mut Tape, args: &Args) -> Outcome {
    let index = args.value(1, "index").cloned().unwrap_or(Value::None);
    match args.value(0, "input")?.clone() {
        Value::List(items) => item(&items, &index),
        Value::Dict(items) => match &index {
            Value::Text(key) => items
                .get(key)
                .cloned()
                .ok_or_else(|| format!("there is no {key:?}")),
            other => Err(format!("{} is no key", other.name())),
        },
        Value::Tensor(x) => {
            let parts = match index {
                Value::List(parts) => parts,
                one => vec![one],
            };
            index_tensor(tape, &x, &parts)
        }
        other => Err(format!("{} has no items", other.name())),
    }
}

fn item(items: &[Value], index: &Value) -> Outcome {
    let n = items.len();
    if let Value::Slice(slice) = index {
        let (start, len, step) = span(slice, n)?;
        let picked = (0..len).map(|i| items[start + i * step].clone());
        return Ok(Value::List(picked.collect()));
    }
    let i = index.integer()?;
    let place = if i < 0 { i + n as i64 } else { i };
    let found = usize::try_from(place).ok().and_then(|i| items.get(i));
    found
        .cloned()
        .ok_or_else(|| format!("there is no item {i} of {n}"))
}

/// Start, length and step of a slice of `n` values.
fn span([start, stop, step]: &[Option<i64>; 3], n: usize) -> Result<(usize, usize, usize), String> {
    let step = step.unwrap_or(1);
    let Some(step) = usize::try_from(step).ok().filter(|step| *step > 0) else {
        return Err(format!("a slice with the step {step} is not supported"));
    };
    let n = n as i64;
    let place = |i: i64| (if i < 0 { i + n } else { i }).clamp(0, n) as usize;
    let (start, stop) = (start.map_or(0, place), stop.map_or(n as usize, place));
    Ok((start, stop.saturating_sub(start).div_ceil(step), step))
}

fn index_tensor(tape: &mut Tape, x: &Tensor, parts: &[Value]) -> Outcome {
    if let [Value::Tensor(index)] = parts {
        return index_by_tensor(tape, x, index);
    }
    let takes = parts
        .iter()
        .filter(|p| !matches!(p, Value::None | Value::Ellipsis))
        .count();
    if takes > x.shape.len() {
        return Err(format!(
            "{takes} indices for a tensor of shape {:?}",
            x.shape
        ));
    }
    let own = strides(&x.shape);
    let (mut shape, mut distances, mut start, mut dim) = (Vec::new(), Vec::new(), 0, 0);
    let mut rest = takes;
    for part in parts {
        match part {
            Value::None => {
                shape.push(1);
                distances.push(0);
                continue;
            }
            Value::Ellipsis => {
                while dim < x.shape.len() - rest {
                    shape.push(x.shape[dim]);
                    distances.push(own[dim]);
                    dim += 1;
                }
                continue;
            }
            Value::Slice(slice) => {
                let (from, len, step) = span(slice, x.shape[dim])?;
                start += from * own[dim];
                shape.push(len);
                distances.push(own[dim] * step);
            }
            index => start += place(index.integer()?, x.shape[dim])? * own[dim],
        }
        dim += 1;
        rest -= 1;
    }
    shape.extend_from_slice(&x.shape[dim..]);
    distances.extend_from_slice(&own[dim..]);
    strided(tape, x, &shape, &distances, start).map(Value::Tensor)
}

fn place(i: i64, n: usize) -> Result<usize, String> {
    let place = if i < 0 { i + n as i64 } else { i };
    let found = usize::try_from(place).ok().filter(|p| *p < n);
    found.ok_or_else(|| format!("there is no place {i} of {n}"))
}

/// The rows that a list of places or a mask picks.
fn index_by_tensor(tape: &mut Tape, x: &Tensor, index: &Tensor) -> Outcome {
    if index.kind == Kind::Bool {
        return masked(tape, x, index);
    }
    let Some((rows, row)) = x.shape.split_first() else {
        return Err("a number has no places".into());
    };
    let width: usize = row.iter().product();
    let mut places = Vec::new();
    tape.reserve(&[index.data.len(), width])?;
    for i in index.data.iter() {
        let start = place(Value::Number(*i, index.kind).integer()?, *rows)? * width;
        places.extend(start..start + width);
    }
    let shape: Vec<usize> = index.shape.iter().chain(row).copied().collect();
    tape.gather(x, &shape, places).map(Value::Tensor)
}

fn masked(tape: &mut Tape, x: &Tensor, mask: &Tensor) -> Outcome {
    if !x.shape.starts_with(&mask.shape) {
        return Err(format!(
            "a mask of shape {:?} for a tensor of shape {:?}",
            mask.shape, x.shape
        ));
    }
    let row = &x.shape[mask.shape.len()..];
    let width: usize = row.iter().product();
    let marked: Vec<usize> = (0..mask.data.len())
        .filter(|i| mask.data[*i] != 0.0)
        .collect();
    let places = marked
        .iter()
        .flat_map(|i| i * width..(i + 1) * width)
        .collect();
    let shape: Vec<usize> = std::iter::once(marked.len())
        .chain(row.iter().copied())
        .collect();
    tape.gather(x, &shape, places).map(Value::Tensor)
}

fn masked_select(tape: &mut Tape, args: &Args) -> Outcome {
    let (x, mask) = (
        args.tensor(tape, 0, "input")?,
        args.tensor(tape, 1, "mask")?,
    );
    if x.shape != mask.shape {
        return Err(format!(
            "a mask of shape {:?} for a tensor of shape {:?}",
            mask.shape, x.shape
        ));
    }
    masked(tape, &x, &mask)
}

/// `len` values along a dimension, from `start` on.
fn piece(
    tape: &mut Tape,
    x: &Tensor,
    dim: usize,
    start: usize,
    len: usize,
) -> Result<Tensor, String> {
    let own = strides(&x.shape);
    if x.shape
        .get(dim)
        .is_none_or(|n| start.saturating_add(len) > *n)
    {
        return Err(format!(
            "{len} values from {start} on are not in {:?}",
            x.shape
        ));
    }
    let mut shape = x.shape.clone();
    shape[dim] = len;
    strided(tape, x, &shape, &own, start * own[dim])
}

fn narrow(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dim = x.dim(args.value(1, "dim")?.integer()?)?;
    let n = x.shape.get(dim).copied().unwrap_or(0);
    let start = args.value(2, "start")?.integer()?;
    let start = if start == n as i64 {
        n
    } else {
        place(start, n)?
    };
    let len = args.value(3, "length")?.integer()?;
    let len = usize::try_from(len).map_err(|_| format!("length {len} is below 0"))?;
    piece(tape, &x, dim, start, len).map(Value::Tensor)
}

fn select(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dim = x.dim(args.value(1, "dim")?.integer()?)?;
    let n = x.shape.get(dim).copied().unwrap_or(0);
    let start = place(args.value(2, "index")?.integer()?, n)?;
    let mut picked = piece(tape, &x, dim, start, 1)?;
    picked.shape.remove(dim);
    Ok(Value::Tensor(picked))
}

/// Brings dimension `dim` to the front and back after `work`.
fn along_first(
    tape: &mut Tape,
    x: &Tensor,
    dim: usize,
    work: impl FnOnce(&mut Tape, &Tensor) -> Outcome,
) -> Outcome {
    let (front, dim) = (0, dim as i64);
    let Value::Tensor(turned) = swapped(tape, x, front, dim)? else {
        return Err("no tensor".into());
    };
    match work(tape, &turned)? {
        Value::Tensor(done) => swapped(tape, &done, front, dim),
        other => Ok(other),
    }
}

fn index_select(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dim = x.dim(args.value(1, "dim")?.integer()?)?;
    let index = args.tensor(tape, 2, "index")?;
    along_first(tape, &x, dim, |tape, x| index_by_tensor(tape, x, &index))
}

fn gather(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dim = x.dim(args.value(1, "dim")?.integer()?)?;
    let index = args.tensor(tape, 2, "index")?;
    let fits = index.shape.len() == x.shape.len()
        && (0..x.shape.len()).all(|d| d == dim || index.shape[d] <= x.shape[d]);
    if !fits || x.shape.is_empty() {
        return Err(format!(
            "places of shape {:?} for a tensor of shape {:?}",
            index.shape, x.shape
        ));
    }
    let mut own = strides(&x.shape);
    let (stride, n) = (own[dim], x.shape[dim]);
    own[dim] = 0;
    let bases = offsets(&index.shape, &own);
    let place_of = |(base, i): (usize, &f64)| {
        let i = Value::Number(*i, Kind::Int).integer()?;
        Ok(base + place(i, n)? * stride)
    };
    let places = bases.into_iter().zip(index.data.iter()).map(place_of);
    let places = places.collect::<Result<_, String>>()?;
    tape.gather(&x, &index.shape, places).map(Value::Tensor)
}

fn flip(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let dims = args.rest(1, "dims");
    let dims = dims
        .iter()
        .map(|d| x.dim(d.integer()?))
        .collect::<Result<Vec<_>, _>>()?;
    let own = strides(&x.shape);
    let n = x.data.len();
    let turned = |i: usize| {
        let move_in = |i: usize, d: &usize| match (x.shape.get(*d), own.get(*d)) {
            (Some(n), Some(s)) => {
                let at = i / s % n;
                i - at * s + (n - 1 - at) * s
            }
            _ => i,
        };
        dims.iter().fold(i, move_in)
    };
    tape.gather(&x, &x.shape, (0..n).map(turned).collect())
        .map(Value::Tensor)
}

fn diff(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    if args.integer(1, "n")?.unwrap_or(1) != 1 {
        return Err("differences of differences are not supported: call diff again".into());
    }
    let dim = x.dim(args.integer(2, "dim")?.unwrap_or(-1))?;
    let n = x.shape.get(dim).copied().unwrap_or(0).saturating_sub(1);
    let (low, high) = (
        piece(tape, &x, dim, 0, n)?,
        piece(tape, &x, dim, 1.min(n), n)?,
    );
    tape.zip(&high, &low, x.kind, |a, b| [a - b, 1.0, -1.0])
        .map(Value::Tensor)
}

fn tensors(tape: &mut Tape, args: &Args) -> Result<Vec<Tensor>, String> {
    match args.value(0, "tensors")?.clone() {
        Value::List(values) if !values.is_empty() => {
            values.iter().map(|v| to_tensor(tape, v)).collect()
        }
        _ => Err("a list of tensors is needed".into()),
    }
}

fn stack(tape: &mut Tape, args: &Args) -> Outcome {
    let all = tensors(tape, args)?;
    let dim = args.integer(1, "dim")?.unwrap_or(0);
    let shape = all[0].shape.clone();
    if let Some(other) = all.iter().find(|t| t.shape != shape) {
        return Err(format!(
            "shapes {shape:?} and {:?} do not stack",
            other.shape
        ));
    }
    let mut joined = tape.chain(&all)?;
    joined.shape = std::iter::once(all.len()).chain(shape).collect();
    let n = joined.shape.len();
    let to = joined.dim(dim)?;
    // The new dimension is the first; it moves to its place, and the others keep their order.
    let mut order: Vec<usize> = (1..n).collect();
    order.insert(to, 0);
    permuted(tape, &joined, &order)
}

fn cat(tape: &mut Tape, args: &Args) -> Outcome {
    let all = tensors(tape, args)?;
    let dim = match args.get(1, "axis") {
        Some(axis) => axis.integer()?,
        None => args.integer(1, "dim")?.unwrap_or(0),
    };
    let dim = all[0].dim(dim)?;
    let mut turned = Vec::new();
    for tensor in &all {
        match swapped(tape, tensor, 0, dim as i64)? {
            Value::Tensor(t) if !t.shape.is_empty() => turned.push(t),
            _ => return Err("numbers do not join: stack them".into()),
        }
    }
    let row = turned[0].shape[1..].to_vec();
    if let Some(i) = turned.iter().position(|t| t.shape[1..] != row) {
        return Err(format!(
            "shapes {:?} and {:?} do not join",
            all[0].shape, all[i].shape
        ));
    }
    let n = turned.iter().map(|t| t.shape[0]).sum();
    let mut joined = tape.chain(&turned)?;
    joined.shape = std::iter::once(n).chain(row).collect();
    swapped(tape, &joined, 0, dim as i64)
}

/// Places of the values of each row along the last dimension, in order.
fn order_of(x: &Tensor, descending: bool) -> Vec<usize> {
    let n = x.shape.last().copied().unwrap_or(1).max(1);
    let mut order: Vec<usize> = (0..x.data.len()).collect();
    for row in order.chunks_mut(n) {
        row.sort_by(|a, b| {
            let order = x.data[*a].total_cmp(&x.data[*b]);
            if descending { order.reverse() } else { order }
        });
    }
    order
}

/// The first `k` of each sorted row, with their places in it.
fn sorted(tape: &mut Tape, x: &Tensor, dim: i64, descending: bool, k: Option<usize>) -> Outcome {
    let dim = x.dim(dim)?;
    if dim + 1 != x.shape.len().max(1) {
        return Err("values are sorted along the last dimension alone".into());
    }
    let n = x.shape.last().copied().unwrap_or(1);
    let k = k.unwrap_or(n);
    if k > n {
        return Err(format!("there are no {k} of {n} values"));
    }
    let order = order_of(x, descending);
    let places: Vec<usize> = order
        .chunks(n.max(1))
        .flat_map(|row| &row[..k])
        .copied()
        .collect();
    let mut shape = x.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = k;
    }
    let indices = places.iter().map(|p| (p % n) as f64).collect();
    let values = tape.gather(x, &shape, places)?;
    let indices = tape.constant(&shape, Kind::Int, indices)?;
    Ok(Value::List(vec![
        Value::Tensor(values),
        Value::Tensor(indices),
    ]))
}

fn sort(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    args.ignore(&["stable"]);
    let dim = args.integer(1, "dim")?.unwrap_or(-1);
    let descending = args.flag(2, "descending", false)?;
    sorted(tape, &x, dim, descending, None)
}

fn top(tape: &mut Tape, args: &Args) -> Outcome {
    let x = args.tensor(tape, 0, "input")?;
    let k = args.value(1, "k")?.integer()?;
    let k = usize::try_from(k).map_err(|_| format!("{k} values are too few"))?;
    let dim = args.integer(2, "dim")?.unwrap_or(-1);
    let largest = args.flag(3, "largest", true)?;
    args.flag(4, "sorted", true)?;
    sorted(tape, &x, dim, largest, Some(k))
}
