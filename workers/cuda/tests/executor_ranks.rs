//! The acceptance tests of executors, with the model on several GPUs as ranks. Ignored where `cargo test` runs; `tests/gpu.sh` runs
//! them. With fewer GPUs than ranks several are on one, and then products of few rows do not make their sums themselves.

use std::sync::Arc;

use baton_cuda::{CudaExecutor, CudaMemory, CudaModel, CudaOptions, Device, open_group};
use baton_engine::{Executor, kv_geometry};
use baton_executor_tests::company::{BLOCK_TOKENS, BLOCKS, alone, sequences, together};
use baton_executor_tests::families::{family, prompt_log_probabilities};
use baton_executor_tests::worlds::{Alike, worlds};
use baton_executor_tests::{
    Applies, Build, Part, Random, STEP_SEQUENCES_MAX, STEP_TOKENS_MAX, Tiny, golden, step,
    tiny_families,
};
use baton_kv_memory::KvMemory;
use baton_model::{ModelDir, ModelSpec, RankSource, TensorSource, UniformSpec, WeightFormat};
use baton_protocol::KvShares;

/// As on one GPU: sums of partial products that were rounded to BF16 are no worse than its activations.
const ERROR_MAX: f64 = 0.1;

/// What rounding activations to e4m3 costs, as on one GPU (`executor.rs`), at most and in the mean.
const FP8_ERROR_MAX: f64 = 0.6;
const FP8_ERROR_MEAN: f64 = 0.1;

/// Where ranks share a GPU every step rounds them, not only the one of the prompt: five times as many logits to be the worst of, and all KV is rounded.
const FP8_SHARED_ERROR_MAX: f64 = 0.9;

fn gpus() -> u32 {
    Device::open(0).unwrap_or_else(|error| panic!("{error}"));
    (0..8).take_while(|gpu| Device::open(*gpu).is_ok()).count() as u32
}

/// The model on so many ranks, or on one if it cannot be divided.
fn ranks(ranks: usize, build: Build<'_>, tokens: usize, sequences: usize) -> CudaExecutor {
    let ranks = match divides(build.spec, ranks) {
        true => ranks,
        false => 1,
    };
    let gpus = gpus();
    let devices = match ranks {
        1 => Device::open(0).map(|device| vec![device]),
        _ => open_group(
            &(0..ranks as u32)
                .map(|rank| rank % gpus)
                .collect::<Vec<_>>(),
        ),
    };
    let devices = devices.unwrap_or_else(|error| panic!("{error}"));
    let options = CudaOptions {
        step_tokens_max: tokens,
        step_sequences_max: sequences,
    };
    let sources: Vec<_> = (0..ranks)
        .map(|rank| RankSource::new(build.weights, build.spec, rank, ranks))
        .collect();
    let sources: Vec<&dyn TensorSource> = sources.iter().map(|source| source as _).collect();
    let model = CudaModel::load(&devices, build.spec, &sources, options)
        .unwrap_or_else(|error| panic!("{error}"));
    let kv = kv_geometry(build.spec, build.block_tokens);
    let shares = KvShares::parallel(&kv, ranks as u32, 1);
    let memory = |(rank, device)| -> Arc<dyn KvMemory> {
        let bytes = build.blocks * shares.block_bytes(&kv, rank) as usize;
        let mut memory = CudaMemory::new(device, bytes).expect("GPU memory");
        memory.fill_bytes(0xff).expect("GPU memory"); // NaN: what is read and was not written shows
        Arc::new(memory)
    };
    let memories = devices.iter().enumerate().map(memory).collect();
    CudaExecutor::new(model, memories, kv).unwrap_or_else(|error| panic!("{error}"))
}

fn divides(spec: &ModelSpec, ranks: usize) -> bool {
    use baton_model::Mlp;
    spec.of_rank(ranks).is_ok_and(|spec| {
        let Mlp::Gated(mlp) = &spec.layers[0].mlp;
        mlp.intermediate.is_multiple_of(baton_cuda::GATE_UP_ROWS)
    })
}

fn usual(count: usize, b: Build<'_>) -> CudaExecutor {
    ranks(count, b, STEP_TOKENS_MAX, STEP_SEQUENCES_MAX)
}

#[test]
#[ignore = "needs a GPU"]
fn logits_are_those_of_the_plain_decoder() {
    let mut tried = 0;
    for (i, spec) in tiny_families().into_iter().enumerate() {
        let tiny = Tiny::new(spec, i as u64 + 1);
        for count in [2, 3, 6].into_iter().filter(|&c| divides(&tiny.spec, c)) {
            tried += 1;
            let label = format!("#{i} on {count} ranks");
            family(&label, &tiny, ERROR_MAX, &|b| Box::new(usual(count, b)));
        }
    }
    assert!(tried >= 12, "only {tried}");
}

#[test]
#[ignore = "needs a GPU"]
fn every_sequence_gets_what_it_gets_alone() {
    let build = |b: Build<'_>| -> Box<dyn Executor> {
        let count = [2, 3].into_iter().find(|&c| divides(b.spec, c));
        Box::new(usual(count.expect("a number of ranks"), b))
    };
    worlds(&build, 300, None, Alike::Within(ERROR_MAX as f32));
}

#[test]
#[ignore = "needs a GPU"]
fn long_prompts_give_the_plain_decoder_s_logits() {
    const TOKENS: usize = 1300;
    let spec = UniformSpec {
        tokens_max: 2048,
        ..wide(2, 512, 3)
    };
    let tiny = Tiny::new(spec, 5);
    let tokens = Random(7).tokens(TOKENS, 512);
    let reference = tiny.reference(&tokens);
    for count in [2, 4] {
        let blocks: Vec<u32> = (0..90).rev().collect();
        let build = Build {
            spec: &tiny.spec,
            weights: &tiny,
            block_tokens: 16,
            blocks: blocks.len(),
        };
        let mut executor = ranks(count, build, 1536, 8);
        let mut worst: f64 = 0.0;
        for range in [0..1290, 1290..1291, 1291..TOKENS] {
            let end = range.end;
            let part = Part {
                key: 0,
                tokens: &tokens,
                range,
                blocks: &blocks,
            };
            let logits = &step(&mut executor, &[part])[0];
            for (ours, truth) in logits.iter().zip(&reference[end - 1]) {
                worst = worst.max((f64::from(*ours) - truth).abs());
            }
        }
        println!("{count} ranks: {worst:.4}");
        assert!(worst < ERROR_MAX, "{count} ranks: {worst}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn prompt_log_probabilities_are_those_of_the_plain_decoder() {
    prompt_log_probabilities(ERROR_MAX, &|b| Box::new(usual(2, b)));
}

#[test]
#[ignore = "needs a GPU"]
fn steps_ahead_masks_runs_and_nan_are_as_on_one() {
    use baton_executor_tests::{ahead, broken, masks, runs};
    ahead::steps_ahead(&|b| Box::new(usual(2, b)));
    ahead::chunks_ahead(&|b| Box::new(usual(2, b)));
    masks::masks_are_obeyed(&|b| Box::new(usual(2, b)));
    masks::masks_come_later(&|b| Box::new(usual(2, b)));
    let applies = runs::runs_choose_what_single_steps_do(&|b| Box::new(usual(2, b)));
    assert!(matches!(applies, Applies::No(_)), "{applies:?}");
    broken::rows_without_numbers(&|b| Box::new(usual(2, b)));
}

/// Heads, widths and vocabularies that all paths take: chains, products that push their sums, products of many rows.
fn wide(kv_heads: usize, vocab: usize, layers: usize) -> UniformSpec {
    UniformSpec {
        hidden: 512,
        intermediate: 2048,
        heads: 8,
        kv_heads,
        head_dim: 64,
        vocab,
        layers,
        ..tiny_families().remove(1)
    }
}

/// Prompts of several lengths, then single steps; the number of rows decides the path.
#[test]
#[ignore = "needs a GPU"]
fn every_path_gives_the_plain_decoder_s_logits() {
    for (kv_heads, vocab, layers, format, error_max) in [
        (8, 509, 2, WeightFormat::Bf16, ERROR_MAX),
        (2, 512, 3, WeightFormat::Bf16, ERROR_MAX),
        (4, 512, 3, WeightFormat::Fp8Channel, FP8_ERROR_MAX),
        (4, 511, 2, WeightFormat::Fp8Block, FP8_ERROR_MAX),
    ] {
        let tiny = Tiny::new(wide(kv_heads, vocab, layers), 3).in_format(format);
        let tokens = Random(77).tokens(110, vocab);
        let reference = tiny.reference(&tokens);
        // Where ranks share a GPU, one row goes through a product of many, and cuBLASLt takes no scales of blocks there.
        let apart = |count| format != WeightFormat::Fp8Block || count <= gpus() as usize;
        let counts = [2, 4].into_iter();
        for count in counts.filter(|&count| divides(&tiny.spec, count) && apart(count)) {
            for first in [1, 7, 30, 64, 100] {
                let build = Build {
                    spec: &tiny.spec,
                    weights: &tiny,
                    block_tokens: 16,
                    blocks: 10,
                };
                let mut executor = ranks(count, build, 128, 8);
                let ranges = std::iter::once(0..first).chain((first..110).map(|t| t..t + 1));
                let (mut worst, mut sum): (f64, f64) = (0.0, 0.0);
                for range in ranges {
                    let end = range.end;
                    let part = Part {
                        key: 0,
                        tokens: &tokens,
                        range,
                        blocks: &[8, 3, 9, 1, 0, 2, 7],
                    };
                    let logits = &step(&mut executor, &[part])[0];
                    for (ours, truth) in logits.iter().zip(&reference[end - 1]) {
                        let error = (f64::from(*ours) - truth).abs();
                        assert!(error.is_finite(), "{ours} after {end}");
                        worst = worst.max(error);
                        sum += error;
                    }
                }
                let mean = sum / ((111 - first) * vocab) as f64;
                let label = format!("{count} ranks, {kv_heads} KV heads, {format}, {first} first");
                println!("{label}: worst {worst:.4}, mean {mean:.4}");
                let shares = format == WeightFormat::Fp8Channel && count > gpus() as usize;
                let worst_max = if shares {
                    FP8_SHARED_ERROR_MAX
                } else {
                    error_max
                };
                assert!(worst < worst_max && mean < FP8_ERROR_MEAN, "{label}");
            }
        }
    }
}

/// The same steps, the same bits, whatever the timing of ranks.
#[test]
#[ignore = "needs a GPU"]
fn the_same_steps_give_the_same_bits() {
    for vocab in [509, 512] {
        let tiny = Tiny::new(wide(4, vocab, 3), 9);
        let sequences = sequences(tiny.spec.vocab);
        let build = || {
            usual(
                2,
                Build {
                    spec: &tiny.spec,
                    weights: &tiny,
                    block_tokens: BLOCK_TOKENS,
                    blocks: BLOCKS,
                },
            )
        };
        let expected = alone(&mut build(), &sequences);
        for seed in 0..3 {
            let found = together(&mut build(), &sequences, seed);
            let again = together(&mut build(), &sequences, seed);
            for (at, logits) in &found {
                let bits = |l: &[f32]| l.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(logits), bits(&again[at]), "{at:?}");
                let apart = logits.iter().zip(&expected[at]).map(|(a, b)| (a - b).abs());
                assert!(f64::from(apart.fold(0.0, f32::max)) < ERROR_MAX, "{at:?}");
            }
        }
    }
}

/// As on one GPU (`executor.rs`); sums of three parts that were rounded to BF16 cost a little more.
const GOLDEN: golden::Limits = golden::Limits {
    error_max: 0.9,
    error_mean: 0.09,
    margin: 0.15,
};

/// Nine heads, three of keys and values.
#[test]
#[ignore = "needs a GPU and the test model"]
fn real_weights_on_three_ranks_are_those_of_transformers() {
    let model = golden::model();
    let dir = ModelDir::open(&model.path).expect("a prepared model");
    let weights = dir.weights(0).expect("its weights");
    let build = Build {
        spec: dir.spec(),
        weights: &weights,
        block_tokens: golden::BLOCK_TOKENS,
        blocks: golden::BLOCKS as usize,
    };
    let mut executor = usual(3, build);
    golden::teacher_forced("3 ranks", &mut executor, 6, 64, &GOLDEN);
}
