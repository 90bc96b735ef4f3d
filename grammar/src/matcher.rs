//! One output that follows a grammar.

use std::fmt;
use std::sync::Arc;

use crate::error::{GrammarError, detail};

/// A place in an output. Made by [`Compiler::compile`](crate::Compiler::compile) at the beginning of one.
pub struct Matcher {
    parser: llguidance::Matcher,
    vocab: u32,
    ends: Arc<[u32]>,
}

impl Matcher {
    pub(crate) fn new(parser: llguidance::Matcher, vocab: u32, ends: &[u32]) -> Self {
        let known = ends.iter().copied().filter(|end| *end < vocab);
        Self {
            parser,
            vocab,
            ends: known.collect(),
        }
    }

    /// The same place, with nothing shared: both may be used at the same time.
    #[must_use]
    pub fn branch(&self) -> Self {
        Self {
            parser: self.parser.deep_clone(),
            vocab: self.vocab,
            ends: Arc::clone(&self.ends),
        }
    }

    /// Takes the next token of the output. Takes some microseconds.
    ///
    /// # Errors
    /// [`GrammarError::Token`] if the grammar does not allow it here; nothing more can be asked of the matcher then.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        let taken = self.parser.consume_token(token);
        taken.map_err(|error| GrammarError::Token(detail(error)))
    }

    /// Whether the output is whole and nothing may follow it.
    pub fn is_whole(&self) -> bool {
        self.parser.is_stopped() && !self.parser.is_error()
    }

    /// Which tokens may come next: a bit for each id of the vocabulary, 32 to a word, the lowest id in the lowest bit. At least one
    /// is set. Takes some 10 µs, sometimes milliseconds.
    ///
    /// # Errors
    /// [`GrammarError::Token`] if no token may, or if the parser gave up at one of its bounds.
    pub fn mask(&mut self) -> Result<Box<[u32]>, GrammarError> {
        let mask = self.parser.compute_mask_or_eos();
        let mask = mask.map_err(|error| GrammarError::Token(detail(error)))?;
        let may_end = mask.is_allowed(self.vocab);
        let words = self.vocab.div_ceil(32) as usize;
        let mut words: Box<[u32]> = mask.as_slice().iter().copied().take(words).collect();
        let beyond = self.vocab % 32;
        if let (Some(last), 1..) = (words.last_mut(), beyond) {
            *last &= (1 << beyond) - 1;
        }
        if may_end {
            for end in self.ends.iter() {
                words[*end as usize / 32] |= 1 << (end % 32);
            }
        }
        match words.iter().any(|word| *word != 0) {
            true => Ok(words),
            false => Err(GrammarError::Token(
                "no token of the vocabulary may come next".to_owned(),
            )),
        }
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Matcher({} tokens, ends with {:?})",
            self.vocab, self.ends
        )
    }
}
