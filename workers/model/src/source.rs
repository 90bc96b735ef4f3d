//! Where an executor takes weights from: a model directory, or a test.

use crate::model_dir::Weights;
use crate::safetensors::Dtype;

/// A BF16 tensor as it lies in the checkpoint.
pub struct TensorBytes<'a> {
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// Its numbers, little-endian, row after row.
    pub bytes: &'a [u8],
}

/// Anything that has tensors.
pub trait TensorSource {
    /// The BF16 tensor of this name; an error is the reason as a sentence.
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String>;

    /// The same, and it has this shape.
    fn shaped(&self, name: &str, shape: &[usize]) -> Result<&[u8], String> {
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
}

impl TensorSource for Weights {
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
        let tensor = self.tensor(name).map_err(|e| e.to_string())?;
        if tensor.dtype != Dtype::Bf16 {
            return Err(format!(
                "it is {}, and this executor computes in BF16",
                tensor.dtype
            ));
        }
        Ok(TensorBytes {
            shape: tensor.shape,
            bytes: tensor.bytes,
        })
    }
}
