//! Descriptions of matrices for the copy engine (TMA).

use cudarc::driver::sys;

use crate::error::{CudaError, driver};

/// A row-major matrix, as the copy engine of Hopper and later knows it. Zeros elsewhere.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct TensorMap([u8; 128]);

const BF16: sys::CUtensorMapDataType = sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
const BYTES: sys::CUtensorMapDataType = sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8;

/// How a matrix is copied to shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Columns of one copy: 128 bytes of them.
    pub columns: u32,
    /// Rows of one copy.
    pub rows: u32,
    /// L2 fetches 256 bytes at a time instead of 128.
    pub far: bool,
}

impl TensorMap {
    /// A map of nothing, for kernels that do not use theirs.
    pub const NONE: Self = Self([0; 128]);

    /// BF16 `[rows][columns]` at an address that is a multiple of 16, with rows of a multiple of 16 bytes; shared memory is
    /// swizzled by 128 bytes, and what lies outside reads as zero.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if the copy engine cannot do it.
    pub fn new(
        address: sys::CUdeviceptr,
        rows: usize,
        columns: usize,
        piece: Piece,
    ) -> Result<Self, CudaError> {
        let sizes = [columns as u64, rows as u64];
        let copied = [piece.columns, piece.rows];
        Self::encode(
            address,
            BF16,
            sizes,
            [columns as u64 * 2],
            copied,
            piece.far,
        )
    }

    /// Bytes `[rows][columns]`, otherwise as [`TensorMap::new`].
    ///
    /// # Errors
    /// As there.
    pub fn bytes(
        address: sys::CUdeviceptr,
        rows: usize,
        columns: usize,
        piece: Piece,
    ) -> Result<Self, CudaError> {
        let sizes = [columns as u64, rows as u64];
        let copied = [piece.columns, piece.rows];
        Self::encode(address, BYTES, sizes, [columns as u64], copied, piece.far)
    }

    /// Numbers of 1 or 2 bytes `[rows][columns]`, rows of a multiple of 128 bytes, copied 16 KiB at a time: `box_rows` rows, of each
    /// 128 bytes, then the next 128 of each; otherwise as [`TensorMap::new`].
    ///
    /// # Errors
    /// As there.
    pub fn stages(
        address: sys::CUdeviceptr,
        [rows, columns]: [usize; 2],
        number_bytes: usize,
        box_rows: usize,
    ) -> Result<Self, CudaError> {
        let numbers = if number_bytes == 1 { BYTES } else { BF16 };
        let (across, row_bytes) = (128 / number_bytes, columns * number_bytes);
        let sizes = [across as u64, rows as u64, (row_bytes / 128) as u64];
        let copied = [across as u32, box_rows as u32, (128 / box_rows) as u32];
        let strides = [row_bytes as u64, 128];
        Self::encode(address, numbers, sizes, strides, copied, false)
    }

    /// Queries, BF16 `[rows][heads][head_dim]`, copied `tokens` rows of `group` heads of 64 numbers at a time, heads next to
    /// each other; otherwise as [`TensorMap::new`].
    ///
    /// # Errors
    /// As there.
    pub fn queries(
        address: sys::CUdeviceptr,
        [rows, heads, head_dim]: [usize; 3],
        [tokens, group]: [usize; 2],
    ) -> Result<Self, CudaError> {
        let sizes = [head_dim as u64, heads as u64, rows as u64];
        let strides = [head_dim as u64 * 2, (heads * head_dim) as u64 * 2];
        let copied = [64, group as u32, tokens as u32];
        Self::encode(address, BF16, sizes, strides, copied, false)
    }

    /// Sizes and what is copied in elements, strides (of all dimensions but the innermost) in bytes.
    fn encode<const RANK: usize, const STRIDES: usize>(
        address: sys::CUdeviceptr,
        numbers: sys::CUtensorMapDataType,
        sizes: [u64; RANK],
        strides: [u64; STRIDES],
        copied: [u32; RANK],
        far: bool,
    ) -> Result<Self, CudaError> {
        const { assert!(STRIDES + 1 == RANK) };
        use sys::CUtensorMapL2promotion as Promotion;
        let promotion = match far {
            true => Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            false => Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        };
        let mut map = Self::NONE;
        // SAFETY: 128 bytes aligned to 64 are written; arrays of the rank's lengths are read.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                numbers,
                RANK as u32,
                address as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                copied.as_ptr(),
                [1u32; RANK].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                promotion,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|e| driver(&format!("describing a tensor of {sizes:?}"), e))?;
        Ok(map)
    }
}
