//! Tensor-parallel ranks: the same bits as one rank has, and the KV of each rank's heads in its own arena.

mod common;

use std::ops::Range;
use std::sync::Arc;

use baton_cpu::Kernel;
use baton_engine::{Executor, kv_geometry};
use baton_executor_tests::company::{BLOCK_TOKENS, BLOCKS, alone, sequences, together};
use baton_executor_tests::{Build, Part, Random, Tiny, golden, step, tiny_families};
use baton_kv_memory::KvMemory;
use baton_model::{ModelDir, ModelSpec, TensorSource, UniformSpec};
use baton_protocol::KvShares;
use common::{chosen, kernels, ranks};

/// A family with heads for many ranks: 8 query heads, and 4 or 2 of keys and values, so that 8 ranks share them.
/// A rank's part of K is whole tiles of AMX, as in models of use.
fn many_heads(kv_heads: usize, tied: bool) -> ModelSpec {
    let spec = UniformSpec {
        family: "qwen2".to_owned(),
        heads: 8,
        kv_heads,
        head_dim: 32,
        intermediate: 8 * 32,
        qkv_bias: true,
        tied_embeddings: tied,
        ..tiny_families().remove(0)
    };
    ModelSpec::try_from(spec).expect("a model")
}

fn build<'a>(spec: &'a ModelSpec, weights: &'a dyn TensorSource) -> Build<'a> {
    Build {
        spec,
        weights,
        block_tokens: BLOCK_TOKENS,
        blocks: BLOCKS,
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn ranks_have_the_bits_of_one() {
    let tiny = |spec| Tiny::of(spec, 9);
    let families = tiny_families().into_iter();
    let mut models: Vec<Tiny> = families.map(|family| Tiny::new(family, 9)).collect();
    models.extend([many_heads(4, false), many_heads(2, true)].map(tiny));
    let mut tried = 0;
    for tiny in &models {
        let sequences = sequences(tiny.spec.vocab);
        let alone = |kernel| {
            let mut one = ranks(kernel, 2, 1, build(&tiny.spec, tiny)).0;
            alone(&mut one, &sequences)
        };
        for kernel in kernels() {
            let expected = alone(kernel);
            for count in (2..=8).filter(|&count| tiny.spec.of_rank(count).is_ok()) {
                tried += 1;
                let mut executor = ranks(kernel, 3, count, build(&tiny.spec, tiny)).0;
                // Parts that are no whole tiles of AMX are not for it.
                let device = &executor.info().device;
                let is_other = !device.starts_with(&format!("cpu {kernel},"));
                assert!(
                    !is_other || kernel == Kernel::Amx,
                    "{kernel} became {device}"
                );
                let other = is_other.then(|| alone(Kernel::Avx512Bf16));
                let expected = other.as_ref().unwrap_or(&expected);
                for (at, logits) in together(&mut executor, &sequences, count as u64) {
                    assert_eq!(
                        bits(&logits),
                        bits(&expected[&at]),
                        "{} on {kernel} with {count} ranks, sequence and tokens {at:?}",
                        tiny.spec.family
                    );
                }
            }
        }
    }
    let kernels = kernels().count();
    assert!(tried >= 8 * kernels, "only {tried} with {kernels} kernels");
}

#[test]
fn real_weights_on_three_ranks_have_the_bits_of_one() {
    let model = golden::model();
    let dir = ModelDir::open(&model.path).expect("a prepared model");
    let weights = dir.weights(0).expect("its weights");
    let mut executors = [1, 3].map(|count| {
        let build = Build {
            spec: dir.spec(),
            weights: &weights,
            block_tokens: golden::BLOCK_TOKENS,
            blocks: 4,
        };
        ranks(chosen(), 2, count, build).0
    });
    let tokens = Random(5).tokens(100, dir.spec().vocab);
    for range in [0..70, 70..99, 99..100] {
        let part = |range: &Range<usize>| Part {
            key: 1,
            tokens: &tokens,
            range: range.clone(),
            blocks: &[2, 0, 3, 1],
        };
        let [one, three] = executors
            .each_mut()
            .map(|e| step(e, &[part(&range)]).remove(0));
        assert_eq!(bits(&one), bits(&three), "{range:?}");
    }
}

/// What a context worker of one size writes is what a decode worker of another reads, head for head.
#[test]
fn kv_goes_between_unequal_numbers_of_ranks() {
    let tiny = Tiny::of(many_heads(4, false), 9);
    let kv = kv_geometry(&tiny.spec, BLOCK_TOKENS);
    let tokens = Random(3).tokens(40, tiny.spec.vocab);
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(BLOCK_TOKENS as usize) as u32).collect();
    let kernel = chosen();
    let feed = |executor: &mut dyn Executor, range: Range<usize>| {
        let part = Part {
            key: 1,
            tokens: &tokens,
            range,
            blocks: &blocks,
        };
        bits(&step(executor, &[part]).remove(0))
    };
    let (mut one, _) = ranks(kernel, 2, 1, build(&tiny.spec, &tiny));
    feed(&mut one, 0..tokens.len() - 1);
    let expected = feed(&mut one, tokens.len() - 1..tokens.len());
    for (from, to) in [
        (2, 1),
        (1, 2),
        (4, 2),
        (2, 4),
        (8, 1),
        (1, 8),
        (8, 4),
        (2, 8),
    ] {
        let (mut context, source) = ranks(kernel, 2, from, build(&tiny.spec, &tiny));
        feed(&mut context, 0..tokens.len() - 1);
        let (mut decode, destination) = ranks(kernel, 2, to, build(&tiny.spec, &tiny));
        let shares = |count| KvShares::parallel(&kv, count as u32, 1);
        let whole = gather(&source, &shares(from), &kv, blocks.len());
        scatter(&whole, &destination, &shares(to), &kv, blocks.len());
        let found = feed(&mut decode, tokens.len() - 1..tokens.len());
        assert_eq!(found, expected, "from {from} ranks to {to}");
    }
}

type Arenas = [Arc<dyn KvMemory>];

/// Bytes of one head of a block, of all layers.
fn head_bytes(kv: &baton_protocol::KvGeometry) -> usize {
    let group = &kv.groups[0];
    kv.block_bytes() / group.kv_heads as usize
}

/// Each head of each block, by block and head.
fn gather(
    arenas: &Arenas,
    shares: &KvShares,
    kv: &baton_protocol::KvGeometry,
    blocks: usize,
) -> Vec<Vec<u8>> {
    let (heads, bytes) = (kv.groups[0].kv_heads as usize, head_bytes(kv));
    let mut all = vec![vec![0; bytes]; blocks * heads];
    each(arenas, shares, bytes, blocks, |block, head, place| {
        // SAFETY: inside the arena, which no step touches now.
        unsafe { place.copy_to_nonoverlapping(all[block * heads + head].as_mut_ptr(), bytes) };
    });
    all
}

fn scatter(
    all: &[Vec<u8>],
    arenas: &Arenas,
    shares: &KvShares,
    kv: &baton_protocol::KvGeometry,
    blocks: usize,
) {
    let (heads, bytes) = (kv.groups[0].kv_heads as usize, head_bytes(kv));
    each(arenas, shares, bytes, blocks, |block, head, place| {
        // SAFETY: as above.
        unsafe { place.copy_from_nonoverlapping(all[block * heads + head].as_ptr(), bytes) };
    });
}

fn each(
    arenas: &Arenas,
    shares: &KvShares,
    bytes: usize,
    blocks: usize,
    mut visit: impl FnMut(usize, usize, *mut u8),
) {
    for (arena, share) in arenas.iter().zip(&shares.0) {
        let (heads, base) = (
            share[0].heads(),
            arena.address().host().expect("host memory"),
        );
        for block in 0..blocks {
            for (index, head) in heads.clone().enumerate() {
                let at = (block * heads.len() + index) * bytes;
                assert!(at + bytes <= arena.len());
                // SAFETY: inside the arena.
                visit(block, head as usize, unsafe { base.as_ptr().add(at) });
            }
        }
    }
}
