//! Models on disk: their configuration as a [`ModelSpec`], their weights by name, their shards.
//!
//! - [`ModelSpec`] says in numbers what a decoder is, layer by layer: each has a [`LayerKind`], and layers whose KV has the
//!   same strides form a [`KvGroup`]. [`parse_config`] reads one from a Hugging Face `config.json` and refuses what no
//!   executor here could compute.
//! - [`names`] holds every weight name, [`expected_tensors`] the list of tensors a spec needs, and
//!   [`Split`] how tensor parallelism shares each of them out.
//! - [`WeightFormat`] says how the projections are kept, BF16 or FP8; [`Fp8Matrix`] is one with its scales.
//! - [`SafetensorsFile`] maps a weight file and hands out tensors whose bounds were checked first.
//! - [`TensorSource`] is what executors take weights from.
//! - [`ModelDir`] is a prepared model directory: a [`Manifest`] and the weights of each rank.

#![deny(unsafe_code)] // one exception: mapping a file, in `weights/mapped.rs`
#![warn(clippy::unwrap_used)]

mod config;
mod directory;
mod error;
mod hex;
mod spec;
mod weights;

pub use config::{checkpoint_format, eos_token_ids, parse_config};
pub use directory::{
    CHAT_TEMPLATE, CONFIG, FileEntry, FingerprintHasher, GENERATION_CONFIG, MANIFEST,
    MANIFEST_FORMAT, Manifest, ModelDir, TOKENIZER, TOKENIZER_CONFIG, Weights, hash_file,
    rank_file_name,
};
pub use error::ModelError;
pub use hex::hex;
pub use spec::{
    AttentionSpec, GatedMlpSpec, KvGroup, LayerKind, Mixer, Mlp, ModelSpec, Rope, RopeScaling,
    UniformSpec,
};
pub use weights::{
    BLOCK, Dtype, E4M3_MAX, Fp8Matrix, Fp8Scales, MatrixBytes, RankSource, SafetensorsFile, Split,
    StoredTensor, Tensor, TensorBytes, TensorEntry, TensorSource, TensorSpec, WeightFormat,
    check_tp_size, dequantize_row, e4m3_from_f32, e4m3_is_nan, expected_tensors, f32_from_e4m3,
    header_bytes, names, part, quantize_row, stored_tensors,
};
