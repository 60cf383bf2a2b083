//! A backend whose numbers are made up but depend on everything that the real ones depend on.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tinker_engine::{
    AdapterId, AdapterState, Backend, BaseInfo, Error, HostTensor, LoraSpec, OptimReport,
    Optimizer, Prefill, Result, SequenceOutput, SlotId, TrainSequence, Work,
};
use tinker_server::Loader;

const NAME: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
pub(crate) const VOCAB: usize = 32;
pub(crate) const CONTEXT: usize = 64;

/// Loads for any directory.
pub(crate) fn load(_dir: &Path, _threads: usize) -> Result<Box<dyn Backend>> {
    Ok(Box::new(FakeBackend::new()))
}

/// What a backend does wrong or says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    /// Refuses to train on these tokens.
    pub(crate) refused: Option<Vec<u32>>,
    /// Panics once in exporting an adapter.
    pub(crate) export_panics: Arc<AtomicBool>,
    /// What each adapter is said to take.
    pub(crate) adapter_bytes: usize,
    /// What work is said to take: an adapter, a pass, samples.
    pub(crate) work_bytes: [u64; 3],
    /// What a pass without gradient is said to take.
    pub(crate) forward_bytes: u64,
    /// What each cached sequence is said to hold, if not what it does.
    pub(crate) slot_bytes: Option<usize>,
    /// The context, if another than [`CONTEXT`].
    pub(crate) context: Option<usize>,
}

/// Loads a backend with faults for any directory.
pub(crate) fn load_with(faults: Faults) -> Loader {
    Loader::new(move |_dir, _threads| {
        let mut backend = FakeBackend::new();
        backend.info.max_context = faults.context.unwrap_or(CONTEXT);
        backend.faults = faults.clone();
        Ok(Box::new(backend))
    })
}

#[derive(Debug)]
struct Slot {
    adapter: Option<AdapterId>,
    tokens: Vec<u32>,
    capacity: usize,
}

#[derive(Debug)]
pub(crate) struct FakeBackend {
    info: BaseInfo,
    adapters: BTreeMap<u64, AdapterState>,
    slots: BTreeMap<u64, Slot>,
    next: u64,
    faults: Faults,
}

impl FakeBackend {
    fn new() -> Self {
        Self {
            info: BaseInfo {
                vocab_size: VOCAB,
                max_context: CONTEXT,
                hidden_size: 8,
                n_layers: 1,
                n_parameters: 100,
                architecture: "Fake".into(),
                precision: "fake".into(),
            },
            adapters: BTreeMap::new(),
            slots: BTreeMap::new(),
            next: 0,
            faults: Faults::default(),
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn state(&self, adapter: AdapterId) -> Result<&AdapterState> {
        self.adapters.get(&adapter.0).ok_or(Error::Unknown {
            kind: "adapter",
            id: adapter.0,
        })
    }

    fn weights(&self, adapter: Option<AdapterId>) -> Result<Vec<f32>> {
        Ok(match adapter {
            Some(adapter) => self.state(adapter)?.weights[NAME].data.clone(),
            None => vec![0.0; 4],
        })
    }

    fn logits(&self, slot: &Slot, n: usize) -> Result<Vec<f32>> {
        let weights = self.weights(slot.adapter)?;
        Ok((0..VOCAB as u32)
            .map(|token| 3.0 * noise(&weights, &slot.tokens[..n], token))
            .collect())
    }

    fn outputs(
        &self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let weights = self.weights(adapter)?;
        Ok(sequences
            .iter()
            .map(|sequence| {
                let at = |i: usize| &sequence.tokens[..=i / sequence.k];
                let logprobs: Vec<f32> = sequence
                    .targets
                    .iter()
                    .enumerate()
                    .map(|(i, &target)| noise(&weights, at(i), target) - 1.0)
                    .collect();
                let loss = -logprobs.iter().map(|&l| f64::from(l)).sum::<f64>();
                SequenceOutput { logprobs, loss }
            })
            .collect())
    }
}

/// A number in `[0, 1)` that depends on all arguments.
fn noise(weights: &[f32], tokens: &[u32], salt: u32) -> f32 {
    let mut hasher = DefaultHasher::new();
    weights.iter().for_each(|w| w.to_bits().hash(&mut hasher));
    (tokens, salt).hash(&mut hasher);
    (hasher.finish() >> 40) as f32 / (1_u64 << 24) as f32
}

impl Backend for FakeBackend {
    fn info(&self) -> &BaseInfo {
        &self.info
    }

    fn memory_for(&self, work: Work<'_>) -> u64 {
        let [adapter, pass, slots] = self.faults.work_bytes;
        match work {
            Work::Adapter(_) => adapter,
            Work::Weights(_) => adapter * 2 / 5,
            Work::Pass { .. } => pass,
            Work::Forward { .. } => self.faults.forward_bytes,
            Work::Slots { .. } => slots,
        }
    }

    fn create_adapter(&mut self, spec: &LoraSpec) -> Result<AdapterId> {
        if spec.rank > self.info.hidden_size {
            return Err(Error::Invalid(format!(
                "rank {} is above the hidden size {}",
                spec.rank, self.info.hidden_size
            )));
        }
        let seed = [spec.seed as u32, (spec.seed >> 32) as u32];
        let data = (0..4).map(|i| noise(&[], &seed, i)).collect();
        let tensor = HostTensor {
            shape: vec![2, 2],
            data,
        };
        let state = AdapterState {
            spec: *spec,
            weights: [(NAME.to_owned(), tensor)].into(),
            moments: BTreeMap::new(),
            gradient: BTreeMap::new(),
            step: 0,
        };
        self.import_adapter(&state)
    }

    fn import_adapter(&mut self, state: &AdapterState) -> Result<AdapterId> {
        if !state.weights.contains_key(NAME) {
            return Err(Error::Invalid(format!("tensor {NAME} is missing")));
        }
        let id = self.fresh();
        self.adapters.insert(id, state.clone());
        Ok(AdapterId(id))
    }

    fn export_adapter(&self, adapter: AdapterId) -> Result<AdapterState> {
        if self.faults.export_panics.swap(false, Ordering::SeqCst) {
            panic!("a bug in the export");
        }
        self.state(adapter).cloned()
    }

    fn snapshot_adapter(&mut self, adapter: AdapterId) -> Result<AdapterId> {
        let state = AdapterState {
            moments: BTreeMap::new(),
            gradient: BTreeMap::new(),
            step: 0,
            ..self.state(adapter)?.clone()
        };
        self.import_adapter(&state)
    }

    fn adapter_bytes(&self, _adapter: AdapterId) -> usize {
        self.faults.adapter_bytes
    }

    fn drop_adapter(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter.0);
    }

    fn forward(
        &mut self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        self.outputs(adapter, sequences)
    }

    fn forward_backward(
        &mut self,
        adapter: AdapterId,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        if sequences.iter().any(|s| s.tokens == [13, 13, 13]) {
            panic!("a bug in the engine");
        }
        let refused = self.faults.refused.as_ref();
        if refused.is_some_and(|refused| sequences.iter().any(|s| s.tokens == *refused)) {
            return Err(Error::Invalid("tokens that this backend refuses".into()));
        }
        let outputs = self.outputs(Some(adapter), sequences)?;
        let weights = self.weights(Some(adapter))?;
        let state = self.adapters.get_mut(&adapter.0).unwrap();
        let gradient = state.gradient.entry(NAME.into()).or_insert(vec![0.0; 4]);
        for sequence in sequences {
            for (i, g) in gradient.iter_mut().enumerate() {
                *g += noise(&weights, &sequence.tokens, i as u32 + 1000);
            }
        }
        Ok(outputs)
    }

    fn optim_step(&mut self, adapter: AdapterId, optimizer: &Optimizer) -> Result<OptimReport> {
        self.state(adapter)?;
        let Optimizer::AdamW(params) = optimizer else {
            return Err(Error::Invalid("this backend has adamw alone".into()));
        };
        let state = self.adapters.get_mut(&adapter.0).unwrap();
        let gradient = state.gradient.remove(NAME).unwrap_or(vec![0.0; 4]);
        let (first, second) = state
            .moments
            .entry(NAME.into())
            .or_insert((vec![0.0; 4], vec![0.0; 4]));
        let weights = &mut state.weights.get_mut(NAME).unwrap().data;
        for i in 0..4 {
            first[i] = params.beta1 * first[i] + (1.0 - params.beta1) * gradient[i];
            second[i] = params.beta2 * second[i] + (1.0 - params.beta2) * gradient[i] * gradient[i];
            weights[i] -= params.learning_rate * first[i] / (second[i].sqrt() + params.eps);
        }
        state.step += 1;
        Ok(OptimReport {
            step: state.step,
            grad_norm: gradient
                .iter()
                .map(|g| f64::from(g * g))
                .sum::<f64>()
                .sqrt(),
        })
    }

    fn clear_gradient(&mut self, adapter: AdapterId) -> Result<()> {
        self.state(adapter)?;
        self.adapters.get_mut(&adapter.0).unwrap().gradient.clear();
        Ok(())
    }

    fn open_slot(&mut self, adapter: Option<AdapterId>, capacity: usize) -> Result<SlotId> {
        self.weights(adapter)?;
        let id = self.fresh();
        let slot = Slot {
            adapter,
            tokens: Vec::new(),
            capacity,
        };
        self.slots.insert(id, slot);
        Ok(SlotId(id))
    }

    fn fork_slot(&mut self, slot: SlotId) -> Result<SlotId> {
        let from = &self.slots[&slot.0];
        let copy = Slot {
            adapter: from.adapter,
            tokens: from.tokens.clone(),
            capacity: from.capacity,
        };
        let id = self.fresh();
        self.slots.insert(id, copy);
        Ok(SlotId(id))
    }

    fn fork_prefix(&mut self, slot: SlotId, len: usize, capacity: usize) -> Result<SlotId> {
        let from = &self.slots[&slot.0];
        let copy = Slot {
            adapter: from.adapter,
            tokens: from.tokens[..len].to_vec(),
            capacity,
        };
        let id = self.fresh();
        self.slots.insert(id, copy);
        Ok(SlotId(id))
    }

    fn slot_bytes(&self, slot: SlotId) -> usize {
        let held = self.slots[&slot.0].tokens.len() * size_of::<u32>();
        self.faults.slot_bytes.unwrap_or(held)
    }

    fn close_slot(&mut self, slot: SlotId) {
        self.slots.remove(&slot.0);
    }

    fn prefill(&mut self, slot: SlotId, tokens: &[u32], prompt_logprobs: bool) -> Result<Prefill> {
        let known = self.slots.get_mut(&slot.0).unwrap();
        assert!(known.tokens.len() + tokens.len() <= known.capacity);
        let start = known.tokens.len();
        known.tokens.extend_from_slice(tokens);
        let known = &self.slots[&slot.0];
        let mut logprobs = Vec::new();
        if prompt_logprobs {
            for i in start + 1..known.tokens.len() {
                let logits = self.logits(known, i)?;
                let sum = logits.iter().map(|l| l.exp()).sum::<f32>().ln();
                logprobs.push(logits[known.tokens[i] as usize] - sum);
            }
        }
        Ok(Prefill {
            prompt_logprobs: logprobs,
            next_logits: self.logits(known, known.tokens.len())?,
        })
    }

    fn decode_step(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for (slot, token) in rows {
            let known = self.slots.get_mut(&slot.0).unwrap();
            assert!(known.tokens.len() < known.capacity);
            known.tokens.push(*token);
            let known = &self.slots[&slot.0];
            all.extend(self.logits(known, known.tokens.len())?);
        }
        Ok(all)
    }
}
