//! The fake device: no model, and yet KV that is really moved.
//!
//! [`FakeExecutor`] keeps one digest per token where a model keeps keys and values, and chooses tokens from
//! what it reads back. Kept in the worker's arena, those digests travel like any KV, and a pull that brought
//! the wrong bytes shows as wrong tokens.
#![allow(unsafe_code)] // atomics over the arena

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_engine::{FakeConfig, FakeExecutor, FakeKv, KvMemory};
use baton_model::ModelDir;
use baton_protocol::{KvDtype, KvGeometry};

use crate::WorkerConfig;

/// A geometry of 8 bytes a token: one digest.
pub(crate) fn geometry(block_tokens: u32) -> KvGeometry {
    KvGeometry {
        layout: KvGeometry::LAYOUT,
        dtype: KvDtype::Bf16,
        block_tokens,
        kv_heads: 1,
        layers: 1,
        head_dim: 2,
    }
}

/// A fake executor with the bounds of this model. It never chooses an end-of-sequence id, so outputs have
/// the length that was asked for.
pub(crate) fn executor(
    config: &WorkerConfig,
    step_micros: u64,
    model: &ModelDir,
    memory: Arc<dyn KvMemory>,
    kv: KvGeometry,
    blocks: u32,
) -> FakeExecutor {
    let digests = ArenaDigests {
        blocks: blocks as usize,
        slots: kv.block_tokens as usize,
        block_bytes: kv.block_bytes(),
        memory,
    };
    let fake = FakeConfig {
        kv,
        blocks,
        vocab: model.spec().vocab as u32,
        tokens_max: model.manifest.tokens_max as u32,
        step_sequences_max: config.batch,
        step_tokens_max: config.step_tokens,
        step_micros,
        steps_in_flight: 2,
        run_max: 1,
        never_emit: model.manifest.eos_token_ids.clone(),
        faults: config.fake_faults,
    };
    FakeExecutor::with_memory(fake, Arc::new(digests))
}

/// Digests in an arena: that of a slot at byte `block * block_bytes + slot * 8`.
struct ArenaDigests {
    memory: Arc<dyn KvMemory>,
    blocks: usize,
    slots: usize,
    block_bytes: usize,
}

impl ArenaDigests {
    fn at(&self, block: u32, slot: u32) -> &AtomicU64 {
        let (block, slot) = (block as usize, slot as usize);
        let offset = block * self.block_bytes + slot * size_of::<u64>();
        let is_inside = block < self.blocks
            && slot < self.slots
            && offset + size_of::<u64>() <= self.memory.len();
        assert!(
            is_inside,
            "slot {slot} of block {block} is outside the arena"
        );
        // SAFETY: the arena lives and stays where it is as long as `memory`, which `self` holds; the eight
        // bytes are inside it, and aligned, for it begins on a page and blocks are multiples of 8 bytes.
        // Others write here only by transfers into blocks that no sequence holds at that time.
        unsafe { AtomicU64::from_ptr(self.memory.base().add(offset).cast()) }
    }
}

impl FakeKv for ArenaDigests {
    fn write(&self, block: u32, slot: u32, digest: u64) {
        self.at(block, slot).store(digest, Ordering::Relaxed);
    }

    fn read(&self, block: u32, slot: u32) -> u64 {
        self.at(block, slot).load(Ordering::Relaxed)
    }
}
