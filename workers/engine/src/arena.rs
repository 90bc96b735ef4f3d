//! How a model's KV lies in an arena: the same for every executor, or they could not read each other's.

use baton_model::ModelSpec;
use baton_protocol::{KvGeometry, KvGroup};

/// The arena layout of a model that one rank holds whole.
pub fn kv_geometry(spec: &ModelSpec, block_tokens: u32) -> KvGeometry {
    let group = |group: &baton_model::KvGroup| KvGroup {
        layers: group.layers.len() as u32,
        kv_heads: group.kv_heads as u32,
        head_dim: group.head_dim as u32,
    };
    KvGeometry::bf16(block_tokens, spec.kv_groups().iter().map(group).collect())
}

/// For an executor whose layers are all alike: their one group, and the blocks that an arena of `bytes` bytes holds.
///
/// # Errors
/// What of the geometry is not the model's, that its layers' KV is of several kinds, or that there is no room for a block.
pub fn uniform_arena(
    spec: &ModelSpec,
    kv: &KvGeometry,
    bytes: usize,
) -> Result<(KvGroup, usize), String> {
    if let Some(difference) = kv.difference(&kv_geometry(spec, kv.block_tokens)) {
        return Err(difference);
    }
    if kv.block_tokens == 0 {
        return Err("a block of 0 tokens".to_owned());
    }
    let group = kv.only_group().ok_or_else(|| {
        let groups = kv.groups.len();
        format!("its layers' KV is of {groups} kinds, and this executor computes one")
    })?;
    match bytes / kv.block_bytes() {
        0 => Err(format!(
            "a block takes {} bytes, the arena has {bytes}",
            kv.block_bytes()
        )),
        blocks => Ok((group, blocks)),
    }
}
