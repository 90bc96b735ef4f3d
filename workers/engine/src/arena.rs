//! How a model's KV lies in an arena: the same for every executor, or they could not read each other's.

use baton_model::ModelSpec;
use baton_protocol::{KvDtype, KvGeometry};

/// The arena layout of a model that one rank holds whole.
///
/// # Panics
/// If the spec has no layers, which none that was read from a file is.
pub fn kv_geometry(spec: &ModelSpec, block_tokens: u32) -> KvGeometry {
    let group = &spec.kv_groups()[0]; // executors refuse models with several
    KvGeometry {
        layout: KvGeometry::LAYOUT,
        dtype: KvDtype::Bf16,
        block_tokens,
        kv_heads: group.kv_heads as u32,
        layers: group.layers.len() as u32,
        head_dim: group.head_dim as u32,
    }
}

/// Blocks that an arena of `bytes` bytes holds.
///
/// # Errors
/// What of the geometry is not the model's, or that there is no room for a block.
pub fn arena_blocks(spec: &ModelSpec, kv: &KvGeometry, bytes: usize) -> Result<usize, String> {
    if let Some(difference) = kv.difference(&kv_geometry(spec, kv.block_tokens)) {
        return Err(difference);
    }
    if kv.block_tokens == 0 {
        return Err("a block of 0 tokens".to_owned());
    }
    match bytes / kv.block_bytes() {
        0 => Err(format!(
            "a block takes {} bytes, the arena has {bytes}",
            kv.block_bytes()
        )),
        blocks => Ok(blocks),
    }
}
