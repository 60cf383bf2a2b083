//! A backend without a model, for tests of the layers above: small, instant and deterministic.
//!
//! It computes nothing that a language model would. Its logits are a hash of the adapter's weights
//! and of the tokens so far, so that whatever must change a result (a token, a training step, another
//! adapter) does, and nothing else; its gradient pulls every weight towards the targets it has seen.
//! Checks and errors are those of the real backends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::adapter::{AdapterState, HostTensor, LoraSpec};
use crate::backend::{AdapterId, Backend, BaseInfo, Prefill, SequenceOutput, SlotId, check_prefix};
use crate::error::{Error, Result};
use crate::loss::TrainSequence;
use crate::optim::{Family, OptimReport, Optimizer, clip_factor, ema};
use crate::rng;
use crate::sampler::logprob_of;

/// The only module of a fake adapter.
const MODULE: &str = "base_model.model.model.layers.0.self_attn.q_proj";
const HIDDEN: usize = 8;

/// A backend whose numbers are made up; see the module.
#[derive(Debug)]
pub struct FakeBackend {
    info: BaseInfo,
    adapters: BTreeMap<AdapterId, AdapterState>,
    slots: BTreeMap<SlotId, FakeSlot>,
    next_id: u64,
}

#[derive(Debug, Clone)]
struct FakeSlot {
    /// Hash of the adapter when the slot was opened.
    weights: u64,
    tokens: Vec<u32>,
    capacity: usize,
}

/// Makes a [`FakeBackend`] of 64 tokens and a context of 128, whatever the directory.
///
/// # Errors
/// Never; the signature is that of [`crate::load_cpu`].
pub fn load_fake(_dir: &Path, _threads: usize) -> Result<Box<dyn Backend>> {
    Ok(Box::new(FakeBackend::new(64, 128)))
}

impl FakeBackend {
    /// A backend with this vocabulary and context.
    pub fn new(vocab_size: usize, max_context: usize) -> Self {
        let info = BaseInfo {
            vocab_size,
            max_context,
            hidden_size: HIDDEN,
            n_layers: 1,
            n_parameters: 0,
            architecture: "Fake".into(),
            precision: "fake".into(),
        };
        Self {
            info,
            adapters: BTreeMap::new(),
            slots: BTreeMap::new(),
            next_id: 0,
        }
    }

    /// Slots that are open: 0 when everything above has cleaned up.
    pub fn n_slots(&self) -> usize {
        self.slots.len()
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn adapter(&self, id: AdapterId) -> Result<&AdapterState> {
        self.adapters.get(&id).ok_or(Error::Unknown {
            kind: "adapter",
            id: id.0,
        })
    }

    fn slot(&mut self, id: SlotId) -> Result<&mut FakeSlot> {
        self.slots.get_mut(&id).ok_or(Error::Unknown {
            kind: "slot",
            id: id.0,
        })
    }

    fn weights_of(&self, adapter: Option<AdapterId>) -> Result<u64> {
        adapter.map_or(Ok(0), |id| Ok(hash_weights(self.adapter(id)?)))
    }

    /// Logits after `tokens`, between -2 and 2.
    fn logits(&self, weights: u64, tokens: &[u32]) -> Vec<f32> {
        let context = tokens.iter().fold(weights, |hash, token| {
            rng::bits(hash, u64::from(*token) + 1)
        });
        (0..self.info.vocab_size as u64)
            .map(|token| (4.0 * rng::uniform(context, token) - 2.0) as f32)
            .collect()
    }

    fn check(&self, sequences: &[TrainSequence]) -> Result<()> {
        for (i, sequence) in sequences.iter().enumerate() {
            let outcome = sequence.check(self.info.vocab_size, self.info.max_context);
            outcome.map_err(|message| Error::Invalid(format!("sequence {i}: {message}")))?;
        }
        Ok(())
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.info.vocab_size;
        match tokens.iter().find(|t| **t as usize >= vocab) {
            None => Ok(()),
            Some(token) => {
                let message = format!("token {token} is not below the vocabulary size {vocab}");
                Err(Error::Invalid(message))
            }
        }
    }

    fn score(&self, weights: u64, sequence: &TrainSequence) -> Result<SequenceOutput> {
        let mut output = SequenceOutput {
            logprobs: Vec::new(),
            loss: 0.0,
        };
        for (i, targets) in sequence.targets.chunks(sequence.k).enumerate() {
            let logits = self.logits(weights, &sequence.tokens[..=i]);
            for target in targets {
                output.logprobs.push(logprob_of(&logits, *target)?);
            }
        }
        let evaluated = sequence.loss.evaluate(&output.logprobs);
        output.loss = evaluated.map_err(Error::Invalid)?.total;
        if !output.loss.is_finite() {
            return Err(Error::NotFinite(format!("the loss is {}", output.loss)));
        }
        Ok(output)
    }
}

fn hash_weights(state: &AdapterState) -> u64 {
    let values = state.weights.values().flat_map(|tensor| &tensor.data);
    values.fold(1, |hash, value| rng::bits(hash, u64::from(value.to_bits())))
}

fn append(slot: &mut FakeSlot, tokens: &[u32]) -> Result<()> {
    let (len, capacity) = (slot.tokens.len(), slot.capacity);
    if len + tokens.len() > capacity {
        let n = tokens.len();
        let message = format!("{n} more tokens do not fit a slot that holds {len} of {capacity}");
        return Err(Error::Invalid(message));
    }
    slot.tokens.extend(tokens);
    Ok(())
}

impl Backend for FakeBackend {
    fn info(&self) -> &BaseInfo {
        &self.info
    }

    fn create_adapter(&mut self, spec: &LoraSpec) -> Result<AdapterId> {
        if spec.rank == 0 || !(spec.train_attn || spec.train_mlp || spec.train_unembed) {
            let message = format!("cannot make a LoRA adapter of rank {}", spec.rank);
            return Err(Error::Invalid(message));
        }
        let tensor = |shape: [usize; 2], value: &dyn Fn(u64) -> f32| HostTensor {
            shape: shape.to_vec(),
            data: (0..(shape[0] * shape[1]) as u64).map(value).collect(),
        };
        let random = |i| rng::uniform(spec.seed, i) as f32 - 0.5;
        let weights = BTreeMap::from([
            (
                format!("{MODULE}.lora_A.weight"),
                tensor([spec.rank, HIDDEN], &random),
            ),
            (
                format!("{MODULE}.lora_B.weight"),
                tensor([HIDDEN, spec.rank], &|_| 0.0),
            ),
        ]);
        let (moments, gradient) = (BTreeMap::new(), BTreeMap::new());
        self.import_adapter(&AdapterState {
            spec: *spec,
            weights,
            moments,
            gradient,
            step: 0,
        })
    }

    fn import_adapter(&mut self, state: &AdapterState) -> Result<AdapterId> {
        let wanted = [
            (format!("{MODULE}.lora_A.weight"), [state.spec.rank, HIDDEN]),
            (format!("{MODULE}.lora_B.weight"), [HIDDEN, state.spec.rank]),
        ];
        for (name, shape) in wanted {
            let fits = |t: &HostTensor| t.shape == shape && t.data.iter().all(|x| x.is_finite());
            if !state.weights.get(&name).is_some_and(fits) {
                let message = format!("`{name}` is missing, not finite or not of shape {shape:?}");
                return Err(Error::Invalid(message));
            }
        }
        let id = AdapterId(self.next_id());
        self.adapters.insert(id, state.clone());
        Ok(id)
    }

    fn export_adapter(&self, adapter: AdapterId) -> Result<AdapterState> {
        self.adapter(adapter).cloned()
    }

    fn snapshot_adapter(&mut self, adapter: AdapterId) -> Result<AdapterId> {
        let mut copy = self.adapter(adapter)?.clone();
        copy.moments.clear();
        copy.gradient.clear();
        copy.step = 0;
        let id = AdapterId(self.next_id());
        self.adapters.insert(id, copy);
        Ok(id)
    }

    fn adapter_bytes(&self, adapter: AdapterId) -> usize {
        let weights = self.adapters.get(&adapter).map(|state| &state.weights);
        let tensors = weights.into_iter().flat_map(|weights| weights.values());
        tensors.map(|tensor| size_of_val(&tensor.data[..])).sum()
    }

    fn drop_adapter(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter);
    }

    fn forward(
        &mut self,
        adapter: Option<AdapterId>,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let weights = self.weights_of(adapter)?;
        self.check(sequences)?;
        sequences
            .iter()
            .map(|sequence| self.score(weights, sequence))
            .collect()
    }

    fn forward_backward(
        &mut self,
        adapter: AdapterId,
        sequences: &[TrainSequence],
    ) -> Result<Vec<SequenceOutput>> {
        let outputs = self.forward(Some(adapter), sequences)?;
        let known = Error::Unknown {
            kind: "adapter",
            id: adapter.0,
        };
        let state = self.adapters.get_mut(&adapter).ok_or(known)?;
        for (name, tensor) in &state.weights {
            let n = tensor.data.len();
            let gradient = state
                .gradient
                .entry(name.clone())
                .or_insert_with(|| vec![0.0; n]);
            for (sequence, output) in sequences.iter().zip(&outputs) {
                let evaluated = sequence.loss.evaluate(&output.logprobs);
                let derivatives = evaluated.map_err(Error::Invalid)?.gradient;
                for (target, derivative) in sequence.targets.iter().zip(derivatives) {
                    gradient[*target as usize % n] += derivative;
                }
            }
        }
        Ok(outputs)
    }

    fn optim_step(&mut self, adapter: AdapterId, optimizer: &Optimizer) -> Result<OptimReport> {
        optimizer.check()?;
        let known = Error::Unknown {
            kind: "adapter",
            id: adapter.0,
        };
        let state = self.adapters.get_mut(&adapter).ok_or(known)?;
        let is_dimuon = optimizer.family() == Family::Dimuon;
        if state
            .moments
            .values()
            .any(|(_, second)| second.is_empty() != is_dimuon)
        {
            let message = format!("a step of {} cannot follow", optimizer.family().name());
            return Err(Error::Invalid(message));
        }
        let gradient = std::mem::take(&mut state.gradient);
        let squares = gradient.values().flatten().map(|g| f64::from(*g).powi(2));
        let grad_norm = squares.sum::<f64>().sqrt();
        state.step += 1;
        for (name, tensor) in &mut state.weights {
            let n = tensor.data.len();
            let none = || (vec![0.0; n], vec![0.0; n]);
            let (first, second) = state.moments.entry(name.clone()).or_insert_with(none);
            for (i, weight) in tensor.data.iter_mut().enumerate() {
                let g = gradient.get(name).map_or(0.0, |g| g[i]);
                match optimizer {
                    Optimizer::AdamW(params) => {
                        let g = g * clip_factor(params.grad_clip_norm, grad_norm);
                        first[i] = ema(params.beta1, first[i], g);
                        second[i] = ema(params.beta2, second[i], g * g);
                        *weight *= 1.0 - params.learning_rate * params.weight_decay;
                        *weight -=
                            params.learning_rate * first[i] / (second[i].sqrt() + params.eps);
                    }
                    Optimizer::Dimuon(params) => {
                        let g = g * clip_factor(params.grad_clip_norm, grad_norm);
                        first[i] = ema(params.beta1, first[i], g);
                        *weight -= params.learning_rate * first[i].signum();
                    }
                }
            }
            if is_dimuon {
                second.clear();
            }
        }
        Ok(OptimReport {
            step: state.step,
            grad_norm,
        })
    }

    fn clear_gradient(&mut self, adapter: AdapterId) -> Result<()> {
        let known = Error::Unknown {
            kind: "adapter",
            id: adapter.0,
        };
        self.adapters
            .get_mut(&adapter)
            .ok_or(known)?
            .gradient
            .clear();
        Ok(())
    }

    fn open_slot(&mut self, adapter: Option<AdapterId>, capacity: usize) -> Result<SlotId> {
        let max = self.info.max_context;
        if capacity == 0 || capacity > max {
            return Err(Error::Invalid(format!(
                "slot capacity {capacity} is not in 1..={max}"
            )));
        }
        let weights = self.weights_of(adapter)?;
        let id = SlotId(self.next_id());
        self.slots.insert(
            id,
            FakeSlot {
                weights,
                tokens: Vec::new(),
                capacity,
            },
        );
        Ok(id)
    }

    fn fork_slot(&mut self, slot: SlotId) -> Result<SlotId> {
        let copy = self.slot(slot)?.clone();
        let id = SlotId(self.next_id());
        self.slots.insert(id, copy);
        Ok(id)
    }

    fn fork_prefix(&mut self, slot: SlotId, len: usize, capacity: usize) -> Result<SlotId> {
        let max_context = self.info.max_context;
        let from = self.slot(slot)?;
        check_prefix(len, from.tokens.len(), capacity, max_context)?;
        let copy = FakeSlot {
            weights: from.weights,
            tokens: from.tokens[..len].to_vec(),
            capacity,
        };
        let id = SlotId(self.next_id());
        self.slots.insert(id, copy);
        Ok(id)
    }

    fn slot_bytes(&self, slot: SlotId) -> usize {
        let tokens = self.slots.get(&slot).map_or(0, |slot| slot.tokens.len());
        tokens * size_of::<u32>()
    }

    fn close_slot(&mut self, slot: SlotId) {
        self.slots.remove(&slot);
    }

    fn prefill(&mut self, slot: SlotId, tokens: &[u32], prompt_logprobs: bool) -> Result<Prefill> {
        if tokens.is_empty() {
            return Err(Error::Invalid("there are no tokens to append".into()));
        }
        self.check_tokens(tokens)?;
        append(self.slot(slot)?, tokens)?;
        let FakeSlot {
            weights,
            tokens: all,
            ..
        } = self.slot(slot)?.clone();
        let start = all.len() - tokens.len();
        let scored = if prompt_logprobs {
            start + 1..all.len()
        } else {
            0..0
        };
        let prompt_logprobs = scored
            .map(|i| logprob_of(&self.logits(weights, &all[..i]), all[i]))
            .collect::<Result<_>>()?;
        Ok(Prefill {
            prompt_logprobs,
            next_logits: self.logits(weights, &all),
        })
    }

    fn decode_step(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<f32>> {
        let mut named = BTreeSet::new();
        for (id, token) in rows {
            self.check_tokens(&[*token])?;
            append(&mut self.slot(*id)?.clone(), &[*token])?;
            if !named.insert(*id) {
                return Err(Error::Invalid(format!("slot {} is named twice", id.0)));
            }
        }
        let mut logits = Vec::with_capacity(rows.len() * self.info.vocab_size);
        for (id, token) in rows {
            append(self.slot(*id)?, &[*token])?;
            let slot = self.slot(*id)?.clone();
            logits.extend(self.logits(slot.weights, &slot.tokens));
        }
        Ok(logits)
    }
}
