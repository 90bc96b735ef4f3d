//! Models on disk: their configuration as a [`ModelSpec`], their weights by name, their shards.
//!
//! - [`ModelSpec`] says in numbers what a decoder is; [`parse_config`] reads one from a Hugging Face
//!   `config.json` and refuses what no executor here could compute.
//! - [`names`] holds every weight name, [`expected_tensors`] the list of tensors a spec needs, and
//!   [`Split`] how tensor parallelism shares each of them out.
//! - [`WeightFormat`] says how the projections are kept, BF16 or FP8; [`Fp8Matrix`] is one with its scales.
//! - [`SafetensorsFile`] maps a weight file and hands out tensors whose bounds were checked first.
//! - [`TensorSource`] is what executors take weights from.
//! - [`ModelDir`] is a prepared model directory: a [`Manifest`] and the weights of each rank.

#![deny(unsafe_code)] // one exception: mapping a file, in `mapped.rs`

mod config;
mod e4m3;
mod error;
mod fingerprint;
mod fp8;
mod manifest;
mod mapped;
mod model_dir;
pub mod names;
mod quantization;
mod safetensors;
mod source;
mod spec;
mod tensors;
mod weight_format;

pub use config::{checkpoint_format, eos_token_ids, parse_config};
pub use e4m3::{E4M3_MAX, e4m3_from_f32, e4m3_is_nan, f32_from_e4m3};
pub use error::ModelError;
pub use fingerprint::FingerprintHasher;
pub use fp8::{BLOCK, Fp8Matrix, Fp8Scales, dequantize_row, quantize_row};
pub use manifest::{FileEntry, MANIFEST_FORMAT, Manifest};
pub use model_dir::{
    CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, MANIFEST, ModelDir, TOKENIZER, TOKENIZER_CONFIG,
    Weights, hash_file, rank_file_name,
};
pub use safetensors::{Dtype, SafetensorsFile, Tensor, TensorEntry, header_bytes};
pub use source::{MatrixBytes, TensorBytes, TensorSource};
pub use spec::{ModelSpec, Rope, RopeScaling};
pub use tensors::{
    Split, StoredTensor, TensorSpec, check_tp_size, expected_tensors, stored_tensors,
};
pub use weight_format::WeightFormat;
