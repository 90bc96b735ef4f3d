//! Where an executor takes weights from: one rank's file of a model directory, or a test.

use std::borrow::Cow;

use super::fp8::Fp8Matrix;

/// A BF16 tensor as it lies in the checkpoint.
pub struct TensorBytes<'a> {
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// Its numbers, little-endian, row after row.
    pub bytes: Cow<'a, [u8]>,
}

/// A projection `[out][in]` in whatever format the source has it.
#[derive(Clone, Debug, PartialEq)]
pub enum MatrixBytes<'a> {
    /// Little-endian BF16, row after row.
    Bf16(Cow<'a, [u8]>),
    /// e4m3 with scales.
    Fp8(Fp8Matrix<'a>),
}

/// Anything that has tensors.
pub trait TensorSource: Sync {
    /// The BF16 tensor of this name; an error is the reason as a sentence.
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String>;

    /// The same, and it has this shape.
    fn shaped(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [u8]>, String> {
        let tensor = self.bf16(name)?;
        let bytes: usize = shape.iter().product::<usize>() * 2;
        if tensor.shape != shape || tensor.bytes.len() != bytes {
            return Err(format!(
                "its shape is {:?} in {} bytes, the configuration says {shape:?}",
                tensor.shape,
                tensor.bytes.len()
            ));
        }
        Ok(tensor.bytes)
    }

    /// One of the seven projections of a layer, `[out][in]`, in the source's format. A source that has
    /// FP8 has all of them so, with scales of one kind.
    fn projection(&self, name: &str, out: usize, inputs: usize) -> Result<MatrixBytes<'_>, String> {
        self.shaped(name, &[out, inputs]).map(MatrixBytes::Bf16)
    }
}
