//! How the next token is chosen, when generation ends, and what is reported of each token.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::TokenRules;
use crate::token_rules::shared;

/// How one token is chosen from the logits. The defaults choose greedily.
///
/// Order of operations, the same in every executor: `logit_bias`, banned ids (stop ids before
/// `min_tokens`), repetition, frequency and presence penalties, the mask of the grammar and of the token rules, temperature, top-k, top-p, min-p, draw.
/// Log-probabilities are of the distribution before temperature and truncation, after bias and penalties.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time it is in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these token ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Random numbers are a function of this and the position of the token in the sequence, and of
    /// nothing else: a retry on another worker draws the same numbers. The API server draws a seed
    /// where the client gave none.
    pub seed: u64,
    /// Report the log-probability of each token, and of this many most likely ones.
    pub logprobs: Option<u8>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// Sampling and the rules that end a generation. Stop strings are the API server's affair.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Token ids that end the generation: the model's end-of-sequence ids (none under
    /// `ignore_eos`) and the client's own. The token itself is part of the output.
    pub stop_token_ids: Vec<u32>,
    /// Stop ids cannot be chosen before this many tokens are generated.
    #[serde(default)]
    pub min_tokens: u32,
    /// Generation ends after this many tokens, counted from the end of the prompt. At least 1.
    pub max_tokens: u32,
    /// What the output must follow, besides all else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grammar: Option<Grammar>,
    /// Which tokens the output may have, besides all else.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "shared")]
    pub token_rules: Option<Arc<TokenRules>>,
}

/// What an output must follow. No other token than those that it allows is chosen; where it allows an end, stop ids are, too. An
/// output after which nothing may come ends with [`FinishReason::Whole`]; one that is cut by `max_tokens` may be no whole one.
///
/// Whoever sends one has made sure that it can be compiled; a worker refuses one that cannot as [`Malformed`](crate::Refusal::Malformed).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grammar {
    /// JSON that is valid by this JSON schema, given as JSON text.
    JsonSchema(String),
    /// Text that this regular expression matches as a whole, in the syntax of Rust's `regex` crate.
    Regex(String),
    /// Text of this grammar, in llguidance's dialect of Lark.
    Lark(String),
}

impl Grammar {
    /// Its text.
    pub fn text(&self) -> &str {
        let (Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text)) = self;
        text
    }
}

/// Why a generation ended by its own rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop id was chosen; it is the last token.
    Stop,
    /// The grammar allows nothing after the last token, which is part of the text.
    Whole,
    /// `max_tokens`, or the model's longest sequence, was reached.
    Length,
}

impl FinishReason {
    /// OpenAI's word for it: to a client a whole text is one that ended by itself.
    pub fn label(self) -> &'static str {
        match self {
            Self::Stop | Self::Whole => "stop",
            Self::Length => "length",
        }
    }
}

/// One candidate and its log-probability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob(pub u32, pub f32);

/// Log-probabilities at one position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// Natural logarithm of the chosen token's probability.
    pub logprob: f32,
    /// The most likely tokens, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TopLogprob>,
}

impl TokenLogprobs {
    /// Most bytes that this takes in a message with this many alternatives, of a vocabulary of this many tokens, and the
    /// comma after it.
    pub const fn bytes_max(top: u8, vocab: u32) -> usize {
        /// Longest 32-bit floating point number in JSON: sign, `0.0000`, nine digits.
        const NUMBER: usize = 16;
        let digits = match vocab {
            0 | 1 => 1,
            count => (count - 1).ilog10() as usize + 1,
        };
        let one = r#"{"logprob":,"top":[]},"#.len() + NUMBER;
        let alternative = "[,],".len() + digits + NUMBER;
        one + top as usize * alternative
    }
}
