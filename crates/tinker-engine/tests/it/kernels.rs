//! The kernels themselves: for real compilers, and in every order of their threads.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use tinker_engine::cuda::device::{HEADS, KERNELS};
use tinker_engine::cuda::{compile, load_on};
use tinker_engine::{AdapterState, Backend, Loss, TrainSequence};

use crate::common::{FEW, Reference, dir};
use crate::emulated::{Seen, open_thorough};
use crate::gpu::{STEP, prompt};
use crate::wide::SHAPES;

/// Sends a model through everything that the backend does.
fn do_everything(backend: &mut dyn Backend, state: &AdapterState, tokens: &[u32]) {
    let adapter = backend.import_adapter(state).unwrap();
    let n = 40;
    let sequence = TrainSequence {
        tokens: tokens[..n].to_vec(),
        targets: tokens[1..=n].to_vec(),
        k: 1,
        loss: Loss::CrossEntropy {
            weights: vec![1.0; n],
        },
    };
    backend.forward_backward(adapter, &[sequence]).unwrap();
    backend.optim_step(adapter, &STEP.into()).unwrap();
    let slot = backend.open_slot(Some(adapter), tokens.len() + 1).unwrap();
    backend.prefill(slot, tokens, true).unwrap();
    let fork = backend.fork_slot(slot).unwrap();
    backend.decode_step(&[(slot, 3), (fork, 4)]).unwrap();
}

/// As [`do_everything`] where each launch is run in several orders; returns the kernels launched.
fn in_every_order(dir: &Path, state: &AdapterState, n: usize) -> BTreeSet<&'static str> {
    let seen = Seen::default();
    let recorder = Arc::clone(&seen);
    let open = move |head| Ok(open_thorough(head, &recorder));
    let mut backend = load_on(&open, dir, None).unwrap();
    do_everything(&mut *backend, state, &prompt(n));
    let seen = seen.lock().unwrap();
    seen.clone()
}

#[test]
fn no_kernel_depends_on_the_order_of_its_blocks_and_threads() {
    let mut seen = BTreeSet::new();
    for model in FEW {
        let adapter = Reference::of(model).adapter();
        seen.extend(in_every_order(&dir(model), &adapter, 67));
    }
    // The last with two chunks of keys.
    for (shape, n) in SHAPES.into_iter().zip([67, 67, 67, 260]) {
        let made = shape.make();
        seen.extend(in_every_order(&made.dir, &made.adapter, n));
    }

    assert_eq!(seen, KERNELS.into_iter().collect());
}

/// With CUDA's compiler, which needs no GPU; `cargo xtask test` gets it. Without it there is nothing to
/// check here: the emulation compiles the same kernels.
#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "how whoever has brought the compiler says so"
)]
fn the_kernels_compile_for_gpus() {
    let is_required = std::env::var_os("TINKER_TEST_NVRTC").is_some();
    // The memory of a block is checked where machine code is made; PTX is for other GPUs.
    let cases = [(64, "compute_75"), (128, "sm_90"), (256, "sm_90")];
    assert!(
        HEADS
            .iter()
            .all(|head| cases.iter().any(|(of, _)| of == head))
    );
    for (head, architecture) in cases {
        match compile(head, architecture) {
            Ok(code) => assert!(code.len() > 10_000),
            Err(error) if error.to_string().starts_with("libnvrtc is not there") => {
                assert!(!is_required, "{error}");
                return;
            }
            Err(error) => panic!("{error}"),
        }
    }
}
