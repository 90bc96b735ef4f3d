//! A drafter for executors without a model: it knows how they choose.

use crate::Drafter;
use crate::fake::{EMPTY, digest_of, hash_of, pick};
use crate::sampling::mix;

/// Drafts what a [`FakeExecutor`](crate::FakeExecutor) chooses at temperature 0, and now and then another token. For seeds,
/// banned tokens and tokens that are never chosen it is wrong, as drafters are.
pub struct FakeDrafter {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Logits per position.
    pub vocab: u32,
}

impl Drafter for FakeDrafter {
    fn draft(&mut self, tokens: &[u32], most: usize, drafts: &mut Vec<u32>) {
        let mut last = EMPTY;
        let mut digests = Vec::with_capacity(tokens.len() + most);
        let mut run = |token: u32, digests: &mut Vec<u64>| {
            last = digest_of(last, token);
            digests.push(last);
        };
        for token in tokens {
            run(*token, &mut digests);
        }
        for _ in 0..most {
            let blocks = digests.chunks(self.block_tokens as usize);
            let sums =
                blocks.map(|block| block.iter().fold(0, |sum, d| u64::wrapping_add(sum, *d)));
            let hash = hash_of(sums);
            let right = pick(hash, self.vocab);
            let token = match mix(hash) % 4 {
                0 => (right + 1) % self.vocab,
                _ => right,
            };
            drafts.push(token);
            run(token, &mut digests);
        }
    }
}
