//! An NVIDIA GPU, through CUDA's driver, compiler (NVRTC) and products (cuBLAS), which are looked for
//! when the first model is loaded.

use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::panic::catch_unwind;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::{result as driver, sys};
use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};

use super::device::{Device, Gemm, KERNELS, Launch, Matrix, Number, SOURCE, fault};
use crate::error::{Error, Result};

/// Where to get the libraries that are no part of the driver.
const TOOLKIT: &str = "install the CUDA toolkit 12 or 13, or Python's packages nvidia-cublas and \
     nvidia-cuda-nvrtc, and put the folders of its libraries into LD_LIBRARY_PATH";

/// Whether a GPU answers and the libraries are there; the error says what is missing and what to do.
///
/// # Errors
/// If there is no driver, no GPU, or a library is missing.
pub fn is_available() -> Result<()> {
    guarded(|| {
        check_libraries()?;
        first_gpu().map(|_| ())
    })
}

/// Opens the first GPU, with kernels for heads up to `head` wide.
///
/// # Errors
/// As [`is_available`]; and if the GPU does not take the kernels.
pub fn open(head: usize) -> Result<Arc<dyn Device>> {
    guarded(|| {
        check_libraries()?;
        Ok(Arc::new(Gpu::open(head)?) as Arc<dyn Device>)
    })
}

/// Compiles the kernels for heads up to `head` wide: to machine code for an architecture such as `sm_90`,
/// to PTX for one such as `compute_90`. Needs no GPU.
///
/// # Errors
/// If NVRTC is missing, or refuses the kernels, with its messages.
pub fn compile(head: usize, architecture: &str) -> Result<Vec<u8>> {
    guarded(|| {
        // SAFETY: looking for a library runs nothing but its initialisation.
        if !unsafe { nvrtc_sys::is_culib_present() } {
            return Err(missing("libnvrtc", TOOLKIT));
        }
        compile_for(head, architecture)
    })
}

/// A missing symbol is a panic of the bindings; here it is an error.
fn guarded<T>(work: impl FnOnce() -> Result<T> + std::panic::UnwindSafe) -> Result<T> {
    catch_unwind(work).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let said = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let said = said.unwrap_or("it does not say why");
        Err(fault(format!(
            "a library of CUDA does not fit this program: {said}"
        )))
    })
}

fn missing(library: &str, next: &str) -> Error {
    fault(format!("{library} is not there: {next}"))
}

fn check_libraries() -> Result<()> {
    // SAFETY: looking for a library runs nothing but its initialisation.
    let [has_driver, has_nvrtc, has_blas] = unsafe {
        [
            sys::is_culib_present(),
            nvrtc_sys::is_culib_present(),
            blas_sys::is_culib_present(),
        ]
    };
    if !has_driver {
        let next = "install NVIDIA's driver, or use --device cpu";
        return Err(missing("libcuda, a part of NVIDIA's driver,", next));
    }
    for (is_there, library) in [(has_nvrtc, "libnvrtc"), (has_blas, "libcublas")] {
        if !is_there {
            return Err(missing(library, TOOLKIT));
        }
    }
    Ok(())
}

/// The first GPU of this machine.
fn first_gpu() -> Result<sys::CUdevice> {
    let none = |what: String| fault(format!("no GPU answers ({what}): use --device cpu"));
    driver::init().map_err(|e| none(e.to_string()))?;
    let count = driver::device::get_count().map_err(|e| none(e.to_string()))?;
    if count == 0 {
        return Err(none("NVIDIA's driver finds none".into()));
    }
    driver::device::get(0).map_err(|e| none(e.to_string()))
}

fn compile_for(head: usize, architecture: &str) -> Result<Vec<u8>> {
    let source = CString::new(SOURCE).map_err(|e| fault(e.to_string()))?;
    let refused = |e: nvrtc::NvrtcError| fault(format!("NVRTC: {e}"));
    let program = nvrtc::create_program(&source, None).map_err(refused)?;
    let options = [
        format!("--gpu-architecture={architecture}"),
        format!("-DHEAD={head}"),
        // Products are contracted where the kernels say so, and nowhere else.
        "--fmad=false".to_owned(),
        "--std=c++17".to_owned(),
    ];
    // SAFETY: the program was just created, and is destroyed once, below.
    unsafe {
        let outcome = match nvrtc::compile_program(program, &options) {
            Ok(()) if architecture.starts_with("sm_") => machine_code(program).map_err(refused),
            Ok(()) => nvrtc::get_ptx(program)
                .map(|ptx| ptx.into_iter().map(|c| c as u8).collect())
                .map_err(refused),
            Err(error) => {
                let log = nvrtc::get_program_log(program).unwrap_or_default();
                let log: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
                let log = String::from_utf8_lossy(&log);
                let log = log.trim_end_matches('\0').trim();
                Err(fault(format!("NVRTC for {architecture}: {error}: {log}")))
            }
        };
        let _ = nvrtc::destroy_program(program);
        outcome
    }
}

/// # Safety
/// The program has been compiled for a real architecture.
unsafe fn machine_code(program: nvrtc_sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut size = 0usize;
    // SAFETY: the buffer is as large as NVRTC says.
    unsafe {
        nvrtc_sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
        let mut code = vec![0u8; size];
        nvrtc_sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()?;
        Ok(code)
    }
}

/// The newest architecture that NVRTC knows, up to the GPU's own.
fn best_architecture(own: c_int) -> Result<c_int> {
    let refused = |e: nvrtc::NvrtcError| fault(format!("NVRTC: {e}"));
    let mut count = 0;
    // SAFETY: NVRTC writes one number, then as many as it said.
    let known = unsafe {
        nvrtc_sys::nvrtcGetNumSupportedArchs(&raw mut count)
            .result()
            .map_err(refused)?;
        let mut known = vec![0 as c_int; usize::try_from(count).unwrap_or(0)];
        nvrtc_sys::nvrtcGetSupportedArchs(known.as_mut_ptr())
            .result()
            .map_err(refused)?;
        known
    };
    let best = known.into_iter().filter(|arch| *arch <= own).max();
    best.ok_or_else(|| fault(format!("this NVRTC does not know the GPU's sm_{own}")))
}

/// A GPU with its kernels.
struct Gpu {
    name: String,
    context: sys::CUcontext,
    kernels: Vec<sys::CUfunction>,
    /// Null until the kernels are loaded.
    module: sys::CUmodule,
    /// Null until it is made.
    blas: Mutex<blas_sys::cublasHandle_t>,
    device: sys::CUdevice,
}

// SAFETY: CUDA's handles may be used from any thread; the one that is not to be used from two at once
// is behind a mutex.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

fn failed(what: &str) -> impl Fn(driver::DriverError) -> Error {
    move |error| fault(format!("the GPU cannot {what}: {error}"))
}

fn blas_failed(error: blas::CublasError) -> Error {
    fault(format!("cuBLAS: {error}"))
}

impl Gpu {
    fn open(head: usize) -> Result<Self> {
        let gpu = first_gpu()?;
        let name = driver::device::get_name(gpu).map_err(failed("say its name"))?;
        use sys::CUdevice_attribute_enum as Attribute;
        // SAFETY: the device was just found; the context is given back when the value is dropped, also where
        // something below fails.
        let context = unsafe { driver::primary_ctx::retain(gpu) }.map_err(failed("be opened"))?;
        let mut opened = Self {
            name,
            context,
            kernels: Vec::new(),
            module: std::ptr::null_mut(),
            blas: Mutex::new(std::ptr::null_mut()),
            device: gpu,
        };
        opened.enter()?;
        // SAFETY: the device was just found.
        let (major, minor) = unsafe {
            let attribute = |which| driver::device::get_attribute(gpu, which);
            let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
            let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
            let unknown = failed("say its architecture");
            (major.map_err(&unknown)?, minor.map_err(&unknown)?)
        };
        let own = 10 * major + minor;
        let best = best_architecture(own)?;
        // Machine code runs on its own architecture; PTX goes on to newer ones.
        let kind = if best == own { "sm" } else { "compute" };
        let mut code = compile_for(head, &format!("{kind}_{best}"))?;
        code.push(0);
        // SAFETY: the code is what NVRTC made, and ends in 0.
        let module = unsafe { driver::module::load_data(code.as_ptr().cast()) };
        opened.module = module.map_err(failed("load the kernels"))?;
        opened.kernels = kernels_of(opened.module)?;
        let handle = blas::create_handle().map_err(blas_failed)?;
        opened.blas = Mutex::new(handle);
        // SAFETY: the handle was just made.
        unsafe {
            let mode = blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            blas_sys::cublasSetMathMode(handle, mode)
                .result()
                .map_err(blas_failed)?;
        }
        Ok(opened)
    }

    /// Makes this the GPU that the thread's calls go to.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is released when this is dropped.
        unsafe { driver::ctx::set_current(self.context) }.map_err(failed("be used"))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Nothing can be done about an error here.
        let _ = self.enter();
        let blas = *self.blas.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: handle and module were made in this context, and what used them held this; memory is
        // released before, as each allocation holds this too. The context was retained once.
        unsafe {
            if !blas.is_null() {
                let _ = blas::destroy_handle(blas);
            }
            if !self.module.is_null() {
                let _ = driver::module::unload(self.module);
            }
            let _ = driver::primary_ctx::release(self.device);
        }
    }
}

/// The kernels of a module, in the order of [`KERNELS`].
fn kernels_of(module: sys::CUmodule) -> Result<Vec<sys::CUfunction>> {
    let kernel = |name: &&str| {
        let name = CString::new(*name).map_err(|e| fault(e.to_string()))?;
        // SAFETY: the caller has just loaded the module.
        unsafe { driver::module::get_function(module, name) }.map_err(failed("find a kernel"))
    };
    KERNELS.iter().map(kernel).collect()
}

// SAFETY: memory comes from the driver, which hands none out twice.
unsafe impl Device for Gpu {
    fn name(&self) -> &str {
        &self.name
    }

    fn free_memory(&self) -> Result<usize> {
        self.enter()?;
        let (free, _) = driver::mem_get_info().map_err(failed("say what memory it has"))?;
        Ok(free)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: nobody reads the memory before it is written.
        unsafe { driver::malloc_sync(bytes) }.map_err(|error| {
            let free = driver::mem_get_info().map_or(0, |(free, _)| free >> 20);
            fault(format!(
                "the GPU has no {bytes} bytes left ({free} MiB are free, {error}): \
                 hold fewer models, sequences or adapters on it"
            ))
        })
    }

    unsafe fn release(&self, address: u64, _bytes: usize) {
        // Nothing can be done about an error here; the next call meets it again.
        if self.enter().is_ok() {
            // SAFETY: passed on to the caller.
            let _ = unsafe { driver::free_sync(address) };
        }
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: passed on to the caller.
        unsafe { driver::memcpy_htod_sync(to, bytes) }.map_err(failed("take data"))
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: passed on to the caller.
        unsafe { driver::memcpy_dtoh_sync(bytes, from) }.map_err(failed("give data back"))
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        let stream = std::ptr::null_mut();
        // SAFETY: passed on to the caller.
        unsafe { driver::memcpy_dtod_async(to, from, bytes, stream) }.map_err(failed("copy"))
    }

    unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        let stream = std::ptr::null_mut();
        // SAFETY: passed on to the caller.
        unsafe { driver::memset_d8_async(address, 0, bytes, stream) }
            .map_err(failed("clear memory"))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.enter()?;
        let index = KERNELS.iter().position(|name| *name == launch.kernel);
        let kernel = index.and_then(|i| self.kernels.get(i));
        let kernel = kernel.ok_or_else(|| fault(format!("no kernel {}", launch.kernel)))?;
        let mut args: Vec<*mut c_void> = launch.args.iter().map(|arg| arg.pointer()).collect();
        let [x, y, z] = launch.grid;
        let stream = std::ptr::null_mut();
        let threads = (launch.threads, 1, 1);
        // SAFETY: passed on to the caller; the arguments live until the launch has copied them.
        unsafe { driver::launch_kernel(*kernel, (x, y, z), threads, 0, stream, &mut args) }
            .map_err(|e| fault(format!("the GPU cannot run {}: {e}", launch.kernel)))
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.enter()?;
        // Held until the call is made: the handle is not to be used from two threads at once.
        let handle = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        let operation = |matrix: &Matrix| match matrix.turned {
            true => blas_sys::cublasOperation_t::CUBLAS_OP_T,
            false => blas_sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let numbers = match gemm.numbers {
            Number::F32 => blas_sys::cudaDataType::CUDA_R_32F,
            Number::Bf16 => blas_sys::cudaDataType::CUDA_R_16BF,
        };
        let size = |n: usize| {
            c_int::try_from(n).map_err(|_| fault(format!("a matrix has {n} rows or columns")))
        };
        let beta = if gemm.adds { 1.0f32 } else { 0.0 };
        // cuBLAS has columns where these have rows: C^T = B^T A^T.
        // SAFETY: passed on to the caller; the factors are read before the call returns.
        unsafe {
            blas::gemm_ex(
                *handle,
                operation(&gemm.b),
                operation(&gemm.a),
                size(gemm.n)?,
                size(gemm.m)?,
                size(gemm.k)?,
                (&raw const gemm.scale).cast(),
                gemm.b.address as *const c_void,
                numbers,
                size(gemm.b.stride)?,
                gemm.a.address as *const c_void,
                numbers,
                size(gemm.a.stride)?,
                (&raw const beta).cast(),
                gemm.c as *mut c_void,
                blas_sys::cudaDataType::CUDA_R_32F,
                size(gemm.c_stride)?,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(blas_failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_binding_says_as_it_panics_is_the_error() {
        let texts: [fn() -> Result<()>; 2] = [
            || panic!("no symbol"),
            || panic!("{}", String::from("no symbol")),
        ];
        for text in texts {
            let error = guarded(text).unwrap_err().to_string();

            assert!(
                error.ends_with("does not fit this program: no symbol"),
                "{error}"
            );
        }
    }
}
