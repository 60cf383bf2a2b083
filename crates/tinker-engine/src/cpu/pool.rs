//! A few threads that share the work of one call at a time.
//!
//! Decoding hands out work for every token, several times a millisecond where a model is small, so idle workers
//! first spin and only then sleep.
//! Tasks are taken in order from a counter; who computes which never matters to a result.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Turns of the waiting loop before a worker sleeps; about 50 microseconds.
const SPINS: u32 = 1500;

/// Threads that run the tasks of [`Pool::run`] together with the caller.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Number of the current job, times `JOB`; `OPEN` while it can be joined; below it the number of
    /// workers that have joined.
    state: AtomicU64,
    job: Mutex<Option<Job>>,
    next: AtomicUsize,
    /// Whether a call is under way, from before its job opens until every worker has left it.
    running: AtomicBool,
    panicked: AtomicBool,
    quit: AtomicBool,
    sleeping: Mutex<usize>,
    wake: Condvar,
}

const OPEN: u64 = 1 << 16;
const JOB: u64 = 1 << 17;

/// A borrowed closure with its lifetime erased; `run` does not return while a worker may use it.
#[derive(Debug, Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
}

// SAFETY: the closure is `Sync`, and `run` keeps it alive while a worker has it.
unsafe impl Send for Job {}

impl Pool {
    /// A pool of `threads` threads, the caller's included; 0 means one per core.
    pub(crate) fn new(threads: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores() } else { threads };
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: Mutex::new(None),
            next: AtomicUsize::new(0),
            running: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            quit: AtomicBool::new(false),
            sleeping: Mutex::new(0),
            wake: Condvar::new(),
        });
        let workers = (1..threads).filter_map(|i| {
            let shared = Arc::clone(&shared);
            let worker = std::thread::Builder::new().name(format!("tinker-engine-{i}"));
            // Without a thread the others do its work.
            worker.spawn(move || shared.work()).ok()
        });
        Self {
            workers: workers.collect(),
            shared,
        }
    }

    /// Threads that work on a call.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)`, .., `task(n_tasks - 1)`, each once, on whichever thread is free.
    ///
    /// A call from inside a task, or from another thread while one is under way, runs on its caller
    /// alone. A panic of a task reaches the caller once no thread works on the call any more.
    pub(crate) fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        if n_tasks <= 1 || self.workers.is_empty() || shared.running.swap(true, Ordering::AcqRel) {
            (0..n_tasks).for_each(task);
            return;
        }
        shared.publish(task, n_tasks);
        let outcome = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(task, n_tasks)));
        let before = shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut joined = before % OPEN;
        while joined != 0 {
            std::hint::spin_loop();
            joined = shared.state.load(Ordering::Acquire) % OPEN;
        }
        let worker_panicked = shared.panicked.swap(false, Ordering::AcqRel);
        shared.running.store(false, Ordering::Release);
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        assert!(!worker_panicked, "a worker of the engine panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Release);
        drop(self.shared.sleeping.lock());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker ends only by returning: its tasks' panics are caught.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn publish<'a>(&self, task: &'a (dyn Fn(usize) + Sync + 'a), n_tasks: usize) {
        // SAFETY: only the lifetime changes; `run` returns after every worker has left the job.
        let task: *const (dyn Fn(usize) + Sync) = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), *const (dyn Fn(usize) + Sync)>(
                task,
            )
        };
        *self.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(Job { task, n_tasks });
        self.next.store(0, Ordering::Release);
        self.state.fetch_add(JOB + OPEN, Ordering::AcqRel);
        // The lock orders this after a worker's last look at the state before it sleeps.
        if *self.sleeping.lock().unwrap_or_else(PoisonError::into_inner) > 0 {
            self.wake.notify_all();
        }
    }

    fn take_tasks(&self, task: &(dyn Fn(usize) + Sync), n_tasks: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::AcqRel);
            if i >= n_tasks {
                return;
            }
            task(i);
        }
    }

    /// A worker's life: wait for a job, join it, leave it.
    fn work(&self) {
        let mut last = 0;
        while let Some(state) = self.wait_for_job(last) {
            last = state / JOB;
            let joined =
                self.state
                    .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Acquire);
            if joined.is_err() {
                // Another worker joined in between, or the job closed: look again.
                last -= 1;
                continue;
            }
            let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(job) = job {
                // SAFETY: this worker has joined, so `run` waits for it and the closure is alive.
                let task = unsafe { &*job.task };
                let outcome = catch_unwind(AssertUnwindSafe(|| self.take_tasks(task, job.n_tasks)));
                if outcome.is_err() {
                    self.panicked.store(true, Ordering::Release);
                }
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for an open job after `last`; `None` when the pool ends.
    fn wait_for_job(&self, last: u64) -> Option<u64> {
        let open = || {
            let state = self.state.load(Ordering::Acquire);
            (state & OPEN != 0 && state / JOB != last).then_some(state)
        };
        for _ in 0..SPINS {
            if let Some(state) = open() {
                return Some(state);
            }
            if self.quit.load(Ordering::Acquire) {
                return None;
            }
            std::hint::spin_loop();
        }
        let mut sleeping = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.quit.load(Ordering::Acquire) {
                return None;
            }
            if let Some(state) = open() {
                return Some(state);
            }
            *sleeping += 1;
            sleeping = self
                .wake
                .wait(sleeping)
                .unwrap_or_else(PoisonError::into_inner);
            *sleeping -= 1;
        }
    }
}

/// A pointer that tasks may share when each writes to its own part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedMut<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: whoever reads or writes through it promises that parts do not overlap.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Shares `slice` for as long as its borrow lasts.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
        }
    }

    /// Pointer to, and number of, the elements from `start` on.
    pub(crate) fn part(&self, start: usize) -> (*mut T, usize) {
        assert!(start <= self.len, "part from {start} of {}", self.len);
        (self.start.wrapping_add(start), self.len - start)
    }

    /// The elements from `start` on.
    ///
    /// # Safety
    /// The range lies in the shared slice, which outlives the result, and no other task touches it.
    pub(crate) unsafe fn slice<'a>(&self, start: usize, len: usize) -> &'a mut [T] {
        self.check(start, len);
        // SAFETY: passed on to the caller.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// The elements from `start` on, to read.
    ///
    /// # Safety
    /// The range lies in the shared slice, which outlives the result, and nobody writes to it.
    pub(crate) unsafe fn read<'a>(&self, start: usize, len: usize) -> &'a [T] {
        self.check(start, len);
        // SAFETY: passed on to the caller.
        unsafe { std::slice::from_raw_parts(self.start.add(start), len) }
    }

    fn check(&self, start: usize, len: usize) {
        debug_assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} elements from {start} of {}",
            self.len
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            for n in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();

                pool.run(n, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });

                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_nested_call_runs_on_its_caller() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);

        pool.run(4, &|_| {
            pool.run(5, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        });

        assert_eq!(count.into_inner(), 20);
    }

    #[test]
    fn a_call_nested_in_a_workers_last_task_runs_on_the_worker() {
        let pool = Pool::new(2);
        let caller = std::thread::current().id();
        let both = std::sync::Barrier::new(2);
        let count = AtomicUsize::new(0);

        pool.run(2, &|_| {
            both.wait();
            if std::thread::current().id() == caller {
                return;
            }
            while pool.shared.state.load(Ordering::Acquire) & OPEN != 0 {
                std::hint::spin_loop();
            }
            pool.run(5, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        });

        assert_eq!(count.into_inner(), 5);
    }

    #[test]
    fn panics_of_caller_and_worker_together_are_reported_once() {
        let pool = Pool::new(2);
        let both = std::sync::Barrier::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, &|i| {
                both.wait();
                panic!("task {i}");
            });
        }));
        assert!(outcome.is_err());

        pool.run(8, &|_| {});
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert!(i != 5))));
        assert!(outcome.is_err());

        let count = AtomicUsize::new(0);
        pool.run(8, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });

        assert_eq!(count.into_inner(), 8);
    }
}
