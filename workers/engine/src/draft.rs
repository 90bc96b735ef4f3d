//! Where drafts come from: guesses of a sequence's next tokens, which the executor checks all at once.

use crate::sequence::Sequence;

/// Steps that a sequence without drafts may be ahead of what the host knows of it, one behind the other, until the drafter is
/// asked again: to be asked, it must sit out until its last token is here.
const UNASKED_MAX: usize = 32;

/// Guesses what comes next in a text. A wrong guess costs time and changes no token.
pub trait Drafter: Send {
    /// Appends to `drafts` the tokens that may come after `tokens` (a sequence's prompt and output so far), at most `most` of
    /// them, the next one first. None if it has no good guess. `drafts` is empty before.
    ///
    /// The engine's thread calls it while it plans a step: it should take microseconds.
    fn draft(&mut self, tokens: &[u32], most: usize, drafts: &mut Vec<u32>);
}

/// The drafter, if there is one, and what bounds its drafts.
#[derive(Default)]
pub struct Drafts {
    drafter: Option<Box<dyn Drafter>>,
    /// Most drafts of a sequence in a step.
    most: usize,
    /// Tokens are below this.
    vocab: u32,
    /// Longest sequence.
    tokens_max: usize,
    /// Tokens that drafts may take of the step being planned.
    pub budget: usize,
    drafts: Vec<u32>,
}

impl Drafts {
    /// `run_max` is the executor's.
    pub fn new(drafter: Box<dyn Drafter>, run_max: usize, vocab: u32, tokens_max: usize) -> Self {
        Self {
            drafter: Some(drafter),
            most: run_max.saturating_sub(1),
            vocab,
            tokens_max,
            ..Self::default()
        }
    }

    /// Drafts for a generating sequence, with blocks for each: as many as budget, blocks and the sequence's end leave room
    /// for. None while its last token is in flight.
    #[inline]
    pub fn of(&mut self, sequence: &mut Sequence) -> &[u32] {
        self.drafts.clear();
        let Some(drafter) = &mut self.drafter else {
            return &[];
        };
        if !sequence.constrained.is_free() {
            return &[]; // a mask is known for one token
        }
        if sequence.in_flight > 0 {
            sequence.unasked += 1;
            return &[];
        }
        sequence.unasked = 0;
        // The last token of all needs no draft: nothing comes after it.
        let left = sequence.tokens_left(self.tokens_max).saturating_sub(1);
        let most = self.most.min(self.budget).min(left);
        if most == 0 {
            return &[];
        }
        drafter.draft(&sequence.tokens, most, &mut self.drafts);
        let vocab = self.vocab;
        let known = self.drafts.iter().take_while(|draft| **draft < vocab);
        let mut count = known.take(most).count();
        let tokens = sequence.tokens.len();
        while sequence.blocks.capacity() < tokens + count && sequence.blocks.grow() {}
        count = count.min(sequence.blocks.capacity() - tokens);
        self.budget -= count;
        &self.drafts[..count]
    }

    /// Whether a sequence's next row has to wait for what is in flight of it: nobody knows how many tokens its run will give,
    /// or the drafter was not asked for long.
    pub fn sits_out(&self, sequence: &Sequence) -> bool {
        let is_due = self.most > 0 && sequence.unasked >= UNASKED_MAX;
        sequence.drafted > 0 || is_due && sequence.in_flight > 0
    }
}
