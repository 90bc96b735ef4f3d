//! Why a grammar, or a tokenizer, cannot be used.

use std::fmt;

/// Longest message of the parser's that is passed on, in bytes: it may quote the grammar.
const DETAIL_BYTES_MAX: usize = 500;

/// What cannot be done, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrammarError {
    /// The grammar is wrong, or says what is not supported: the client can mend it.
    Grammar(String),
    /// The model's tokenizer cannot be used for structured output.
    Tokenizer(String),
    /// A token was given to a matcher that it does not allow, or its parser gave up at a bound.
    Token(String),
}

impl fmt::Display for GrammarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grammar(detail) => write!(f, "the grammar cannot be compiled: {detail}"),
            Self::Tokenizer(detail) => write!(
                f,
                "structured output is not possible with this model's tokenizer: {detail}"
            ),
            Self::Token(detail) => {
                write!(f, "the grammar cannot be followed any further: {detail}")
            }
        }
    }
}

impl std::error::Error for GrammarError {}

/// The parser's message on one line, without what it says of its own inside, cut to a bound.
pub(crate) fn detail(error: impl fmt::Display) -> String {
    let text = error.to_string();
    let text = text.split("<state>").next().unwrap_or_default();
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.len() > DETAIL_BYTES_MAX {
        let end = (0..=DETAIL_BYTES_MAX)
            .rev()
            .find(|at| line.is_char_boundary(*at));
        line.truncate(end.unwrap_or(0));
        line.push('…');
    }
    line
}
