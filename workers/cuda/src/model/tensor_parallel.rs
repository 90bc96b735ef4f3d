//! What a rank's part of a model needs of the others: sums into the residual stream, and all of the logits.

use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::device::Buffer;
use crate::ranks::{AllGather, AllReduce, Sum, SumDtype};

/// One rank's end of a group, and the memory in which its own parts lie.
pub(crate) struct TensorParallel {
    sums: AllReduce,
    gather: AllGather,
    /// BF16 `[rows][hidden]`.
    partial: Buffer<u16>,
    /// `[rows][columns]`.
    logits: Buffer<f32>,
    /// Of the vocabulary, on this rank.
    columns: usize,
    hidden: usize,
}

impl TensorParallel {
    /// For steps of so many rows, and logits of so many at once.
    ///
    /// # Errors
    /// [`CudaError`].
    pub(crate) fn new(
        sums: AllReduce,
        (rows, hidden): (usize, usize),
        (logits_rows, columns): (usize, usize),
    ) -> Result<Self, CudaError> {
        let device = sums.device();
        // The last numbers are read as sixteen bytes.
        let logits = logits_rows * columns + 4;
        Ok(Self {
            gather: AllGather::new(&sums)?,
            partial: Buffer::zeroed(device, rows * hidden, "partial sums")?,
            logits: Buffer::zeroed(device, logits, "logits")?,
            columns,
            hidden,
            sums,
        })
    }

    /// Where a product that is a part of a sum goes: BF16 `[rows][hidden]`.
    pub(crate) fn partial(&self) -> CUdeviceptr {
        self.partial.at(0)
    }

    /// Adds the sum of all ranks' partials to the residual stream `x`.
    ///
    /// # Safety
    /// [`Self::partial`] and `x` hold this many rows; all ranks do the same.
    pub(crate) unsafe fn add(&self, x: CUdeviceptr, rows: usize) -> Result<(), CudaError> {
        let sum = Sum {
            dtype: SumDtype::Bf16ToF32,
            partial: self.partial(),
            out: x,
            residual: Some(x),
            count: rows * self.hidden,
        };
        // SAFETY: the caller's promise.
        unsafe { self.sums.launch(&sum) }
    }

    /// Where this rank's logits go: `[rows][columns]`.
    pub(crate) fn logits(&self) -> CUdeviceptr {
        self.logits.at(0)
    }

    /// All ranks' logits into `all` `[rows][vocab]`.
    ///
    /// # Safety
    /// [`Self::logits`] and `all` hold this many rows; all ranks do the same.
    pub(crate) unsafe fn gather(
        &self,
        all: CUdeviceptr,
        rows: usize,
        vocab: usize,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; the buffer has room behind its last number.
        unsafe {
            self.gather
                .launch(all, self.logits(), rows, vocab, self.columns)
        }
    }

    /// Whether a sum that is over did without a rank.
    ///
    /// # Errors
    /// [`CudaError::Rank`].
    pub(crate) fn check(&self) -> Result<(), CudaError> {
        self.sums.told()
    }
}
