//! Whether a model can be divided over the ranks of a tensor-parallel group.

use super::fp8::BLOCK;
use super::tensors::{Split, TensorSpec, expected_tensors};
use super::weight_format::WeightFormat;
use crate::error::ModelError;
use crate::spec::{Mixer, Mlp, ModelSpec};

/// Whether the model in this format can be divided over `tp_size` ranks: whole heads and equal parts for each, and no
/// block of [`WeightFormat::Fp8Block`] cut.
///
/// # Errors
/// [`ModelError::TensorParallel`] says what cannot be divided.
pub fn check_tp_size(
    spec: &ModelSpec,
    format: WeightFormat,
    tp_size: usize,
) -> Result<(), ModelError> {
    if tp_size == 0 {
        return Err(ModelError::TensorParallel(
            "the tensor-parallel size must be at least 1, it is 0".to_owned(),
        ));
    }
    let mut parts = Vec::new();
    for kind in spec.kinds() {
        let Mixer::Attention(attention) = &kind.mixer;
        let Mlp::Gated(mlp) = &kind.mlp;
        parts.push(("key/value heads", attention.kv_heads));
        parts.push(("query heads", attention.heads));
        parts.push(("feed-forward columns", mlp.intermediate));
    }
    if !spec.tied_embeddings {
        parts.push(("vocabulary entries", spec.vocab));
    }
    for (what, count) in parts {
        if count % tp_size != 0 {
            return Err(ModelError::TensorParallel(format!(
                "tensor-parallel size {tp_size} does not divide the model's {count} {what}; choose a size that does"
            )));
        }
    }
    match format {
        WeightFormat::Fp8Block if tp_size > 1 => expected_tensors(spec)
            .iter()
            .filter(|tensor| tensor.projection)
            .try_for_each(|tensor| check_blocks(tensor, tp_size)),
        _ => Ok(()),
    }
}

fn check_blocks(tensor: &TensorSpec, tp_size: usize) -> Result<(), ModelError> {
    let (what, count) = match tensor.split {
        Split::Replicated => return Ok(()),
        Split::Rows => ("rows", tensor.rows()),
        Split::Columns => ("columns", tensor.columns()),
    };
    let part = count / tp_size;
    match part.is_multiple_of(BLOCK) {
        true => Ok(()),
        false => Err(ModelError::TensorParallel(format!(
            "tensor-parallel size {tp_size} gives a rank {part} of the {count} {what} of `{}`, which cuts a \
             {BLOCK}×{BLOCK} block of FP8 weights; choose a size that gives a multiple of {BLOCK}, or \
             prepare the model with `--dtype bf16`",
            tensor.name
        ))),
    }
}
