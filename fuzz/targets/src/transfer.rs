//! What decode workers read of others' KV: descriptors, plans made of handles, and messages of the staged transport.

use std::num::NonZeroU64;

use arbitrary::{Arbitrary, Unstructured};
use baton_protocol::{BlockRun, KvGeometry, KvGroup, KvShare, KvShares, MemoryType, UcxVersion};
use baton_transfer::{fuzzing, plan_reads};

#[derive(Arbitrary, Debug)]
struct Case {
    head: [u8; 24],
    body: Vec<u8>,
    arena_bytes: u64,
    block_tokens: u8,
    kv_heads: u8,
    layers: u8,
    head_dim: u8,
    ranks: Vec<Rank>,
    /// Ours: a split that a worker makes of itself.
    own: (u8, u8),
    /// Numbers are as small as those of a sound handle, or any.
    runs: Vec<(u16, u8)>,
    odd: Option<(u32, u32)>,
    local: Vec<u16>,
    arena: Arena,
}

/// As a context worker says it that means harm: whatever it likes, under whole seals.
#[derive(Arbitrary, Debug)]
struct Arena {
    base: u64,
    /// Small ones are what divisions trip over.
    bytes: u64,
    is_small: bool,
    gpu: bool,
    key: Option<Vec<u8>>,
    address: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
struct Rank {
    heads: (u8, u8),
    layers: (u8, u8),
    beyond: bool,
}

/// A descriptor that is taken has an arena with bytes, which lie in the address space, and what is read to try it lies in it. A
/// handle against the layout of a worker: a plan that is made reads every byte of the wanted blocks once, into them and
/// nowhere else. A message of the staged transport asks for nothing outside of the arena.
pub fn transfer(data: &[u8]) {
    let Ok(case) = Case::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    describe(&case.arena);
    let asked = fuzzing::ranges_asked(&case.head, &case.body, case.arena_bytes);
    for range in asked.into_iter().flatten() {
        assert!(range.start < range.end && range.end <= case.arena_bytes);
    }

    let group = KvGroup {
        kv_heads: u32::from(case.kv_heads % 8) + 1,
        layers: u32::from(case.layers % 8) + 1,
        head_dim: u32::from(case.head_dim % 4) + 1,
    };
    let kv = KvGeometry::bf16(u32::from(case.block_tokens % 4) + 1, vec![group]);
    let source = KvShares(
        case.ranks
            .iter()
            .map(|rank| vec![share(rank, &group)])
            .collect(),
    );
    let tensor = u32::from(case.own.0 % 8) + 1;
    let pipeline = u32::from(case.own.1).min(group.layers - 1) + 1;
    let own = KvShares::parallel(&kv, tensor, pipeline);
    let mut local: Vec<u32> = case.local.iter().map(|id| u32::from(*id)).collect();
    local.sort_unstable();
    local.dedup();
    let Ok(reads) = plan_reads(&kv, &source, &own, &runs(&case), &local) else {
        return;
    };
    for rank in 0..own.ranks() {
        let block = own.block_bytes(&kv, rank);
        let to_rank = reads
            .iter()
            .filter(|read| read.destination as usize == rank);
        let mut written: Vec<(u64, u64)> = to_rank
            .map(|read| (read.local_offset, read.local_offset + read.bytes))
            .collect();
        written.sort_unstable();
        assert!(
            written.windows(2).all(|pair| pair[0].1 <= pair[1].0),
            "twice"
        );
        let bytes: u64 = written.iter().map(|(from, to)| to - from).sum();
        assert_eq!(bytes, local.len() as u64 * block);
        for (from, to) in written {
            let blocks = from / block..to.div_ceil(block);
            assert!(blocks.into_iter().all(|id| local.contains(&(id as u32))));
        }
    }
}

fn describe(arena: &Arena) {
    const UCX: UcxVersion = UcxVersion(1, 13, 1);
    let memory = match arena.gpu {
        true => MemoryType::Cuda,
        false => MemoryType::Host,
    };
    let bytes = match arena.is_small {
        true => arena.bytes % 8,
        false => arena.bytes,
    };
    let key = arena.key.as_deref();
    let place = (arena.base, bytes);
    let descriptor = fuzzing::sealed(UCX, &arena.address, key, place, memory);
    if fuzzing::descriptor(&descriptor, UCX).is_err() {
        return;
    }
    let end = arena.base.checked_add(bytes);
    assert!(end.is_some() && (arena.gpu || key.is_some()) && !arena.address.is_empty());
    let length = NonZeroU64::new(bytes).expect("an arena without bytes was taken");
    for range in fuzzing::probed(length, memory) {
        assert!(range.start < range.end && range.end <= bytes);
    }
}

fn share(rank: &Rank, group: &KvGroup) -> KvShare {
    let wide = |(first, count): (u8, u8), limit: u32| match rank.beyond {
        true => (u32::from(first) << 24, u32::from(count) << 24),
        false => (u32::from(first) % limit, u32::from(count) % limit + 1),
    };
    let (head_first, head_count) = wide(rank.heads, group.kv_heads);
    let (layer_first, layer_count) = wide(rank.layers, group.layers);
    KvShare {
        head_first,
        head_count,
        layer_first,
        layer_count,
    }
}

fn runs(case: &Case) -> Vec<BlockRun> {
    let small = case.runs.iter().map(|(first, count)| BlockRun {
        first: u32::from(*first),
        count: u32::from(*count),
    });
    let odd = case.odd.map(|(first, count)| BlockRun { first, count });
    small.chain(odd).collect()
}
