//! A traced loss, checked and ready to be computed.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value as Json;
use tinker_engine::Evaluation;
use tinker_types::{CreateCustomLossRequest, CustomLossInput, CustomLossNode};

use super::args::Args;
use super::ops::{Op, lookup};
use super::tape::Tape;
use super::value::{Kind, Tensor, Value};

/// The only version of the format.
const FORMAT: u32 = 1;
/// Most inputs of a loss, `logprobs` included.
const MAX_INPUTS: usize = 16;
/// Most nodes of a graph.
const MAX_NODES: usize = 4096;
/// Longest names of inputs and metrics, as the official client bounds them.
const MAX_NAME: usize = 64;
const LOGPROBS: &str = "logprobs";

/// A message that names the node at fault.
type Checked<T> = Result<T, String>;

/// A loss of one datum: its log-probabilities and other inputs to a number.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    inputs: Vec<CustomLossInput>,
    nodes: Vec<Node>,
    loss: usize,
    metrics: Vec<(String, usize)>,
}

#[derive(Debug)]
struct Node {
    name: String,
    target: String,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Input(usize),
    Call {
        op: Op,
        args: Vec<Arg>,
        named: BTreeMap<String, Arg>,
    },
}

/// An argument as it stands in the graph.
#[derive(Debug, Clone)]
enum Arg {
    /// The value of an earlier node.
    Ref(usize),
    Number(f64, Kind),
    None,
    Text(String),
    List(Vec<Self>),
    Dict(BTreeMap<String, Self>),
    Slice(Vec<Self>),
    Ellipsis,
    Kind(Kind),
    Place,
}

/// An input of a datum.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Input {
    /// Row-major dimensions.
    pub(crate) shape: Vec<usize>,
    /// Whether its values are whole numbers.
    pub(crate) is_int: bool,
    /// Its values.
    pub(crate) data: Vec<f64>,
}

impl Program {
    /// Checks a request to create a loss.
    ///
    /// # Errors
    /// A message naming what is not understood: a node, a function, an input.
    pub(crate) fn parse(request: &CreateCustomLossRequest) -> Checked<Self> {
        check_inputs(&request.inputs)?;
        if request.graph.format != FORMAT {
            return Err(format!(
                "format {} of the graph is not known: this server reads format {FORMAT}",
                request.graph.format
            ));
        }
        if request.graph.nodes.len() > MAX_NODES {
            return Err(format!(
                "the graph has {} nodes, more than {MAX_NODES}",
                request.graph.nodes.len()
            ));
        }
        let mut parser = Parser {
            inputs: &request.inputs,
            n_inputs: 0,
            known: HashMap::new(),
            nodes: Vec::new(),
            output: None,
        };
        for node in &request.graph.nodes {
            let parsed = parser.node(node);
            parsed.map_err(|why| format!("node {} ({}): {why}", node.name, node.target))?;
        }
        if parser.n_inputs != request.inputs.len() {
            return Err(format!(
                "the graph has {} placeholders for {} inputs",
                parser.n_inputs,
                request.inputs.len()
            ));
        }
        let (loss, metrics) = parser.output.ok_or("the graph has no output")?;
        Ok(Self {
            name: request.name.clone(),
            inputs: request.inputs.clone(),
            nodes: parser.nodes,
            loss,
            metrics,
        })
    }

    /// The inputs beside `logprobs`, in order.
    pub(crate) fn inputs(&self) -> &[CustomLossInput] {
        self.inputs.get(1..).unwrap_or_default()
    }

    /// The name that people know it by.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The rank that `logprobs` has, and so the targets.
    pub(crate) fn rank(&self) -> usize {
        self.inputs.first().map_or(1, |input| input.rank.into())
    }

    /// Value, derivative and metrics at log-probabilities of this shape.
    pub(crate) fn evaluate(
        &self,
        logprobs: &[f32],
        shape: &[usize],
        inputs: &[Input],
    ) -> Checked<Evaluation> {
        let evaluated = self.run(logprobs, shape, inputs);
        evaluated.map_err(|why| format!("loss {}: {why}", self.name))
    }

    fn run(&self, logprobs: &[f32], shape: &[usize], inputs: &[Input]) -> Checked<Evaluation> {
        let mut tape = Tape::default();
        let wide = logprobs.iter().map(|l| f64::from(*l)).collect();
        let variable = tape.variable(shape, wide)?;
        let mut values: Vec<Value> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let value = match &node.step {
                Step::Input(0) => Ok(Value::Tensor(variable.clone())),
                Step::Input(i) => input(&mut tape, inputs.get(i - 1)),
                Step::Call { op, args, named } => {
                    let resolved = resolve(&values, args, named);
                    resolved.and_then(|args| op.call(&mut tape, &args))
                }
            };
            let value =
                value.map_err(|why| format!("node {} ({}): {why}", node.name, node.target))?;
            values.push(value);
        }
        let loss = tensor_of(&values, self.loss).ok_or("the loss is no tensor")?;
        if !loss.shape.is_empty() {
            return Err(format!(
                "the loss has shape {:?}, it must be a number",
                loss.shape
            ));
        }
        let gradient = tape.gradient(loss, &variable);
        if let Some(at) = gradient.iter().position(|g| !(*g as f32).is_finite()) {
            let k = shape.get(1).copied().unwrap_or(1).max(1);
            return Err(format!(
                "the derivative for the log-probability at position {} is {}",
                at / k,
                gradient[at]
            ));
        }
        Ok(Evaluation {
            total: loss.single()?,
            terms: Vec::new(),
            gradient: gradient.iter().map(|g| *g as f32).collect(),
            metrics: self.metrics(&values)?,
        })
    }

    fn metrics(&self, values: &[Value]) -> Checked<Vec<(String, f64)>> {
        let metric = |(name, i): &(String, usize)| {
            let value = values.get(*i).ok_or("no value").map_err(str::to_owned);
            let value = value.and_then(Value::number);
            Ok((
                name.clone(),
                value.map_err(|why| format!("metric {name}: {why}"))?,
            ))
        };
        self.metrics.iter().map(metric).collect()
    }
}

fn tensor_of(values: &[Value], i: usize) -> Option<&Tensor> {
    match values.get(i) {
        Some(Value::Tensor(tensor)) => Some(tensor),
        _ => None,
    }
}

fn input(tape: &mut Tape, input: Option<&Input>) -> Checked<Value> {
    let input = input.ok_or("the input is missing")?;
    let kind = if input.is_int { Kind::Int } else { Kind::Float };
    tape.constant(&input.shape, kind, input.data.clone())
        .map(Value::Tensor)
}

fn resolve(values: &[Value], args: &[Arg], named: &BTreeMap<String, Arg>) -> Checked<Args> {
    let positional = args
        .iter()
        .map(|arg| arg.value(values))
        .collect::<Checked<_>>()?;
    let named = named
        .iter()
        .map(|(name, arg)| Ok((name.clone(), arg.value(values)?)));
    Ok(Args::new(positional, named.collect::<Checked<_>>()?))
}

impl Arg {
    fn value(&self, values: &[Value]) -> Checked<Value> {
        let all = |args: &[Self]| {
            args.iter()
                .map(|arg| arg.value(values))
                .collect::<Checked<_>>()
        };
        Ok(match self {
            Self::Ref(i) => values
                .get(*i)
                .cloned()
                .ok_or("a node that is not computed yet")?,
            Self::Number(value, kind) => Value::Number(*value, *kind),
            Self::None => Value::None,
            Self::Text(text) => Value::Text(text.clone()),
            Self::List(args) => Value::list(all(args)?)?,
            Self::Dict(args) => {
                let pairs = args
                    .iter()
                    .map(|(key, arg)| Ok((key.clone(), arg.value(values)?)));
                let dict = Value::Dict(pairs.collect::<Checked<_>>()?);
                // It counts as the only item of a list.
                Value::list(vec![dict.clone()])?;
                dict
            }
            Self::Slice(parts) => {
                let part = |i: usize| match parts.get(i) {
                    None | Some(Self::None) => Ok(None),
                    Some(arg) => arg.value(values)?.integer().map(Some),
                };
                Value::Slice([part(0)?, part(1)?, part(2)?])
            }
            Self::Ellipsis => Value::Ellipsis,
            Self::Kind(kind) => Value::Kind(*kind),
            Self::Place => Value::Place,
        })
    }
}

fn check_inputs(inputs: &[CustomLossInput]) -> Checked<()> {
    match inputs {
        [first, ..] if first.name == LOGPROBS && matches!(first.rank, 1 | 2) => {}
        _ => return Err("the first input must be logprobs, of rank 1 or 2".into()),
    }
    if inputs.len() > MAX_INPUTS {
        return Err(format!(
            "{} inputs are more than {MAX_INPUTS}",
            inputs.len()
        ));
    }
    for (i, input) in inputs.iter().enumerate() {
        if !is_input_name(&input.name) {
            return Err(format!(
                "the name of input {:?} must be lowercase letters, digits and underscores, at most {MAX_NAME}",
                input.name
            ));
        }
        if input.rank > 2 {
            return Err(format!(
                "input {} has rank {}: it must be 0, 1 or 2",
                input.name, input.rank
            ));
        }
        if inputs.iter().take(i).any(|other| other.name == input.name) {
            return Err(format!("there are two inputs {}", input.name));
        }
    }
    Ok(())
}

fn is_input_name(name: &str) -> bool {
    let first = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    first && name.len() <= MAX_NAME && name.bytes().all(fits)
}

/// Whether a metric is named `custom/<name>:sum` or `custom/<name>:mean`.
fn is_metric_name(name: &str) -> bool {
    let inner = name.strip_prefix("custom/");
    let inner = inner.and_then(|n| n.strip_suffix(":sum").or_else(|| n.strip_suffix(":mean")));
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_./-".contains(&b);
    inner.is_some_and(|n| (1..=MAX_NAME).contains(&n.len()) && n.bytes().all(fits))
}

/// What was read of a graph so far.
struct Parser<'a> {
    inputs: &'a [CustomLossInput],
    n_inputs: usize,
    known: HashMap<String, usize>,
    nodes: Vec<Node>,
    output: Option<(usize, Vec<(String, usize)>)>,
}

impl Parser<'_> {
    fn node(&mut self, node: &CustomLossNode) -> Checked<()> {
        if self.output.is_some() {
            return Err("it comes after the output".into());
        }
        let step = match node.op.as_str() {
            "placeholder" => self.placeholder(node)?,
            "call_function" => self.call(node, function(&node.target)?)?,
            "call_method" => self.call(node, method(&node.target)?)?,
            "output" => {
                self.output = Some(self.output(node)?);
                return Ok(());
            }
            other => return Err(format!("{other} nodes are not supported")),
        };
        if self
            .known
            .insert(node.name.clone(), self.nodes.len())
            .is_some()
        {
            return Err("there are two nodes of this name".into());
        }
        self.nodes.push(Node {
            name: node.name.clone(),
            target: node.target.clone(),
            step,
        });
        Ok(())
    }

    fn placeholder(&mut self, node: &CustomLossNode) -> Checked<Step> {
        let expected = self.inputs.get(self.n_inputs);
        if expected.is_none_or(|input| input.name != node.target) {
            return Err("it is not the next input".into());
        }
        self.n_inputs += 1;
        Ok(Step::Input(self.n_inputs - 1))
    }

    fn call(&self, node: &CustomLossNode, op: Op) -> Checked<Step> {
        let args = node.args.iter().map(|arg| self.arg(arg));
        let named = node
            .kwargs
            .iter()
            .map(|(name, arg)| Ok((name.clone(), self.arg(arg)?)));
        Ok(Step::Call {
            op,
            args: args.collect::<Checked<_>>()?,
            named: named.collect::<Checked<_>>()?,
        })
    }

    /// The nodes of the loss and of the metrics.
    fn output(&self, node: &CustomLossNode) -> Checked<(usize, Vec<(String, usize)>)> {
        let shape = || "it must be a pair of the loss and a dict of metrics".to_owned();
        let [returned] = &node.args[..] else {
            return Err(shape());
        };
        let Arg::List(pair) = self.arg(returned)? else {
            return Err(shape());
        };
        let [Arg::Ref(loss), Arg::Dict(metrics)] = &pair[..] else {
            return Err(shape());
        };
        let metric = |(name, arg): (&String, &Arg)| match arg {
            _ if !is_metric_name(name) => Err(format!(
                "metric {name:?} must be named custom/<name>:sum or custom/<name>:mean"
            )),
            Arg::Ref(i) => Ok((name.clone(), *i)),
            _ => Err(format!("metric {name:?} is no tensor")),
        };
        Ok((*loss, metrics.iter().map(metric).collect::<Checked<_>>()?))
    }

    fn arg(&self, json: &Json) -> Checked<Arg> {
        let all = |values: &[Json]| {
            values
                .iter()
                .map(|v| self.arg(v))
                .collect::<Checked<Vec<_>>>()
        };
        Ok(match json {
            Json::Null => Arg::None,
            Json::Bool(value) => Arg::Number(f64::from(u8::from(*value)), Kind::Bool),
            Json::Number(n) => {
                let kind = if n.is_f64() { Kind::Float } else { Kind::Int };
                Arg::Number(n.as_f64().ok_or("a number that is too large")?, kind)
            }
            Json::String(text) => Arg::Text(text.clone()),
            Json::Array(values) => Arg::List(all(values)?),
            Json::Object(fields) => {
                let mut fields = fields.iter();
                match (fields.next(), fields.next()) {
                    (Some((tag, value)), None) => self.tagged(tag, value)?,
                    _ => return Err("an argument of several tags".into()),
                }
            }
        })
    }

    fn tagged(&self, tag: &str, json: &Json) -> Checked<Arg> {
        let malformed = || format!("the argument {tag:?} is malformed");
        let all = || {
            let values = json.as_array().ok_or_else(malformed)?;
            values
                .iter()
                .map(|v| self.arg(v))
                .collect::<Checked<Vec<_>>>()
        };
        Ok(match tag {
            "ref" => {
                let name = json.as_str().ok_or_else(malformed)?;
                let known = self.known.get(name);
                Arg::Ref(*known.ok_or_else(|| format!("there is no node {name:?} before it"))?)
            }
            "tuple" => Arg::List(all()?),
            "slice" => Arg::Slice(all()?),
            "dict" => {
                let fields = json.as_object().ok_or_else(malformed)?;
                let pairs = fields
                    .iter()
                    .map(|(key, v)| Ok((key.clone(), self.arg(v)?)));
                Arg::Dict(pairs.collect::<Checked<_>>()?)
            }
            "ellipsis" => Arg::Ellipsis,
            "float" => match json.as_str() {
                Some("inf") => Arg::Number(f64::INFINITY, Kind::Float),
                Some("-inf") => Arg::Number(f64::NEG_INFINITY, Kind::Float),
                Some("nan") => Arg::Number(f64::NAN, Kind::Float),
                _ => return Err(malformed()),
            },
            "dtype" => Arg::Kind(dtype(json.as_str().ok_or_else(malformed)?)?),
            "device" | "layout" | "memory_format" => Arg::Place,
            other => return Err(format!("the argument {other:?} is not known")),
        })
    }
}

fn dtype(name: &str) -> Checked<Kind> {
    match name {
        "float32" | "float64" | "float16" | "bfloat16" | "float" | "double" | "half" => {
            Ok(Kind::Float)
        }
        "int64" | "int32" | "int16" | "int8" | "uint8" | "long" | "int" | "short" => Ok(Kind::Int),
        "bool" => Ok(Kind::Bool),
        other => Err(format!("the dtype {other:?} is not supported")),
    }
}

/// A function by its qualified name.
fn function(target: &str) -> Checked<Op> {
    let (module, name) = target.rsplit_once('.').unwrap_or(("", target));
    let is_known_module = matches!(
        module.split('.').next(),
        Some("torch" | "math" | "operator")
    ) || target == "getattr";
    let op = if is_known_module { lookup(name) } else { None };
    op.ok_or_else(|| unknown("function"))
}

fn method(target: &str) -> Checked<Op> {
    lookup(target).ok_or_else(|| unknown("method"))
}

fn unknown(what: &str) -> String {
    format!(
        "this {what} is not among those that this server computes: compute the loss in your program, \
         with a function in the place of the handle"
    )
}
