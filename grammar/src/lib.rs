//! Grammars: which token may come next in an output that must follow a JSON schema, a regular expression or a Lark grammar.
//!
//! - [`check`] says whether a grammar can be used at all, without any model: the API server asks it before a request goes on.
//! - [`Compiler`] knows a model's vocabulary and makes a [`Matcher`] of a grammar. A worker has one.
//! - [`Matcher`] stands at one place of one output: it takes tokens, and says which may come next.
//!
//! The parsing is [`llguidance`]'s: an Earley parser over a lexer of derivatives, walked over a trie of the vocabulary. What is
//! added here are bounds (on the grammar's size, on the time of compiling, on the memory of its lexer), the end of an
//! output, and errors that a client can read.
//!
//! Costs: a compiler holds some 10 MB for a vocabulary of 128,000 tokens and takes some 100 ms to build. A matcher takes 0.1 to
//! 10 ms to compile and 0.1 to some MB; a mask takes some 10 µs, a rare one milliseconds.
#![forbid(unsafe_code)]

mod compiler;
mod error;
mod limits;
mod matcher;

pub use compiler::{Compiler, check};
pub use error::GrammarError;
pub use matcher::Matcher;

#[cfg(test)]
mod tests;
