//! Steps submitted ahead, their sequences going on from tokens that nobody has seen yet: the same tokens as step by step.

use std::sync::Arc;

use baton_engine::{
    Executor, SampleRequest, SampleState, Sampled, SequenceStep, StepOutput, StepPlan,
};
use baton_model::UniformSpec;
use baton_protocol::Sampling;

use crate::{Build, Builder, Random, Tiny, tiny_families};

const SEQUENCES: usize = 9;
const PROMPT: usize = 11;
const STEPS: usize = 40;
const BLOCK_TOKENS: u32 = 8;
const BLOCKS_EACH: usize = (PROMPT + STEPS).div_ceil(BLOCK_TOKENS as usize);

/// Runs random batches, in which every sequence is in most steps and at another place in each, one step at a time and
/// then with the next step submitted before the last is collected.
///
/// # Panics
/// If a token or a log-probability differs.
pub fn steps_ahead(build: Builder<'_>) {
    let spec = UniformSpec {
        vocab: 301,
        ..tiny_families().remove(1)
    };
    let tiny = Tiny::new(spec, 12);
    let build = || {
        build(Build {
            spec: &tiny.spec,
            weights: &tiny,
            block_tokens: BLOCK_TOKENS,
            blocks: SEQUENCES * BLOCKS_EACH,
        })
    };
    for seed in 0..3 {
        let batches = batches(seed);
        let expected = run(&mut *build(), &batches, 1);
        let found = run(&mut *build(), &batches, 2);
        assert_eq!(found, expected, "with two steps in flight, seed {seed}");
        let mut tokens: Vec<u32> = expected.iter().flatten().map(|s| s.token).collect();
        tokens.sort_unstable();
        tokens.dedup();
        assert!(tokens.len() > 30, "the texts hardly differ: {tokens:?}");
    }
}

/// Sequences of each step after the prompts, in random order.
fn batches(seed: u64) -> Vec<Vec<usize>> {
    let mut random = Random(seed + 1);
    let batch = |_| {
        let mut left: Vec<usize> = (0..SEQUENCES).collect();
        let mut batch = Vec::new();
        while !left.is_empty() {
            let sequence = left.swap_remove(random.below(left.len()));
            if random.below(6) > 0 {
                batch.push(sequence);
            }
        }
        batch
    };
    let batches = (0..STEPS).map(batch);
    batches.filter(|batch| !batch.is_empty()).collect()
}

/// What each sequence was told.
fn run(executor: &mut dyn Executor, batches: &[Vec<usize>], in_flight: usize) -> Vec<Vec<Sampled>> {
    let mut told: Vec<Vec<Sampled>> = vec![Vec::new(); SEQUENCES];
    let prompts: Vec<usize> = (0..SEQUENCES).collect();
    // Sequences of the steps in flight, the oldest first.
    let mut flights = std::collections::VecDeque::from([prompts.clone()]);
    executor.submit(&prompt_plan(&prompts)).expect("a step");
    for batch in batches {
        if flights.len() == in_flight {
            let output = executor.collect().expect("a step");
            take(&mut told, &flights.pop_front().expect("one"), output);
        }
        let plan = decode_plan(batch, &told, flights.back());
        executor.submit(&plan).expect("a step");
        flights.push_back(batch.clone());
    }
    for flight in flights {
        take(&mut told, &flight, executor.collect().expect("a step"));
    }
    told
}

fn take(told: &mut [Vec<Sampled>], batch: &[usize], output: StepOutput) {
    assert_eq!(output.sequences.len(), batch.len());
    for (sequence, output) in batch.iter().zip(output.sequences) {
        told[*sequence].push(output.sampled.expect("asked for"));
    }
}

fn prompt_plan(batch: &[usize]) -> StepPlan {
    let mut plan = StepPlan::default();
    for sequence in batch {
        let tokens = (0..PROMPT).map(|i| ((i * 31 + sequence * 7) % 301) as u32);
        push(&mut plan, *sequence, tokens.collect(), 0, None, &[]);
    }
    plan
}

/// Sequences whose last token is in flight follow it, the others have it.
fn decode_plan(batch: &[usize], told: &[Vec<Sampled>], last: Option<&Vec<usize>>) -> StepPlan {
    let mut plan = StepPlan::default();
    for sequence in batch {
        let follows = last.and_then(|last| last.iter().position(|other| other == sequence));
        let known = &told[*sequence];
        let start = PROMPT + known.len() - usize::from(follows.is_none());
        // What stands beside `follows` means nothing.
        let token = match follows {
            Some(_) => u32::MAX,
            None => known.last().expect("told").token,
        };
        push(&mut plan, *sequence, vec![token], start, follows, known);
    }
    plan
}

fn push(
    plan: &mut StepPlan,
    sequence: usize,
    tokens: Vec<u32>,
    start: usize,
    follows: Option<usize>,
    known: &[Sampled],
) {
    let mut state = SampleState {
        sampling: sampling(sequence),
        ..SampleState::default()
    };
    known.iter().for_each(|sampled| state.count(sampled.token));
    let (token, block) = (plan.tokens.len(), plan.blocks.len());
    let end = start + tokens.len();
    plan.tokens.extend(tokens);
    plan.blocks
        .extend((0..BLOCKS_EACH).map(|i| (i * SEQUENCES + sequence) as u32));
    plan.sequences.push(SequenceStep {
        key: sequence as u64,
        tokens: token..plan.tokens.len(),
        follows,
        start: start as u32,
        blocks: block..plan.blocks.len(),
        sample: Some(SampleRequest {
            position: end as u32,
            state: Arc::new(state),
            ban_stop_ids: false,
        }),
        targets: 0..0,
        target_top: 0,
    });
}

/// Each sequence has a rule of its own.
fn sampling(sequence: usize) -> Sampling {
    let base = Sampling {
        temperature: 1.5,
        seed: sequence as u64,
        ..Sampling::default()
    };
    match sequence {
        0 => Sampling::default(),
        1 => Sampling { top_k: 9, ..base },
        2 => Sampling { top_p: 0.7, ..base },
        3 => Sampling {
            min_p: 0.05,
            ..base
        },
        4 => Sampling {
            logprobs: Some(2),
            ..base
        },
        5 => Sampling {
            logit_bias: vec![(17, 4.0)],
            ..base
        },
        6 => Sampling {
            repetition_penalty: 1.5,
            frequency_penalty: 0.5,
            ..base
        },
        _ => base,
    }
}
