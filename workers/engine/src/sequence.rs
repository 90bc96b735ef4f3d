//! A sequence inside the engine: its tokens, where its KV is, and the rules that end it.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_protocol::{CacheSalt, FinishReason, SequenceSpec, Service, Tier, TokenLogprobs};

use crate::{BlockTable, Constraint, Follows, Mask, SampleRun, SampleState, TokenCount, TokenMask};

/// Tokens whose time a generating sequence may use in advance. A sequence that ends before it was expected to has not paid it back: that bounds how
/// late it is then.
const BORROWED_MAX: usize = 64;

/// Who goes first: the lesser.
pub type Place = (Tier, Reverse<i32>, u64);

/// What the engine knows of one sequence.
pub struct Sequence {
    pub key: u64,
    /// Order of arrival in this engine.
    pub arrival: u64,
    /// Whose KV it may use.
    pub cache_salt: CacheSalt,
    /// What it was promised.
    pub service: Service,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    /// Tokens that it had when it was resumed; 0 for a prompt.
    pub resumed: usize,
    /// The KV of this many tokens is in place.
    pub computed: usize,
    /// Tokens after those that steps in flight run: of a prompt its own, else the last one and tokens that nobody knows yet,
    /// or the last one and drafts.
    pub in_flight: usize,
    /// How many of these are drafts.
    pub drafted: usize,
    /// Where the last of these steps has it.
    pub last: Follows,
    /// Steps that were planned for it since the drafter was asked.
    pub unasked: usize,
    /// Since when it could have had steps and interactive sequences had them: of batch sequences.
    pub passed_over: Option<Instant>,
    /// The step being planned is not for it.
    pub sits_out: bool,
    pub blocks: BlockTable,
    pub prompt: PromptReport,
    pub constrained: Constrained,
    state: Arc<SampleState>,
    min_tokens: usize,
    max_tokens: usize,
}

/// What a prompt's end reports besides its token.
pub struct PromptReport {
    /// Alternatives to report with each prompt token, if wanted.
    pub logprobs_top: Option<u8>,
    pub logprobs: Vec<TokenLogprobs>,
    pub cached_tokens: usize,
    pub submitted: Instant,
    /// When its first step began.
    pub started: Option<Instant>,
    /// Set if it is told how far it is.
    pub stream: Option<Streamed>,
}

/// Whether somebody was told of a prompt's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streamed {
    /// Not yet.
    No,
    /// Somebody reads them while it runs: they are never exchanged for others.
    Begun,
}

/// What a sequence's output must follow, if anything.
#[derive(Debug, Default)]
pub struct Constrained {
    constraint: Option<Box<dyn Constraint>>,
    /// The mask of the next token, once it is known and until a row takes it.
    mask: Option<Arc<TokenMask>>,
    /// Why there will be none.
    pub failure: Option<String>,
    /// A step in flight has a row of it that means nothing: its mask did not come in time.
    pub is_void: bool,
}

impl Constrained {
    pub fn by(constraint: Option<Box<dyn Constraint>>) -> Self {
        Self {
            constraint,
            ..Self::default()
        }
    }

    /// Whether any token may come.
    pub fn is_free(&self) -> bool {
        self.constraint.is_none()
    }

    /// Whether the next token cannot be chosen yet.
    pub fn is_late(&self) -> bool {
        self.constraint.is_some() && self.mask.is_none()
    }

    /// The mask for a row that runs already, asked for until `deadline` at most. `None` makes the row void.
    pub fn mask_of_row(&mut self, deadline: Instant) -> Option<Arc<TokenMask>> {
        self.ask(deadline);
        self.is_void = self.mask.is_none();
        self.mask.take()
    }

    /// Asks for the mask of the next token where it is missing, until `deadline` at most.
    pub fn ask(&mut self, deadline: Instant) {
        if let (Some(constraint), None, None) = (&mut self.constraint, &self.mask, &self.failure) {
            match constraint.mask(deadline) {
                Mask::Ready(mask) => self.mask = Some(mask),
                Mask::Late => {}
                Mask::Failed(detail) => self.failure = Some(detail),
            }
        }
    }
}

impl Sequence {
    pub fn new(
        key: u64,
        arrival: u64,
        spec: SequenceSpec,
        blocks: BlockTable,
        now: Instant,
    ) -> Self {
        let tokens = spec.tokens.0;
        let prompt_tokens = spec.prompt_tokens as usize;
        let generation = spec.generation;
        let mut state = SampleState {
            sampling: generation.sampling,
            stop_token_ids: generation.stop_token_ids,
            counts: Vec::new(),
        };
        if state.has_penalty() {
            state.counts = count_tokens(&tokens, prompt_tokens);
        }
        Self {
            key,
            arrival,
            cache_salt: spec.cache_salt,
            service: spec.service,
            tokens,
            prompt_tokens,
            resumed: 0,
            computed: 0,
            in_flight: 0,
            drafted: 0,
            last: Follows::default(),
            unasked: 0,
            passed_over: None,
            sits_out: false,
            blocks,
            prompt: PromptReport {
                logprobs_top: None,
                logprobs: Vec::new(),
                cached_tokens: 0,
                submitted: now,
                started: None,
                stream: None,
            },
            constrained: Constrained::default(),
            state: Arc::new(state),
            min_tokens: generation.min_tokens as usize,
            max_tokens: generation.max_tokens as usize,
        }
    }

    /// Its place in the order of who goes first: interactive before batch, then by priority, then by arrival.
    pub fn place(&self) -> Place {
        let Service { tier, priority, .. } = self.service;
        (tier, Reverse(priority), self.arrival)
    }

    /// Until when the step must end that it was put into last, for its mean time between tokens to be `itl` since it was resumed. A part of its
    /// later tokens' time may be used before: half of those that it may generate, at most [`BORROWED_MAX`], and no more than their steps give back
    /// if each takes `step`.
    pub fn due(&self, itl: Duration, step: Duration) -> Instant {
        let sure = self.in_flight - self.drafted;
        let left = self.max_tokens.saturating_sub(self.output_tokens());
        let borrowed = itl * (left / 2).min(BORROWED_MAX) as u32;
        let given_back = itl.saturating_sub(step) * left as u32;
        let tokens = self.tokens.len() - self.resumed + sure;
        self.prompt.submitted + itl * tokens as u32 + borrowed.min(given_back)
    }

    /// Tokens of a prompt that no step has run or runs.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed - self.in_flight
    }

    /// Whether a step in flight surely ends this generating sequence, whatever drafts are rejected.
    pub fn is_ending(&self, tokens_max: usize) -> bool {
        self.in_flight > 0 && self.in_flight - self.drafted >= self.tokens_left(tokens_max)
    }

    /// Tokens that it may generate yet, those in flight included. `tokens_max` bounds the whole sequence.
    pub fn tokens_left(&self, tokens_max: usize) -> usize {
        let output = self.max_tokens.saturating_sub(self.output_tokens());
        output.min(tokens_max.saturating_sub(self.tokens.len()))
    }

    /// Whether its next row can be told before the tokens in flight are known here. Penalties count every token, and the
    /// device adds only the one that the row follows. A mask depends on the token before it, and comes when that is known.
    pub fn can_follow(&self) -> bool {
        let needs_last = self.state.has_penalty() || !self.constrained.is_free();
        self.in_flight <= 1 || !needs_last
    }

    /// Whether no row can be made for want of a mask. That of a row which follows a step in flight comes later.
    pub fn lacks_mask(&self) -> bool {
        match self.in_flight {
            0 => self.constrained.is_late(),
            _ => self.constrained.is_void,
        }
    }

    /// Output tokens so far; also the output index of the next one.
    pub fn output_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// How to choose the token of this position, which comes after all tokens that are known or in flight, and after each of as many
    /// drafts.
    pub fn sample_run(&mut self, position: usize, drafts: usize) -> SampleRun {
        let len = drafts + 1;
        let stop_ids_banned = match self.state.stop_token_ids.is_empty() {
            true => 0,
            false => self
                .min_tokens
                .saturating_sub(position - self.prompt_tokens),
        };
        SampleRun {
            len,
            position: position as u32,
            state: Arc::clone(&self.state),
            stop_ids_banned: stop_ids_banned.min(len),
            mask: self.constrained.mask.take(),
        }
    }

    /// Why generation would end with this token as the next. `tokens_max` bounds the whole sequence.
    pub fn finish_with(&self, token: u32, tokens_max: usize) -> Option<FinishReason> {
        if self.state.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        (self.tokens_left(tokens_max) <= 1).then_some(FinishReason::Length)
    }

    /// Tells the constraint, if there is one, of a token that is about to be pushed; why generation ends with it, if it does.
    ///
    /// # Errors
    /// Why the constraint cannot go on with it.
    pub fn finish_of(
        &mut self,
        token: u32,
        tokens_max: usize,
    ) -> Result<Option<FinishReason>, String> {
        let finish = self.finish_with(token, tokens_max);
        let Some(constraint) = &mut self.constrained.constraint else {
            return Ok(finish);
        };
        if finish == Some(FinishReason::Stop) {
            return Ok(finish);
        }
        // An output that is whole with its last token ended by itself, whatever bound it reached.
        let is_whole = constraint.accept(token)?;
        Ok(if is_whole {
            Some(FinishReason::Whole)
        } else {
            finish
        })
    }

    /// Append an output token.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if self.state.has_penalty() {
            // Copied if a step in flight holds it.
            Arc::make_mut(&mut self.state).count(token);
        }
    }
}

fn count_tokens(tokens: &[u32], prompt_tokens: usize) -> Vec<TokenCount> {
    let (prompt, output) = tokens.split_at(prompt_tokens);
    let prompt = prompt.iter().map(|token| TokenCount {
        token: *token,
        prompt: 1,
        output: 0,
    });
    let output = output.iter().map(|token| TokenCount {
        token: *token,
        prompt: 0,
        output: 1,
    });
    let mut counts: Vec<TokenCount> = prompt.chain(output).collect();
    counts.sort_unstable_by_key(|count| count.token);
    counts.dedup_by(|next, kept| {
        let same = next.token == kept.token;
        if same {
            kept.prompt += next.prompt;
            kept.output += next.output;
        }
        same
    });
    counts
}

#[cfg(test)]
mod tests {
    use baton_protocol::{Generation, PackedTokens, Sampling};

    use super::*;
    use crate::BlockPool;

    fn sequence(generation: Generation) -> Sequence {
        let spec = SequenceSpec {
            tokens: PackedTokens(vec![7, 3, 7, 9]),
            prompt_tokens: 3,
            generation,
            cache_salt: CacheSalt::NONE,
            service: baton_protocol::Service::default(),
        };
        let blocks = BlockPool::new(1, 4).reserve(1).expect("room");
        Sequence::new(1, 0, spec, blocks, Instant::now())
    }

    #[test]
    fn no_more_time_is_used_before_than_later_tokens_give_back() {
        let sequence = sequence(Generation {
            max_tokens: 100,
            ..Generation::default()
        });
        let ms = Duration::from_millis;
        let used_before = |step: Duration| {
            let mean = ms(10) * (sequence.tokens.len() - sequence.resumed) as u32;
            sequence.due(ms(10), step) - sequence.prompt.submitted - mean
        };
        // One token is there: 99 are left, of which steps of 2 ms would give back 8 ms each. Half of them is the bound.
        assert_eq!(sequence.output_tokens(), 1);
        assert_eq!(used_before(ms(2)), ms(490));
        // Where each takes 8 of its 10 ms there are 2 ms of each.
        assert_eq!(used_before(ms(8)), ms(198));
        assert_eq!(used_before(ms(12)), ms(0));
    }

    #[test]
    fn counts_follow_the_output() {
        let mut sequence = sequence(Generation {
            sampling: Sampling {
                presence_penalty: 0.1,
                ..Sampling::default()
            },
            max_tokens: 9,
            ..Generation::default()
        });
        for token in [9, 3, 1] {
            sequence.push(token);
        }
        let fresh = count_tokens(&sequence.tokens, 3);
        assert_eq!(
            sequence.sample_run(sequence.tokens.len(), 0).state.counts,
            fresh
        );
        assert_eq!(
            fresh[0],
            TokenCount {
                token: 1,
                prompt: 0,
                output: 1
            }
        );
        assert_eq!(
            fresh[1],
            TokenCount {
                token: 3,
                prompt: 1,
                output: 1
            }
        );
        assert_eq!(
            fresh[2],
            TokenCount {
                token: 7,
                prompt: 2,
                output: 0
            }
        );
        assert_eq!(
            fresh[3],
            TokenCount {
                token: 9,
                prompt: 0,
                output: 2
            }
        );
    }

    #[test]
    fn the_first_rule_that_holds_ends_it() {
        let mut sequence = sequence(Generation {
            stop_token_ids: vec![5],
            min_tokens: 2,
            max_tokens: 3,
            ..Generation::default()
        });
        assert_eq!(
            sequence
                .sample_run(sequence.tokens.len(), 3)
                .stop_ids_banned,
            1
        );
        assert_eq!(sequence.finish_with(4, 100), None);
        assert_eq!(sequence.finish_with(4, 5), Some(FinishReason::Length));
        sequence.push(4);
        assert_eq!(
            sequence
                .sample_run(sequence.tokens.len() + sequence.in_flight, 3)
                .stop_ids_banned,
            0
        );
        assert_eq!(sequence.finish_with(5, 100), Some(FinishReason::Stop));
        assert_eq!(sequence.finish_with(4, 100), Some(FinishReason::Length));
    }
}
