//! KV whose every word says which it is, whatever the ranks it is divided over.

use std::ops::Range;

use baton_protocol::{BlockRun, KvGeometry, KvGroup, KvShares};
use baton_transfer::Read;

/// What is moved.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    layers: u32,
    /// Of an arena.
    pub(crate) blocks: u32,
    /// Lengths of prompts.
    pub(crate) tokens: &'static [u32],
}

pub(crate) const SHAPES: [Shape; 2] = [
    Shape {
        name: "Llama-8B",
        layers: 32,
        blocks: 288,
        tokens: &[32, 256, 1024, 2048, 8192],
    },
    Shape {
        name: "Llama-70B",
        layers: 80,
        blocks: 96,
        tokens: &[256, 2048],
    },
];

pub(crate) const BLOCK_TOKENS: u32 = 32;

impl Shape {
    pub(crate) fn named(name: &str) -> Self {
        let mut shapes = SHAPES.into_iter();
        shapes.find(|shape| shape.name == name).expect("a shape")
    }

    pub(crate) fn kv(&self) -> KvGeometry {
        let group = KvGroup {
            layers: self.layers,
            kv_heads: 8,
            head_dim: 128,
        };
        KvGeometry::bf16(BLOCK_TOKENS, vec![group])
    }

    pub(crate) fn shares(&self, ranks: usize) -> KvShares {
        KvShares::parallel(&self.kv(), ranks as u32, 1)
    }

    /// Of each rank's arena.
    pub(crate) fn arena_bytes(&self, ranks: usize) -> Vec<usize> {
        let (kv, shares) = (self.kv(), self.shares(ranks));
        let bytes = |rank| shares.block_bytes(&kv, rank) as usize * self.blocks as usize;
        (0..ranks).map(bytes).collect()
    }

    /// Words of one block on a rank, as the block of this number of the whole model has them.
    pub(crate) fn words(&self, ranks: usize, rank: usize, block: u32) -> Vec<u64> {
        let kv = self.kv();
        let bytes = self.shares(ranks).block_bytes(&kv, rank);
        let heads = self.heads(ranks, rank);
        // Heads stand outside layers: a head is one range.
        let of_head = bytes / u64::from(heads.end - heads.start);
        let head = |head: u32| {
            let words = 0..of_head / 8;
            words.map(move |word| pattern(block, head, word))
        };
        heads.flat_map(head).collect()
    }

    fn heads(&self, ranks: usize, rank: usize) -> Range<u32> {
        let each = 8 / ranks as u32;
        rank as u32 * each..(rank as u32 + 1) * each
    }
}

/// The word of a head of a block.
fn pattern(block: u32, head: u32, word: u64) -> u64 {
    let place = (u64::from(block) << 40) ^ (u64::from(head) << 32) ^ word;
    (place ^ 0x5eed_0000_0000_0000).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// `count` blocks of an arena of `blocks`, in runs of `run` neighbours that are in no order.
pub(crate) fn runs(count: u32, run: u32, blocks: u32) -> Vec<BlockRun> {
    let places = blocks / run;
    // 37 is prime to the numbers of places, so no block comes twice.
    let of = |i: u32| BlockRun {
        first: (i * 37 + 5) % places * run,
        count: run.min(count - i * run),
    };
    (0..count.div_ceil(run)).map(of).collect()
}

/// Bytes of reads.
pub(crate) fn bytes(reads: &[Read]) -> u64 {
    reads.iter().map(|read| read.bytes).sum()
}
