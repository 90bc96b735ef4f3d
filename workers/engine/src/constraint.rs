//! What a sequence's next token may be, where its output must follow a grammar.
//!
//! The grammar itself is the caller's. It hands over a [`Constraint`] with the sequence; the engine tells it each token that
//! was chosen, and asks it for the mask of the next one. Masks are made beside the engine's thread: a sequence whose mask is
//! late sits out a step, and the others go on.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// Which tokens may be chosen: a bit for each id, 32 to a word, the lowest id in the lowest bit. Ids beyond the last word may
/// not.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenMask(Box<[u32]>);

impl TokenMask {
    /// Of words, the first of which has the bits of ids 0 to 31.
    pub fn new(words: Box<[u32]>) -> Self {
        Self(words)
    }

    /// Of the ids that may be chosen, each below `vocab`.
    ///
    /// # Panics
    /// If one is not.
    pub fn of(vocab: u32, allowed: impl IntoIterator<Item = u32>) -> Self {
        let mut words = vec![0u32; vocab.div_ceil(32) as usize];
        for token in allowed {
            assert!(token < vocab, "token {token} of a vocabulary of {vocab}");
            words[token as usize / 32] |= 1 << (token % 32);
        }
        Self(words.into())
    }

    /// Whether this token may be chosen.
    pub fn allows(&self, token: u32) -> bool {
        let word = self.0.get(token as usize / 32);
        word.is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Its words.
    pub fn words(&self) -> &[u32] {
        &self.0
    }

    /// Gives the logits of tokens that may not be chosen minus infinity.
    pub fn apply(&self, logits: &mut [f32]) {
        let words = self.0.iter().copied().chain(std::iter::repeat(0));
        for (chunk, word) in logits.chunks_mut(32).zip(words) {
            if word == u32::MAX {
                continue;
            }
            for (i, logit) in chunk.iter_mut().enumerate() {
                if word >> i & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

impl fmt::Debug for TokenMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let allowed: u32 = self.0.iter().map(|word| word.count_ones()).sum();
        write!(f, "TokenMask({allowed} of {})", self.0.len() * 32)
    }
}

/// The mask of a sequence's next token.
#[derive(Clone, Debug)]
pub enum Mask {
    /// Here it is. At least one token is allowed.
    Ready(Arc<TokenMask>),
    /// It is not made yet.
    Late,
    /// It cannot be made, and why, as a sentence. It ends the sequence.
    Failed(String),
}

/// The rules of one sequence's output, at the place where the sequence stands.
///
/// The engine calls [`Self::mask`] until it is ready, has a token chosen that the mask allows, and then calls
/// [`Self::accept`] with it. Neither call may take longer than some microseconds, but for the wait that the engine allows.
pub trait Constraint: Send + fmt::Debug {
    /// Takes the token that was chosen, and begins to make the mask of the one after it. Returns whether the output is whole: no
    /// token may follow, and the sequence ends.
    ///
    /// # Errors
    /// Why the token cannot be taken, as a sentence. It ends the sequence.
    fn accept(&mut self, token: u32) -> Result<bool, String>;

    /// The mask of the next token. Waits for it until `deadline` at most; a deadline that is past asks without waiting.
    fn mask(&mut self, deadline: Instant) -> Mask;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_says_the_same_of_ids_and_of_logits() {
        let allowed = [0, 31, 32, 63, 70];
        let mask = TokenMask::of(71, allowed);
        let mut logits = vec![1.0; 100];
        mask.apply(&mut logits);
        for (token, logit) in logits.iter().enumerate() {
            let may = allowed.contains(&(token as u32));
            assert_eq!(mask.allows(token as u32), may, "{token}");
            assert_eq!(*logit == 1.0, may, "{token}");
        }
        assert!(!mask.allows(u32::MAX));
        let all = TokenMask::new(vec![u32::MAX; 2].into());
        all.apply(&mut logits[64..]);
        assert_eq!(logits[70], 1.0);
    }
}
