//! The parts of an output, and its end.

use std::sync::Arc;

use baton_protocol::{FinishReason, TopLogprob};

/// A part of a message in a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text of the reasoning.
    Reasoning(String),
    /// Text of the answer.
    Content(String),
    /// A call begins.
    Call {
        /// Number of the call.
        index: usize,
        /// Its id.
        id: String,
        /// The tool.
        name: String,
    },
    /// Text of its arguments.
    Arguments {
        /// Number of the call.
        index: usize,
        /// JSON text, a part of it.
        delta: String,
    },
}

impl Part {
    /// Bytes of its text.
    pub fn len(&self) -> usize {
        match self {
            Self::Reasoning(text) | Self::Content(text) | Self::Arguments { delta: text, .. } => {
                text.len()
            }
            Self::Call { id, name, .. } => id.len() + name.len(),
        }
    }
}

/// A call of a message in one piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Its id.
    pub id: String,
    /// The tool.
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// One token's log-probabilities, ready to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct LogprobEntry {
    /// The token.
    pub token: u32,
    /// Its log-probability; none for the first token of a prompt.
    pub logprob: Option<f32>,
    /// Alternatives.
    pub top: Vec<TopLogprob>,
    /// Where its text begins in the choice's text, in characters.
    pub offset: usize,
    /// Whether its text is text of the answer, and not of reasoning, a call, a marker or what ended the output. A token of which
    /// nothing was told apart yet counts as what came before it.
    pub in_content: bool,
}

/// What a stream brings of one choice at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Piece<'a> {
    /// Text.
    pub text: &'a str,
    /// Log-probabilities, if asked for.
    pub logprobs: &'a [LogprobEntry],
    /// Token ids, if asked for.
    pub token_ids: &'a [u32],
}

impl Piece<'_> {
    /// Whether it brings nothing.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.logprobs.is_empty() && self.token_ids.is_empty()
    }
}

/// What the client named and the output ended with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A stop string.
    Text(Arc<str>),
    /// A stop token.
    Token(u32),
}

/// Why a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why the generation did.
    pub reason: FinishReason,
    /// Whether the model called tools.
    pub has_called: bool,
    /// What of the client's stops it was, if it was one.
    pub stop: Option<Stop>,
}
