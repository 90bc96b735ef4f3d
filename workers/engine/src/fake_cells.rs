//! KV of the fake executor, laid out as a model's: a digest for each token in each head of each layer, on one rank or several.
//!
//! A pull between workers of unequal sizes that brings a head to the wrong place shows as wrong tokens: every copy of a digest
//! is marked with its place, and all must agree.

use std::sync::atomic::{AtomicU64, Ordering};

use baton_protocol::{KvGeometry, KvGroup, KvShares};

use crate::FakeKv;
use crate::sampling::mix;

/// Bytes of one digest.
const DIGEST_BYTES: u64 = size_of::<u64>() as u64;

/// A geometry with room for one digest a token in each head of each layer, and for nothing else.
pub fn fake_geometry(block_tokens: u32, kv_heads: u32, layers: u32) -> KvGeometry {
    let group = KvGroup {
        layers,
        kv_heads,
        // Keys and values of two BF16 numbers each: 8 bytes.
        head_dim: 2,
    };
    KvGeometry::bf16(block_tokens, vec![group])
}

/// The arenas of a worker's ranks, in 64-bit words.
pub trait RankWords: Send + Sync {
    /// `count` words from byte `offset`, a multiple of 8, of a rank's arena on.
    fn words(&self, rank: usize, offset: u64, count: usize) -> &[AtomicU64];

    /// The word at byte `offset`.
    fn word(&self, rank: usize, offset: u64) -> &AtomicU64 {
        &self.words(rank, offset, 1)[0]
    }
}

impl RankWords for Vec<Vec<AtomicU64>> {
    fn words(&self, rank: usize, offset: u64, count: usize) -> &[AtomicU64] {
        &self[rank][(offset / DIGEST_BYTES) as usize..][..count]
    }
}

/// [`FakeKv`] in the arenas of a worker's ranks. A rank has only the heads and layers of its share.
pub struct FakeCells<W> {
    words: W,
    ranks: Vec<RankCells>,
}

struct RankCells {
    block_bytes: u64,
    cells: Vec<Cell>,
}

/// One head of one layer.
struct Cell {
    /// Where it begins in a block.
    offset: u64,
    /// What its digests are marked with.
    mark: u64,
}

impl FakeCells<Vec<Vec<AtomicU64>>> {
    /// Arenas of `blocks` blocks in memory of their own, all zero.
    pub fn in_memory(kv: &KvGeometry, shares: &KvShares, blocks: u32) -> Self {
        let arena = |rank| {
            let bytes = shares.block_bytes(kv, rank) * u64::from(blocks);
            (0..bytes / DIGEST_BYTES)
                .map(|_| AtomicU64::new(0))
                .collect()
        };
        Self::new(kv, shares, (0..shares.ranks()).map(arena).collect())
    }
}

impl<W: RankWords> FakeCells<W> {
    /// Over arenas that are laid out so.
    ///
    /// # Panics
    /// If the shares are not of this geometry, or if a head has no room for a digest a token.
    pub fn new(kv: &KvGeometry, shares: &KvShares, words: W) -> Self {
        shares.check(kv).expect("shares of this geometry");
        let rank = |rank: usize| {
            let (mut cells, mut offset) = (Vec::new(), 0);
            for (index, (share, group)) in shares.0[rank].iter().zip(&kv.groups).enumerate() {
                let bytes = kv.cell_bytes(group);
                assert!(bytes >= u64::from(kv.block_tokens) * DIGEST_BYTES);
                for head in share.heads() {
                    for layer in share.layers() {
                        let mark = mark(index, head, layer);
                        cells.push(Cell { offset, mark });
                        offset += bytes;
                    }
                }
            }
            RankCells {
                block_bytes: offset,
                cells,
            }
        };
        let ranks = (0..shares.ranks()).map(rank).collect();
        Self { words, ranks }
    }

    /// The arenas.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// Every copy of the digests of `slots` tokens from `slot` on, with their mark.
    fn copies(
        &self,
        block: u32,
        slot: u32,
        slots: u32,
    ) -> impl Iterator<Item = (&[AtomicU64], u64)> {
        let ranks = self.ranks.iter().enumerate();
        ranks.flat_map(move |(rank, of)| {
            let begin = u64::from(block) * of.block_bytes + u64::from(slot) * DIGEST_BYTES;
            let words = move |cell: &Cell| {
                let words = self.words.words(rank, begin + cell.offset, slots as usize);
                (words, cell.mark)
            };
            of.cells.iter().map(words)
        })
    }
}

/// 0 where there is but one head and layer.
fn mark(group: usize, head: u32, layer: u32) -> u64 {
    match (group, head, layer) {
        (0, 0, 0) => 0,
        _ => mix((group as u64) << 56 | u64::from(head) << 28 | u64::from(layer)),
    }
}

impl<W: RankWords> FakeKv for FakeCells<W> {
    fn write(&self, block: u32, slot: u32, digest: u64) {
        for (words, mark) in self.copies(block, slot, 1) {
            words[0].store(digest ^ mark, Ordering::Relaxed);
        }
    }

    /// What was stored; something else if the copies do not agree.
    fn read(&self, block: u32, slot: u32) -> u64 {
        let mut digests = self
            .copies(block, slot, 1)
            .map(|(words, mark)| words[0].load(Ordering::Relaxed) ^ mark);
        let first = digests.next().unwrap_or_default();
        digests.fold(first, |read, digest| match digest == first {
            true => read,
            false => mix(read ^ digest),
        })
    }

    /// Digests of a block lie side by side in each cell: those of one cell are summed, and compared with the others.
    fn sum(&self, block: u32, slots: u32) -> u64 {
        let sum = |(words, mark): (&[AtomicU64], u64)| {
            let digests = words.iter().map(|word| word.load(Ordering::Relaxed) ^ mark);
            digests.fold(0, u64::wrapping_add)
        };
        let mut copies = self.copies(block, 0, slots);
        let Some((first, first_mark)) = copies.next() else {
            return 0;
        };
        let agree = |(words, mark): (&[AtomicU64], u64)| {
            let differs = first_mark ^ mark;
            let mut pairs = first.iter().zip(words);
            pairs.all(|(a, b)| a.load(Ordering::Relaxed) ^ b.load(Ordering::Relaxed) == differs)
        };
        match copies.all(agree) {
            true => sum((first, first_mark)),
            false => (0..slots).fold(0, |sum, slot| sum.wrapping_add(self.read(block, slot))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_that_is_wrong_on_one_rank_is_not_read_as_what_was_stored() {
        let kv = fake_geometry(4, 3, 2);
        for ranks in 1..=4 {
            let shares = KvShares::parallel(&kv, ranks, 1);
            let cells = FakeCells::in_memory(&kv, &shares, 2);
            cells.write(1, 3, 77);
            assert_eq!(cells.read(1, 3), 77);
            assert_eq!(cells.read(0, 3), cells.read(1, 2), "neither was written");
            let sum =
                |slots| (0..slots).fold(0, |sum: u64, slot| sum.wrapping_add(cells.read(1, slot)));
            assert_eq!([3, 4].map(|slots| cells.sum(1, slots)), [3, 4].map(sum));
            let whole = cells.sum(1, 4);
            for rank in 0..ranks as usize {
                let word = cells.words().word(rank, cells.ranks[rank].block_bytes + 24);
                word.fetch_xor(1, Ordering::Relaxed);
                assert_ne!(cells.read(1, 3), 77);
                assert_ne!(cells.sum(1, 4), whole);
                word.fetch_xor(1, Ordering::Relaxed);
            }
        }
    }

    /// What the same digest looks like in two places is not the same.
    #[test]
    fn a_digest_in_the_place_of_another_head_is_wrong() {
        let kv = fake_geometry(4, 2, 1);
        let cells = FakeCells::in_memory(&kv, &KvShares::parallel(&kv, 2, 1), 1);
        cells.write(0, 0, 5);
        let [one, other] = [0, 1].map(|rank| cells.words().word(rank, 0));
        let swapped = one.swap(other.load(Ordering::Relaxed), Ordering::Relaxed);
        other.store(swapped, Ordering::Relaxed);
        assert_ne!(cells.read(0, 0), 5);
    }
}
