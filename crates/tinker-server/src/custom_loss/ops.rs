//! The operations that a graph may call, by their names in PyTorch and Python.

mod elementwise;
mod functional;
mod make;
mod reduce;
mod shape;

use super::args::Args;
use super::tape::Tape;
use super::value::{Kind, Value};

/// What a call comes to; the error is a message.
pub(super) type Outcome = Result<Value, String>;

/// An operation.
#[derive(Debug, Clone, Copy)]
pub(super) enum Op {
    /// Value and derivative of each value; floats come of it if it says so.
    Unary(fn(f64) -> (f64, f64), Gives),
    /// Value and both derivatives of pairs of values.
    Binary(fn(f64, f64) -> [f64; 3], Gives),
    /// A test of each value.
    Test(fn(f64) -> bool),
    /// A comparison of pairs of values.
    Compare(fn(f64, f64) -> bool),
    /// Anything else.
    Call(fn(&mut Tape, &Args) -> Outcome),
}

/// The kind of numbers that an operation gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gives {
    /// That of its arguments.
    Same,
    /// Floats, whatever its arguments.
    Float,
}

impl Gives {
    fn kind(self, of: Kind) -> Kind {
        match self {
            Self::Same => of.max(Kind::Int),
            Self::Float => Kind::Float,
        }
    }
}

/// The operation of a function or method, by the last part of its name.
pub(super) fn lookup(name: &str) -> Option<Op> {
    elementwise::unary(name)
        .or_else(|| elementwise::binary(name))
        .or_else(|| elementwise::logical(name))
        .or_else(|| reduce::lookup(name))
        .or_else(|| shape::lookup(name))
        .or_else(|| make::lookup(name))
        .or_else(|| functional::lookup(name))
}

impl Op {
    /// Calls the operation.
    pub(super) fn call(self, tape: &mut Tape, args: &Args) -> Outcome {
        args.account(tape)?;
        let outcome = match self {
            Self::Unary(f, result) => elementwise::call_unary(tape, args, f, result),
            Self::Binary(f, result) => elementwise::call_binary(tape, args, f, result),
            Self::Test(f) => elementwise::call_test(tape, args, f),
            Self::Compare(f) => elementwise::call_compare(tape, args, f),
            Self::Call(f) => f(tape, args),
        }?;
        args.check_all_seen()?;
        Ok(outcome)
    }
}
