//! A chain of parallel steps that the threads of a pool go through together.
//!
//! A token of a small model is dozens of products of a few microseconds, and handing out each of them
//! costs a good part of that. Here threads stay in the chain: one atomic addition hands in a part and
//! draws the next, and whoever hands in the last part of a step prepares the next step.
//!
//! Parts are drawn, not given to threads: one that the system takes away for a while holds up the
//! others with the part that it has, and not with later ones.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::pool::Pool;

/// Turns of a waiting loop before a thread lets others run; about 50 microseconds.
const SPINS: u32 = 1500;

/// Steps that depend on each other, and what is done between them.
pub(crate) trait Chain: Send {
    /// What the threads share in a step.
    type Step: Step;

    /// Finishes the step before, if there was one, and prepares the next. All parts of the step before
    /// are done, and it is no more.
    fn next(&mut self) -> Option<Self::Step>;
}

/// Work that threads share.
pub(crate) trait Step: Send + Sync {
    /// Computes part `part` of `parts`.
    ///
    /// # Safety
    /// Every part is computed once, all of as many `parts`, and those of lower numbers begin first.
    unsafe fn run(&self, part: usize, parts: usize);
}

/// Goes through a chain with the threads of `pool`. A panic of a step reaches the caller.
pub(crate) fn run<C: Chain>(pool: &Pool, chain: C) {
    let walk = Walk::new(pool.threads(), chain);
    walk.prepare(1);
    pool.run(walk.parts, &|_| walk.go());
}

/// Keeps what threads wait for apart from what they write.
#[repr(align(128))]
struct Line(AtomicU64);

/// One part handed in, in the count.
const DONE: u64 = 1 << 32;

/// Of the steps that are prepared: there are no more.
const END: u64 = u64::MAX;

struct Walk<C: Chain> {
    /// Parts of each step.
    parts: usize,
    /// Parts drawn, of all steps; above them, in units of `DONE`, parts handed in.
    count: Line,
    /// Steps prepared so far, or `END`.
    prepared: Line,
    /// Whether a thread panicked: no more steps are prepared.
    failed: AtomicBool,
    /// The step that is under way, which may point to what the chain does, and so goes before it.
    state: UnsafeCell<(Option<C::Step>, C)>,
}

// SAFETY: the state is read by those who hold a part of the step that is under way, and written by the
// one who has handed in its last part.
unsafe impl<C: Chain> Sync for Walk<C> {}

impl<C: Chain> Walk<C> {
    /// Nothing is prepared yet.
    fn new(parts: usize, chain: C) -> Self {
        Self {
            parts,
            count: Line(AtomicU64::new(0)),
            prepared: Line(AtomicU64::new(0)),
            failed: AtomicBool::new(false),
            state: UnsafeCell::new((None, chain)),
        }
    }

    /// Computes parts until there are no more.
    fn go(&self) {
        let _guard = FailOnPanic(&self.failed);
        let parts = self.parts as u64;
        let mut drawn = self.count.0.fetch_add(1, Ordering::AcqRel) % DONE;
        while self.wait_for(drawn / parts) {
            // SAFETY: this thread holds a part of the step, so nobody changes it; and parts are drawn once, in
            // their order.
            unsafe {
                if let Some(step) = &(*self.state.get()).0 {
                    step.run((drawn % parts) as usize, self.parts);
                }
            }
            let before = self.count.0.fetch_add(DONE + 1, Ordering::AcqRel);
            let all = (drawn / parts + 1) * parts;
            if before / DONE + 1 == all {
                self.prepare(drawn / parts + 2);
            }
            drawn = before % DONE;
        }
    }

    /// Prepares the next step, so that `n` are prepared.
    fn prepare(&self, n: u64) {
        // SAFETY: all parts of the step are handed in, and nobody looks at the next before it is prepared.
        let (step, chain) = unsafe { &mut *self.state.get() };
        *step = None;
        *step = chain.next();
        let prepared = if step.is_some() { n } else { END };
        self.prepared.0.store(prepared, Ordering::Release);
    }

    /// Waits until step `i` is prepared; false if there are no more. A part of a step that is prepared is
    /// computed also when another failed: the rest of its step may wait for it.
    fn wait_for(&self, i: u64) -> bool {
        let prepared = || self.prepared.0.load(Ordering::Acquire);
        wait_until(|| prepared() > i || self.failed.load(Ordering::Acquire));
        prepared() != END && prepared() > i
    }
}

/// Waits for what another thread is about to do.
pub(crate) fn wait_until(is_done: impl Fn() -> bool) {
    let mut turns = 0;
    while !is_done() {
        if turns < SPINS {
            turns += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Lets the other threads go if this one panics.
struct FailOnPanic<'a>(&'a AtomicBool);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Counts its parts, and notes when a step begins before all parts of the one before are done.
    struct Counting<'a> {
        left: usize,
        parts: &'a AtomicUsize,
        at_steps: &'a Mutex<Vec<usize>>,
    }

    struct Counted<'a>(&'a AtomicUsize);

    impl<'a> Chain for Counting<'a> {
        type Step = Counted<'a>;

        fn next(&mut self) -> Option<Counted<'a>> {
            let n = self.parts.load(Ordering::Relaxed);
            self.at_steps.lock().unwrap().push(n);
            self.left = self.left.checked_sub(1)?;
            Some(Counted(self.parts))
        }
    }

    impl Step for Counted<'_> {
        unsafe fn run(&self, part: usize, parts: usize) {
            assert!(part < parts);
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_step_begins_when_all_parts_of_the_one_before_are_done() {
        for threads in 1..=4 {
            for steps in [0, 1, 2, 500] {
                let pool = Pool::new(threads);
                let (parts, at_steps) = (AtomicUsize::new(0), Mutex::new(Vec::new()));

                run(
                    &pool,
                    Counting {
                        left: steps,
                        parts: &parts,
                        at_steps: &at_steps,
                    },
                );

                let wanted: Vec<usize> = (0..=steps).map(|step| step * threads).collect();
                assert_eq!(at_steps.into_inner().unwrap(), wanted);
            }
        }
    }

    #[test]
    fn a_chain_in_a_task_of_the_pool_runs_on_its_caller() {
        let pool = Pool::new(2);
        let (parts, at_steps) = (AtomicUsize::new(0), Mutex::new(Vec::new()));

        pool.run(2, &|task| {
            if task == 0 {
                let chain = Counting {
                    left: 3,
                    parts: &parts,
                    at_steps: &at_steps,
                };
                run(&pool, chain);
            }
        });

        assert_eq!(at_steps.into_inner().unwrap(), [0, 2, 4, 6]);
    }

    /// Panics in one part of its third step.
    struct Failing(usize);

    struct Fails(bool);

    impl Chain for Failing {
        type Step = Fails;

        fn next(&mut self) -> Option<Fails> {
            self.0 += 1;
            Some(Fails(self.0 == 3))
        }
    }

    impl Step for Fails {
        unsafe fn run(&self, part: usize, _: usize) {
            assert!(part > 0 || !self.0, "as it should");
        }
    }

    #[test]
    fn a_part_that_others_may_wait_for_is_computed_after_a_panic() {
        let (parts, at_steps) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let chain = Counting {
            left: 9,
            parts: &parts,
            at_steps: &at_steps,
        };
        let walk = Walk::new(2, chain);
        walk.prepare(1);
        // Another thread drew a part, and panics in it before this one comes to its own.
        walk.count.0.fetch_add(1, Ordering::AcqRel);
        walk.failed.store(true, Ordering::Release);

        walk.go();

        assert_eq!(parts.into_inner(), 1);
        assert_eq!(at_steps.into_inner().unwrap(), [0], "no step follows");
    }

    #[test]
    fn a_panic_ends_an_endless_chain_and_reaches_the_caller() {
        for threads in 1..=3 {
            let pool = Pool::new(threads);

            let outcome = catch_unwind(AssertUnwindSafe(|| run(&pool, Failing(0))));

            assert!(outcome.is_err());
            pool.run(4, &|_| {});
        }
    }
}
