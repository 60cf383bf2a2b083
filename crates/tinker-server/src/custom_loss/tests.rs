//! Uploaded losses beside autograd, and graphs that are malformed, too large or hostile.

use serde_json::{Value as Json, json};
use tinker_types::CreateCustomLossRequest;

use super::{Input, Program};

fn reference() -> Vec<Json> {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/losses/graphs.json");
    let text = std::fs::read_to_string(path).unwrap();
    let mut json: Json = serde_json::from_str(&text).unwrap();
    serde_json::from_value(json["losses"].take()).unwrap()
}

fn request(name: &str, inputs: Json, graph: Json) -> CreateCustomLossRequest {
    let json = json!({"session_id": "s", "custom_loss_seq_id": 0, "name": name,
                      "inputs": inputs, "graph": graph, "type": "create_custom_loss"});
    serde_json::from_value(json).unwrap()
}

fn input(json: &Json) -> Input {
    serde_json::from_value::<Vec<usize>>(json["shape"].clone())
        .map(|shape| Input {
            shape,
            is_int: json["is_int"].as_bool().unwrap(),
            data: serde_json::from_value(json["data"].clone()).unwrap(),
        })
        .unwrap()
}

fn close(actual: f64, expected: f64) -> bool {
    (actual - expected).abs() < 1e-5 * (1.0 + expected.abs())
}

#[test]
fn losses_traced_by_the_official_sdk_have_the_values_of_autograd() {
    let reference = reference();
    assert!(reference.len() > 15);
    for case in reference {
        let name = case["name"].as_str().unwrap();
        let request = request(name, case["inputs"].clone(), case["graph"].clone());
        let program = Program::parse(&request).unwrap();
        let logprobs = input(&case["logprobs"]);
        let narrow: Vec<f32> = logprobs.data.iter().map(|l| *l as f32).collect();
        let others: Vec<Input> = case["others"]
            .as_array()
            .unwrap()
            .iter()
            .map(input)
            .collect();

        let evaluated = program.evaluate(&narrow, &logprobs.shape, &others).unwrap();

        let value = case["value"].as_f64().unwrap();
        assert!(
            close(evaluated.total, value),
            "{name}: {} {value}",
            evaluated.total
        );
        let gradient: Vec<f64> = serde_json::from_value(case["gradient"].clone()).unwrap();
        assert_eq!(gradient.len(), evaluated.gradient.len());
        for (i, (actual, expected)) in evaluated.gradient.iter().zip(&gradient).enumerate() {
            assert!(
                close(f64::from(*actual), *expected),
                "{name} {i}: {actual} {expected}"
            );
        }
        let metrics = case["metrics"].as_object().unwrap();
        assert_eq!(metrics.len(), evaluated.metrics.len(), "{name}");
        for (key, actual) in &evaluated.metrics {
            let expected = match &metrics[key] {
                Json::Bool(truth) => f64::from(u8::from(*truth)),
                number => number.as_f64().unwrap(),
            };
            assert!(
                close(*actual, expected),
                "{name} {key}: {actual} {expected}"
            );
        }
    }
}

/// A loss of `logprobs` and `a`, of one call.
fn call(target: &str, args: Json, kwargs: Json) -> CreateCustomLossRequest {
    let inputs = json!([{"name": "logprobs", "rank": 1}, {"name": "a", "rank": 1}]);
    let graph = json!({"format": 1, "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "placeholder", "name": "a", "target": "a"},
        {"op": "call_function", "name": "x", "target": target, "args": args, "kwargs": kwargs},
        {"op": "output", "name": "output", "target": "output",
         "args": [{"tuple": [{"ref": "x"}, {"dict": {}}]}]}]});
    request("f", inputs, graph)
}

fn failure(request: &CreateCustomLossRequest) -> String {
    let a = Input {
        shape: vec![3],
        is_int: false,
        data: vec![1.0; 3],
    };
    let program = Program::parse(request).unwrap();
    program.evaluate(&[-1.0, 0.0], &[2], &[a]).unwrap_err()
}

#[test]
fn failures_name_the_node_and_the_shapes() {
    let logprobs = json!({"ref": "logprobs"});
    assert_eq!(
        failure(&call(
            "operator.mul",
            json!([logprobs, {"ref": "a"}]),
            json!({})
        )),
        "loss f: node x (operator.mul): shapes [2] and [3] do not broadcast"
    );
    assert_eq!(
        failure(&call("torch.exp", json!([logprobs]), json!({}))),
        "loss f: the loss has shape [2], it must be a number"
    );
    assert_eq!(
        failure(&call("torch.sum", json!([logprobs]), json!({"out": 1}))),
        "loss f: node x (torch.sum): the argument \"out\" is not supported"
    );
    assert_eq!(
        failure(&call("torch.sum", json!([logprobs, 1]), json!({}))),
        "loss f: node x (torch.sum): there is no dimension 1 in [2]"
    );
    assert_eq!(
        failure(&call(
            "torch.full",
            json!([{"tuple": [100_000, 100_000]}, 1.0]),
            json!({})
        )),
        "loss f: node x (torch.full): a tensor of shape [100000, 100000] is too much: a loss may read and write 16777216 values of a datum in all"
    );
    assert_eq!(
        failure(&call("operator.getitem", json!([logprobs, 2]), json!({}))),
        "loss f: node x (operator.getitem): there is no place 2 of 2"
    );
}

#[test]
fn a_derivative_that_is_no_number_names_the_position() {
    let mut request = call("torch.log", json!([{"ref": "logprobs"}]), json!({}));
    let sum = json!({"op": "call_method", "name": "y", "target": "sum", "args": [{"ref": "x"}]});
    request
        .graph
        .nodes
        .insert(3, serde_json::from_value(sum).unwrap());
    request.graph.nodes[4].args = vec![json!({"tuple": [{"ref": "y"}, {"dict": {}}]})];

    let text = failure(&request);

    assert!(
        text.starts_with("loss f: the derivative for the log-probability at position 1 is inf"),
        "{text}"
    );
}

#[test]
fn graphs_that_are_not_understood_are_refused_by_node() {
    let refusal = |request: &CreateCustomLossRequest| Program::parse(request).unwrap_err();
    let good = || call("torch.sum", json!([{"ref": "logprobs"}]), json!({}));
    Program::parse(&good()).unwrap();

    let text = refusal(&call("os.system", json!(["true"]), json!({})));
    assert!(
        text.starts_with("node x (os.system): this function is not among"),
        "{text}"
    );
    let text = refusal(&call("torch.sum", json!([{"ref": "later"}]), json!({})));
    assert_eq!(
        text,
        "node x (torch.sum): there is no node \"later\" before it"
    );
    let text = refusal(&call("torch.sum", json!([{"code": "1"}]), json!({})));
    assert_eq!(
        text,
        "node x (torch.sum): the argument \"code\" is not known"
    );
    let mut module = good();
    module.graph.nodes[2].op = "call_module".into();
    assert_eq!(
        refusal(&module),
        "node x (torch.sum): call_module nodes are not supported"
    );
    let mut format = good();
    format.graph.format = 2;
    assert!(refusal(&format).contains("format 2"));
    let mut twice = good();
    twice.graph.nodes[2].name = "a".into();
    assert_eq!(
        refusal(&twice),
        "node a (torch.sum): there are two nodes of this name"
    );
    let mut open = good();
    open.graph.nodes.pop();
    assert_eq!(refusal(&open), "the graph has no output");
    let mut fewer = good();
    fewer.graph.nodes.remove(1);
    assert_eq!(refusal(&fewer), "the graph has 1 placeholders for 2 inputs");
    let mut metric = good();
    metric.graph.nodes[3].args =
        vec![json!({"tuple": [{"ref": "x"}, {"dict": {"loss:sum": {"ref": "x"}}}]})];
    assert!(refusal(&metric).contains("metric \"loss:sum\" must be named custom/"));
    let mut named = good();
    named.inputs[1].name = "A".into();
    assert!(refusal(&named).contains("the name of input \"A\""));
    let mut scalar = good();
    scalar.inputs[0].rank = 0;
    assert_eq!(
        refusal(&scalar),
        "the first input must be logprobs, of rank 1 or 2"
    );
}

/// A graph in which each of `n` calls takes the one before it twice.
fn doubling(n: usize, target: &str, args: impl Fn(Json) -> Json) -> CreateCustomLossRequest {
    let mut request = call("torch.sum", json!([{"ref": "logprobs"}]), json!({}));
    let mut nodes = vec![
        json!({"op": "call_function", "name": "n0", "target": "operator.getitem",
        "args": [[[1, 2], 0], 0]}),
    ];
    for i in 1..n {
        let before = json!({"ref": format!("n{}", i - 1)});
        nodes.push(
            json!({"op": "call_function", "name": format!("n{i}"), "target": target,
            "args": args(before)}),
        );
    }
    let nodes: Vec<_> = nodes
        .into_iter()
        .map(|n| serde_json::from_value(n).unwrap())
        .collect();
    request.graph.nodes.splice(2..2, nodes);
    request
}

#[test]
fn lists_do_not_grow_without_bound() {
    let appended = doubling(60, "operator.add", |list| json!([list, list]));
    let nested = doubling(60, "operator.getitem", |list| json!([[[list, list]], 0]));

    for request in [appended, nested] {
        let text = failure(&request);
        assert!(text.contains("a list of more than 4096 items"), "{text}");
    }
}

#[test]
fn reading_is_bounded_as_writing_is() {
    let mut request = call(
        "torch.full",
        json!([{"tuple": [4_000_000]}, 1.0]),
        json!({}),
    );
    for i in 0..5 {
        let sum = json!({"op": "call_method", "name": format!("s{i}"), "target": "sum", "args": [{"ref": "x"}]});
        request
            .graph
            .nodes
            .insert(3, serde_json::from_value(sum).unwrap());
    }

    let text = failure(&request);

    assert!(text.contains("is too much"), "{text}");
}

#[test]
fn hostile_arguments_are_errors() {
    let x = json!({"ref": "logprobs"});
    let huge = 9_007_199_254_740_991_i64;
    let empty = json!({"slice": [2, 2, null]});
    for (target, args) in [
        ("torch.reshape", json!([x, [huge, huge, huge]])),
        ("torch.reshape", json!([x, [-1, 0]])),
        ("torch.narrow", json!([x, 0, 1, huge])),
        ("torch.select", json!([x, 0, huge])),
        ("torch.topk", json!([x, 3])),
        ("torch.topk", json!([x, -1])),
        ("torch.flatten", json!([x, 1, 0])),
        ("torch.permute", json!([x, [0, 0]])),
        ("torch.transpose", json!([x, 5, 0])),
        ("torch.arange", json!([0, 1, 0])),
        ("torch.arange", json!([{"float": "nan"}])),
        ("torch.broadcast_to", json!([x, [huge, 2]])),
        ("torch.cat", json!([[]])),
        ("torch.stack", json!([[x, {"ref": "a"}]])),
        ("torch.gather", json!([x, 0, {"ref": "a"}])),
        ("torch.index_select", json!([x, 0, {"ref": "a"}])),
        ("torch.zeros", json!([-1])),
        ("torch.matmul", json!([x, {"ref": "a"}])),
        ("torch.diff", json!([1.0])),
        ("operator.getitem", json!([x, {"tuple": [0, 0]}])),
        ("operator.getitem", json!([x, {"slice": [null, null, 0]}])),
        ("operator.getitem", json!([x, empty])),
        ("math.sqrt", json!(["text"])),
        ("getattr", json!([x, "data_ptr"])),
    ] {
        failure(&call(target, args, json!({})));
    }
}
