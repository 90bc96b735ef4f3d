//! A request of a world: what it asks for, when it arrives, when it is retried, and how long its KV is leased.

use baton_engine::{NewSequence, SampleRequest, SampleState, TokenCount};
use baton_protocol::{
    CacheSalt, FinishReason, Generation, PackedTokens, Sampling, SequenceSpec, Service, Tier,
};

use super::rule::Rule;
use crate::Random;

/// Longest prompt, in tokens.
const PROMPT_MAX: usize = 80;
/// Longest output.
const OUTPUT_MAX: usize = 24;

/// What one sequence asks for. All of it is drawn from the world's random numbers.
#[derive(Clone, Debug)]
pub struct Job {
    pub prompt: Vec<u32>,
    pub generation: Generation,
    pub service: Service,
    pub rule: Option<Rule>,
    /// Alternatives to report with each token of the prompt, if its log-probabilities are wanted.
    pub prompt_logprobs: Option<u8>,
    pub stream: bool,
    /// The step before which it is submitted.
    pub arrives: usize,
    /// Steps for which its KV is leased between prompt and output.
    pub leased: usize,
    /// After so many output tokens it is aborted and submitted again, as a retry on another worker would be. `None` once that is done.
    pub retry_at: Option<usize>,
}

/// Why a sequence ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Finished(FinishReason),
    /// No token may come.
    Failed,
}

impl Job {
    /// One of `vocab` tokens. Prompts begin with parts of `stems`, now and then.
    pub fn draw(random: &mut Random, vocab: u32, stems: &[Vec<u32>]) -> Self {
        let one_in = |random: &mut Random, n| random.below(n) == 0;
        let mut prompt = Vec::new();
        if one_in(random, 2) {
            let stem = &stems[random.below(stems.len())];
            prompt.extend(&stem[..random.below(stem.len() + 1)]);
        }
        let own = 1 + random.below(PROMPT_MAX - prompt.len());
        prompt.extend(random.tokens(own, vocab as usize));
        let stops = match random.below(3) {
            0 => 40,
            1 => 3,
            _ => 0,
        };
        let max_tokens = 1 + random.below(OUTPUT_MAX);
        let generation = Generation {
            sampling: sampling(random, vocab),
            stop_token_ids: random.tokens(stops, vocab as usize),
            min_tokens: random.below(max_tokens) as u32,
            max_tokens: max_tokens as u32,
            ..Generation::default()
        };
        let tier = match one_in(random, 4) {
            true => Tier::Batch,
            false => Tier::Interactive,
        };
        Self {
            prompt,
            generation,
            service: Service {
                tier,
                priority: random.below(3) as i32 - 1,
                itl_ms: None,
            },
            rule: one_in(random, 2).then(|| Rule::draw(random, vocab)),
            prompt_logprobs: one_in(random, 6).then(|| random.below(3) as u8),
            stream: one_in(random, 3),
            arrives: random.below(30),
            leased: random.below(4),
            retry_at: one_in(random, 4).then(|| random.below(max_tokens)),
        }
    }

    /// The sequence with so much output.
    pub fn spec(&self, output: &[u32]) -> SequenceSpec {
        let mut tokens = self.prompt.clone();
        tokens.extend(output);
        SequenceSpec {
            tokens: PackedTokens(tokens),
            prompt_tokens: self.prompt.len() as u32,
            generation: self.generation.clone(),
            cache_salt: CacheSalt::NONE,
            service: self.service,
        }
    }

    /// The same as a prompt to run. Log-probabilities of the prompt are asked for once, with no output.
    pub fn new_sequence(&self, key: u64, output: &[u32]) -> NewSequence {
        NewSequence {
            key,
            spec: self.spec(output),
            prompt_logprobs: self.prompt_logprobs.filter(|_| output.is_empty()),
            constraint: self.rule.map(|rule| rule.after(output)),
            stream: self.stream,
        }
    }

    /// How the token after this output is chosen.
    pub fn request(&self, output: &[u32]) -> SampleRequest {
        let state = SampleState {
            sampling: self.generation.sampling.clone(),
            stop_token_ids: self.generation.stop_token_ids.clone(),
            counts: self.counts(output),
        };
        SampleRequest {
            position: (self.prompt.len() + output.len()) as u32,
            ban_stop_ids: output.len() < self.generation.min_tokens as usize,
            state: state.into(),
            mask: self.rule.map(|rule| rule.mask(output)),
        }
    }

    /// Whether the text ends with this output, of sequences that have `tokens_max` tokens at most.
    pub fn end(&self, output: &[u32], tokens_max: usize) -> Option<End> {
        let last = output.last()?;
        let finish = if self.generation.stop_token_ids.contains(last) {
            FinishReason::Stop
        } else if self.rule.is_some_and(|rule| rule.is_whole(output)) {
            FinishReason::Whole
        } else if output.len() >= self.generation.max_tokens as usize
            || self.prompt.len() + output.len() >= tokens_max
        {
            FinishReason::Length
        } else {
            return None;
        };
        Some(End::Finished(finish))
    }

    /// Not counted by the engine: that it counts right is tested with this.
    fn counts(&self, output: &[u32]) -> Vec<TokenCount> {
        let mut state = SampleState::default();
        let mut prompt = self.prompt.clone();
        prompt.sort_unstable();
        for tokens in prompt.chunk_by(|a, b| a == b) {
            state.counts.push(TokenCount {
                token: tokens[0],
                prompt: tokens.len() as u32,
                output: 0,
            });
        }
        output.iter().for_each(|token| state.count(*token));
        state.counts
    }
}

fn sampling(random: &mut Random, vocab: u32) -> Sampling {
    let base = Sampling {
        temperature: 1.5,
        seed: random.below(1 << 30) as u64,
        logprobs: (random.below(4) == 0).then(|| random.below(4) as u8),
        ..Sampling::default()
    };
    match random.below(8) {
        0 | 1 => Sampling {
            temperature: 0.0,
            ..base
        },
        2 => Sampling { top_k: 9, ..base },
        3 => Sampling { top_p: 0.7, ..base },
        4 => Sampling {
            min_p: 0.05,
            ..base
        },
        5 => Sampling {
            logit_bias: vec![(random.below(vocab as usize) as u32, 4.0)],
            ..base
        },
        6 => Sampling {
            repetition_penalty: 1.5,
            presence_penalty: 0.25,
            frequency_penalty: 0.5,
            ..base
        },
        _ => base,
    }
}
