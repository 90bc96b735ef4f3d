//! The tensors of a model: their names and shapes, their formats, the files they lie in.

mod e4m3;
mod fp8;
mod mapped;
pub mod names;
mod rank_source;
mod safetensors;
mod source;
mod tensor_parallel;
mod tensors;
mod weight_format;

pub use e4m3::{E4M3_MAX, e4m3_from_f32, e4m3_is_nan, f32_from_e4m3};
pub use fp8::{BLOCK, Fp8Matrix, Fp8Scales, dequantize_row, quantize_row};
pub use rank_source::{RankSource, part};
pub use safetensors::{Dtype, SafetensorsFile, Tensor, TensorEntry, header_bytes};
pub use source::{MatrixBytes, TensorBytes, TensorSource};
pub use tensor_parallel::check_tp_size;
pub use tensors::{Split, StoredTensor, TensorSpec, expected_tensors, stored_tensors};
pub use weight_format::WeightFormat;
