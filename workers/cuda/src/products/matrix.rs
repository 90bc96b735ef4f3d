//! Matrices of weights on the GPU, BF16 or FP8, and how products read them.

use std::sync::Arc;

use crate::error::CudaError;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::tensor_map::{Piece, TensorMap};

/// Rows and columns that share a scale in [`Format::Fp8Block`].
pub const BLOCK: usize = 128;

/// What the numbers of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// BF16.
    Bf16,
    /// e4m3, a scale for each output.
    Fp8Channel,
    /// e4m3, a scale for each 128 × 128.
    Fp8Block,
}

impl Format {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::Fp8Channel, Self::Fp8Block];

    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8Channel | Self::Fp8Block => 1,
        }
    }

    /// What the kernels call it: `WEIGHT` of `kernels/gemm_skinny.cu`.
    pub fn number(self) -> usize {
        match self {
            Self::Bf16 => 0,
            Self::Fp8Channel => 1,
            Self::Fp8Block => 2,
        }
    }
}

/// How the outputs of a matrix lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// As they come.
    Plain,
    /// 8 of gate, 8 of up, and so on; scales of blocks are gate's and then up's.
    InTurn,
}

/// Weights `[outputs][inputs]`. Those of FP8 stand in the order 0, 8, 1, 9, … 7, 15 within each 16 (`docs/cuda-gemm.md`).
pub struct Matrix {
    /// Their bytes.
    pub buffer: Buffer<u8>,
    /// FP8: `[outputs]`, or `[ceil(outputs / 128)][ceil(inputs / 128)]`.
    pub scales: Option<Buffer<f32>>,
    /// What they are.
    pub format: Format,
    /// How outputs lie.
    pub order: RowOrder,
    /// Rows.
    pub outputs: usize,
    /// Columns.
    pub inputs: usize,
    /// 64 rows by 128 bytes.
    pub map: TensorMap,
}

impl Matrix {
    /// Describes weights that are on the GPU.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn new(
        device: &Arc<Device>,
        buffer: Buffer<u8>,
        scales: Option<Buffer<f32>>,
        format: Format,
        order: RowOrder,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, CudaError> {
        assert_eq!(buffer.len(), outputs * inputs * format.bytes());
        let expected = match (format, order) {
            (Format::Bf16, _) => None,
            (Format::Fp8Channel, _) => Some(outputs),
            (Format::Fp8Block, RowOrder::Plain) => {
                Some(outputs.div_ceil(BLOCK) * inputs.div_ceil(BLOCK))
            }
            (Format::Fp8Block, RowOrder::InTurn) => {
                Some(2 * (outputs / 2).div_ceil(BLOCK) * inputs.div_ceil(BLOCK))
            }
        };
        assert_eq!(scales.as_ref().map(Buffer::len), expected);
        let row_bytes = inputs * format.bytes();
        let map = if device.capability() != (9, 0) || !row_bytes.is_multiple_of(16) {
            TensorMap::NONE
        } else if format == Format::Bf16 {
            let piece = Piece {
                columns: 64,
                rows: 64,
                far: false,
            };
            TensorMap::new(buffer.at(0), outputs, inputs, piece)?
        } else {
            let piece = Piece {
                columns: 128,
                rows: 64,
                far: false,
            };
            TensorMap::bytes(buffer.at(0), outputs, inputs, piece)?
        };
        Ok(Self {
            buffer,
            scales,
            format,
            order,
            outputs,
            inputs,
            map,
        })
    }

    /// Address of the scales; null without.
    pub fn scales_at(&self) -> u64 {
        self.scales.as_ref().map_or(0, |scales| scales.at(0))
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.buffer.len() + self.scales.as_ref().map_or(0, |scales| scales.len() * 4)
    }
}

/// Puts codes into the order in which FP8 weights are kept; their count is a multiple of 16.
pub fn extend_stored(out: &mut Vec<u8>, codes: &[u8]) {
    let (sixteens, rest) = codes.as_chunks::<16>();
    assert!(rest.is_empty(), "the caller has looked");
    out.extend(sixteens.iter().flat_map(|c| {
        [
            c[0], c[8], c[1], c[9], c[2], c[10], c[3], c[11], c[4], c[12], c[5], c[13], c[6],
            c[14], c[7], c[15],
        ]
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_sixteen_come_in_turn() {
        let codes: Vec<u8> = (0..32).collect();
        let mut out = Vec::new();
        extend_stored(&mut out, &codes);
        assert_eq!(out[..6], [0, 8, 1, 9, 2, 10]);
        assert_eq!(out[14..20], [7, 15, 16, 24, 17, 25]);
    }
}
