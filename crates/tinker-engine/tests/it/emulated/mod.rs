//! A device for tests: the kernels compiled as C++ for this processor, and products by three loops.
//!
//! Fresh memory is filled with NaN, so that a kernel that reads what nobody wrote shows.
#![expect(unsafe_code, reason = "a library is loaded and its functions called")]

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
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
    Ok(Arc::new(Emulated {
        kernels: kernels(head),
        memory,
        taken: Mutex::new(BTreeMap::new()),
    }))
}

type Emulate =
    unsafe extern "C" fn(*const c_char, *const u32, u32, *mut *mut c_void) -> std::ffi::c_int;

/// The kernels for heads of a width, compiled once.
fn kernels(head: usize) -> &'static Library {
    static MADE: Mutex<BTreeMap<usize, &'static Library>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap();
    made.entry(head)
        .or_insert_with(|| Box::leak(Box::new(compile(head))))
}

#[expect(
    clippy::disallowed_methods,
    reason = "how a machine names its C++ compiler"
)]
fn compile(head: usize) -> Library {
    let table: String = KERNELS
        .iter()
        .map(|name| format!("    {{\"{name}\", emulation::bridge<{name}>}},\n"))
        .collect();
    let source = format!(
        "{}\n{SOURCE}\nstatic const emulation::Entry ENTRIES[] = {{\n{table}    {{nullptr, nullptr}}}};\n\
         extern \"C\" int emulate(const char* name, const unsigned* grid, unsigned threads, void** args) {{\n\
         return emulation::launch(ENTRIES, name, grid, threads, args);\n}}\n",
        include_str!("emulation.h")
    );
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (file, library) = (
        dir.path().join("kernels.cpp"),
        dir.path().join("kernels.so"),
    );
    std::fs::write(&file, source).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-march=native", "-ffp-contract=off"])
        .args(["-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE"])
        .arg(format!("-DHEAD={head}"))
        .args([file.as_path(), Path::new("-o"), &library])
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}: install a C++ compiler, or set CXX to one"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{compiler}: {said}");
    // SAFETY: the library has no initialisation but that of its variables.
    unsafe { Library::new(&library) }.unwrap()
}

/// A device on this processor.
#[derive(Debug)]
struct Emulated {
    kernels: &'static Library,
    /// Bytes it has.
    memory: usize,
    /// Bytes taken, by address.
    taken: Mutex<BTreeMap<u64, usize>>,
}

impl Emulated {
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
        // SAFETY: the size is not 0.
        let memory = unsafe {
            let memory = alloc(Layout::from_size_align(bytes, ALIGN).unwrap());
            memory.write_bytes(0xff, bytes);
            memory
        };
        let address = memory as u64;
        self.taken.lock().unwrap().insert(address, bytes);
        Ok(address)
    }

    unsafe fn release(&self, address: u64, bytes: usize) {
        assert_eq!(self.taken.lock().unwrap().remove(&address), Some(bytes));
        // SAFETY: it was allocated with this layout.
        unsafe {
            dealloc(
                address as *mut u8,
                Layout::from_size_align(bytes, ALIGN).unwrap(),
            )
        };
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
        let name = CString::new(launch.kernel).unwrap();
        let mut args: Vec<*mut c_void> = launch.args.iter().map(Arg::pointer).collect();
        // SAFETY: the function has this signature; the caller passes what the kernel takes.
        let outcome = unsafe {
            let emulate: Symbol<'_, Emulate> = self.kernels.get(b"emulate").unwrap();
            emulate(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                args.as_mut_ptr(),
            )
        };
        assert_eq!(outcome, 0, "{launch:?}");
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
