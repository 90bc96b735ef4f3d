//! How model families write reasoning and tool calls.
//!
//! A model writes one stream of text. Some of it is reasoning, some is the answer, some calls tools, and each family marks that in
//! its own way: that is its chat format. Here are the formats ([`Format`], [`Reasoning`]), the rule that picks them for a model
//! ([`choose`](fn@choose)), a parser for each ([`Parser`]), and the grammar that makes a model call a tool in its
//! format ([`grammar`]).
//! There is no I/O, no clock and no randomness.
//!
//! # Input
//!
//! [`Piece`]s: text as it comes from the detokenizer, cut anywhere between characters, and special tokens, one piece each with their
//! text. Families differ in which of their markers are special tokens (`[TOOL_CALLS]` is, Qwen's `<tool_call>` is not), and the same
//! marker may be either in two tokenizers. So a marker is found in both: a special token that is a marker, or text that spells it. A
//! special token that is no marker of the format, such as the end of the turn, has no place in the text and is dropped.
//!
//! # Output
//!
//! [`Event`]s. Adjacent events of one kind may be cut anywhere; joined, they are the same however the input was cut:
//!
//! - The arguments of a call, all its [`Event::CallArguments`] joined, are the JSON text of one object: the model's own text in
//!   formats that write JSON, a translation in those that write XML or Python. They are streamed; a stream that was cut short
//!   leaves them cut short.
//! - No text is lost and none repeated: what is not part of a call, nor a marker, is content or reasoning.
//! - What looks like a call and is none (no JSON, no name, a key that has no place there) is content, as the model wrote it. A call
//!   is believed once its name is known and its arguments begin, and then it is not taken back: what is wrong afterwards ends
//!   the call, and the rest is content.
//! - Where a marker opens calls, a call to a tool that was not offered is a call: the model meant one, and the client's
//!   answer ("no such tool") is what sets it right. Formats without a marker (a JSON object or a Python list as the answer) call
//!   only tools that were offered; with any other name it is an answer that happens to look so.
//! - White space beside a marker belongs to the marker. Templates put it there, and they put it there again when the message comes
//!   back: kept, it would double, and the prefix would no longer be the one in the cache.
//! - Memory is bounded by [`HELD_BYTES_MAX`] for what cannot be decided yet. What would need more is content.
#![forbid(unsafe_code)]

mod calls;
mod choose;
mod event;
mod format;
pub mod grammar;
mod id;
mod lexer;
mod literal;
mod out;
mod parser;
mod thinking;
mod tool;

pub use choose::{Choice, Facts, choose};
pub use event::{End, Event, Piece};
pub use format::{Format, Reasoning};
pub use id::call_id;
pub use parser::Parser;
pub use tool::{Tool, Tools};

/// Most bytes that a parser holds back: a call whose name has not come, or a value that is translated whole.
pub const HELD_BYTES_MAX: usize = 64 << 10;

/// Most bytes of a tool's name, a call's id or a channel's header.
pub(crate) const NAME_BYTES_MAX: usize = 256;
