//! What a step takes from the allocator once its buffers are there.
//!
//! The count is of a whole process, so each measurement runs in one of its own.

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tinker_engine::{AdamW, Optimizer};

use crate::common::{Reference, all_models, load};

/// The system's allocator, with a count of the bytes that were asked for.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static COUNTING: Counting = Counting;

#[expect(unsafe_code, reason = "an allocator is unsafe by its trait")]
// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        BYTES.fetch_add(size, Relaxed);
        // SAFETY: the caller's promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// The variable with which a test runs itself again, alone in its process.
const ALONE: &str = "TINKER_TEST_ALONE";

/// Runs `measure` in a process in which nothing else runs: `test` is the caller's own path.
#[expect(
    clippy::disallowed_methods,
    reason = "a test tells itself apart from the process that it starts"
)]
fn alone(test: &str, measure: fn()) {
    if std::env::var_os(ALONE).is_some() {
        return measure();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let ran = child
        .args([test, "--exact"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

/// Bytes asked for while `work` runs.
fn allocated(work: impl FnOnce()) -> usize {
    let before = BYTES.load(Relaxed);
    work();
    BYTES.load(Relaxed) - before
}

/// The least that one of six calls takes after a few others: a thread that comes to a task for the first
/// time makes its buffers then.
fn steady(mut call: impl FnMut()) -> usize {
    (0..6).for_each(|_| call());
    (0..6).map(|_| allocated(&mut call)).min().unwrap()
}

/// What may be listed in a call beside its answer: sequences, and in a mixture the rows of each expert.
fn lists(model: &str) -> usize {
    if model.contains("moe") {
        16 << 10
    } else {
        2 << 10
    }
}

#[test]
fn a_step_takes_no_more_than_its_answer_once_its_buffers_are_there() {
    let test = "allocations::a_step_takes_no_more_than_its_answer_once_its_buffers_are_there";
    alone(test, || {
        for (model, threads) in all_models().flat_map(|model| [(model, 1), (model, 2)]) {
            let reference = Reference::of(model);
            let batch = reference.batch("cross_entropy");
            let answer: usize = batch.iter().map(|s| size_of_val(&s.targets[..])).sum();
            let mut backend = load(model, threads);
            let adapter = reference.import(&mut *backend);

            let pass = steady(|| {
                backend.forward_backward(adapter, &batch).unwrap();
                backend.optim_step(adapter, &adamw()).unwrap();
            });
            let slot = backend.open_slot(Some(adapter), 64).unwrap();
            let token = steady(|| drop(backend.decode_step(&[(slot, 1)]).unwrap()));

            let logits = size_of::<f32>() * backend.info().vocab_size;
            let lists = lists(model);
            assert!(pass <= answer + lists, "{model}: {pass} beside {answer}");
            assert!(token <= logits + lists, "{model}: {token} beside {logits}");
        }
    });
}

fn adamw() -> Optimizer {
    Optimizer::AdamW(AdamW {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        grad_clip_norm: 1.0,
    })
}
