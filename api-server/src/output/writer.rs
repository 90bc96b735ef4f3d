//! How a door writes an answer. A door is a reader of bodies and one of these.

use super::{Call, Finish, LogprobEntry, Part, Piece, Usage};
use crate::error::ApiError;
use crate::text::tokenizer::ModelText;

/// Writes the events of a stream, which is all choices of one request. For each choice it is called in the order `open`, `text` and
/// `part`, `finish`; after the last choice `done`. A failure ends the stream at any place, with `fail` in place of the rest.
///
/// Each appends whole events to `out`. Nothing may be written that grows with the output but the output itself.
pub trait StreamWriter {
    /// A choice begins.
    fn open(&mut self, index: usize, usage: Usage, out: &mut Vec<u8>);

    /// Content, which has no part of its own.
    fn text(
        &mut self,
        index: usize,
        piece: Piece<'_>,
        usage: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
    );

    /// A part. The piece has the tokens that came with it and no text.
    fn part(
        &mut self,
        index: usize,
        part: &Part,
        piece: Piece<'_>,
        usage: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
    );

    /// A choice ends.
    fn finish(&mut self, index: usize, finish: &Finish, usage: Usage, out: &mut Vec<u8>);

    /// All have ended.
    fn done(&mut self, usage: Usage, out: &mut Vec<u8>);

    /// The request failed, after its status was sent.
    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>);
}

/// Writes the answer of a door that has one choice, as a stream or in one piece. What it may repeat of log-probabilities is bounded
/// before ([`Params::check_repeated`](crate::openai::Params::check_repeated)).
pub trait AnswerWriter: StreamWriter + Send {
    /// The JSON document. It is made at once, so it is to be no more than a small multiple of the output.
    fn whole(self: Box<Self>, outcome: Outcome<'_>, model: &ModelText) -> Vec<u8>;
}

/// A choice that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome<'a> {
    /// Text of the answer.
    pub content: &'a str,
    /// Text of the reasoning; empty if there is none or it is not wanted.
    pub reasoning: &'a str,
    /// Calls of tools, in their order.
    pub calls: &'a [Call],
    /// Log-probabilities, if asked for.
    pub logprobs: &'a [LogprobEntry],
    /// Why it ended.
    pub finish: &'a Finish,
    /// Tokens used.
    pub usage: Usage,
}
