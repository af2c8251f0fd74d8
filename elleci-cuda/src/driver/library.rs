//! cuBLASLt: opened with a card where it is installed, never linked.
//!
//! It counts in columns. Our row-major `C [m, n] = A · Bᵀ` is its `Cᵀ [n, m] = B · Aᵀ`: its first operand is our second, an operand that
//! lies by k is turned (first) or not (second), and one that lies by rows the other way round.

use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;

use crate::arena::Dtype;
use crate::device::{DeviceError, Matmul, Operand, Order, Result};

/// What a product is but for its addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Form {
    sizes: [usize; 3],
    operands: [(Order, usize); 2],
    types: [Dtype; 2],
    factor_on_device: bool,
    workspace: usize,
}

/// A form with the algorithm that was chosen for it.
struct Ready {
    desc: sys::cublasLtMatmulDesc_t,
    /// Of its first and second operand, and of the result
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

/// The library with the products that were asked of it.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    ready: HashMap<Form, Ready>,
}

/// Addresses of a product.
pub(super) struct Places {
    pub a: u64,
    pub b: u64,
    pub out: u64,
    /// The factor, and the 0 or 1 that the result's old value is multiplied by, where the former is on the device
    pub factors: Option<(u64, u64)>,
    pub workspace: (u64, usize),
}

/// Whether the library can be loaded.
///
/// # Errors
/// [`DeviceError::Missing`].
pub(super) fn available() -> Result<()> {
    // SAFETY: `is_culib_present` only opens the library.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => {
            Err(missing("no libcublasLt.so of CUDA 12 or 13 in the loader's path; our own kernels do without".into()))
        }
    }
}

fn missing(reason: String) -> DeviceError {
    DeviceError::Missing { library: "libcublasLt", reason }
}

fn fault(action: &'static str) -> impl Fn(result::CublasError) -> DeviceError {
    move |e| DeviceError::Driver { action, reason: format!("{e}; cuda.gemm=own does without cuBLASLt") }
}

impl Library {
    /// The library in the context that is current.
    ///
    /// # Errors
    /// [`DeviceError::Missing`], or what it says.
    pub fn open() -> Result<Library> {
        available()?;
        // cudarc panics where a function is missing.
        let handle = catch_unwind(result::create_handle).map_err(|_| missing("it lacks functions".into()))?;
        Ok(Library { handle: handle.map_err(fault("start cuBLASLt"))?, ready: HashMap::new() })
    }

    /// Queues a product.
    ///
    /// # Safety
    /// All places are memory of the current context with the sizes that the product says, and the stream belongs to it.
    ///
    /// # Errors
    /// A product that the library does not take, or a fault of the device.
    pub unsafe fn matmul(&mut self, p: &Matmul, at: &Places, stream: CUstream) -> Result<()> {
        let form = Form {
            sizes: [p.m, p.n, p.k],
            operands: [(p.a.order, p.a.pitch), (p.b.order, p.b.pitch)],
            types: [p.a.buf.dtype, p.out.dtype],
            factor_on_device: at.factors.is_some(),
            workspace: at.workspace.1,
        };
        if !self.ready.contains_key(&form) {
            let prepared = catch_unwind(AssertUnwindSafe(|| prepare(self.handle, p, &form)));
            let ready = prepared.map_err(|_| missing("it lacks functions".into()))?;
            self.ready.insert(form, ready.map_err(fault("choose a product of cuBLASLt"))?);
        }
        let ready = &self.ready[&form];
        let (one, beta) = (1.0f32, p.add as u32 as f32);
        let (one_int, zero_int) = (1i32, 0i32);
        let pointer = |address: u64| address as *const c_void;
        let host = |float: &f32, int: &i32| -> *const c_void {
            if p.a.buf.dtype == Dtype::I8 { (int as *const i32).cast() } else { (float as *const f32).cast() }
        };
        let (alpha, beta) = match at.factors {
            Some((alpha, beta)) => (pointer(alpha), pointer(beta)),
            None => (host(&one, &one_int), host(&beta, &zero_int)),
        };
        let [first, second, out] = ready.layouts;
        // SAFETY: handle, descriptors and algorithm live as long as this; places and stream are the caller's, and the factors live
        // beyond the call, which reads those of the host at once.
        let queued = unsafe {
            result::matmul(
                self.handle,
                ready.desc,
                alpha,
                beta,
                pointer(at.b),
                first,
                pointer(at.a),
                second,
                pointer(at.out),
                out,
                at.out as *mut c_void,
                out,
                &ready.algo,
                at.workspace.0 as *mut c_void,
                at.workspace.1,
                stream.cast(),
            )
        };
        queued.map_err(fault("multiply with cuBLASLt"))
    }

    /// Releases all of it.
    ///
    /// # Safety
    /// Nothing that was queued runs any more.
    pub unsafe fn destroy(&mut self) {
        for ready in self.ready.drain().map(|(_, r)| r) {
            // SAFETY: made by `prepare`, used by nothing else.
            unsafe { release(ready.desc, &ready.layouts) };
        }
        // SAFETY: made by `open`, used by nothing else.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// # Safety
/// Both were made by `prepare` and are used by nothing else.
unsafe fn release(desc: sys::cublasLtMatmulDesc_t, layouts: &[sys::cublasLtMatrixLayout_t]) {
    // SAFETY: as above.
    unsafe {
        for layout in layouts {
            let _ = result::destroy_matrix_layout(*layout);
        }
        let _ = result::destroy_matmul_desc(desc);
    }
}

fn data_type(dtype: Dtype) -> sys::cudaDataType {
    match dtype {
        Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Dtype::I8 => sys::cudaDataType::CUDA_R_8I,
        Dtype::E4m3 => sys::cudaDataType::CUDA_R_8F_E4M3,
        Dtype::I32 => sys::cudaDataType::CUDA_R_32I,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

/// An operand of `rows` rows as the library sees it: columns of k, or of rows.
fn layout(o: &Operand, rows: usize, k: usize) -> std::result::Result<sys::cublasLtMatrixLayout_t, result::CublasError> {
    let (height, width) = if o.order == Order::K { (k, rows) } else { (rows, k) };
    result::create_matrix_layout(data_type(o.buf.dtype), height as u64, width as u64, o.pitch as i64)
}

/// Describes a product to the library and lets it choose an algorithm.
fn prepare(handle: sys::cublasLtHandle_t, p: &Matmul, form: &Form) -> std::result::Result<Ready, result::CublasError> {
    let (compute, scale) = match p.a.buf.dtype {
        Dtype::I8 => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, sys::cudaDataType::CUDA_R_32I),
        _ => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F),
    };
    let turned = |turn: bool| turn as i32; // CUBLAS_OP_N, CUBLAS_OP_T
    let desc = result::create_matmul_desc(compute, scale)?;
    let mut layouts: Vec<sys::cublasLtMatrixLayout_t> = Vec::new();
    let mut choose = || {
        use sys::cublasLtMatmulDescAttributes_t::*;
        let attributes = [
            (CUBLASLT_MATMUL_DESC_TRANSA, turned(p.b.order == Order::K)),
            (CUBLASLT_MATMUL_DESC_TRANSB, turned(p.a.order == Order::Row)),
            (CUBLASLT_MATMUL_DESC_POINTER_MODE, form.factor_on_device as i32), // ..._HOST, ..._DEVICE
        ];
        for (attribute, value) in attributes {
            // SAFETY: the descriptor was just made; the value is read at once.
            unsafe { result::set_matmul_desc_attribute(desc, attribute, (&raw const value).cast(), size_of::<i32>()) }?;
        }
        layouts.push(layout(&p.b, p.n, p.k)?);
        layouts.push(layout(&p.a, p.m, p.k)?);
        layouts.push(result::create_matrix_layout(data_type(p.out.dtype), p.n as u64, p.m as u64, p.n as i64)?);
        let preference = result::create_matmul_pref()?;
        // SAFETY: all descriptors were just made and live until they are destroyed below or with the library.
        let chosen = unsafe { heuristic(handle, desc, &layouts, preference, form.workspace) };
        // SAFETY: nothing uses it afterwards.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        chosen
    };
    match choose() {
        Ok(algo) => Ok(Ready { desc, layouts: [layouts[0], layouts[1], layouts[2]], algo }),
        Err(e) => {
            // SAFETY: made above and handed to nothing.
            unsafe { release(desc, &layouts) };
            Err(e)
        }
    }
}

/// # Safety
/// All descriptors are alive.
unsafe fn heuristic(
    handle: sys::cublasLtHandle_t,
    desc: sys::cublasLtMatmulDesc_t,
    layouts: &[sys::cublasLtMatrixLayout_t],
    preference: sys::cublasLtMatmulPreference_t,
    workspace: usize,
) -> std::result::Result<sys::cublasLtMatmulAlgo_t, result::CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t::*;
    // Sums of parts in a fixed order: by the type of the sums (2) or of the result (4), not in place (1), which is whoever comes first.
    let (bytes, reductions) = (workspace as u64, 2u32 | 4);
    let [first, second, out] = [layouts[0], layouts[1], layouts[2]];
    // SAFETY: the values are read at once; the descriptors are the caller's.
    unsafe {
        result::set_matmul_pref_attribute(
            preference,
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const bytes).cast(),
            size_of::<u64>(),
        )?;
        result::set_matmul_pref_attribute(
            preference,
            CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            (&raw const reductions).cast(),
            size_of::<u32>(),
        )?;
        Ok(result::get_matmul_algo_heuristic(handle, desc, first, second, out, out, preference)?.algo)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without the library, the reason says that it is not needed.
    #[test]
    fn a_missing_library_is_named() {
        if let Err(e) = available() {
            let text = e.to_string();
            assert!(text.contains("libcublasLt") && text.contains("our own kernels do without"), "{text}");
        }
    }
}
