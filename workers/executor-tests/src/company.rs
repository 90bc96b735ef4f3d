//! Logits alone and in company: random chunks, random neighbours, random blocks.

use std::collections::HashMap;

use baton_engine::Executor;

use crate::{Part, Random, step};

/// Sequences of a run.
pub const SEQUENCES: usize = 4;
/// Tokens of each.
pub const TOKENS: usize = 90;
/// Tokens of a block.
pub const BLOCK_TOKENS: u32 = 8;
const BLOCKS_EACH: usize = TOKENS.div_ceil(BLOCK_TOKENS as usize);
/// Blocks of the arena.
pub const BLOCKS: usize = SEQUENCES * BLOCKS_EACH + 5;

/// Logits, by sequence and number of tokens before them.
pub type Logits = HashMap<(usize, usize), Vec<f32>>;

/// Random sequences of a vocabulary.
pub fn sequences(vocab: usize) -> Vec<Vec<u32>> {
    let mut random = Random(3);
    (0..SEQUENCES)
        .map(|_| random.tokens(TOKENS, vocab))
        .collect()
}

/// Every sequence alone, token by token. `block_tokens` is the executor's.
pub fn alone(executor: &mut dyn Executor, sequences: &[Vec<u32>]) -> Logits {
    let mut logits = Logits::new();
    let blocks: Vec<u32> = (0..blocks_each(executor) as u32).collect();
    for (s, tokens) in sequences.iter().enumerate() {
        for t in 0..TOKENS {
            let part = Part {
                key: 0,
                tokens,
                range: t..t + 1,
                blocks: &blocks,
            };
            logits.insert((s, t + 1), step(executor, &[part]).remove(0));
        }
    }
    logits
}

/// All sequences together: chunks of random lengths, random subsets per step, random blocks.
pub fn together(executor: &mut dyn Executor, sequences: &[Vec<u32>], seed: u64) -> Logits {
    let mut random = Random(seed);
    let mut free: Vec<u32> = (0..executor.info().blocks).collect();
    let each = blocks_each(executor);
    let tables: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|_| {
            (0..each)
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
        if parts.is_empty() {
            continue;
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
        let results = step(executor, &plan);
        for ((s, range), result) in parts.iter().zip(results) {
            done[*s] = range.end;
            logits.insert((*s, range.end), result);
        }
    }
    logits
}

fn blocks_each(executor: &dyn Executor) -> usize {
    executor.info().kv.blocks_for(TOKENS)
}
