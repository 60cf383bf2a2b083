//! The emulated device finds what it is there to find: each test runs a kernel with a fault.

use std::sync::{Arc, LazyLock};

use libloading::Library;
use tinker_engine::cuda::device::{Arg, Device, Launch};

use super::{BACKWARD, Emulated, FORWARD, compile};

const THREADS: u32 = 32;

const FAULTS: &str = r#"
#define KERNEL extern "C" __global__ void

KERNEL sound(const float* x, float* y) {
    __shared__ float held[32];
    held[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = held[31 - threadIdx.x];
}

KERNEL beyond(const float* x, float* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }

KERNEL hasty(const float* x, float* y) {
    __shared__ float held[32];
    held[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = held[31 - threadIdx.x];
    __syncthreads();
}

KERNEL crowded(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + (float)blockIdx.x; }

KERNEL unset(const float* x, float* y) {
    __shared__ float held[32];
    if (threadIdx.x < 16) held[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = held[threadIdx.x];
}

KERNEL divided(const float* x, float* y) {
    if (threadIdx.x < 7) __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}
"#;

/// Runs a kernel that takes 32 floats to 32 others, in so many blocks, each launch in all `orders`.
fn run(kernel: &'static str, blocks: u32, orders: &'static [u64]) -> Vec<f32> {
    static KERNELS: LazyLock<Library> = LazyLock::new(|| {
        let names = ["sound", "beyond", "hasty", "crowded", "unset", "divided"];
        compile(FAULTS, &names, 64)
    });
    let mut device = Emulated::new(&KERNELS, 1 << 20);
    device.orders = orders;
    let device: Arc<dyn Device> = Arc::new(device);
    let bytes = 4 * THREADS as usize;
    let [x, y] = [(); 2].map(|()| device.allocate(bytes).unwrap());
    let numbers: Vec<u8> = (0..THREADS)
        .flat_map(|i| (i as f32).to_le_bytes())
        .collect();
    let mut found = vec![0; bytes];
    // SAFETY: the memory was taken, and the faults stay inside guards and memory.
    unsafe {
        device.upload(x, &numbers).unwrap();
        let launch = Launch {
            kernel,
            grid: [blocks, 1, 1],
            threads: THREADS,
            args: &[Arg::Address(x), Arg::Address(y)],
        };
        device.launch(&launch).unwrap();
        device.download(y, &mut found).unwrap();
        device.release(x, bytes);
        device.release(y, bytes);
    }
    let (numbers, _) = found.as_chunks::<4>();
    numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

const ALL: &[u64] = &[FORWARD, BACKWARD, 7];

#[test]
fn a_sound_kernel_passes() {
    let turned: Vec<f32> = (0..THREADS).rev().map(|i| i as f32).collect();

    assert_eq!(run("sound", 3, ALL), turned);
    assert_eq!(run("sound", 3, &[]), turned);
}

#[test]
#[should_panic(expected = "wrote beside 128 bytes")]
fn a_kernel_that_writes_beyond_its_memory_is_found() {
    run("beyond", 1, &[]);
}

#[test]
#[should_panic(expected = "depends on the order of its threads")]
fn threads_that_do_not_wait_for_each_other_are_found() {
    run("hasty", 1, ALL);
}

#[test]
#[should_panic(expected = "depends on the order of its threads")]
fn blocks_that_write_the_same_place_are_found() {
    run("crowded", 2, ALL);
}

#[test]
#[should_panic(expected = "divided")]
fn threads_of_which_some_wait_are_found() {
    run("divided", 1, &[]);
}

#[test]
fn memory_of_a_block_that_nobody_wrote_is_no_number() {
    run("sound", 2, ALL);

    let found = run("unset", 2, ALL);

    assert!(found[..16].iter().all(|x| x.is_finite()));
    assert!(found[16..].iter().all(|x| x.is_nan()));
}

#[test]
#[should_panic(expected = "gets memory that nobody holds")]
fn a_kernel_that_gets_memory_that_was_given_back_is_found() {
    let device = super::open(64, 1 << 20).unwrap();
    let address = device.allocate(64).unwrap();
    let launch = Launch {
        kernel: "add",
        grid: [1, 1, 1],
        threads: THREADS,
        args: &[Arg::Address(address), Arg::U64(16), Arg::Address(address)],
    };

    // SAFETY: the device refuses to touch what was given back.
    unsafe {
        device.release(address, 64);
        let _ = device.launch(&launch);
    }
}

#[test]
#[should_panic(expected = "1025")]
fn more_threads_than_a_gpu_takes_are_found() {
    let device = super::open(64, 1 << 20).unwrap();
    let launch = Launch {
        kernel: "add",
        grid: [1, 1, 1],
        threads: 1025,
        args: &[Arg::Address(0), Arg::U64(0), Arg::Address(0)],
    };

    // SAFETY: the kernel touches nothing.
    unsafe {
        let _ = device.launch(&launch);
    }
}
