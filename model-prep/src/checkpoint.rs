//! A source, opened: everything about the model but its weights, and a way to read those piece by piece.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use baton_model::{Fp8Matrix, ModelSpec, TensorSpec, WeightFormat, hex};
use sha2::{Digest, Sha256};

use crate::error::PrepError;

/// An opened source.
pub(crate) struct Checkpoint {
    /// Name to serve it under unless the user has another.
    pub name: String,
    /// What its makers call it, as far as its files say so: `SmolLM2-135M-Instruct`, `smollm2`.
    pub family: String,
    /// Where it comes from, for people.
    pub source: String,
    /// Hash over names, sizes and times of the source files.
    pub stamp: String,
    /// The model in numbers, with its own context length.
    pub spec: ModelSpec,
    /// Token that begins a sequence.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// How it keeps the projections; BF16 stands for every unquantized format.
    pub format: WeightFormat,
    /// Files to write as they are: config, tokenizer, template.
    pub files: Vec<SmallFile>,
    /// The weights.
    pub weights: Box<dyn WeightSource>,
}

/// A file that is written whole.
pub(crate) struct SmallFile {
    /// Its plain name.
    pub name: &'static str,
    /// What is in it.
    pub content: Vec<u8>,
}

/// Weights of a checkpoint, under Hugging Face's names and in Hugging Face's order of rows.
pub(crate) trait WeightSource {
    /// Whether a tensor is there, in this shape, in a format that can be read; if it is to be `kept`, in
    /// this one. Reads no weights.
    fn check(&self, tensor: &TensorSpec, kept: Option<WeightFormat>) -> Result<(), PrepError>;

    /// Append the elements of a checked tensor, whole rows or a whole vector, as little-endian BF16; FP8 is
    /// dequantized.
    fn read(
        &self,
        tensor: &TensorSpec,
        elements: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), PrepError>;

    /// A checked projection as the source has it, if that is FP8.
    fn fp8(&self, _tensor: &TensorSpec) -> Result<Option<Fp8Matrix<'_>>, PrepError> {
        Ok(None)
    }

    /// An error about a checked tensor, with the file it is in.
    fn fault(&self, tensor: &TensorSpec, reason: &str) -> PrepError;
}

/// A hash over names, sizes and times of files: the same files, untouched, have the same.
pub(crate) fn stamp<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<String, PrepError> {
    let mut hasher = Sha256::new();
    for path in paths {
        let metadata = path
            .metadata()
            .map_err(|e| PrepError::io("read the size of", path, e))?;
        let name = path.file_name().unwrap_or_default();
        let line = format!(
            "{name:?} {} {}.{}\n",
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec()
        );
        hasher.update(line);
    }
    Ok(hex(&hasher.finalize()))
}
