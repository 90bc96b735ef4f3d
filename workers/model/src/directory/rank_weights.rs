//! One rank's weight file.

use std::borrow::Cow;
use std::path::Path;

use crate::error::ModelError;
use crate::weights::{
    Dtype, Fp8Matrix, Fp8Scales, MatrixBytes, SafetensorsFile, StoredTensor, Tensor, TensorBytes,
    TensorSource, WeightFormat, names,
};

/// The weights of one rank, mapped. Names are those of [`crate::names`].
#[derive(Debug)]
pub struct Weights {
    file: SafetensorsFile,
    format: WeightFormat,
}

impl Weights {
    /// Maps a file and checks that it holds these tensors.
    pub(super) fn open(
        path: &Path,
        format: WeightFormat,
        mut tensors: impl Iterator<Item = StoredTensor>,
    ) -> Result<Self, ModelError> {
        let file = SafetensorsFile::open(path)?;
        tensors.try_for_each(|tensor| check_tensor(&file, &tensor))?;
        Ok(Self { file, format })
    }

    /// A tensor by name; shapes are this rank's.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        self.file.tensor(name)
    }

    /// Format of the projections.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The file they are in.
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

fn check_tensor(file: &SafetensorsFile, expected: &StoredTensor) -> Result<(), ModelError> {
    let (name, dtype, shape) = expected;
    let found = file.tensor(name)?;
    if found.dtype != *dtype || found.shape != *shape {
        let reason = format!(
            "is {} of shape {:?}, it should be {dtype} of shape {shape:?}; prepare the model again",
            found.dtype, found.shape
        );
        return Err(ModelError::tensor(file.path(), name, reason));
    }
    Ok(())
}

impl TensorSource for Weights {
    fn bf16(&self, name: &str) -> Result<TensorBytes<'_>, String> {
        let tensor = self.of_dtype(name, Dtype::Bf16)?;
        Ok(TensorBytes {
            shape: tensor.shape,
            bytes: tensor.bytes.into(),
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
