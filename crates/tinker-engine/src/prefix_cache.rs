//! Sequences that stay cached after their request, so that prompts which begin alike share the work.
//!
//! A conversation sends its whole history again with every turn, and a loop asks the same question
//! many times. What the model has computed for a beginning does not depend on what follows it, so it
//! is copied instead of computed anew, with the same bits. How much was copied is told, and so only what
//! an owner's own requests left is: another's prompt could be guessed by it, token by token.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::backend::{AdapterId, Backend, BaseInfo, SlotId};

/// Fewest tokens that are worth copying; shorter beginnings are computed anew.
pub(crate) const MIN_SHARED: usize = 16;

/// Memory that cached sequences of a small model may take.
const MIN_BYTES: usize = 256 << 20;

/// Parameters of a model that allow cached sequences one byte. 2 GB for 8 billion parameters, which
/// are 7,600 tokens of Llama 3.1 8B: 32 blocks of 8 heads with 128 keys and values of 4 bytes.
const PARAMETERS_PER_BYTE: u64 = 4;

/// Most cached sequences: each is compared with each new prompt.
const MAX_ENTRIES: usize = 256;

/// Cached sequences, least recently used first.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    entries: VecDeque<Entry>,
    bytes: usize,
    max_bytes: usize,
}

/// What sequences that share work have in common beside their tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) owner: Option<Arc<str>>,
    pub(crate) adapter: Option<AdapterId>,
}

#[derive(Debug)]
struct Entry {
    origin: Origin,
    /// Tokens that the slot holds.
    tokens: Vec<u32>,
    slot: SlotId,
    bytes: usize,
}

/// A slot whose first tokens are those of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shared {
    pub(crate) slot: SlotId,
    /// How many tokens.
    pub(crate) len: usize,
}

/// Memory that cached sequences of a base model may take: they grow with the model.
pub(crate) fn max_bytes(base: &BaseInfo) -> usize {
    let share = base.n_parameters / PARAMETERS_PER_BYTE;
    usize::try_from(share).unwrap_or(usize::MAX).max(MIN_BYTES)
}

/// Number of equal tokens at the beginning.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl PrefixCache {
    pub(crate) const fn new(max_bytes: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            bytes: 0,
            max_bytes,
        }
    }

    /// Memory of what is cached.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The cached sequence that shares most with the beginning of `prompt`, at most all of it.
    pub(crate) fn find(&mut self, origin: &Origin, prompt: &[u32]) -> Option<Shared> {
        let is_of_origin = |(_, entry): &(usize, &Entry)| entry.origin == *origin;
        let (i, len) = (self.entries.iter().enumerate())
            .filter(is_of_origin)
            .map(|(i, entry)| (i, common(&entry.tokens, prompt)))
            .max_by_key(|(_, len)| *len)
            .filter(|(_, len)| *len >= MIN_SHARED)?;
        let entry = self.entries.remove(i)?;
        let slot = entry.slot;
        self.entries.push_back(entry);
        Some(Shared { slot, len })
    }

    /// Keeps a slot that holds `tokens`, or closes it if it is not worth its memory.
    pub(crate) fn insert(
        &mut self,
        backend: &mut dyn Backend,
        origin: Origin,
        tokens: Vec<u32>,
        slot: SlotId,
    ) {
        let is_known = |entry: &Entry| entry.origin == origin && entry.tokens.starts_with(&tokens);
        if tokens.len() < MIN_SHARED || self.entries.iter().any(is_known) {
            backend.close_slot(slot);
            return;
        }
        let slot = trimmed(backend, slot, tokens.len());
        let bytes = backend.slot_bytes(slot);
        if bytes > self.max_bytes {
            backend.close_slot(slot);
            return;
        }
        self.close_if(backend, |entry| {
            entry.origin == origin && tokens.starts_with(&entry.tokens)
        });
        while self.bytes + bytes > self.max_bytes || self.entries.len() >= MAX_ENTRIES {
            let Some(oldest) = self.entries.pop_front() else {
                break;
            };
            self.bytes -= oldest.bytes;
            backend.close_slot(oldest.slot);
        }
        self.bytes += bytes;
        self.entries.push_back(Entry {
            origin,
            tokens,
            slot,
            bytes,
        });
    }

    /// Closes all that was computed with an adapter.
    pub(crate) fn forget(&mut self, backend: &mut dyn Backend, adapter: AdapterId) {
        self.close_if(backend, |entry| entry.origin.adapter == Some(adapter));
    }

    /// Closes everything; returns how many bytes that were.
    pub(crate) fn clear(&mut self, backend: &mut dyn Backend) -> usize {
        let bytes = self.bytes;
        self.close_if(backend, |_| true);
        bytes
    }

    fn close_if(&mut self, backend: &mut dyn Backend, goes: impl Fn(&Entry) -> bool) {
        let bytes = &mut self.bytes;
        self.entries.retain(|entry| {
            let goes = goes(entry);
            if goes {
                *bytes -= entry.bytes;
                backend.close_slot(entry.slot);
            }
            !goes
        });
    }
}

/// A slot with the same tokens and without the room to grow, if that is less memory.
fn trimmed(backend: &mut dyn Backend, slot: SlotId, len: usize) -> SlotId {
    let Ok(copy) = backend.fork_prefix(slot, len, len) else {
        return slot;
    };
    let is_smaller = backend.slot_bytes(copy) < backend.slot_bytes(slot);
    let (kept, closed) = if is_smaller {
        (copy, slot)
    } else {
        (slot, copy)
    };
    backend.close_slot(closed);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeBackend;

    /// Of nobody, on the base model.
    const PLAIN: Origin = Origin {
        owner: None,
        adapter: None,
    };

    fn cached(cache: &mut PrefixCache, backend: &mut FakeBackend, tokens: &[u32]) -> SlotId {
        let slot = backend.open_slot(None, 128).unwrap();
        backend.prefill(slot, tokens, false).unwrap();
        cache.insert(backend, PLAIN, tokens.to_vec(), slot);
        slot
    }

    #[test]
    fn the_longest_beginning_is_found_and_short_ones_are_not() {
        let mut backend = FakeBackend::new(64, 128);
        let mut cache = PrefixCache::new(MIN_BYTES);
        let tokens: Vec<u32> = (0..60).collect();
        cached(
            &mut cache,
            &mut backend,
            &[&tokens[..20], &[63; 9]].concat(),
        );
        let long = cached(&mut cache, &mut backend, &tokens[..40]);

        let found = cache.find(&PLAIN, &tokens[..50]);
        assert_eq!(
            found,
            Some(Shared {
                slot: long,
                len: 40
            })
        );
        let found = cache.find(&PLAIN, &tokens[..30]);
        assert_eq!(
            found,
            Some(Shared {
                slot: long,
                len: 30
            })
        );
        assert_eq!(cache.find(&PLAIN, &tokens[..MIN_SHARED - 1]), None);
        let of_adapter = Origin {
            adapter: Some(AdapterId(1)),
            ..PLAIN
        };
        assert_eq!(cache.find(&of_adapter, &tokens), None);
        let of_ann = Origin {
            owner: Some("ann".into()),
            ..PLAIN
        };
        assert_eq!(cache.find(&of_ann, &tokens), None);
    }

    #[test]
    fn a_longer_sequence_takes_the_place_of_its_beginning() {
        let mut backend = FakeBackend::new(64, 128);
        let mut cache = PrefixCache::new(MIN_BYTES);
        for n in [30, 20, 40, 40] {
            cached(&mut cache, &mut backend, &vec![1; n]);
            assert_eq!(backend.n_slots(), 1, "{n}");
        }

        assert_eq!(cache.find(&PLAIN, &[1; 60]).unwrap().len, 40);
        cache.clear(&mut backend);
        assert_eq!((backend.n_slots(), cache.bytes), (0, 0));
    }

    #[test]
    fn the_least_recently_used_makes_room() {
        let mut backend = FakeBackend::new(64, 128);
        let slot = backend.open_slot(None, 128).unwrap();
        backend.prefill(slot, &[0; 20], false).unwrap();
        let one = backend.slot_bytes(slot);
        backend.close_slot(slot);
        let mut cache = PrefixCache::new(2 * one);
        cached(&mut cache, &mut backend, &[1; 20]);
        cached(&mut cache, &mut backend, &[2; 20]);
        cache.find(&PLAIN, &[1; 20]).unwrap();

        cached(&mut cache, &mut backend, &[3; 20]);

        assert!(cache.find(&PLAIN, &[1; 20]).is_some());
        assert_eq!(cache.find(&PLAIN, &[2; 20]), None);
        assert_eq!(backend.n_slots(), 2);
        cached(&mut cache, &mut backend, &[4; 100]);
        assert_eq!(cache.find(&PLAIN, &[4; 20]), None, "larger than the cache");
    }

    #[test]
    fn larger_models_may_keep_more() {
        let mut base = FakeBackend::new(64, 128).info().clone();
        for (n_parameters, bytes) in [(0, 256 << 20), (8_000_000_000, 2_000_000_000)] {
            base.n_parameters = n_parameters;
            assert_eq!(max_bytes(&base), bytes);
        }
    }
}
