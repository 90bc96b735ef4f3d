//! From block runs to byte ranges.

use baton_protocol::{BlockRun, KvGeometry, RankRuns};

use crate::{Read, TransferError};

/// The ranges to read for one sequence: each needed byte once, neighbours as one range.
///
/// `source` is where the sequence lies: for each rank of the context worker, the heads and layers it holds
/// and its blocks, in order. A rank's arena is `[block][its heads][its layers][K,V][token][head_dim]`.
/// `local` are the destination's blocks in the same order, in an arena that holds all heads and layers. A
/// block is copied whole even if it is only partly filled.
///
/// # Errors
/// [`TransferError::Plan`] if the ranks do not hold every head of every layer exactly once, or not as
/// many blocks as `local` has.
pub fn plan_reads(
    kv: &KvGeometry,
    source: &[RankRuns],
    local: &[u32],
) -> Result<Vec<Read>, TransferError> {
    check_cover(kv, source)?;
    let mut reads = Vec::new();
    for (rank, share) in source.iter().enumerate() {
        plan_rank(kv, rank as u32, share, local, &mut reads)?;
    }
    Ok(reads)
}

fn plan_rank(
    kv: &KvGeometry,
    rank: u32,
    share: &RankRuns,
    local: &[u32],
    reads: &mut Vec<Read>,
) -> Result<(), TransferError> {
    let layer_bytes = kv.head_bytes() as u64 / u64::from(kv.layers);
    let head_bytes = kv.head_bytes() as u64;
    let block_bytes = kv.block_bytes() as u64;
    let (first_head, first_layer) = (u64::from(share.head_first), u64::from(share.layer_first));
    // With all layers, the rank's heads of a block are one range; else each head is one.
    let whole_heads = share.layer_count == kv.layers;
    let (pieces, piece_bytes) = if whole_heads {
        (1, u64::from(share.head_count) * head_bytes)
    } else {
        (
            u64::from(share.head_count),
            u64::from(share.layer_count) * layer_bytes,
        )
    };

    let begin = reads.len();
    let mut blocks = share.runs.iter().flat_map(blocks_of);
    for (index, &to) in local.iter().enumerate() {
        let from = blocks.next().ok_or_else(|| {
            TransferError::Plan(format!(
                "rank {rank} has {index} blocks, {} are needed",
                local.len()
            ))
        })?;
        for piece in 0..pieces {
            let read = Read {
                rank,
                remote_offset: (from * pieces + piece) * piece_bytes,
                local_offset: u64::from(to) * block_bytes
                    + (first_head + piece) * head_bytes
                    + first_layer * layer_bytes,
                bytes: piece_bytes,
            };
            match reads[begin..].last_mut() {
                Some(last) if follows(last, &read) => last.bytes += read.bytes,
                _ => reads.push(read),
            }
        }
    }
    if blocks.next().is_some() {
        return Err(TransferError::Plan(format!(
            "rank {rank} has more than the {} blocks that are needed",
            local.len()
        )));
    }
    Ok(())
}

fn blocks_of(run: &BlockRun) -> impl Iterator<Item = u64> + use<> {
    let first = u64::from(run.first);
    first..first + u64::from(run.count)
}

fn follows(last: &Read, next: &Read) -> bool {
    last.remote_offset + last.bytes == next.remote_offset
        && last.local_offset + last.bytes == next.local_offset
}

/// Every head of every layer is held exactly once.
fn check_cover(kv: &KvGeometry, source: &[RankRuns]) -> Result<(), TransferError> {
    let mut area = 0;
    for (rank, share) in source.iter().enumerate() {
        let reaches = |first: u32, count: u32, limit: u32| {
            count > 0 && first.checked_add(count).is_some_and(|end| end <= limit)
        };
        if !reaches(share.head_first, share.head_count, kv.kv_heads)
            || !reaches(share.layer_first, share.layer_count, kv.layers)
        {
            return Err(TransferError::Plan(format!(
                "rank {rank} claims heads {}+{} of {} and layers {}+{} of {}",
                share.head_first,
                share.head_count,
                kv.kv_heads,
                share.layer_first,
                share.layer_count,
                kv.layers
            )));
        }
        if let Some(other) = source[..rank]
            .iter()
            .position(|other| overlap(share, other))
        {
            return Err(TransferError::Plan(format!(
                "ranks {other} and {rank} hold the same heads"
            )));
        }
        area += u64::from(share.head_count) * u64::from(share.layer_count);
    }
    // Disjoint and within bounds, so the area decides.
    if area != u64::from(kv.kv_heads) * u64::from(kv.layers) {
        return Err(TransferError::Plan("some heads are held by no rank".into()));
    }
    Ok(())
}

fn overlap(a: &RankRuns, b: &RankRuns) -> bool {
    let meet = |a: u32, a_count: u32, b: u32, b_count: u32| a < b + b_count && b < a + a_count;
    meet(a.head_first, a.head_count, b.head_first, b.head_count)
        && meet(a.layer_first, a.layer_count, b.layer_first, b.layer_count)
}
