//! Where an executor takes weights from: a model directory, or a test.

use std::borrow::Cow;

use crate::fp8::{Fp8Matrix, Fp8Scales};
use crate::model_dir::Weights;
use crate::names;
use crate::safetensors::{Dtype, Tensor};
use crate::weight_format::WeightFormat;

/// A BF16 tensor as it lies in the checkpoint.
pub struct TensorBytes<'a> {
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// Its numbers, little-endian, row after row.
    pub bytes: &'a [u8],
}

/// A projection `[out][in]` in whatever format the source has it.
#[derive(Clone, Debug, PartialEq)]
pub enum MatrixBytes<'a> {
    /// Little-endian BF16, row after row.
    Bf16(&'a [u8]),
    /// e4m3 with scales.
    Fp8(Fp8Matrix<'a>),
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

    /// One of the seven projections of a layer, `[out][in]`, in the source's format. A source that has
    /// FP8 has all of them so, with scales of one kind.
    fn projection(&self, name: &str, out: usize, inputs: usize) -> Result<MatrixBytes<'_>, String> {
        self.shaped(name, &[out, inputs]).map(MatrixBytes::Bf16)
    }
}

impl TensorSource for Weights {
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
        let tensor = self.of_dtype(name, Dtype::Bf16)?;
        Ok(TensorBytes {
            shape: tensor.shape,
            bytes: tensor.bytes,
        })
    }

    fn projection(&self, name: &str, out: usize, inputs: usize) -> Result<MatrixBytes<'_>, String> {
        let shape = [out, inputs];
        let Some(scales_shape) = self.format().scales_shape(shape) else {
            return self.shaped(name, &shape).map(MatrixBytes::Bf16);
        };
        let codes = self.of_dtype(name, Dtype::F8E4M3)?;
        let scales = self.of_dtype(&names::scales(name), Dtype::F32)?;
        for (found, expected) in [(&codes.shape, &shape[..]), (&scales.shape, &scales_shape)] {
            if found != expected {
                return Err(format!(
                    "the shape of it or of its scales is {found:?}, the configuration says {expected:?}"
                ));
            }
        }
        let numbers = scales.bytes.as_chunks::<4>().0.iter();
        let numbers = numbers.map(|&bytes| f32::from_le_bytes(bytes)).collect();
        Ok(MatrixBytes::Fp8(Fp8Matrix {
            rows: out,
            columns: inputs,
            codes: Cow::Borrowed(codes.bytes),
            scales: match self.format() {
                WeightFormat::Fp8Block => Fp8Scales::Block(numbers),
                _ => Fp8Scales::Channel(numbers),
            },
        }))
    }
}

impl Weights {
    fn of_dtype(&self, name: &str, dtype: Dtype) -> Result<Tensor<'_>, String> {
        let tensor = self.tensor(name).map_err(|e| e.to_string())?;
        if tensor.dtype != dtype {
            return Err(format!(
                "`{name}` is {}, it should be {dtype}",
                tensor.dtype
            ));
        }
        Ok(tensor)
    }
}
