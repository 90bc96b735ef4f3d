//! The fake device: no model, and yet KV that is really moved.
//!
//! [`FakeExecutor`] keeps one digest per token where a model keeps keys and values, and chooses tokens from
//! what it reads back. Kept in the arenas of the worker's ranks, those digests travel like any KV, and a pull that brought
//! the wrong bytes shows as wrong tokens.
#![allow(unsafe_code)] // atomics over the arenas

use std::slice;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use baton_engine::{FakeCells, FakeConfig, FakeExecutor, RankWords};
use baton_kv_memory::KvMemory;
use baton_model::ModelDir;
use baton_protocol::{KvGeometry, KvShares};

use crate::config::WorkerConfig;

/// A fake executor with the bounds of this model. It never chooses an end-of-sequence id, so outputs have
/// the length that was asked for.
pub(crate) fn executor(
    config: &WorkerConfig,
    step_micros: u64,
    model: &ModelDir,
    memories: Vec<Arc<dyn KvMemory>>,
    (kv, shares): (KvGeometry, &KvShares),
    blocks: u32,
) -> FakeExecutor {
    let digests = FakeCells::new(&kv, shares, Arenas(memories));
    let fake = FakeConfig {
        kv,
        blocks,
        vocab: model.spec().vocab as u32,
        tokens_max: model.manifest.tokens_max as u32,
        step_sequences_max: config.batch,
        step_tokens_max: config.step_tokens,
        step_micros,
        cost: config.fake_cost.clone(),
        steps_in_flight: 2,
        run_max: 1,
        never_emit: model.manifest.eos_token_ids.clone(),
        faults: config.fake_faults,
    };
    FakeExecutor::with_memory(fake, Arc::new(digests))
}

/// By rank.
struct Arenas(Vec<Arc<dyn KvMemory>>);

impl RankWords for Arenas {
    fn words(&self, rank: usize, offset: u64, count: usize) -> &[AtomicU64] {
        let memory = &self.0[rank];
        let bytes = count * size_of::<AtomicU64>();
        let is_inside = offset.is_multiple_of(8) && offset as usize + bytes <= memory.len();
        assert!(
            is_inside,
            "{bytes} bytes at {offset} are outside rank {rank}'s arena"
        );
        let Some(base) = memory.address().host() else {
            unreachable!("the fake device's arenas are in host memory");
        };
        // SAFETY: the arena lives and stays where it is as long as `memory`, which `self` holds; the words
        // are inside it, and aligned, for it begins on a page. Others write here only by transfers into
        // blocks that no sequence holds at that time.
        unsafe { slice::from_raw_parts(base.add(offset as usize).as_ptr().cast(), count) }
    }
}
