//! A device for tests: the kernels compiled as C++ for this processor, and products by three loops.
//!
//! It is stricter than a GPU. Fresh memory is filled with NaN, so that a kernel that reads what nobody
//! wrote shows; so is what lies around it, which is looked at after each launch. Blocks and threads go in
//! another order with each launch.
#![expect(unsafe_code, reason = "a library is loaded and its functions called")]

pub(crate) mod stand_in;
mod strictness;

use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use libloading::{Library, Symbol};
use tinker_engine::cuda::device::{
    Arg, Device, Gemm, KERNELS, Launch, Matrix, Number, SOURCE, fault,
};
use tinker_engine::cuda::load_on;
use tinker_engine::{Backend, Result};

use crate::common::dir;

/// Loads a reference model onto an emulated device.
pub(crate) fn load_emulated(model: &str, _threads: usize) -> Box<dyn Backend> {
    load_on(&|head| open(head, 1 << 30), &dir(model), None).unwrap()
}

/// A device with so many bytes of memory and kernels for heads up to `head` wide.
pub(crate) fn open(head: usize, memory: usize) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(Emulated::new(kernels(head), memory)))
}

/// What a device has been asked for.
#[derive(Debug, Default)]
pub(crate) struct Gauges {
    /// The most bytes that were taken at once.
    pub(crate) peak: AtomicUsize,
    /// Launches of kernels so far.
    pub(crate) launches: AtomicU64,
}

/// As [`open`] with memory enough, and gauges to read.
pub(crate) fn open_measured(head: usize, gauges: &Arc<Gauges>) -> Arc<dyn Device> {
    Arc::new(Emulated {
        gauges: Arc::clone(gauges),
        ..Emulated::new(kernels(head), 1 << 30)
    })
}

/// Names of kernels that were launched.
pub(crate) type Seen = Arc<Mutex<BTreeSet<&'static str>>>;

/// A device that runs each launch in several orders and fails the test where memory then differs.
pub(crate) fn open_thorough(head: usize, seen: &Seen) -> Arc<dyn Device> {
    Arc::new(Emulated {
        orders: &[FORWARD, BACKWARD, 7],
        seen: Arc::clone(seen),
        ..Emulated::new(kernels(head), 1 << 30)
    })
}

type Emulate =
    unsafe extern "C" fn(*const c_char, *const u32, u32, u64, *mut *mut c_void) -> std::ffi::c_int;

/// Orders of blocks and threads; greater numbers are seeds of shuffles.
const FORWARD: u64 = 0;
const BACKWARD: u64 = 1;

/// The kernels for heads of a width, compiled once.
fn kernels(head: usize) -> &'static Library {
    static MADE: Mutex<BTreeMap<usize, &'static Library>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap();
    made.entry(head)
        .or_insert_with(|| Box::leak(Box::new(compile(SOURCE, &KERNELS, head))))
}

/// Kernels that `emulate` launches by their name.
fn compile(source: &str, kernels: &[&str], head: usize) -> Library {
    let source = format!(
        "{}extern \"C\" __attribute__((visibility(\"default\"))) int emulate(const char* name, \
         const unsigned* grid, unsigned threads, uint64_t order, void** args) {{\n\
         return emulation::launch(ENTRIES, name, grid, threads, order, args);\n}}\n",
        with_entries(source, kernels)
    );
    build(&source, &[&format!("-DHEAD={head}")])
}

/// The kernels with what emulates a device, and a table of them.
fn with_entries(source: &str, kernels: &[&str]) -> String {
    let table: String = kernels
        .iter()
        .map(|name| format!("    {{\"{name}\", emulation::bridge<{name}>}},\n"))
        .collect();
    format!(
        "{}\n{source}\nstatic const emulation::Entry ENTRIES[] = {{\n{table}    {{nullptr, nullptr}}}};\n",
        include_str!("emulation.h")
    )
}

/// Compiles C++ to a library, and loads it.
#[expect(
    clippy::disallowed_methods,
    reason = "how a machine names its C++ compiler"
)]
fn build(source: &str, arguments: &[&str]) -> Library {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (file, library) = (dir.path().join("source.cpp"), dir.path().join("library.so"));
    std::fs::write(&file, source).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-march=native", "-ffp-contract=off"])
        .args(["-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE"])
        // Else kernels for heads of another width would share the memory of their blocks with these.
        .arg("-fvisibility=hidden")
        // As with CUDA, memory may be read as numbers of another kind.
        .arg("-fno-strict-aliasing")
        .args(arguments)
        .args([file.as_path(), Path::new("-o"), &library])
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}: install a C++ compiler, or set CXX to one"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{compiler}: {said}");
    // SAFETY: the library has no initialisation but that of its variables.
    unsafe { Library::new(&library) }.unwrap()
}

/// Bytes of guard on each side of an allocation.
const GUARD: usize = 1024;

/// What guards, and memory that nobody has written, are filled with: not a number, of 16, 32 or 64 bits.
const FILL: u8 = 0xff;

/// The most that a GPU takes: threads of a block, and blocks along each axis.
const MOST_THREADS: u32 = 1024;
const MOST_BLOCKS: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];

/// A device on this processor.
#[derive(Debug)]
struct Emulated {
    kernels: &'static Library,
    /// Bytes it has.
    memory: usize,
    /// Bytes taken, by address.
    taken: Mutex<BTreeMap<u64, usize>>,
    gauges: Arc<Gauges>,
    /// What each launch is run in; the next of all where there is none.
    orders: &'static [u64],
    /// Kernels that were launched.
    seen: Seen,
}

impl Emulated {
    fn new(kernels: &'static Library, memory: usize) -> Self {
        Self {
            kernels,
            memory,
            taken: Mutex::default(),
            gauges: Arc::default(),
            orders: &[],
            seen: Arc::default(),
        }
    }

    fn used(&self) -> usize {
        self.taken.lock().unwrap().values().sum()
    }

    /// Fails the test if a range is not in memory that was taken.
    fn check(&self, address: u64, bytes: usize) {
        let taken = self.taken.lock().unwrap();
        let (start, size) = taken.range(..=address).next_back().expect("an allocation");
        let end = address + bytes as u64;
        assert!(end <= start + *size as u64, "{bytes} bytes beyond the end");
    }

    /// Fails the test if something around an allocation was written to.
    fn check_guards(&self, by: &dyn Fn() -> String) {
        for (address, bytes) in &*self.taken.lock().unwrap() {
            let (before, after) = guards(*address, *bytes);
            // SAFETY: both belong to the allocation.
            let [before, after] =
                [before, after].map(|(at, len)| unsafe { std::slice::from_raw_parts(at, len) });
            let is_whole = before.iter().chain(after).all(|byte| *byte == FILL);
            assert!(is_whole, "{} wrote beside {bytes} bytes", by());
        }
    }

    /// A copy of all memory.
    fn contents(&self) -> Vec<(u64, Vec<u8>)> {
        let taken = self.taken.lock().unwrap();
        let copy = |(address, bytes): (&u64, &usize)| {
            // SAFETY: the memory was taken.
            let held = unsafe { std::slice::from_raw_parts(*address as *const u8, *bytes) };
            (*address, held.to_vec())
        };
        taken.iter().map(copy).collect()
    }

    /// Runs a launch once.
    fn run(&self, launch: &Launch<'_>, order: u64) {
        let name = CString::new(launch.kernel).unwrap();
        let mut args: Vec<*mut c_void> = launch.args.iter().map(Arg::pointer).collect();
        // SAFETY: the function has this signature; whoever launches passes what the kernel takes.
        let outcome = unsafe {
            let emulate: Symbol<'_, Emulate> = self.kernels.get(b"emulate").unwrap();
            emulate(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                order,
                args.as_mut_ptr(),
            )
        };
        assert_eq!(outcome, 0, "{launch:?}");
        self.check_guards(&|| format!("{launch:?}"));
    }

    /// Fails the test if a GPU would not take the launch.
    fn check_launch(&self, launch: &Launch<'_>) {
        assert!((1..=MOST_THREADS).contains(&launch.threads), "{launch:?}");
        let mut blocks = launch.grid.iter().zip(MOST_BLOCKS);
        let fits = blocks.all(|(n, most)| (1..=most).contains(n));
        assert!(fits, "{launch:?}");
        let taken = self.taken.lock().unwrap();
        for arg in launch.args {
            let Arg::Address(address @ 1..) = *arg else {
                continue;
            };
            let holder = taken.range(..=address).next_back();
            let is_held = holder.is_some_and(|(start, bytes)| address <= start + *bytes as u64);
            assert!(is_held, "{launch:?} gets memory that nobody holds");
        }
    }

    fn check_matrix(&self, matrix: &Matrix, (rows, columns): (usize, usize), number: Number) {
        let (rows, columns) = if matrix.turned {
            (columns, rows)
        } else {
            (rows, columns)
        };
        assert!(matrix.stride >= columns);
        let numbers = (rows - 1) * matrix.stride + columns;
        self.check(matrix.address, numbers * number.bytes());
    }
}

const ALIGN: usize = 256;

/// An allocation with its guards.
fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(GUARD + bytes + GUARD, ALIGN).unwrap()
}

/// Where the guards of an allocation begin, and how long they are.
fn guards(address: u64, bytes: usize) -> ((*const u8, usize), (*const u8, usize)) {
    let (before, after) = (address - GUARD as u64, address + bytes as u64);
    ((before as *const u8, GUARD), (after as *const u8, GUARD))
}

// SAFETY: the allocator hands no memory out twice.
unsafe impl Device for Emulated {
    fn name(&self) -> &'static str {
        "emulated"
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.memory.saturating_sub(self.used()))
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        if bytes > self.memory.saturating_sub(self.used()) {
            return Err(fault(format!("the device has no {bytes} bytes left")));
        }
        let layout = layout(bytes);
        // SAFETY: the size is not 0, and the guard before lies in it.
        let address = unsafe {
            let memory = alloc(layout);
            memory.write_bytes(FILL, layout.size());
            memory.add(GUARD) as u64
        };
        self.taken.lock().unwrap().insert(address, bytes);
        self.gauges.peak.fetch_max(self.used(), Ordering::Relaxed);
        Ok(address)
    }

    unsafe fn release(&self, address: u64, bytes: usize) {
        let before = self.taken.lock().unwrap().remove(&address);
        assert_eq!(before, Some(bytes));
        let layout = layout(bytes);
        let memory = (address as usize - GUARD) as *mut u8;
        // SAFETY: it was allocated with this layout.
        unsafe {
            // Whoever still has the address gets no numbers.
            memory.write_bytes(FILL, layout.size());
            dealloc(memory, layout);
        }
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.check(to, bytes.len());
        // SAFETY: checked.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.check(from, bytes.len());
        // SAFETY: checked.
        unsafe { (from as *const u8).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.check(from, bytes);
        self.check(to, bytes);
        // SAFETY: checked.
        unsafe { (from as *const u8).copy_to(to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        self.check(address, bytes);
        // SAFETY: checked.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.check_launch(launch);
        self.seen.lock().unwrap().insert(launch.kernel);
        let number = self.gauges.launches.fetch_add(1, Ordering::Relaxed);
        let [first, rest @ ..] = self.orders else {
            self.run(launch, number);
            return Ok(());
        };
        let before = self.contents();
        self.run(launch, *first);
        let wanted = self.contents();
        for order in rest {
            for (address, bytes) in &before {
                // SAFETY: as many bytes were read there.
                unsafe {
                    (*address as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                }
            }
            self.run(launch, *order);
            let same = self.contents() == wanted;
            assert!(same, "{launch:?} depends on the order of its threads");
        }
        Ok(())
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let Gemm { m, n, k, .. } = *gemm;
        self.check_matrix(&gemm.a, (m, k), gemm.numbers);
        self.check_matrix(&gemm.b, (k, n), gemm.numbers);
        let c = Matrix {
            address: gemm.c,
            stride: gemm.c_stride,
            turned: false,
        };
        self.check_matrix(&c, (m, n), Number::F32);
        let [a, b] = [(&gemm.a, m, k), (&gemm.b, k, n)]
            // SAFETY: checked.
            .map(|(matrix, rows, columns)| unsafe { dense(matrix, rows, columns, gemm.numbers) });
        let mut row = vec![0.0f32; n];
        for i in 0..m {
            row.fill(0.0);
            for (left, right) in a[i * k..][..k].iter().zip(b.chunks_exact(n)) {
                for (sum, right) in row.iter_mut().zip(right) {
                    *sum = left.mul_add(*right, *sum);
                }
            }
            for (j, sum) in row.iter().enumerate() {
                // SAFETY: checked.
                let c = unsafe { &mut *(gemm.c as *mut f32).add(i * gemm.c_stride + j) };
                *c = gemm.scale * sum + if gemm.adds { *c } else { 0.0 };
            }
        }
        Ok(())
    }
}

/// A factor `[rows, columns]`, as floats without gaps.
///
/// # Safety
/// The matrix lies in memory.
unsafe fn dense(matrix: &Matrix, rows: usize, columns: usize, numbers: Number) -> Vec<f32> {
    let at = |i: usize, j: usize| {
        let at = if matrix.turned {
            j * matrix.stride + i
        } else {
            i * matrix.stride + j
        };
        // SAFETY: passed on to the caller.
        unsafe {
            match numbers {
                Number::F32 => *(matrix.address as *const f32).add(at),
                Number::Bf16 => {
                    let bits = *(matrix.address as *const u16).add(at);
                    f32::from_bits(u32::from(bits) << 16)
                }
            }
        }
    };
    let indices = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
    indices.map(|(i, j)| at(i, j)).collect()
}
