//! What one tensor-parallel rank has of a model: its weights, its KV arena, and what its part of a layer works in.
//!
//! Ranks compute one after the other on all threads, around one residual stream. Where a layer comes back to it, the ranks'
//! products are the parts of one sum over K ([`crate::gemm::Product`]): no rank has a partial sum of its own, and the logits
//! are bitwise those of one rank.

use std::sync::Arc;

use baton_kv_memory::{Address, KvMemory};

use crate::attention::HeadLayout;
use crate::gemm::{Part, ROW_STEP};
use crate::memory::Pages;
use crate::pack::PANEL;
use crate::weights::RankWeights;

pub struct Rank {
    pub weights: RankWeights,
    memory: Arc<dyn KvMemory>,
    /// Queries, keys and values, f32.
    pub qkv: Pages<f32>,
    /// Queries, by KV head.
    pub q: Pages<u16>,
    /// Attention's output.
    pub attended: Pages<u16>,
    /// The feed-forward layer's inside.
    pub inner: Pages<u16>,
}

impl Rank {
    /// With room for `rows` rows. The memory must be the host's.
    pub fn new(
        weights: RankWeights,
        memory: Arc<dyn KvMemory>,
        shape: &HeadLayout,
        rows: usize,
    ) -> Self {
        let layer = &weights.layers[0];
        Self {
            qkv: Pages::zeroed(rows * layer.qkv.panels * PANEL),
            q: Pages::zeroed(rows * shape.kv_heads * shape.group * shape.head_dim_padded),
            attended: Pages::zeroed(rows * layer.output.k),
            inner: Pages::zeroed(rows * layer.down.k.max(layer.gate_up.panels * PANEL / 2)),
            weights,
            memory,
        }
    }

    /// First byte of its arena.
    pub fn arena(&self) -> *mut u8 {
        match self.memory.address() {
            Address::Host(base) => base.as_ptr(),
            Address::Device(_) => unreachable!("refused at load"),
        }
    }

    /// Its part of the product of attention's output.
    pub fn attended(&self, layer: usize) -> Part<'_> {
        let weights = &self.weights.layers[layer].output;
        Part {
            a: self.attended.as_ptr(),
            lda: weights.k,
            weights,
        }
    }

    /// Its part of the product of the feed-forward layer's inside.
    pub fn inner(&self, layer: usize) -> Part<'_> {
        let weights = &self.weights.layers[layer].down;
        Part {
            a: self.inner.as_ptr(),
            lda: weights.k,
            weights,
        }
    }
}

/// Rows that a buffer for steps of `tokens` tokens has: a tile may read a whole [`ROW_STEP`] of rows from any row on.
pub fn rows_for(tokens: usize) -> usize {
    tokens + ROW_STEP
}
