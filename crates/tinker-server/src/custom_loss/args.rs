//! The arguments of a call, each of which must be understood.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::tape::Tape;
use super::value::{Kind, Tensor, Value};

/// Positional and named arguments. What an operation does not look at is an error.
#[derive(Debug)]
pub(super) struct Args {
    positional: Vec<Value>,
    named: BTreeMap<String, Value>,
    seen: RefCell<(usize, BTreeSet<String>)>,
}

type Checked<T> = Result<T, String>;

impl Args {
    pub(super) const fn new(positional: Vec<Value>, named: BTreeMap<String, Value>) -> Self {
        Self {
            positional,
            named,
            seen: RefCell::new((0, BTreeSet::new())),
        }
    }

    /// The argument at position `i`, which may be given by name.
    pub(super) fn get(&self, i: usize, name: &str) -> Option<&Value> {
        let mut seen = self.seen.borrow_mut();
        seen.0 = seen.0.max(i + 1);
        let found = self.named.get(name);
        if found.is_some() {
            seen.1.insert(name.to_owned());
        }
        let found = found.or_else(|| self.positional.get(i));
        found.filter(|value| !matches!(value, Value::None))
    }

    /// An argument that is only given by name.
    pub(super) fn keyword(&self, name: &str) -> Option<&Value> {
        self.ignore(&[name]);
        let found = self.named.get(name);
        found.filter(|value| !matches!(value, Value::None))
    }

    /// All positional arguments from `i` on; a single list stands for its items.
    pub(super) fn rest(&self, i: usize, name: &str) -> Vec<Value> {
        let first = self.get(i, name).cloned();
        self.seen.borrow_mut().0 = usize::MAX;
        match first {
            Some(Value::List(values)) if self.positional.len() <= i + 1 => values,
            Some(value) if self.positional.len() <= i => vec![value],
            _ => self.positional.get(i..).unwrap_or_default().to_vec(),
        }
    }

    /// Accepts a named argument that makes no difference.
    pub(super) fn ignore(&self, names: &[&str]) {
        let mut seen = self.seen.borrow_mut();
        seen.1.extend(names.iter().map(|name| (*name).to_owned()));
    }

    /// Accounts for the values that the call reads.
    pub(super) fn account(&self, tape: &mut Tape) -> Checked<()> {
        let all = self.positional.iter().chain(self.named.values());
        let n = all.map(Value::n_values).sum();
        tape.reserve(&[n]).map(drop)
    }

    /// Refuses what nobody has looked at.
    pub(super) fn check_all_seen(&self) -> Checked<()> {
        let seen = self.seen.borrow();
        if self.positional.len() > seen.0 {
            return Err(format!(
                "{} arguments are given, at most {} are taken",
                self.positional.len(),
                seen.0
            ));
        }
        // `None` is what an argument is that nobody gave.
        let mut given = self
            .named
            .iter()
            .filter(|(_, value)| !matches!(value, Value::None));
        match given.find(|(name, _)| !seen.1.contains(*name)) {
            Some((name, _)) => Err(format!("the argument {name:?} is not supported")),
            None => Ok(()),
        }
    }

    pub(super) fn value(&self, i: usize, name: &str) -> Checked<&Value> {
        self.get(i, name)
            .ok_or_else(|| format!("the argument {name:?} is missing"))
    }

    /// A tensor; a number is one without dimensions.
    pub(super) fn tensor(&self, tape: &mut Tape, i: usize, name: &str) -> Checked<Tensor> {
        to_tensor(tape, self.value(i, name)?)
    }

    /// A whole number, if it is given.
    pub(super) fn integer(&self, i: usize, name: &str) -> Checked<Option<i64>> {
        self.get(i, name).map(Value::integer).transpose()
    }

    /// A number, if it is given.
    pub(super) fn number(&self, i: usize, name: &str) -> Checked<Option<f64>> {
        self.get(i, name).map(Value::number).transpose()
    }

    /// One or several dimensions, if any are given.
    pub(super) fn dims(&self, i: usize, name: &str) -> Checked<Option<Vec<i64>>> {
        self.get(i, name).map(Value::integers).transpose()
    }

    pub(super) fn flag(&self, i: usize, name: &str, default: bool) -> Checked<bool> {
        Ok(self.number(i, name)?.map_or(default, |value| value != 0.0))
    }

    pub(super) fn text(&self, i: usize, name: &str, default: &str) -> Checked<String> {
        match self.get(i, name) {
            None => Ok(default.to_owned()),
            Some(Value::Text(text)) => Ok(text.clone()),
            Some(other) => Err(format!("{name} is {}, not a text", other.name())),
        }
    }

    /// The kind of numbers that `dtype` asks for.
    pub(super) fn dtype(&self) -> Checked<Option<Kind>> {
        match self.keyword("dtype") {
            None => Ok(None),
            Some(Value::Kind(kind)) => Ok(Some(*kind)),
            Some(other) => Err(format!("dtype is {}", other.name())),
        }
    }

    /// Whether all of the first `n` arguments are Python numbers.
    pub(super) fn are_numbers(&self, n: usize) -> bool {
        let all = self.positional.iter().take(n);
        self.named.is_empty()
            && all.clone().count() == n
            && all.clone().all(|v| matches!(v, Value::Number(..)))
    }
}

/// A tensor; a number is one without dimensions.
pub(super) fn to_tensor(tape: &mut Tape, value: &Value) -> Result<Tensor, String> {
    match value {
        Value::Tensor(tensor) => Ok(tensor.clone()),
        Value::Number(value, kind) => tape.constant(&[], *kind, vec![*value]),
        other => Err(format!("{} is no tensor", other.name())),
    }
}
