use std::collections::BTreeMap;

use baton_protocol::KvGroup;
use proptest::prelude::*;

use super::*;

/// A cell of group 0 has 4 bytes.
fn geometry(groups: &[(u32, u32)]) -> KvGeometry {
    let group = |(index, &(kv_heads, layers)): (usize, &(u32, u32))| KvGroup {
        layers,
        kv_heads,
        head_dim: index as u32 + 1,
    };
    KvGeometry::bf16(1, groups.iter().enumerate().map(group).collect())
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

/// Distinct block ids, some of them neighbours, not always in order.
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

/// Where each 4 bytes of a sequence lie on a rank, by (block of the sequence, group, head, layer, word of the cell). Written
/// from the layout as the protocol tells it, cell by cell.
fn words(
    kv: &KvGeometry,
    shares: &[KvShare],
    ids: &[u32],
) -> BTreeMap<(usize, usize, u32, u32, u64), u64> {
    let mut words = BTreeMap::new();
    let block_words: u64 = shares
        .iter()
        .zip(&kv.groups)
        .map(|(share, group)| share.cells() * kv.cell_bytes(group) / 4)
        .sum();
    for (block, id) in ids.iter().enumerate() {
        let mut at = u64::from(*id) * block_words;
        for (index, (share, group)) in shares.iter().zip(&kv.groups).enumerate() {
            for head in share.heads() {
                for layer in share.layers() {
                    for word in 0..kv.cell_bytes(group) / 4 {
                        words.insert((block, index, head, layer, word), at);
                        at += 1;
                    }
                }
            }
        }
    }
    words
}

/// The plan against the layout, word by word.
fn check(
    kv: &KvGeometry,
    source: &KvShares,
    destination: &KvShares,
    source_ids: &[u32],
    local: &[u32],
) -> Result<(), TestCaseError> {
    let reads = plan_reads(kv, source, destination, &run_length(source_ids), local)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    let mut copied = BTreeMap::new();
    for read in &reads {
        prop_assert!(read.bytes > 0 && read.bytes % 4 == 0);
        for word in 0..read.bytes / 4 {
            let to = (read.destination as usize, read.local_offset / 4 + word);
            let from = (read.source as usize, read.remote_offset / 4 + word);
            prop_assert!(copied.insert(to, from).is_none(), "{read:?} writes twice");
        }
    }
    let holders: Vec<_> = source
        .0
        .iter()
        .map(|shares| words(kv, shares, source_ids))
        .collect();
    let mut expected = BTreeMap::new();
    for (rank, shares) in destination.0.iter().enumerate() {
        for (cell, to) in words(kv, shares, local) {
            let mut holders = holders.iter().enumerate();
            let from = holders.find_map(|(source, words)| Some((source, *words.get(&cell)?)));
            expected.insert((rank, to), from.expect("somebody holds it"));
        }
    }
    prop_assert_eq!(&copied, &expected);
    // As few as there can be: a range ends only where the next word is from elsewhere.
    let ends = expected.iter().filter(|(to, from)| {
        let next = expected.get(&(to.0, to.1 + 1));
        next != Some(&(from.0, from.1 + 1))
    });
    prop_assert_eq!(reads.len(), ends.count());
    Ok(())
}

#[derive(Debug, Clone)]
struct Case {
    kv: KvGeometry,
    source_ids: Vec<u32>,
    local: Vec<u32>,
    stages: (u32, u32),
}

fn case() -> impl Strategy<Value = Case> {
    let groups = prop::collection::vec((1u32..10, 1u32..4), 1..3);
    (groups, 1u32..4, 1u32..4, 0usize..5).prop_flat_map(|(groups, from, to, blocks)| {
        let kv = geometry(&groups);
        (ids(blocks), ids(blocks)).prop_map(move |(source_ids, local)| Case {
            kv: kv.clone(),
            source_ids,
            local,
            stages: (from, to),
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Every pair of tensor-parallel sizes 1 to 8, any number of heads, layers split too: every byte of every rank of ours is
    /// written once, from the lowest rank of the peer that holds it, in the fewest ranges.
    #[test]
    fn every_byte_comes_once_and_from_its_place(case in case()) {
        let Case { kv, source_ids, local, stages } = case;
        for from in 1..=8 {
            for to in 1..=8 {
                // Stages that split no layer off are none: a rank must hold something.
                let few = |stages: u32| stages.min(kv.groups.iter().map(|group| group.layers).max().unwrap_or(1));
                let source = KvShares::parallel(&kv, from, few(stages.0));
                let destination = KvShares::parallel(&kv, to, few(stages.1));
                check(&kv, &source, &destination, &source_ids, &local)?;
            }
        }
    }

    /// Shares that are no tensor-parallel split: rectangles that overlap as they like, as long as they hold everything.
    #[test]
    fn any_shares_that_hold_everything_will_do(
        case in case(),
        rectangles in prop::collection::vec((0u32..10, 1u32..10, 0u32..4, 1u32..4), 0..5),
        last in any::<prop::sample::Index>(),
    ) {
        let Case { kv, source_ids, local, .. } = case;
        let rank = |&(head, heads, layer, layers): &(u32, u32, u32, u32)| kv.groups.iter().map(|group| {
            let (head_first, layer_first) = (head % group.kv_heads, layer % group.layers);
            KvShare {
                head_first,
                head_count: heads.min(group.kv_heads - head_first),
                layer_first,
                layer_count: layers.min(group.layers - layer_first),
            }
        }).collect::<Vec<_>>();
        let mut source: Vec<_> = rectangles.iter().map(rank).collect();
        let whole = kv.groups.iter().map(KvShare::whole).collect();
        source.insert(last.index(source.len() + 1), whole);
        let mut destination: Vec<_> = rectangles.iter().rev().map(rank).collect();
        destination.push(source[0].clone());
        check(&kv, &KvShares(source), &KvShares(destination), &source_ids, &local)?;
    }
}

#[test]
fn neighbours_on_both_sides_are_one_read_whatever_their_order() {
    let kv = geometry(&[(2, 3)]);
    let block = kv.block_bytes() as u64;
    let whole = KvShares::whole(&kv);
    let read = |from: u64, to: u64, blocks: u64| Read {
        source: 0,
        destination: 0,
        remote_offset: from * block,
        local_offset: to * block,
        bytes: blocks * block,
    };
    let runs = run_length(&[5, 6, 1]);
    let reads = plan_reads(&kv, &whole, &whole, &runs, &[8, 9, 10]).expect("sound");
    assert_eq!(reads, [read(5, 8, 2), read(1, 10, 1)]);
    let runs = run_length(&[6, 5]);
    let reads = plan_reads(&kv, &whole, &whole, &runs, &[9, 8]).expect("sound");
    assert_eq!(reads, [read(5, 8, 2)]);
}

#[test]
fn a_rank_reads_its_heads_of_a_block_in_one_range() {
    let kv = geometry(&[(8, 3)]);
    let ranks = |tensor| KvShares::parallel(&kv, tensor, 1);
    let count = |from, to| {
        let runs = run_length(&[3, 4, 9]);
        let reads = plan_reads(&kv, &ranks(from), &ranks(to), &runs, &[7, 2, 5]);
        reads.expect("sound").len()
    };
    // Three blocks, of which no two are neighbours on both sides.
    assert_eq!(count(1, 1), 3);
    assert_eq!(count(4, 4), 4 * 3);
    assert_eq!(count(1, 4), 4 * 3);
    assert_eq!(count(4, 1), 4 * 3);
    assert_eq!(count(2, 8), 8 * 3);
}

#[test]
fn unsound_handles_are_refused() {
    let kv = geometry(&[(2, 3)]);
    let whole = KvShares::whole(&kv);
    let run = |first, count| vec![BlockRun { first, count }];
    let half = KvShares(vec![vec![KvShare {
        head_count: 1,
        ..whole.0[0][0]
    }]]);
    let beyond = KvShares(vec![vec![KvShare {
        head_first: u32::MAX,
        ..whole.0[0][0]
    }]]);
    for (source, runs, local, words) in [
        (KvShares(vec![]), run(0, 1), vec![0], "no rank"),
        (half, run(0, 1), vec![0], "no rank of the peer holds head 1"),
        (beyond, run(0, 1), vec![0], "claims heads"),
        (whole.clone(), run(0, 1), vec![0, 1], "1 blocks"),
        (whole.clone(), run(0, 1), vec![], "1 blocks"),
        (
            whole.clone(),
            run(u32::MAX, u32::MAX),
            vec![0],
            "4294967295 blocks",
        ),
    ] {
        match plan_reads(&kv, &source, &whole, &runs, &local) {
            Err(TransferError::Plan(told)) => assert!(told.contains(words), "{told}"),
            outcome => panic!("{source:?} {local:?}: {outcome:?}"),
        }
    }
}

/// A peer may claim shares that take a read for each head of each layer.
#[test]
fn reads_are_bounded() {
    let kv = geometry(&[(64, 64)]);
    let cell = |index: u32| KvShare {
        head_first: 0,
        head_count: 64,
        layer_first: index,
        layer_count: 1,
    };
    let source = KvShares((0..64).map(|index| vec![cell(index)]).collect());
    let whole = KvShares::whole(&kv);
    let blocks: Vec<u32> = (0..2 * READS_MAX as u32 / (64 * 64)).collect();
    let told = plan_reads(&kv, &source, &whole, &run_length(&blocks), &blocks);
    let told = told.expect_err("too many").to_string();
    assert!(told.contains("more than"), "{told}");
}
