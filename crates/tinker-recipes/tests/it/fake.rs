//! A training service in memory whose "weights" are a digest of every operation in order, so that
//! two runs end equal exactly if they did the same.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

use tinker_api::Error;
use tinker_recipes::{Pending, Restored, Service, Trainer, TrainerSpec};
use tinker_types::{
    AdamParams, Datum, ForwardBackwardOutput, OptimStepResponse, TensorData, TinkerPath, loss_input,
};

/// Shared by the service and its training runs.
#[derive(Debug, Default)]
struct Shared {
    checkpoints: BTreeMap<String, Weights>,
    operations: Vec<String>,
    n_runs: usize,
    fails_after: Option<usize>,
    loss: Option<f32>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Weights {
    digest: u64,
    n_steps: u32,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct FakeService(Arc<Mutex<Shared>>);

impl FakeService {
    /// The digest saved at `path`.
    pub(crate) fn weights_at(&self, path: &TinkerPath) -> u64 {
        self.0.lock().unwrap().checkpoints[&path.to_string()].digest
    }

    /// Forgets the checkpoint called `name`, as an expired one.
    pub(crate) fn expire(&self, name: &str) {
        let suffix = format!("/weights/{name}");
        self.0
            .lock()
            .unwrap()
            .checkpoints
            .retain(|path, _| !path.ends_with(&suffix));
    }

    /// Fails every operation after the next `n`.
    pub(crate) fn fail_after(&self, n: Option<usize>) {
        self.0.lock().unwrap().fails_after = n;
    }

    /// Answers this loss instead of a falling one.
    pub(crate) fn set_loss(&self, loss: f32) {
        self.0.lock().unwrap().loss = Some(loss);
    }

    /// What was asked, in order.
    pub(crate) fn operations(&self) -> Vec<String> {
        self.0.lock().unwrap().operations.clone()
    }

    fn run(&self, weights: Weights) -> Box<dyn Trainer> {
        let mut shared = self.0.lock().unwrap();
        let id = shared.n_runs;
        shared.n_runs += 1;
        Box::new(FakeTrainer {
            shared: self.0.clone(),
            id,
            weights,
            gradient: 0,
        })
    }
}

impl Service for FakeService {
    fn create<'a>(&'a self, spec: &'a TrainerSpec) -> Pending<'a, Box<dyn Trainer>> {
        let digest = digest_of(&(spec.base_model.as_str(), spec.lora.seed));
        let run = self.run(Weights { digest, n_steps: 0 });
        Box::pin(async { Ok(run) })
    }

    fn restore<'a>(&'a self, state: &'a TinkerPath) -> Pending<'a, Restored> {
        let saved = self
            .0
            .lock()
            .unwrap()
            .checkpoints
            .get(&state.to_string())
            .copied();
        let restored = match saved {
            Some(weights) => Restored::Trainer(self.run(weights)),
            None => Restored::Unusable("it does not exist".to_owned()),
        };
        Box::pin(async { Ok(restored) })
    }
}

struct FakeTrainer {
    shared: Arc<Mutex<Shared>>,
    id: usize,
    weights: Weights,
    gradient: u64,
}

impl FakeTrainer {
    /// Notes the operation; false if it is to fail.
    fn note(&self, operation: String) -> bool {
        let mut shared = self.shared.lock().unwrap();
        shared.operations.push(operation);
        match &mut shared.fails_after {
            Some(0) => false,
            Some(n) => {
                *n -= 1;
                true
            }
            None => true,
        }
    }

    fn answer(&self, data: &[Datum]) -> ForwardBackwardOutput {
        let falling = 2.0 / (1.0 + self.weights.n_steps as f32);
        let loss = self.shared.lock().unwrap().loss.unwrap_or(falling);
        let outputs = data.iter().map(|datum| {
            let n = datum.loss_fn_inputs()[loss_input::WEIGHTS].shape()[0];
            BTreeMap::from([("logprobs".to_owned(), TensorData::floats(vec![-loss; n]))])
        });
        ForwardBackwardOutput {
            loss_fn_outputs: outputs.collect(),
            ..Default::default()
        }
    }

    fn save(&self, segment: &str, name: &str) -> TinkerPath {
        let path: TinkerPath = format!("tinker://run-{}/{segment}/{name}", self.id)
            .parse()
            .unwrap();
        self.shared
            .lock()
            .unwrap()
            .checkpoints
            .insert(path.to_string(), self.weights);
        path
    }
}

impl Trainer for FakeTrainer {
    fn forward_backward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput> {
        let is_ok = self.note(format!("forward_backward {}", data.len()));
        let answer = self.answer(&data);
        self.gradient = digest_of(&(self.gradient, serde_json::to_string(&data).unwrap()));
        ready(is_ok, answer)
    }

    fn forward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput> {
        let is_ok = self.note(format!("forward {}", data.len()));
        ready(is_ok, self.answer(&data))
    }

    fn optim_step(&mut self, adam: AdamParams) -> Pending<'static, OptimStepResponse> {
        let is_ok = self.note("optim_step".to_owned());
        let adam = serde_json::to_string(&adam).unwrap();
        self.weights.digest = digest_of(&(self.weights, self.gradient, adam));
        self.weights.n_steps += 1;
        self.gradient = 0;
        let metrics = BTreeMap::from([("grad_norm".to_owned(), 0.5), ("step".to_owned(), 1.0)]);
        ready(
            is_ok,
            OptimStepResponse {
                metrics: Some(metrics),
            },
        )
    }

    fn save_state(&mut self, name: &str, _ttl: Option<u64>) -> Pending<'static, TinkerPath> {
        let is_ok = self.note(format!("save_state {name}"));
        ready(is_ok, self.save("weights", name))
    }

    fn save_sampler(&mut self, name: &str) -> Pending<'static, TinkerPath> {
        let is_ok = self.note(format!("save_sampler {name}"));
        ready(is_ok, self.save("sampler_weights", name))
    }
}

fn ready<T: Send + 'static>(is_ok: bool, value: T) -> Pending<'static, T> {
    Box::pin(async move {
        if is_ok {
            Ok(value)
        } else {
            Err(Error::Protocol("the server is gone".to_owned()))
        }
    })
}

fn digest_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
