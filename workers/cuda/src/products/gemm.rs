//! Matrix products through cuBLASLt, each shape planned once.
//!
//! `y[rows][outputs] = x[rows][inputs] · w[outputs][inputs]ᵀ`, everything row-major as it lies. To cuBLASLt, which counts
//! columns first, that is yᵀ = w · xᵀ with w transposed: the one form that FP8 takes as well.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::libraries;

/// What NVIDIA recommends for Hopper.
static WORKSPACE_BYTES: usize = 32 << 20;

/// What becomes of the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// BF16, stored.
    Bf16,
    /// f32, stored.
    F32,
    /// f32, added to what is there.
    AddF32,
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// BF16 by BF16.
    Bf16,
    /// e4m3 by e4m3, times scales. On Hopper alone; inputs a multiple of 16, outputs of 8. Sums of up to some thousand numbers are
    /// taken in the tensor core's own, shorter accumulators: an error of 3e-3 of the result at 14,336 inputs, where rounding
    /// activations to e4m3 costs 3e-2.
    E4m3 {
        /// f32 `[outputs]`, or with `blocks` `[outputs / 128][inputs / 128]`.
        w_scales: CUdeviceptr,
        /// f32 `[rows]`, or with `blocks` `[inputs / 128][rows]`.
        x_scales: CUdeviceptr,
        /// Scales are of 128 × 128 weights and of 128 activations; outputs a multiple of 128, inputs of 512.
        blocks: bool,
    },
}

/// How cuBLASLt's plans differ by what is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Bf16,
    Vectors,
    Blocks,
}

/// One product, summed in f32.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// `[rows][inputs]`.
    pub x: CUdeviceptr,
    /// `[outputs][inputs]`.
    pub w: CUdeviceptr,
    /// `[rows][outputs]`.
    pub y: CUdeviceptr,
    /// Rows of x and y.
    pub rows: usize,
    /// Rows of w.
    pub outputs: usize,
    /// Columns of x and w.
    pub inputs: usize,
    /// What x and w are.
    pub dtype: Dtype,
    /// What y is.
    pub output: Output,
}

/// cuBLASLt on a device, and its plans.
pub struct Blas {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    plans: HashMap<(usize, usize, usize, Kind, Output), Plan>,
}

// SAFETY: the handle and the plans belong to this value, which one thread uses at a time.
unsafe impl Send for Blas {}

/// What cuBLASLt wants to hear again with each product.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Blas {
    /// Loads the library.
    ///
    /// # Errors
    /// [`CudaError::Library`] without it, [`CudaError::Blas`] if it does not start.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        libraries::cublaslt()?;
        device.bind()?;
        let handle = result::create_handle().map_err(|e| failed("its start", &e))?;
        Ok(Self {
            workspace: Buffer::uninitialized(device, WORKSPACE_BYTES, "cuBLASLt's workspace")?,
            device: device.clone(),
            handle,
            plans: HashMap::new(),
        })
    }

    /// Computes a product on the device's stream.
    ///
    /// # Errors
    /// [`CudaError::Blas`].
    ///
    /// # Safety
    /// The matrices lie where the product says, in memory of this device, and stay until it is done.
    pub unsafe fn multiply(&mut self, product: &Product) -> Result<(), CudaError> {
        let key = (
            product.rows,
            product.outputs,
            product.inputs,
            product.dtype.kind(),
            product.output,
        );
        if !self.plans.contains_key(&key) {
            let plan = Plan::new(self.handle, product).map_err(|e| failed(&product.text(), &e))?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let alpha = 1.0f32;
        let beta = if product.output == Output::AddF32 {
            1.0f32
        } else {
            0.0
        };
        let y = product.y as *mut c_void;
        // SAFETY: the caller's promise; layouts and algorithm were made for these sizes.
        unsafe {
            point_at_scales(plan.operation, product.dtype)
                .map_err(|e| failed(&product.text(), &e))?;
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.w as *const c_void,
                plan.w,
                product.x as *const c_void,
                plan.x,
                y,
                plan.y,
                y,
                plan.y,
                &plan.algorithm,
                self.workspace.at(0) as *mut c_void,
                WORKSPACE_BYTES,
                self.device.stream().cast(),
            )
        }
        .map_err(|e| failed(&product.text(), &e))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made in `new`; nothing of it is in use once the stream is done.
        unsafe {
            let _ = self.device.bind();
            let _ = self.device.synchronize();
            let _ = result::destroy_handle(self.handle);
        }
    }
}

impl Product {
    fn text(&self) -> String {
        format!(
            "a product of {} rows, {} inputs and {} outputs in {:?} to {:?}",
            self.rows,
            self.inputs,
            self.outputs,
            self.dtype.kind(),
            self.output
        )
    }
}

impl Dtype {
    fn kind(&self) -> Kind {
        match self {
            Self::Bf16 => Kind::Bf16,
            Self::E4m3 { blocks: false, .. } => Kind::Vectors,
            Self::E4m3 { blocks: true, .. } => Kind::Blocks,
        }
    }
}

impl Plan {
    fn new(
        handle: sys::cublasLtHandle_t,
        product: &Product,
    ) -> Result<Self, cudarc::cublaslt::result::CublasError> {
        use sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        use sys::cudaDataType_t::{CUDA_R_8F_E4M3, CUDA_R_16BF, CUDA_R_32F};
        let (rows, outputs, inputs) = (
            product.rows as u64,
            product.outputs as u64,
            product.inputs as u64,
        );
        let y_type = match product.output {
            Output::Bf16 => CUDA_R_16BF,
            Output::F32 | Output::AddF32 => CUDA_R_32F,
        };
        let dtype = match product.dtype {
            Dtype::Bf16 => CUDA_R_16BF,
            Dtype::E4m3 { .. } => CUDA_R_8F_E4M3,
        };
        let operation = result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
        let transposed = 1i32; // CUBLAS_OP_T
        // SAFETY: fresh descriptors; attributes of the sizes that the interface states.
        unsafe {
            result::set_matmul_desc_attribute(
                operation,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of_val(&transposed),
            )?;
            set_short_sums(operation, product.dtype.kind())?;
            let w = result::create_matrix_layout(dtype, inputs, outputs, inputs as i64)?;
            let x = result::create_matrix_layout(dtype, inputs, rows, inputs as i64)?;
            let y = result::create_matrix_layout(y_type, outputs, rows, outputs as i64)?;
            let mut plan = Self {
                operation,
                w,
                x,
                y,
                algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] }, // until it is known, just below
            };
            let preference = result::create_matmul_pref()?;
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const WORKSPACE_BYTES).cast(),
                size_of::<usize>(),
            )?;
            let algorithm = plan.choose(handle, product, preference);
            let _ = result::destroy_matmul_pref(preference);
            plan.algorithm = algorithm?;
            Ok(plan)
        }
    }

    /// What cuBLASLt's own estimate puts first. With vectors of scales it knows but one tile, large; for few rows what it would
    /// take without scales is up to 1.6 times as fast (128 rows, 14,336 inputs: 25 instead of 40 µs), and most of that runs with
    /// them all the same: the first that does is taken.
    ///
    /// # Safety
    /// Live handles.
    unsafe fn choose(
        &self,
        handle: sys::cublasLtHandle_t,
        product: &Product,
        preference: sys::cublasLtMatmulPreference_t,
    ) -> Result<sys::cublasLtMatmulAlgo_t, cudarc::cublaslt::result::CublasError> {
        const FEW_ROWS: usize = 384;
        const CANDIDATES: usize = 8;
        let &Self {
            operation, w, x, y, ..
        } = self;
        let kind = product.dtype.kind();
        // SAFETY: the caller's promise; as many results are written as there is room for.
        unsafe {
            let mut candidates: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] =
                std::mem::zeroed();
            let mut count = 0;
            if kind == Kind::Vectors && product.rows <= FEW_ROWS {
                let asked = sys::cublasLtMatmulAlgoGetHeuristic(
                    handle,
                    operation,
                    w,
                    x,
                    y,
                    y,
                    preference,
                    CANDIDATES as i32,
                    candidates.as_mut_ptr(),
                    &mut count,
                );
                if asked.result().is_err() {
                    count = 0;
                }
            }
            set_scaling(operation, kind)?;
            point_at_scales(operation, product.dtype)?;
            for candidate in &candidates[..count as usize] {
                let mut checked = *candidate;
                let algo = &candidate.algo;
                let fits =
                    sys::cublasLtMatmulAlgoCheck(handle, operation, w, x, y, y, algo, &mut checked);
                if fits.result().is_ok() && checked.workspaceSize <= WORKSPACE_BYTES {
                    return Ok(*algo);
                }
            }
            let own = result::get_matmul_algo_heuristic(handle, operation, w, x, y, y, preference)?;
            Ok(own.algo)
        }
    }
}

/// Sums of e4m3 products stay in the tensor core's own accumulators, where that may be chosen.
///
/// # Safety
/// A live descriptor.
unsafe fn set_short_sums(
    operation: sys::cublasLtMatmulDesc_t,
    kind: Kind,
) -> Result<(), cudarc::cublaslt::result::CublasError> {
    let short = 1i8;
    let fast = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_FAST_ACCUM;
    match kind {
        Kind::Bf16 | Kind::Blocks => Ok(()),
        // SAFETY: the attribute is one byte.
        Kind::Vectors => unsafe {
            result::set_matmul_desc_attribute(operation, fast, (&raw const short).cast(), 1)
        },
    }
}

/// # Safety
/// A live descriptor.
unsafe fn set_scaling(
    operation: sys::cublasLtMatmulDesc_t,
    kind: Kind,
) -> Result<(), cudarc::cublaslt::result::CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as A;
    use sys::cublasLtMatmulMatrixScale_t as Scale;
    let (w, x) = match kind {
        Kind::Bf16 => return Ok(()),
        Kind::Vectors => (
            Scale::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F,
            Scale::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F,
        ),
        Kind::Blocks => (
            Scale::CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F,
            Scale::CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F,
        ),
    };
    for (attribute, scale) in [
        (A::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, w),
        (A::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, x),
    ] {
        let value = (&raw const scale).cast();
        // SAFETY: the attribute is such a number.
        unsafe {
            result::set_matmul_desc_attribute(operation, attribute, value, size_of_val(&scale))?;
        }
    }
    Ok(())
}

/// # Safety
/// A live descriptor.
unsafe fn point_at_scales(
    operation: sys::cublasLtMatmulDesc_t,
    dtype: Dtype,
) -> Result<(), cudarc::cublaslt::result::CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as A;
    let Dtype::E4m3 {
        w_scales, x_scales, ..
    } = dtype
    else {
        return Ok(());
    };
    for (attribute, address) in [
        (A::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, w_scales),
        (A::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x_scales),
    ] {
        let value = (&raw const address).cast();
        // SAFETY: the attribute is an address.
        unsafe {
            result::set_matmul_desc_attribute(operation, attribute, value, size_of_val(&address))?;
        }
    }
    Ok(())
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.operation);
            for layout in [self.w, self.x, self.y] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

fn failed(what: &str, error: &cudarc::cublaslt::result::CublasError) -> CudaError {
    CudaError::Blas {
        what: what.to_owned(),
        detail: format!("{:?}", error.0),
    }
}
