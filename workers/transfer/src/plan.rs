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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use baton_protocol::KvDtype;
    use proptest::prelude::*;

    use super::*;

    fn geometry(kv_heads: u32, layers: u32) -> KvGeometry {
        KvGeometry {
            layout: KvGeometry::LAYOUT,
            dtype: KvDtype::Bf16,
            block_tokens: 2,
            kv_heads,
            layers,
            head_dim: 3,
        }
    }

    /// Splits `0 .. count` into parts at some of its inner points.
    fn split(count: u32, cuts: u32) -> Vec<(u32, u32)> {
        let mut parts = Vec::new();
        let mut first = 0;
        for end in 1..=count {
            if end == count || cuts >> end & 1 == 1 {
                parts.push((first, end - first));
                first = end;
            }
        }
        parts
    }

    fn run_length(ids: &[u32]) -> Vec<BlockRun> {
        let mut runs: Vec<BlockRun> = Vec::new();
        for &id in ids {
            match runs.last_mut() {
                Some(run) if run.first + run.count == id => run.count += 1,
                _ => runs.push(BlockRun {
                    first: id,
                    count: 1,
                }),
            }
        }
        runs
    }

    /// Distinct block ids, some of them neighbours.
    fn ids(count: usize) -> impl Strategy<Value = Vec<u32>> {
        let pieces: Vec<Vec<u32>> = (0..count as u32 * 2)
            .collect::<Vec<_>>()
            .chunks(3)
            .map(<[u32]>::to_vec)
            .collect();
        Just(pieces)
            .prop_shuffle()
            .prop_map(move |pieces| pieces.concat()[..count].to_vec())
    }

    #[derive(Debug, Clone)]
    struct Case {
        kv: KvGeometry,
        source: Vec<RankRuns>,
        source_ids: Vec<Vec<u32>>,
        local: Vec<u32>,
    }

    fn case() -> impl Strategy<Value = Case> {
        (1u32..5, 1u32..4, any::<u32>(), any::<u32>(), 0usize..7).prop_flat_map(
            |(heads, layers, head_cuts, layer_cuts, blocks)| {
                let shares: Vec<_> = split(heads, head_cuts)
                    .into_iter()
                    .flat_map(|head| {
                        split(layers, layer_cuts)
                            .into_iter()
                            .map(move |layer| (head, layer))
                    })
                    .collect();
                let ranks = shares.len();
                (
                    Just(shares),
                    prop::collection::vec(ids(blocks), ranks),
                    ids(blocks),
                )
                    .prop_map(move |(shares, source_ids, local)| Case {
                        kv: geometry(heads, layers),
                        source: shares
                            .iter()
                            .zip(&source_ids)
                            .map(
                                |(&((head_first, head_count), (layer_first, layer_count)), ids)| {
                                    RankRuns {
                                        head_first,
                                        head_count,
                                        layer_first,
                                        layer_count,
                                        runs: run_length(ids),
                                    }
                                },
                            )
                            .collect(),
                        source_ids,
                        local,
                    })
            },
        )
    }

    proptest! {
        /// Walks every byte of the sequence through the layout as the protocol defines it.
        #[test]
        fn every_byte_comes_once_and_from_its_place(case in case()) {
            let Case { kv, source, source_ids, local } = case;
            let reads = plan_reads(&kv, &source, &local).expect("the case is sound");
            let mut copied: HashMap<u64, (u32, u64)> = HashMap::new();
            for read in &reads {
                for byte in 0..read.bytes {
                    let twice = copied.insert(read.local_offset + byte, (read.rank, read.remote_offset + byte));
                    prop_assert!(twice.is_none(), "{read:?} writes byte {byte} again");
                }
            }
            let layer_bytes = (kv.head_bytes() / kv.layers as usize) as u64;
            for (rank, share) in source.iter().enumerate() {
                for (index, &to) in local.iter().enumerate() {
                    for head in 0..u64::from(share.head_count) {
                        for layer in 0..u64::from(share.layer_count) {
                            let from_block = u64::from(source_ids[rank][index]);
                            let from = ((from_block * u64::from(share.head_count) + head) * u64::from(share.layer_count) + layer) * layer_bytes;
                            let to_head = u64::from(share.head_first) + head;
                            let to_layer = u64::from(share.layer_first) + layer;
                            let to = ((u64::from(to) * u64::from(kv.kv_heads) + to_head) * u64::from(kv.layers) + to_layer) * layer_bytes;
                            for byte in 0..layer_bytes {
                                prop_assert_eq!(copied.remove(&(to + byte)), Some((rank as u32, from + byte)));
                            }
                        }
                    }
                }
            }
            prop_assert!(copied.is_empty(), "bytes that nobody needs: {copied:?}");
            prop_assert!(!reads.windows(2).any(|pair| pair[0].rank == pair[1].rank && follows(&pair[0], &pair[1])));
        }
    }

    fn whole(kv: &KvGeometry, runs: Vec<BlockRun>) -> RankRuns {
        RankRuns {
            head_first: 0,
            head_count: kv.kv_heads,
            layer_first: 0,
            layer_count: kv.layers,
            runs,
        }
    }

    #[test]
    fn neighbours_on_both_sides_are_one_read() {
        let kv = geometry(2, 3);
        let block = kv.block_bytes() as u64;
        let source = [whole(
            &kv,
            vec![
                BlockRun { first: 5, count: 2 },
                BlockRun { first: 1, count: 1 },
            ],
        )];
        let reads = plan_reads(&kv, &source, &[8, 9, 10]).expect("sound");
        let expected = [
            Read {
                rank: 0,
                remote_offset: 5 * block,
                local_offset: 8 * block,
                bytes: 2 * block,
            },
            Read {
                rank: 0,
                remote_offset: block,
                local_offset: 10 * block,
                bytes: block,
            },
        ];
        assert_eq!(reads, expected);
    }

    #[test]
    fn unsound_handles_are_refused() {
        let kv = geometry(2, 3);
        let one = || vec![BlockRun { first: 0, count: 1 }];
        let half = RankRuns {
            head_count: 1,
            ..whole(&kv, one())
        };
        let beyond = RankRuns {
            head_first: u32::MAX,
            ..whole(&kv, one())
        };
        for (source, local) in [
            (vec![], vec![0]),
            (vec![half.clone()], vec![0]),
            (vec![half.clone(), half], vec![0]),
            (vec![beyond], vec![0]),
            (vec![whole(&kv, one())], vec![0, 1]),
            (vec![whole(&kv, one())], vec![]),
            // Four thousand million blocks end at the first that is too many.
            (
                vec![whole(
                    &kv,
                    vec![BlockRun {
                        first: u32::MAX,
                        count: u32::MAX,
                    }],
                )],
                vec![0],
            ),
        ] {
            let outcome = plan_reads(&kv, &source, &local);
            assert!(
                matches!(outcome, Err(TransferError::Plan(_))),
                "{source:?} {local:?}: {outcome:?}"
            );
        }
    }
}
