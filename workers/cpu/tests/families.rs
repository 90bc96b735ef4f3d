//! Every family, on every kernel of this CPU, against a plain decoder in f64.

mod common;

use std::sync::Arc;

use baton_cpu::{CpuError, CpuExecutor, CpuOptions, HeapMemory, Kernel, kv_geometry};
use baton_engine::{Executor, SequenceStep, StepPlan};
use common::{Part, Random, Tiny, executor, families, kernels, step};

/// Logits of these models have a standard deviation near one; what BF16 activations cost them is measured
/// below 0.05. A wrong rotation, mask, bias or norm costs tenths and more.
const ERROR_MAX: f64 = 0.08;

#[test]
fn logits_are_those_of_the_plain_decoder() {
    for (i, spec) in families().into_iter().enumerate() {
        let tiny = Tiny::new(spec, i as u64 + 1);
        let mut random = Random(77);
        let tokens: Vec<u32> = (0..100)
            .map(|_| random.below(tiny.spec.vocab) as u32)
            .collect();
        let reference = tiny.reference(&tokens);
        for kernel in kernels() {
            let mut executor = executor(&tiny.spec, &tiny, kernel, 2, 16, 10);
            let blocks = [8, 3, 9, 1, 0, 2, 7];
            let mut worst: f64 = 0.0;
            // The prompt in one step, then token by token.
            let ranges = std::iter::once(0..50).chain((50..100).map(|t| t..t + 1));
            for range in ranges {
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
                    assert!(!ours.is_nan(), "{} on {kernel}: NaN", tiny.spec.family);
                }
            }
            println!(
                "{} #{i} on {kernel}: worst logit error {worst:.4}",
                tiny.spec.family
            );
            assert!(
                worst < ERROR_MAX,
                "{} #{i} on {kernel}: {worst}",
                tiny.spec.family
            );
        }
    }
}

#[test]
fn prompt_log_probabilities_are_those_of_the_plain_decoder() {
    let tiny = Tiny::new(families().remove(1), 5);
    let mut random = Random(78);
    // More rows than logits are computed at once.
    let tokens: Vec<u32> = (0..90)
        .map(|_| random.below(tiny.spec.vocab) as u32)
        .collect();
    let reference = tiny.reference(&tokens);
    let mut executor = executor(&tiny.spec, &tiny, Kernel::best(), 2, 32, 3);
    let plan = StepPlan {
        sequences: vec![SequenceStep {
            key: 1,
            tokens: 0..90,
            start: 0,
            blocks: 0..3,
            sample: None,
            targets: 0..89,
            target_top: 3,
        }],
        tokens: tokens.clone(),
        blocks: vec![2, 0, 1],
        targets: tokens[1..].to_vec(),
        want_logits: false,
    };
    let output = executor.forward(&plan).expect("a step").sequences.remove(0);
    assert!(output.sampled.is_none() && output.logits.is_empty());
    assert_eq!(output.target_logprobs.len(), 89);
    for (i, found) in output.target_logprobs.iter().enumerate() {
        let total = reference[i].iter().map(|x| x.exp()).sum::<f64>().ln();
        let truth = reference[i][tokens[i + 1] as usize] - total;
        assert!((f64::from(found.logprob) - truth).abs() < ERROR_MAX);
        assert_eq!(found.top.len(), 3);
        assert!(found.top.is_sorted_by(|a, b| a.1 >= b.1));
        for top in &found.top {
            let truth = reference[i][top.0 as usize] - total;
            assert!((f64::from(top.1) - truth).abs() < ERROR_MAX);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_sentence() {
    let tiny = Tiny::new(families().remove(0), 1);
    let kv = kv_geometry(&tiny.spec, 16);
    let load = |kv: baton_protocol::KvGeometry, bytes| {
        let options = CpuOptions {
            threads: 1,
            kernel: Some(Kernel::Portable),
            step_tokens_max: 8,
            step_sequences_max: 2,
        };
        CpuExecutor::load_from(
            &tiny.spec,
            &tiny,
            Arc::new(HeapMemory::new(bytes)),
            kv,
            options,
        )
    };
    let error = |result: Result<CpuExecutor, CpuError>| result.err().expect("refused").to_string();
    assert!(error(load(kv.clone(), 100)).contains("a block takes"));
    let other = baton_protocol::KvGeometry {
        head_dim: 99,
        ..kv.clone()
    };
    assert!(error(load(other, 1 << 20)).contains("head_dim is 99 here and 12 there"));

    let mut other = Tiny::new(families().remove(0), 1);
    other.spec.hidden = 73;
    let options = CpuOptions {
        threads: 1,
        kernel: None,
        step_tokens_max: 8,
        step_sequences_max: 2,
    };
    let memory = Arc::new(HeapMemory::new(1 << 20));
    let refused = CpuExecutor::load_from(&other.spec, &other, memory, kv.clone(), options);
    assert!(error(refused).contains("model.embed_tokens.weight"));

    let mut executor = load(kv.clone(), 3 * kv.block_bytes()).expect("it loads");
    assert_eq!(executor.info().blocks, 3);
    let plan = |tokens: Vec<u32>, blocks: Vec<u32>, start| StepPlan {
        sequences: vec![SequenceStep {
            key: 1,
            tokens: 0..tokens.len(),
            start,
            blocks: 0..blocks.len(),
            sample: None,
            targets: 0..0,
            target_top: 0,
        }],
        tokens,
        blocks,
        ..StepPlan::default()
    };
    assert!(executor.forward(&plan(vec![1; 8], vec![2], 8)).is_ok());
    for (broken, word) in [
        (plan(vec![1; 9], vec![0], 0), "a step bears 8"),
        (plan(vec![1; 8], vec![3], 0), "block 3"),
        (plan(vec![1; 8], vec![0], 9), "1 blocks"),
        (plan(vec![150], vec![0], 0), "token 150"),
        (plan(vec![], vec![0], 0), "0 tokens"),
        (plan(vec![1; 8], vec![0; 20], 250), "takes 256"),
    ] {
        let error = executor.forward(&broken).expect_err("refused").to_string();
        assert!(error.contains(word), "{error}");
    }
}
