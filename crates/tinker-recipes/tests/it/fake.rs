//! A training service in memory whose "weights" are a digest of every operation in order, so that
//! two runs end equal exactly if they did the same. Its ledgers are in memory, too: what a file
//! holds is the number of one.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use tinker_api::{Error, LedgerError};
use tinker_recipes::{Pending, Restored, Service, Trainer, TrainerSpec};
use tinker_types::{
    AdamParams, Datum, FinishReason, ForwardBackwardOutput, OptimStepResponse, TensorData,
    TinkerPath, loss_input,
};

/// Shared by the service and its training runs.
#[derive(Debug, Default)]
struct Shared {
    checkpoints: BTreeMap<String, Weights>,
    operations: Vec<String>,
    runs: Vec<Run>,
    ledgers: Vec<Ledger>,
    fails_after: Option<(usize, Failing)>,
    loss: Option<f32>,
    start_error: Option<Error>,
    answers_no_goodbye: bool,
    n_open: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Weights {
    digest: u64,
    n_steps: u32,
}

/// A training run on the server.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    weights: Weights,
    gradient: u64,
}

/// What a ledger knows: the run, and each operation with the weights that it met.
#[derive(Debug, Default)]
struct Ledger {
    run: Option<usize>,
    operations: Vec<(String, Weights)>,
}

/// How operations fail.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Failing {
    /// For good.
    ForGood,
    /// The server is not reached any more: nothing of it arrives.
    Away,
}

/// A service; with a ledger, one that notes what is done.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeService {
    shared: Arc<Mutex<Shared>>,
    ledger: Option<usize>,
}

impl FakeService {
    /// The digest saved at `path`.
    pub(crate) fn weights_at(&self, path: &TinkerPath) -> u64 {
        self.shared().checkpoints[&path.to_string()].digest
    }

    /// Forgets the checkpoint called `name`, as an expired one.
    pub(crate) fn expire(&self, name: &str) {
        let suffix = format!("/weights/{name}");
        self.shared()
            .checkpoints
            .retain(|path, _| !path.ends_with(&suffix));
    }

    /// Forgets all training runs; their checkpoints stay.
    pub(crate) fn forget_runs(&self) {
        for ledger in &mut self.shared().ledgers {
            ledger.run = None;
        }
    }

    /// Fails every operation after the next `n` for good.
    pub(crate) fn fail_after(&self, n: Option<usize>) {
        self.shared().fails_after = n.map(|n| (n, Failing::ForGood));
    }

    /// Is not reached any more after the next `n` operations.
    pub(crate) fn leave_after(&self, n: usize) {
        self.shared().fails_after = Some((n, Failing::Away));
    }

    /// Fails the next start of a training run, in a session that is open by then.
    pub(crate) fn fail_start(&self, error: Error) {
        self.shared().start_error = Some(error);
    }

    /// Never answers when a session is ended.
    pub(crate) fn answer_no_goodbye(&self) {
        self.shared().answers_no_goodbye = true;
    }

    /// Answers this loss instead of a falling one.
    pub(crate) fn set_loss(&self, loss: f32) {
        self.shared().loss = Some(loss);
    }

    /// What was done, in order; what a ledger answered is not.
    pub(crate) fn operations(&self) -> Vec<String> {
        self.shared().operations.clone()
    }

    /// Sessions that were not ended.
    pub(crate) fn n_open_sessions(&self) -> usize {
        self.shared().n_open
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap()
    }

    /// The run of the ledger, or a new one.
    fn run(&self, weights: Weights) -> tinker_api::Result<Box<dyn Trainer>> {
        let mut shared = self.shared();
        shared.n_open += 1;
        if let Some(error) = shared.start_error.take() {
            return Err(error);
        }
        let noted = self.ledger.unwrap();
        let ledger = &shared.ledgers[noted];
        let id = match ledger.run {
            Some(id) => id,
            None if !ledger.operations.is_empty() => return Err(lost_run()),
            None => {
                let gradient = 0;
                shared.runs.push(Run { weights, gradient });
                shared.runs.len() - 1
            }
        };
        shared.ledgers[noted].run = Some(id);
        Ok(Box::new(FakeTrainer {
            service: self.clone(),
            ledger: noted,
            id,
            n_done: 0,
        }))
    }
}

fn lost_run() -> Error {
    let run = "run-0".parse().unwrap();
    let detail = "it does not have the run any more".to_owned();
    LedgerError::ServerDiffers { run, detail }.into()
}

impl Service for FakeService {
    fn with_ledger(&self, path: &Path) -> tinker_api::Result<Box<dyn Service>> {
        let mut shared = self.shared();
        // The file says which of the ledgers it is, so that one is as lost as its file.
        let ledger = match std::fs::read_to_string(path) {
            Ok(number) => number.parse().unwrap(),
            Err(_) => {
                shared.ledgers.push(Ledger::default());
                let number = shared.ledgers.len() - 1;
                std::fs::write(path, number.to_string()).unwrap();
                number
            }
        };
        Ok(Box::new(Self {
            shared: Arc::clone(&self.shared),
            ledger: Some(ledger),
        }))
    }

    fn close(&self, _reason: FinishReason) -> Pending<'_, ()> {
        let mut shared = self.shared();
        if shared.answers_no_goodbye {
            return Box::pin(std::future::pending());
        }
        shared.n_open -= 1;
        Box::pin(async { Ok(()) })
    }

    fn create<'a>(&'a self, spec: &'a TrainerSpec) -> Pending<'a, Box<dyn Trainer>> {
        let digest = digest_of(&(spec.base_model.as_str(), spec.lora.seed));
        let run = self.run(Weights { digest, n_steps: 0 });
        Box::pin(async { run })
    }

    fn restore<'a>(&'a self, state: &'a TinkerPath) -> Pending<'a, Restored> {
        let saved = self.shared().checkpoints.get(&state.to_string()).copied();
        let restored = match saved {
            Some(weights) => self.run(weights).map(Restored::Trainer),
            None => {
                self.shared().n_open += 1;
                Ok(Restored::Unusable("it does not exist".to_owned()))
            }
        };
        Box::pin(async { restored })
    }
}

struct FakeTrainer {
    service: FakeService,
    ledger: usize,
    id: usize,
    /// Operations that were asked for here.
    n_done: usize,
}

/// The weights that an operation met, or why it was not done.
type Met = tinker_api::Result<Weights>;

impl FakeTrainer {
    /// Does an operation, unless the ledger knows that it was done.
    fn operate(&mut self, name: &str, content: u64, change: impl FnOnce(&mut Run)) -> Met {
        let operation = format!("{name} {content}");
        let mut shared = self.service.shared();
        let shared = &mut *shared;
        let noted = &mut shared.ledgers[self.ledger].operations;
        if let Some((before, met)) = noted.get(self.n_done) {
            assert_eq!(*before, operation, "another operation than before");
            self.n_done += 1;
            return Ok(*met);
        }
        match &mut shared.fails_after {
            Some((0, Failing::ForGood)) => {
                shared.operations.push(name.to_owned());
                return Err(Error::Protocol("the server is gone".to_owned()));
            }
            Some((0, Failing::Away)) => {
                return Err(Error::Stopped("the server is gone".to_owned()));
            }
            Some((n, _)) => *n -= 1,
            None => {}
        }
        let run = &mut shared.runs[self.id];
        let met = run.weights;
        change(run);
        noted.push((operation, met));
        shared.operations.push(name.to_owned());
        self.n_done += 1;
        Ok(met)
    }

    fn answer(&self, data: &[Datum], weights: Weights) -> ForwardBackwardOutput {
        let falling = 2.0 / (1.0 + weights.n_steps as f32);
        let loss = self.service.shared().loss.unwrap_or(falling);
        let outputs = data.iter().map(|datum| {
            let n = datum.loss_fn_inputs()[loss_input::WEIGHTS].shape()[0];
            BTreeMap::from([("logprobs".to_owned(), TensorData::floats(vec![-loss; n]))])
        });
        ForwardBackwardOutput {
            loss_fn_outputs: outputs.collect(),
            ..Default::default()
        }
    }

    fn pass(
        &mut self,
        name: &str,
        data: &[Datum],
        change: impl FnOnce(&mut Run, u64),
    ) -> Pending<'static, ForwardBackwardOutput> {
        let content = digest_of(&serde_json::to_string(data).unwrap());
        let name = format!("{name} {}", data.len());
        let met = self.operate(&name, content, |run| change(run, content));
        ready(met.map(|weights| self.answer(data, weights)))
    }

    fn save(&mut self, operation: &str, segment: &str, name: &str) -> Pending<'static, TinkerPath> {
        let met = self.operate(&format!("{operation} {name}"), 0, |_| {});
        let path: TinkerPath = format!("tinker://run-{}/{segment}/{name}", self.id)
            .parse()
            .unwrap();
        if let Ok(weights) = met {
            let mut shared = self.service.shared();
            shared.checkpoints.insert(path.to_string(), weights);
        }
        ready(met.map(|_| path))
    }
}

impl Trainer for FakeTrainer {
    fn is_repeating(&self) -> bool {
        self.n_done < self.service.shared().ledgers[self.ledger].operations.len()
    }

    fn forward_backward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput> {
        self.pass("forward_backward", &data, |run, content| {
            run.gradient = digest_of(&(run.gradient, content));
        })
    }

    fn forward(&mut self, data: Vec<Datum>) -> Pending<'static, ForwardBackwardOutput> {
        self.pass("forward", &data, |_, _| {})
    }

    fn optim_step(&mut self, adam: AdamParams) -> Pending<'static, OptimStepResponse> {
        let content = digest_of(&serde_json::to_string(&adam).unwrap());
        let met = self.operate("optim_step", content, |run| {
            run.weights.digest = digest_of(&(run.weights, run.gradient, content));
            run.weights.n_steps += 1;
            run.gradient = 0;
        });
        let metrics = BTreeMap::from([("grad_norm".to_owned(), 0.5), ("step".to_owned(), 1.0)]);
        ready(met.map(|_| OptimStepResponse {
            metrics: Some(metrics),
        }))
    }

    fn save_state(&mut self, name: &str, _ttl: Option<u64>) -> Pending<'static, TinkerPath> {
        self.save("save_state", "weights", name)
    }

    fn save_sampler(&mut self, name: &str) -> Pending<'static, TinkerPath> {
        self.save("save_sampler", "sampler_weights", name)
    }
}

fn ready<T: Send + 'static>(result: tinker_api::Result<T>) -> Pending<'static, T> {
    Box::pin(async { result })
}

fn digest_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
