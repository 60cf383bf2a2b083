//! Going back through the notes.

use std::rc::Rc;

use super::op::{Id, Op, Unary};
use super::{Tape, Var};

impl Tape {
    /// The gradient of a single number with respect to each of `inputs`, in their shapes; none where
    /// it does not depend on the input. The gradients are on the tape, to be differentiated again.
    pub fn gradients<'t>(&'t self, of: Var<'t>, inputs: &[Var<'t>]) -> Vec<Option<Var<'t>>> {
        if of.n_values() != 1 {
            let detail = format!("one number is needed, not the shape {:?}", of.shape());
            self.fail("gradient", detail);
        }
        let is_elsewhere = |var: &Var<'_>| !std::ptr::eq(var.tape, self);
        if is_elsewhere(&of) || inputs.iter().any(is_elsewhere) {
            self.fail("gradient", "it is of another tape".into());
        }
        if self.is_faulty.get() {
            return vec![None; inputs.len()];
        }
        let depends = self.dependents(of.id, inputs);
        let mut adjoints: Vec<Option<Var<'t>>> = vec![None; of.id + 1];
        adjoints[of.id] = Some(self.apply(Op::Broadcast(self.number(1.0).id), of.shape()));
        for id in (0..=of.id).rev() {
            let Some(adjoint) = adjoints[id].filter(|_| depends[id]) else {
                continue;
            };
            let op = self.nodes.borrow()[id].op.clone();
            for (operand, part) in self.parts(&op, Var { tape: self, id }, adjoint, &depends) {
                adjoints[operand] = Some(match adjoints[operand] {
                    Some(sum) => self.same_shape(Op::Add(sum.id, part.id), sum),
                    None => part,
                });
            }
        }
        let gradient = |input: &Var<'t>| adjoints.get(input.id).copied().flatten();
        inputs.iter().map(gradient).collect()
    }

    /// Which nodes up to `last` were computed from `inputs`.
    fn dependents(&self, last: Id, inputs: &[Var<'_>]) -> Vec<bool> {
        let nodes = self.nodes.borrow();
        let mut depends = vec![false; last + 1];
        for input in inputs {
            if let Some(depends) = depends.get_mut(input.id) {
                *depends = true;
            }
        }
        for id in 0..=last {
            depends[id] |= nodes[id].op.operands().iter().any(|&a| depends[a]);
        }
        depends
    }

    /// What an operation passes on to those of its operands that matter: vector-Jacobian products.
    fn parts<'t>(
        &'t self,
        op: &Op,
        result: Var<'t>,
        g: Var<'t>,
        depends: &[bool],
    ) -> Vec<(Id, Var<'t>)> {
        let var = |id| Var { tape: self, id };
        let like = |op: Op, a: Id| (a, self.same_shape(op, var(a)));
        let mut parts = match op {
            Op::Leaf => Vec::new(),
            &Op::Scale(a, factor) => vec![(a, g * factor)],
            &Op::Offset(a, _) => vec![(a, g)],
            &Op::Unary(function, a) => vec![(a, derivative(function, var(a), result, g))],
            &Op::Add(a, b) => vec![(a, g), (b, g)],
            &Op::Sub(a, b) => return binary(depends, (a, || g), (b, || -g)),
            &Op::Mul(a, b) => return binary(depends, (a, || g * var(b)), (b, || g * var(a))),
            &Op::Div(a, b) => {
                let by_divisor = || -(g * result) / var(b);
                return binary(depends, (a, || g / var(b)), (b, by_divisor));
            }
            Op::Masked(a, weights) => vec![like(Op::Masked(g.id, Rc::clone(weights)), *a)],
            &Op::Broadcast(a) => vec![like(Op::SumTo(g.id), a)],
            &Op::SumTo(a) => vec![like(Op::Broadcast(g.id), a)],
            &Op::Reshape(a) => vec![like(Op::Reshape(g.id), a)],
            Op::Gather(a, positions) => vec![like(Op::Scatter(g.id, Rc::clone(positions)), *a)],
            Op::Scatter(a, positions) => vec![like(Op::Gather(g.id, Rc::clone(positions)), *a)],
            Op::Concat(operands) => self.split(g, operands),
            &Op::MatMul(a, b) => {
                let (ga, gb) = (
                    || g.matmul(var(b).transpose()),
                    || var(a).transpose().matmul(g),
                );
                return binary(depends, (a, ga), (b, gb));
            }
            &Op::Transpose(a) => vec![(a, g.transpose())],
        };
        parts.retain(|(operand, _)| depends[*operand]);
        parts
    }

    fn split<'t>(&'t self, g: Var<'t>, operands: &[Id]) -> Vec<(Id, Var<'t>)> {
        let mut start = 0;
        let part = |&operand: &Id| {
            let operand = Var {
                tape: self,
                id: operand,
            };
            let positions = (start..start + operand.n_values()).collect();
            start += operand.n_values();
            let part = self.same_shape(Op::Gather(g.id, positions), operand);
            (operand.id, part)
        };
        operands.iter().map(part).collect()
    }

    pub(super) fn same_shape<'t>(&'t self, op: Op, like: Var<'_>) -> Var<'t> {
        self.apply(op, like.tensor().shape)
    }
}

/// The parts of two operands, computed where they matter.
fn binary<'t>(
    depends: &[bool],
    (a, part_a): (Id, impl FnOnce() -> Var<'t>),
    (b, part_b): (Id, impl FnOnce() -> Var<'t>),
) -> Vec<(Id, Var<'t>)> {
    let mut parts = Vec::new();
    if depends[a] {
        parts.push((a, part_a()));
    }
    if depends[b] {
        parts.push((b, part_b()));
    }
    parts
}

/// `g f'(x)`, where `y = f(x)`.
fn derivative<'t>(function: Unary, x: Var<'t>, y: Var<'t>, g: Var<'t>) -> Var<'t> {
    match function {
        Unary::Exp => g * y,
        Unary::ExpM1 => g * (y + 1.0),
        Unary::Ln => g / x,
        Unary::Ln1p => g / (x + 1.0),
        Unary::Sqrt => g / y * 0.5,
        Unary::Tanh => g * (1.0 - y * y),
        Unary::Sigmoid => g * y * (1.0 - y),
        Unary::LogSigmoid => g * (-x).sigmoid(),
        Unary::Powf(power) => g * x.powf(power - 1.0) * power,
    }
}
