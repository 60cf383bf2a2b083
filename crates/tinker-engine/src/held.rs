//! The adapters and cached sequences that a backend holds, by their ids. What calls may ask of them is
//! checked here, in the same words whatever the device.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::backend::{AdapterId, BaseInfo, SlotId, check_prefix};
use crate::error::{Error, Result};

/// A cached sequence, as far as calls about it are checked.
pub(crate) trait Cached {
    /// Tokens it holds.
    fn len(&self) -> usize;

    /// Most tokens it may hold.
    fn capacity(&self) -> usize;

    /// Memory of its keys and values.
    fn bytes(&self) -> usize;
}

/// Adapters of one kind and slots of one kind; no id is given out twice.
#[derive(Debug)]
pub(crate) struct Held<A, S> {
    vocab_size: usize,
    max_context: usize,
    adapters: BTreeMap<AdapterId, Arc<A>>,
    slots: HashMap<SlotId, S>,
    next_id: u64,
}

impl<A, S: Cached> Held<A, S> {
    /// Nothing, for a model.
    pub(crate) fn new(info: &BaseInfo) -> Self {
        Self {
            vocab_size: info.vocab_size,
            max_context: info.max_context,
            adapters: BTreeMap::new(),
            slots: HashMap::new(),
            next_id: 0,
        }
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(crate) fn add_adapter(&mut self, adapter: A) -> AdapterId {
        let id = AdapterId(self.next_id());
        self.adapters.insert(id, Arc::new(adapter));
        id
    }

    pub(crate) fn adapter(&self, id: AdapterId) -> Result<&Arc<A>> {
        self.adapters.get(&id).ok_or_else(|| unknown_adapter(id))
    }

    /// An adapter for a change: its own copy of the weights if a slot still reads them.
    pub(crate) fn adapter_mut(
        &mut self,
        id: AdapterId,
        copy: impl FnOnce(&A) -> Result<A>,
    ) -> Result<&mut A> {
        let held = self.adapters.get_mut(&id);
        let shared = held.ok_or_else(|| unknown_adapter(id))?;
        if Arc::get_mut(shared).is_none() {
            *shared = Arc::new(copy(shared)?);
        }
        Arc::get_mut(shared).ok_or_else(|| unknown_adapter(id))
    }

    pub(crate) fn optional_adapter(&self, id: Option<AdapterId>) -> Result<Option<Arc<A>>> {
        id.map(|id| self.adapter(id).cloned()).transpose()
    }

    /// Forgets an adapter; returns whether no other is left.
    pub(crate) fn drop_adapter(&mut self, id: AdapterId) -> bool {
        self.adapters.remove(&id);
        self.adapters.is_empty()
    }

    pub(crate) fn add_slot(&mut self, slot: S) -> SlotId {
        let id = SlotId(self.next_id());
        self.slots.insert(id, slot);
        id
    }

    pub(crate) fn slot(&self, id: SlotId) -> Result<&S> {
        self.slots.get(&id).ok_or_else(|| unknown_slot(id))
    }

    pub(crate) fn slot_bytes(&self, id: SlotId) -> usize {
        self.slots.get(&id).map_or(0, S::bytes)
    }

    pub(crate) fn close_slot(&mut self, id: SlotId) {
        self.slots.remove(&id);
    }

    /// Refuses a slot of no tokens, or of more than the model takes.
    pub(crate) fn check_capacity(&self, capacity: usize) -> Result<()> {
        let max = self.max_context;
        if capacity == 0 || capacity > max {
            return Err(Error::Invalid(format!(
                "slot capacity {capacity} is not in 1..={max}"
            )));
        }
        Ok(())
    }

    /// A slot whose first `len` tokens are to be copied into one with room for `capacity`.
    pub(crate) fn slot_to_fork(&self, id: SlotId, len: usize, capacity: usize) -> Result<&S> {
        let from = self.slot(id)?;
        check_prefix(len, from.len(), capacity, self.max_context)?;
        Ok(from)
    }

    /// Takes a slot that is to get `tokens`, so that it can be borrowed alone; to be put back.
    pub(crate) fn take_slot(&mut self, id: SlotId, tokens: &[u32]) -> Result<S> {
        self.check_tokens(tokens.iter().copied())?;
        if tokens.is_empty() {
            return Err(Error::Invalid("there are no tokens to append".into()));
        }
        check_room(self.slot(id)?, tokens.len())?;
        self.slots.remove(&id).ok_or_else(|| unknown_slot(id))
    }

    /// Takes slots that are to get a token each; to be put back. If one cannot, all stay.
    pub(crate) fn take_slots(&mut self, rows: &[(SlotId, u32)]) -> Result<Vec<(SlotId, S)>> {
        self.check_tokens(rows.iter().map(|(_, token)| *token))?;
        let mut named = HashSet::new();
        for (id, _) in rows {
            check_room(self.slot(*id)?, 1)?;
            if !named.insert(*id) {
                return Err(Error::Invalid(format!("slot {} is named twice", id.0)));
            }
        }
        let mut taken = Vec::with_capacity(rows.len());
        for (id, _) in rows {
            taken.extend(self.slots.remove_entry(id));
        }
        Ok(taken)
    }

    pub(crate) fn put_back(&mut self, slots: impl IntoIterator<Item = (SlotId, S)>) {
        self.slots.extend(slots);
    }

    fn check_tokens(&self, tokens: impl IntoIterator<Item = u32>) -> Result<()> {
        let vocab = self.vocab_size;
        match tokens.into_iter().find(|t| *t as usize >= vocab) {
            None => Ok(()),
            Some(token) => {
                let message = format!("token {token} is not below the vocabulary size {vocab}");
                Err(Error::Invalid(message))
            }
        }
    }
}

fn unknown_adapter(id: AdapterId) -> Error {
    Error::Unknown {
        kind: "adapter",
        id: id.0,
    }
}

fn unknown_slot(id: SlotId) -> Error {
    Error::Unknown {
        kind: "slot",
        id: id.0,
    }
}

fn check_room(slot: &impl Cached, n: usize) -> Result<()> {
    let (len, capacity) = (slot.len(), slot.capacity());
    if n > capacity - len {
        let message = format!("{n} more tokens do not fit a slot that holds {len} of {capacity}");
        return Err(Error::Invalid(message));
    }
    Ok(())
}

/// Refuses log-probabilities of a prompt that are no numbers; the first is of the token at `before + 1`.
pub(crate) fn check_scores(slot: SlotId, before: usize, logprobs: &[f32]) -> Result<()> {
    let Some(i) = logprobs.iter().position(|l| !l.is_finite()) else {
        return Ok(());
    };
    let (slot, position, logprob) = (slot.0, before + i + 1, logprobs[i]);
    Err(Error::NotFinite(format!(
        "slot {slot}: the log-probability of the token at position {position} is {logprob}"
    )))
}
