//! A made-up grammar: which tokens may come depends on the length of the output and on its last token.

use std::sync::Arc;
use std::time::Instant;

use baton_engine::{Constraint, Mask, TokenMask, random_bits};

use crate::Random;

/// Of the tokens, about one in `one_in` may come.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    seed: u64,
    vocab: u32,
    one_in: u64,
    /// Output tokens after which it is whole.
    whole_at: usize,
    /// Most times that a mask is asked for in vain.
    late: u64,
}

impl Rule {
    pub fn draw(random: &mut Random, vocab: u32) -> Self {
        Self {
            seed: random.below(1 << 30) as u64,
            vocab,
            one_in: [1, 2, 20][random.below(3)],
            whole_at: match random.below(3) {
                0 => 1 + random.below(12),
                _ => usize::MAX,
            },
            late: random.below(3) as u64,
        }
    }

    /// The mask of the token after this output.
    pub fn mask(&self, output: &[u32]) -> Arc<TokenMask> {
        let before = output.last().map_or(0, |last| u64::from(*last) + 1);
        let place = random_bits(self.seed ^ before << 32, output.len() as u32);
        let allowed = |token: &u32| random_bits(place, *token).is_multiple_of(self.one_in);
        Arc::new(TokenMask::of(self.vocab, (0..self.vocab).filter(allowed)))
    }

    pub fn is_whole(&self, output: &[u32]) -> bool {
        output.len() >= self.whole_at
    }

    /// As the engine asks it, at the place after this output.
    pub fn after(self, output: &[u32]) -> Box<dyn Constraint> {
        Box::new(Ruled {
            rule: self,
            output: output.to_vec(),
            asked: 0,
        })
    }
}

#[derive(Debug)]
struct Ruled {
    rule: Rule,
    output: Vec<u32>,
    asked: u64,
}

impl Constraint for Ruled {
    fn accept(&mut self, token: u32) -> Result<bool, String> {
        if !self.rule.mask(&self.output).allows(token) {
            return Err(format!(
                "token {token} is not allowed at {}",
                self.output.len()
            ));
        }
        self.output.push(token);
        self.asked = 0;
        Ok(self.rule.is_whole(&self.output))
    }

    /// Late as often as the place says: no clock decides.
    fn mask(&mut self, _deadline: Instant) -> Mask {
        let late = random_bits(self.rule.seed, self.output.len() as u32) % (self.rule.late + 1);
        self.asked += 1;
        match self.asked > late {
            true => Mask::Ready(self.rule.mask(&self.output)),
            false => Mask::Late,
        }
    }
}
