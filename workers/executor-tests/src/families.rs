//! Every family against the plain decoder.

use baton_engine::{Executor, Fault, SequenceStep, StepId, StepPlan};
use baton_model::WeightFormat;

use crate::{Build, Builder, Part, Random, Tiny, step, tiny_families};

/// Logits of these models have a standard deviation near one. A prompt of 50 tokens in one step, then 50 steps of one
/// token: no logit may be further than `error_max` from the reference.
///
/// # Panics
/// If one is, or is NaN.
pub fn families(label: &str, error_max: f64, build: Builder<'_>) {
    for (i, spec) in tiny_families().into_iter().enumerate() {
        let tiny = Tiny::new(spec, i as u64 + 1);
        family(&format!("#{i} on {label}"), &tiny, error_max, build);
    }
}

/// The same with FP8 weights, in both formats, against a reference that has the very same weights: what an executor loses
/// besides them, by quantizing activations say, is its own to state.
///
/// # Panics
/// As [`families`].
pub fn fp8_families(label: &str, error_max: f64, build: Builder<'_>) {
    for (i, spec) in tiny_families().into_iter().enumerate() {
        for format in [WeightFormat::Fp8Channel, WeightFormat::Fp8Block] {
            let tiny = Tiny::new(spec.clone(), i as u64 + 1).in_format(format);
            let label = format!("#{i} with {format} on {label}");
            family(&label, &tiny, error_max, build);
        }
    }
}

/// As [`families`], one model.
///
/// # Panics
/// As [`families`].
pub fn family(label: &str, tiny: &Tiny, error_max: f64, build: Builder<'_>) {
    let mut random = Random(77);
    let tokens = random.tokens(100, tiny.spec.vocab);
    let reference = tiny.reference(&tokens);
    let mut executor = build(Build {
        spec: &tiny.spec,
        weights: tiny,
        block_tokens: 16,
        blocks: 10,
    });
    let family = &tiny.spec.family;
    let blocks = [8, 3, 9, 1, 0, 2, 7];
    let (mut worst, mut sum): (f64, f64) = (0.0, 0.0);
    let ranges = std::iter::once(0..50).chain((50..100).map(|t| t..t + 1));
    for range in ranges {
        let end = range.end;
        let part = Part {
            key: 0,
            tokens: &tokens,
            range,
            blocks: &blocks,
        };
        let logits = &step(&mut *executor, &[part])[0];
        for (ours, truth) in logits.iter().zip(&reference[end - 1]) {
            let error = (f64::from(*ours) - truth).abs();
            worst = worst.max(error);
            sum += error;
            assert!(!ours.is_nan(), "{family} {label}: NaN after {end}");
        }
    }
    let mean = sum / (51 * tiny.spec.vocab) as f64;
    println!("{family} {label}: logit errors: worst {worst:.4}, mean {mean:.4}");
    assert!(worst < error_max, "{family} {label}: {worst}");
}

/// Log-probabilities of a prompt's tokens, more than the logits computed at once, and their alternatives.
///
/// # Panics
/// If one is further than `error_max` from the reference.
pub fn prompt_log_probabilities(error_max: f64, build: Builder<'_>) {
    let tiny = Tiny::new(tiny_families().remove(1), 5);
    let mut random = Random(78);
    const TOKENS: usize = 300;
    let tokens = random.tokens(TOKENS, tiny.spec.vocab);
    let spec = baton_model::ModelSpec {
        tokens_max: TOKENS,
        ..tiny.spec.clone()
    };
    let reference = tiny.reference(&tokens);
    let mut executor = build(Build {
        spec: &spec,
        weights: &tiny,
        block_tokens: 32,
        blocks: 10,
    });
    let plan = StepPlan {
        id: StepId(1),
        sequences: vec![SequenceStep {
            key: 1,
            tokens: 0..TOKENS,
            follows: None,
            start: 0,
            blocks: 0..10,
            sample: None,
            targets: 0..TOKENS - 1,
            target_top: 3,
        }],
        tokens: tokens.clone(),
        blocks: vec![2, 0, 1, 9, 8, 7, 3, 4, 6, 5],
        targets: tokens[1..].to_vec(),
        want_logits: false,
        ..StepPlan::default()
    };
    let output = executor.forward(&plan).expect("a step").sequences.remove(0);
    assert!(output.sampled.is_empty() && output.logits.is_empty());
    assert_eq!(output.target_logprobs.len(), TOKENS - 1);
    for (i, found) in output.target_logprobs.iter().enumerate() {
        let total = reference[i].iter().map(|x| x.exp()).sum::<f64>().ln();
        let truth = reference[i][tokens[i + 1] as usize] - total;
        assert!((f64::from(found.logprob) - truth).abs() < error_max);
        assert_eq!(found.top.len(), 3);
        assert!(found.top.is_sorted_by(|a, b| a.1 >= b.1));
        for top in &found.top {
            let truth = reference[i][top.0 as usize] - total;
            assert!((f64::from(top.1) - truth).abs() < error_max);
        }
    }
}

/// Plans that an executor must refuse, whatever the engine promised: memory outside the arena is at stake. `executor` is of
/// the first tiny family with three blocks of 16 tokens and steps of 8 tokens and 2 sequences.
///
/// # Panics
/// If one is not refused in a sentence that says why.
pub fn broken_plans_are_refused(executor: &mut dyn Executor) {
    assert_eq!(executor.info().blocks, 3);
    let plan = |tokens: Vec<u32>, blocks: Vec<u32>, start| StepPlan {
        sequences: vec![SequenceStep {
            key: 1,
            tokens: 0..tokens.len(),
            follows: None,
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
        let error = executor.forward(&broken).expect_err("refused");
        assert_eq!(error.fault, Fault::Refused, "{error}");
        let error = error.to_string();
        assert!(error.contains(word), "{error}");
    }
    // Nothing of them ran.
    assert!(executor.forward(&plan(vec![1; 8], vec![2], 8)).is_ok());
}
