//! From blocks to byte ranges, whatever the tensor-parallel sizes of the two sides.

use std::ops::Range;

use baton_protocol::{BlockRun, KvGeometry, KvShare, KvShares};

use crate::{Read, TransferError};

/// Most reads of one pull. A block of the largest models between unequal sizes takes some dozens, a prompt has some thousand
/// blocks; more is a peer's made-up shares.
const READS_MAX: usize = 1 << 20;

/// The ranges to read for one sequence. See [`BlockMap`], which this makes and uses once.
///
/// # Errors
/// As [`BlockMap::new`] and [`BlockMap::reads`].
pub fn plan_reads(
    kv: &KvGeometry,
    source: &KvShares,
    destination: &KvShares,
    runs: &[BlockRun],
    local: &[u32],
) -> Result<Vec<Read>, TransferError> {
    BlockMap::new(kv, source, destination)?.reads(runs, local)
}

/// Which bytes of a block on a peer's ranks go where in a block on our ranks. Made once for a connection.
///
/// Every head of every layer that a rank of ours holds is read once, from the lowest of the peer's ranks that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    /// By destination rank, then source rank, then offset at the destination. No two of them could be one.
    pieces: Vec<Piece>,
    /// Bytes of one block, by rank of the peer.
    source_block: Vec<u64>,
    /// The same of ours.
    destination_block: Vec<u64>,
}

/// A range of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    source: u32,
    destination: u32,
    /// Where it begins in the peer's block.
    remote: u64,
    /// Where it begins in ours.
    local: u64,
    bytes: u64,
}

impl BlockMap {
    /// `source` is what the peer's ranks hold, `destination` what ours do.
    ///
    /// # Errors
    /// [`TransferError::Plan`] if the shares are not of this geometry, or if no rank of the peer holds what one of ours needs.
    pub fn new(
        kv: &KvGeometry,
        source: &KvShares,
        destination: &KvShares,
    ) -> Result<Self, TransferError> {
        source.check(kv).map_err(TransferError::Plan)?;
        destination.check(kv).map_err(TransferError::Plan)?;
        let mut pieces = Vec::new();
        for rank in 0..destination.ranks() {
            let begin = pieces.len();
            plan_rank(kv, source, destination, rank, &mut pieces)?;
            pieces[begin..].sort_unstable_by_key(|piece: &Piece| (piece.source, piece.local));
        }
        let is_next = |last: &Piece, next: &Piece| {
            (last.source, last.destination) == (next.source, next.destination)
                && last.remote + last.bytes == next.remote
                && last.local + last.bytes == next.local
        };
        pieces.dedup_by(|next, last| {
            let joins = is_next(last, next);
            last.bytes += if joins { next.bytes } else { 0 };
            joins
        });
        let blocks = |shares: &KvShares| {
            let ranks = 0..shares.ranks();
            ranks.map(|rank| shares.block_bytes(kv, rank)).collect()
        };
        Ok(Self {
            pieces,
            source_block: blocks(source),
            destination_block: blocks(destination),
        })
    }

    /// The ranges to read for one sequence, as few as there can be. Blocks are copied whole even if they are only partly
    /// filled.
    ///
    /// `runs` are the peer's blocks in the order of their tokens, `local` ours in the same order; on either side they are the
    /// same on all ranks.
    ///
    /// # Errors
    /// [`TransferError::Plan`] if there are not as many blocks in `runs` as in `local`, or too many ranges.
    pub fn reads(&self, runs: &[BlockRun], local: &[u32]) -> Result<Vec<Read>, TransferError> {
        check_count(runs, local.len())?;
        let mut reads: Vec<Read> = Vec::new();
        let pairs = self
            .pieces
            .chunk_by(|a, b| (a.source, a.destination) == (b.source, b.destination));
        for pieces in pairs {
            self.read_pair(pieces, runs, local, &mut reads)?;
        }
        Ok(reads)
    }

    /// What one rank of ours reads from one of the peer's.
    fn read_pair(
        &self,
        pieces: &[Piece],
        runs: &[BlockRun],
        local: &[u32],
        reads: &mut Vec<Read>,
    ) -> Result<(), TransferError> {
        let begin = reads.len();
        let mut is_sorted = true;
        for (from, &to) in runs.iter().flat_map(blocks_of).zip(local) {
            for piece in pieces {
                let source_block = self.source_block[piece.source as usize];
                let destination_block = self.destination_block[piece.destination as usize];
                let read = Read {
                    source: piece.source,
                    destination: piece.destination,
                    // A peer may say what it likes: what lies beyond its arena is refused before anything is read.
                    remote_offset: from
                        .saturating_mul(source_block)
                        .saturating_add(piece.remote),
                    local_offset: u64::from(to) * destination_block + piece.local,
                    bytes: piece.bytes,
                };
                match reads[begin..].last_mut() {
                    Some(last) if follows(last, &read) => last.bytes += read.bytes,
                    Some(last) => {
                        is_sorted &= last.local_offset < read.local_offset;
                        reads.push(read);
                    }
                    None => reads.push(read),
                }
            }
            if reads.len() > READS_MAX {
                return Err(TransferError::Plan(format!(
                    "{} blocks take more than {READS_MAX} reads",
                    local.len()
                )));
            }
        }
        if !is_sorted {
            let mut own = reads.split_off(begin);
            own.sort_unstable_by_key(|read| read.local_offset);
            own.dedup_by(|next, last| {
                let joins = follows(last, next);
                last.bytes += if joins { next.bytes } else { 0 };
                joins
            });
            reads.append(&mut own);
        }
        Ok(())
    }
}

/// The pieces that one rank of ours needs, head by head.
fn plan_rank(
    kv: &KvGeometry,
    source: &KvShares,
    destination: &KvShares,
    rank: usize,
    pieces: &mut Vec<Piece>,
) -> Result<(), TransferError> {
    for (group, own) in destination.0[rank].iter().enumerate() {
        for head in own.heads() {
            let mut missing = vec![own.layers()];
            missing.retain(|layers| !layers.is_empty());
            for (from, shares) in source.0.iter().enumerate() {
                let share = &shares[group];
                if !share.heads().contains(&head) {
                    continue;
                }
                let found = take_out(&mut missing, share.layers());
                pieces.extend(found.into_iter().map(|layers| Piece {
                    source: from as u32,
                    destination: rank as u32,
                    remote: offset(kv, shares, group, head, layers.start),
                    local: offset(kv, &destination.0[rank], group, head, layers.start),
                    bytes: u64::from(layers.end - layers.start) * kv.cell_bytes(&kv.groups[group]),
                }));
            }
            if let Some(layers) = missing.first() {
                return Err(TransferError::Plan(format!(
                    "no rank of the peer holds head {head} of layer {} of group {group}",
                    layers.start
                )));
            }
        }
    }
    Ok(())
}

/// Takes out of some ranges what another one has of them, and returns it.
fn take_out(ranges: &mut Vec<Range<u32>>, other: Range<u32>) -> Vec<Range<u32>> {
    let (mut found, mut left) = (Vec::new(), Vec::new());
    for range in ranges.drain(..) {
        let (start, end) = (range.start.max(other.start), range.end.min(other.end));
        if start >= end {
            left.push(range);
            continue;
        }
        found.push(start..end);
        let rest = [range.start..start, end..range.end];
        left.extend(rest.into_iter().filter(|rest| !rest.is_empty()));
    }
    *ranges = left;
    found
}

/// Where a head of a layer begins in a block of a rank that holds these shares, it among them.
fn offset(kv: &KvGeometry, shares: &[KvShare], group: usize, head: u32, layer: u32) -> u64 {
    let before = shares.iter().zip(&kv.groups).take(group);
    let before: u64 = before
        .map(|(share, group)| share.cells() * kv.cell_bytes(group))
        .sum();
    let share = &shares[group];
    let heads = u64::from(head - share.head_first);
    let cells = heads * u64::from(share.layer_count) + u64::from(layer - share.layer_first);
    before + cells * kv.cell_bytes(&kv.groups[group])
}

fn check_count(runs: &[BlockRun], wanted: usize) -> Result<(), TransferError> {
    let blocks: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    match blocks == wanted as u64 {
        true => Ok(()),
        false => Err(TransferError::Plan(format!(
            "it names {blocks} blocks, {wanted} are needed"
        ))),
    }
}

fn blocks_of(run: &BlockRun) -> impl Iterator<Item = u64> + use<> {
    let first = u64::from(run.first);
    first..first + u64::from(run.count)
}

fn follows(last: &Read, next: &Read) -> bool {
    last.remote_offset.saturating_add(last.bytes) == next.remote_offset
        && last.local_offset + last.bytes == next.local_offset
}

#[cfg(test)]
mod tests;
