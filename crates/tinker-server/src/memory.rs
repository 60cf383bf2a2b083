//! Refusing work that the machine has no memory for, before it begins: the kernel would end the server instead, and
//! with it everybody else's work.
//!
//! Work takes its memory bit by bit: a sample with every token, an adapter with its first pass and its first step. So
//! what begins is promised what it may take at most, and others have what is neither taken nor promised. What does
//! not fit beside that, and would without the work that ends by itself, waits for it; what would not is refused.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::core::lock;
use crate::error::{Error, Result};
use crate::process;

/// How long what the machine has left is taken for known, by work that asks for little.
const GOOD_FOR: Duration = Duration::from_millis(500);

/// What is little: a thousand samples a second do not ask the kernel each.
const LITTLE: u64 = 64 << 20;

/// The memory that there is for more work, and what is promised of it.
#[derive(Clone)]
pub struct Memory(Arc<Ledger>);

struct Ledger {
    free: Box<dyn Fn() -> Option<u64> + Send + Sync>,
    good_for: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the machine had left, and when.
    known: Option<(Instant, Option<u64>)>,
    /// Of samples.
    samples: Sum,
    /// Of whatever else ends by itself. How much of it is taken nobody says.
    tasks: Sum,
    /// Of adapters that are trained: they stay until they are unloaded.
    lasting: Sum,
    /// What is given up for work that has no room without it.
    kept: u64,
    /// What operations wait for, which samples leave to them.
    claimed: u64,
    /// As much is there in any case: it was freed a moment ago, which the machine may not say at once.
    at_least: u64,
}

/// Bytes that were promised, and how many of them are taken.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    promised: u64,
    held: u64,
}

impl Sum {
    /// What was promised and is not taken.
    const fn open(self) -> u64 {
        self.promised.saturating_sub(self.held)
    }
}

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Keys and values of samples. They leave what operations claim to these.
    Samples,
    /// An adapter that is trained.
    Adapter,
    /// Whatever else ends by itself.
    Task,
}

/// A wish for memory.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) purpose: Purpose,
    /// About how many bytes more at most.
    pub(crate) n_bytes: u64,
    /// Who takes them.
    pub(crate) what: String,
    /// What to do where there are too few.
    pub(crate) advice: &'a str,
}

/// Memory that was promised; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Promise {
    memory: Memory,
    purpose: Purpose,
    n_bytes: u64,
}

impl Drop for Promise {
    fn drop(&mut self) {
        let mut state = lock(&self.memory.0.state);
        let sum = state.sum(self.purpose);
        sum.promised = sum.promised.saturating_sub(self.n_bytes);
        // How much of it was taken is not known until somebody looks again: rather too little is free than too much.
        sum.held = sum.held.saturating_sub(self.n_bytes);
    }
}

/// Memory that counts as free, until it is dropped.
#[derive(Debug)]
pub(crate) struct Freed(Memory);

impl Drop for Freed {
    fn drop(&mut self) {
        lock(&self.0.0.state).at_least = 0;
    }
}

impl State {
    const fn sum(&mut self, purpose: Purpose) -> &mut Sum {
        match purpose {
            Purpose::Samples => &mut self.samples,
            Purpose::Task => &mut self.tasks,
            Purpose::Adapter => &mut self.lasting,
        }
    }

    /// Bytes that are promised to work that ends by itself.
    const fn for_now(&self) -> u64 {
        self.samples.promised.saturating_add(self.tasks.promised)
    }

    /// Of `free` bytes, what is neither taken nor promised, and what were if nothing was under way or kept for later.
    const fn room(&self, purpose: Purpose, free: u64) -> (u64, u64) {
        let lasting = self.lasting.open();
        let claimed = match purpose {
            Purpose::Samples => self.claimed,
            Purpose::Adapter | Purpose::Task => 0,
        };
        let open = self.samples.open().saturating_add(self.tasks.open());
        let now = free.saturating_sub(lasting.saturating_add(open));
        // Of tasks all, taken or not: what waits in vain is refused once they have ended.
        let ending = self.samples.held.saturating_add(self.tasks.promised);
        let alone = free.saturating_add(ending.saturating_add(self.kept));
        (now.saturating_sub(claimed), alone.saturating_sub(lasting))
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Memory").field(&(self.0.free)()).finish()
    }
}

impl Memory {
    /// What this machine has left, and the group of processes that this one is in. Nothing is refused where the
    /// system does not say.
    #[must_use]
    pub fn of_machine() -> Self {
        Self::new(process::available_memory, GOOD_FOR)
    }

    /// What `free` says, in bytes; `None` is as much as anybody asks for.
    pub fn told_by(free: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Self {
        Self::new(free, Duration::ZERO)
    }

    fn new(free: impl Fn() -> Option<u64> + Send + Sync + 'static, good_for: Duration) -> Self {
        Self(Arc::new(Ledger {
            free: Box::new(free),
            good_for,
            state: Mutex::default(),
        }))
    }

    /// What the machine has left, asked for anew unless `may_be_old`.
    fn free(&self, state: &mut State, may_be_old: bool) -> Option<u64> {
        let known = state.known.filter(|(at, _)| at.elapsed() < self.0.good_for);
        let free = match known {
            Some((_, free)) if may_be_old => free,
            _ => {
                let free = (self.0.free)();
                state.known = Some((Instant::now(), free));
                free
            }
        };
        free.map(|free| free.max(state.at_least))
    }

    /// Promises memory.
    ///
    /// # Errors
    /// [`Error::AwaitsMemory`] if it is there once work under way has ended, else [`Error::NoMemory`]; both say
    /// what it is for, how much it takes and how much there is.
    pub(crate) fn promise(&self, ask: &Ask<'_>) -> Result<Promise> {
        let (purpose, n_bytes) = (ask.purpose, ask.n_bytes);
        if n_bytes > 0 {
            let mut state = lock(&self.0.state);
            let fits = |state: &mut State, may_be_old: bool| {
                let free = self.free(state, may_be_old)?;
                let (now, alone) = state.room(purpose, free);
                (n_bytes > now).then_some((now, alone))
            };
            // What is known may be old: it was less then, or was promised and is free.
            if fits(&mut state, n_bytes <= LITTLE).is_some()
                && let Some((now, alone)) = fits(&mut state, false)
            {
                return Err(ask.unmet(now, alone));
            }
            let sum = state.sum(purpose);
            sum.promised = sum.promised.saturating_add(n_bytes);
        }
        Ok(Promise {
            memory: self.clone(),
            purpose,
            n_bytes,
        })
    }

    /// Whether so many bytes could be promised now if what is kept was given up.
    pub(crate) fn has_room(&self, purpose: Purpose, n_bytes: u64) -> bool {
        let mut state = lock(&self.0.state);
        let free = self.free(&mut state, false);
        free.is_none_or(|free| n_bytes <= state.room(purpose, free.saturating_add(state.kept)).0)
    }

    /// Notes how much of what was promised to samples, and to adapters, is taken by now, and how much is kept for
    /// later that could be freed.
    pub(crate) fn note_held(&self, samples: u64, adapters: u64, kept: u64) {
        let mut state = lock(&self.0.state);
        state.kept = kept;
        state.samples.held = samples.min(state.samples.promised);
        // What was taken since is not in what was known.
        state.known = None;
        state.lasting.held = adapters.min(state.lasting.promised);
    }

    /// Notes how much operations wait for.
    pub(crate) fn note_claimed(&self, n_bytes: u64) {
        lock(&self.0.state).claimed = n_bytes;
    }

    /// Bytes that are promised to work that ends by itself.
    pub(crate) fn promised_for_now(&self) -> u64 {
        lock(&self.0.state).for_now()
    }

    /// Bytes that are promised to anybody.
    pub(crate) fn promised(&self) -> u64 {
        let state = lock(&self.0.state);
        state.for_now().saturating_add(state.lasting.promised)
    }

    /// Frees memory, and counts what that was as free even if the machine does not say so at once.
    pub(crate) fn freeing(&self, free_some: impl FnOnce() -> u64) -> Freed {
        let before = self.free(&mut lock(&self.0.state), false);
        let n_bytes = free_some();
        let at_least = before.map_or(0, |before| before.saturating_add(n_bytes));
        let mut state = lock(&self.0.state);
        state.at_least = at_least;
        state.kept = 0;
        drop(state);
        Freed(self.clone())
    }
}

impl Ask<'_> {
    /// Why there is no promise, with so many bytes free now and so many without the work under way.
    fn unmet(&self, now: u64, alone: u64) -> Error {
        let (what, needed) = (&self.what, size(self.n_bytes));
        if self.n_bytes <= alone {
            return Error::AwaitsMemory {
                n_bytes: self.n_bytes,
                message: format!(
                    "{what} would take about {needed} of memory, and {} are neither taken nor promised to work that came before: it begins when some of that has ended",
                    size(now)
                ),
            };
        }
        Error::NoMemory(format!(
            "{what} would take about {needed} of memory, and {} are available: {}",
            size(alone),
            self.advice
        ))
    }
}

/// A number of bytes in the unit that makes it short.
fn size(n_bytes: u64) -> String {
    let mega = n_bytes as f64 / (1 << 20) as f64;
    if mega < 1024.0 {
        format!("{mega:.1} MB")
    } else {
        format!("{:.1} GB", mega / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    const GB: u64 = 1 << 30;

    fn ask(purpose: Purpose, n_bytes: u64) -> Ask<'static> {
        Ask {
            purpose,
            n_bytes,
            what: "a model".into(),
            advice: "take another",
        }
    }

    /// Asserts that there is room for exactly so many bytes.
    #[track_caller]
    fn check_room(memory: &Memory, purpose: Purpose, n_bytes: u64) {
        drop(memory.promise(&ask(purpose, n_bytes)).unwrap());
        assert!(memory.promise(&ask(purpose, n_bytes + 1)).is_err());
    }

    #[test]
    fn what_fits_is_taken_and_what_does_not_is_refused_with_both_sizes() {
        let memory = Memory::told_by(|| Some(3 * GB));

        check_room(&memory, Purpose::Task, 3 * GB);
        let error = memory.promise(&ask(Purpose::Task, 3 * GB + GB / 2));

        assert_eq!(
            error.unwrap_err().to_string(),
            "a model would take about 3.5 GB of memory, and 3.0 GB are available: take another"
        );
        let boundless = Memory::told_by(|| None);
        boundless.promise(&ask(Purpose::Task, u64::MAX)).unwrap();
    }

    #[test]
    fn what_has_room_once_a_task_of_another_thread_has_ended_waits_for_it() {
        let free = Arc::new(AtomicU64::new(8 * GB));
        let told = Arc::clone(&free);
        let memory = Memory::told_by(move || Some(told.load(Ordering::Relaxed)));
        let upload = memory.promise(&ask(Purpose::Task, 4 * GB)).unwrap();
        // It has taken what it was promised, and nobody noted that.
        free.store(4 * GB, Ordering::Relaxed);
        memory.note_held(0, 0, 0);

        let waits = memory.promise(&ask(Purpose::Task, 5 * GB)).unwrap_err();
        drop(upload);
        let refused = memory.promise(&ask(Purpose::Task, 5 * GB)).unwrap_err();

        assert!(matches!(waits, Error::AwaitsMemory { .. }), "{waits}");
        assert!(matches!(refused, Error::NoMemory(_)), "{refused}");
    }

    #[test]
    fn promises_add_up_until_they_are_given_back() {
        let memory = Memory::told_by(|| Some(3 * GB));

        let first = memory.promise(&ask(Purpose::Samples, 2 * GB)).unwrap();
        let error = memory.promise(&ask(Purpose::Samples, 2 * GB)).unwrap_err();

        assert!(
            matches!(&error, Error::AwaitsMemory { n_bytes, .. } if *n_bytes == 2 * GB),
            "{error:?}"
        );
        assert_eq!(
            error.to_string(),
            "a model would take about 2.0 GB of memory, and 1.0 GB are neither taken nor promised to work that came before: it begins when some of that has ended"
        );
        let too_much = memory.promise(&ask(Purpose::Samples, 3 * GB + 1));
        assert!(matches!(too_much, Err(Error::NoMemory(_))));
        drop(first);
        check_room(&memory, Purpose::Samples, 3 * GB);
    }

    #[test]
    fn what_is_taken_is_not_counted_twice() {
        let free = Arc::new(AtomicU64::new(4 * GB));
        let told = Arc::clone(&free);
        let memory = Memory::told_by(move || Some(told.load(Ordering::SeqCst)));
        let samples = memory.promise(&ask(Purpose::Samples, 2 * GB)).unwrap();
        let adapter = memory.promise(&ask(Purpose::Adapter, GB)).unwrap();
        check_room(&memory, Purpose::Task, GB);

        // Half of each is taken.
        free.store(4 * GB - GB - GB / 2, Ordering::SeqCst);
        memory.note_held(GB, GB / 2, 0);

        check_room(&memory, Purpose::Task, GB);
        // Nobody looked after the samples ended: what of them was taken is not known to be free.
        drop(samples);
        check_room(&memory, Purpose::Task, 2 * GB);
        free.store(4 * GB - GB / 2, Ordering::SeqCst);
        check_room(&memory, Purpose::Task, 3 * GB);
        drop(adapter);
    }

    #[test]
    fn an_adapter_is_nothing_to_wait_for() {
        let memory = Memory::told_by(|| Some(3 * GB));
        let _adapter = memory.promise(&ask(Purpose::Adapter, 2 * GB)).unwrap();

        let error = memory.promise(&ask(Purpose::Adapter, 2 * GB)).unwrap_err();

        assert_eq!(
            error.to_string(),
            "a model would take about 2.0 GB of memory, and 1.0 GB are available: take another"
        );
    }

    #[test]
    fn samples_leave_to_operations_what_these_wait_for() {
        let memory = Memory::told_by(|| Some(3 * GB));
        memory.note_claimed(2 * GB);

        check_room(&memory, Purpose::Samples, GB);
        check_room(&memory, Purpose::Task, 3 * GB);

        let behind = memory.promise(&ask(Purpose::Samples, 2 * GB));
        assert!(matches!(behind, Err(Error::AwaitsMemory { .. })));
    }

    #[test]
    fn what_is_kept_for_later_counts_once_it_is_given_up() {
        let memory = Memory::told_by(|| Some(3 * GB));
        memory.note_held(0, 0, GB);

        check_room(&memory, Purpose::Task, 3 * GB);
        assert!(memory.has_room(Purpose::Task, 4 * GB) && !memory.has_room(Purpose::Task, 5 * GB));
        let waits = memory.promise(&ask(Purpose::Task, 4 * GB));
        assert!(matches!(waits, Err(Error::AwaitsMemory { .. })));
        let _freed = memory.freeing(|| GB);
        check_room(&memory, Purpose::Task, 4 * GB);
    }

    #[test]
    fn what_was_freed_counts_while_the_machine_does_not_say_so() {
        let memory = Memory::told_by(|| Some(GB));

        let freed = memory.freeing(|| GB);
        check_room(&memory, Purpose::Task, 2 * GB);
        drop(freed);

        check_room(&memory, Purpose::Task, GB);
    }

    #[test]
    fn the_kernel_is_asked_again_before_anything_is_refused_and_for_what_is_large() {
        let asked = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked);
        let free = move || Some(count.fetch_add(1, Ordering::SeqCst) * 100);
        let memory = Memory::new(free, Duration::from_secs(3600));
        let n_asked = || asked.load(Ordering::SeqCst);

        drop(memory.promise(&ask(Purpose::Task, 50)).unwrap());
        assert_eq!(n_asked(), 2, "there was nothing at first");
        drop(memory.promise(&ask(Purpose::Task, 100)).unwrap());
        assert_eq!(n_asked(), 2, "that was known");
        assert!(memory.promise(&ask(Purpose::Task, LITTLE + 1)).is_err());
        assert!(n_asked() > 2);
    }
}
