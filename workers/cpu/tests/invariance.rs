//! On one kernel the logits are the same bits whatever the batch, the chunks, the neighbours, the blocks and
//! the threads.

mod common;

use std::collections::HashMap;

use baton_cpu::CpuExecutor;
use common::{Part, Random, Tiny, executor, families, kernels, step};
use proptest::prelude::*;

const SEQUENCES: usize = 4;
const TOKENS: usize = 90;
const BLOCK: u32 = 8;
const BLOCKS_EACH: usize = TOKENS.div_ceil(BLOCK as usize);

/// Logits, by sequence and number of tokens before them.
type Logits = HashMap<(usize, usize), Vec<u32>>;

fn sequences(vocab: usize) -> Vec<Vec<u32>> {
    let mut random = Random(3);
    (0..SEQUENCES)
        .map(|_| (0..TOKENS).map(|_| random.below(vocab) as u32).collect())
        .collect()
}

/// Every sequence alone, token by token, on one thread.
fn alone(executor: &mut CpuExecutor, sequences: &[Vec<u32>]) -> Logits {
    let mut logits = Logits::new();
    let blocks: Vec<u32> = (0..BLOCKS_EACH as u32).collect();
    for (s, tokens) in sequences.iter().enumerate() {
        for t in 0..TOKENS {
            let part = Part {
                key: 0,
                tokens,
                range: t..t + 1,
                blocks: &blocks,
            };
            logits.insert((s, t + 1), bits(&step(executor, &[part])[0]));
        }
    }
    logits
}

/// All sequences together: chunks of random lengths, random subsets per step, random blocks.
fn together(executor: &mut CpuExecutor, sequences: &[Vec<u32>], seed: u64) -> Logits {
    let mut random = Random(seed);
    let mut free: Vec<u32> = (0..executor_blocks() as u32).collect();
    let tables: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|_| {
            (0..BLOCKS_EACH)
                .map(|_| free.swap_remove(random.below(free.len())))
                .collect()
        })
        .collect();
    let mut done = [0; SEQUENCES];
    let mut logits = Logits::new();
    while done.iter().any(|d| *d < TOKENS) {
        let mut parts = Vec::new();
        for (s, done) in done.iter().copied().enumerate() {
            if done < TOKENS && random.below(3) > 0 {
                let longest = if random.below(2) == 0 { 1 } else { 50 };
                let end = (done + 1 + random.below(longest)).min(TOKENS);
                parts.push((s, done..end));
            }
        }
        let plan: Vec<Part<'_>> = parts
            .iter()
            .map(|(s, range)| Part {
                key: *s as u64,
                tokens: &sequences[*s],
                range: range.clone(),
                blocks: &tables[*s],
            })
            .collect();
        let results = if plan.is_empty() {
            Vec::new()
        } else {
            step(executor, &plan)
        };
        for ((s, range), result) in parts.iter().zip(results) {
            done[*s] = range.end;
            logits.insert((*s, range.end), bits(&result));
        }
    }
    logits
}

fn executor_blocks() -> usize {
    SEQUENCES * BLOCKS_EACH + 5
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]

    #[test]
    fn logits_do_not_depend_on_the_company(seed: u64) {
        // Llama 3 with grouped heads, Mistral with a window that cuts inside and across blocks, Qwen3.
        for family in [1, 3, 5] {
            let tiny = Tiny::new(families().remove(family), 9);
            let sequences = sequences(tiny.spec.vocab);
            for kernel in kernels() {
                let build = |threads| {
                    executor(&tiny.spec, &tiny, kernel, threads, BLOCK, executor_blocks())
                };
                let expected = alone(&mut build(1), &sequences);
                for threads in [1, 2, 3] {
                    let mut executor = build(threads);
                    let found = together(&mut executor, &sequences, seed ^ threads as u64);
                    for (at, logits) in &found {
                        prop_assert_eq!(
                            logits, &expected[at],
                            "{} on {} with {} threads, sequence and tokens {:?}",
                            tiny.spec.family, kernel, threads, at
                        );
                    }
                }
            }
        }
    }
}
