//! What talks to CUDA, with libraries that stand in for the driver and cuBLAS: arguments, contexts, the order
//! of matrices. Kernels are emulated, so results are those of the emulated device, bit for bit.

use tinker_engine::cuda::compile;
use tinker_engine::{AdapterState, Backend, Loss, TrainSequence, cuda_is_available, load_cuda};

use crate::common::{Reference, dir};
use crate::emulated::load_emulated;
use crate::emulated::stand_in::{HEAD, StandIn};
use crate::gpu::{STEP, prompt};

/// The state after a step of training, and the logits of a prompt and of a decoded token.
fn answers(backend: &mut dyn Backend, reference: &Reference) -> (AdapterState, [Vec<f32>; 2]) {
    let (tokens, n) = (prompt(41), 40);
    let adapter = reference.import(backend);
    let sequence = TrainSequence {
        tokens: tokens[..n].to_vec(),
        targets: tokens[1..].to_vec(),
        k: 1,
        loss: Loss::CrossEntropy {
            weights: vec![1.0; n],
        },
    };
    backend.forward_backward(adapter, &[sequence]).unwrap();
    backend.optim_step(adapter, &STEP.into()).unwrap();
    let slot = backend.open_slot(Some(adapter), 300).unwrap();
    let first = backend.prefill(slot, &prompt(270), false).unwrap();
    let second = backend.decode_step(&[(slot, 5)]).unwrap();
    let state = backend.export_adapter(adapter).unwrap();
    (state, [first.next_logits, second])
}

/// NVRTC is not stood in for: without it there is nothing to check here.
#[test]
fn a_driver_is_called_as_its_documentation_asks() {
    if compile(HEAD, "sm_90").is_err_and(|e| e.to_string().starts_with("libnvrtc is not there")) {
        return;
    }
    let stand_in = StandIn::get();
    cuda_is_available().unwrap();
    for model in ["llama", "qwen3-bf16"] {
        let reference = Reference::of(model);
        let wanted = answers(&mut *load_emulated(model, 1), &reference);

        let mut backend = load_cuda(&dir(model), None).unwrap();
        assert_eq!(backend.info().precision, "stand-in f32");
        // From another thread, as a server calls it.
        let found = std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                let found = answers(&mut *backend, &reference);
                drop(backend);
                found
            });
            work.join().unwrap()
        });

        assert!(found == wanted, "{model}");
        assert_eq!(stand_in.left(), 0, "{model}");
    }
}
