//! What goes into an engine and what comes out.

use std::time::Duration;

use baton_protocol::{BlockRun, FinishReason, SequenceSpec, TokenLogprobs};

use crate::{BlockTable, Constraint, Sampled};

/// Bounds of an engine. What exceeds the executor's own bounds is cut to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Token budget of a step: longer prompts run in several chunks.
    pub step_tokens_max: usize,
    /// Most sequences that run at once.
    pub sequences_max: usize,
    /// Most prompts that may wait; also, beyond `sequences_max`, most resumed sequences.
    pub queue_max: usize,
    /// Keep the KV of finished sequences for prompts that begin alike.
    pub prefix_cache: bool,
}

/// A prompt to run, or prompt and output so far after a retry.
#[derive(Debug)]
pub struct NewSequence {
    /// The caller's name for it, unique among what is in the engine.
    pub key: u64,
    /// Tokens and rules.
    pub spec: SequenceSpec,
    /// Report the log-probabilities of the prompt's tokens too, with this many alternatives. Such a prompt is
    /// computed whole: cached prefixes have no logits.
    pub prompt_logprobs: Option<u8>,
    /// What its output must follow, which has taken the output in `spec`.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Tell how far it is, if it takes more than one step ([`Event::Begun`]).
    pub stream: bool,
}

/// A sequence whose KV is in place.
#[derive(Debug)]
pub struct ResumedSequence {
    /// The caller's name for it, unique among what is in the engine.
    pub key: u64,
    /// Tokens whose KV is in `blocks`, and rules.
    pub spec: SequenceSpec,
    /// The token after them, chosen already.
    pub next: u32,
    /// Blocks of this engine's pool that hold the KV of all of `spec.tokens`; there may be more.
    pub blocks: BlockTable,
    /// What its output must follow, which has taken the output in `spec` and `next`.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// What a step brought about.
#[derive(Debug)]
pub enum Event {
    /// A prompt that is to be streamed has had its first step and needs more. Its blocks are these from now on to its end.
    Begun {
        /// Which.
        key: u64,
        /// The blocks of all of its tokens.
        runs: Vec<BlockRun>,
        /// The KV of so many tokens is in place: the steps that computed it are collected.
        computed: u32,
        /// Tokens whose KV was reused.
        cached_tokens: u32,
        /// From submission to the first step.
        queue: Duration,
    },
    /// A further step of such a prompt is over, and not the last.
    Computed {
        /// Which.
        key: u64,
        /// The KV of so many tokens is in place.
        computed: u32,
    },
    /// A prompt's KV is complete and its next token chosen; the sequence has left the engine.
    Prefilled {
        /// Which.
        key: u64,
        /// The KV of all of its tokens: full blocks and at most one partial, last.
        blocks: BlockTable,
        /// The token after them.
        sampled: Sampled,
        /// Set when that token ended the generation.
        finish: Option<FinishReason>,
        /// Tokens whose KV was reused.
        cached_tokens: u32,
        /// For each prompt token but the first, if asked for.
        prompt_logprobs: Option<Vec<TokenLogprobs>>,
        /// From submission to the first step.
        queue: Duration,
        /// From the first step to the token.
        compute: Duration,
    },
    /// A token of a resumed sequence.
    Token {
        /// Which.
        key: u64,
        /// Output index: the number of output tokens before it.
        index: u32,
        /// The token.
        sampled: Sampled,
        /// Set when it ended the generation: the sequence has left and its blocks are given back.
        finish: Option<FinishReason>,
    },
    /// No next token could be chosen for a sequence, or none that its constraint allows, and no retry here would help: it has left and its blocks are given back.
    Failed {
        /// Which.
        key: u64,
        /// Why, as a sentence.
        detail: String,
    },
    /// The executor refused a step with this sequence in it, which is a defect of the engine or of the executor. The sequence has left and its
    /// blocks are given back. It can be retried as a new prompt: another sequence may be the cause.
    Refused {
        /// Which.
        key: u64,
        /// Why, as a sentence.
        detail: String,
    },
    /// No block was left for the next token of a sequence, and this was the youngest one: it has left and its blocks
    /// are given back. Running prompt and output so far as a new prompt goes on with the same text.
    Preempted {
        /// Which.
        key: u64,
    },
}

/// How busy an engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineLoad {
    /// Sequences that wait for their first step.
    pub waiting: usize,
    /// Sequences in the running batch.
    pub running: usize,
    /// Prompt tokens not yet run.
    pub waiting_tokens: usize,
    /// Those of them that belong to batch requests.
    pub batch_tokens: usize,
    /// Generating sequences, in the running batch or waiting for a place.
    pub decoding: usize,
    /// Tokens that these have together.
    pub decoding_tokens: usize,
}
