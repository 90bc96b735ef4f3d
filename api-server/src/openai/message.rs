//! The parts of a chat message beside its content: reasoning and calls of tools.

use super::shape::{Shape, escape, put};
use crate::output::{Call, Part, Piece, Usage};
use crate::text::tokenizer::ModelText;

impl Shape {
    /// A chunk with a part of a message. The piece has its tokens and no text.
    pub fn part_chunk(
        &self,
        index: usize,
        part: &Part,
        piece: Piece<'_>,
        usage: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        self.delta_chunk(index, piece, usage, model, out, |out| match part {
            Part::Content(text) => {
                out.extend_from_slice(b"\"content\":\"");
                escape(text, out);
                out.push(b'"');
            }
            // Clients know it by either name.
            Part::Reasoning(text) => {
                out.extend_from_slice(b"\"reasoning_content\":\"");
                escape(text, out);
                out.extend_from_slice(b"\",\"reasoning\":\"");
                escape(text, out);
                out.push(b'"');
            }
            Part::Call { index, id, name } => {
                open_call(*index, id, name, out);
                out.extend_from_slice(b"\"}}]");
            }
            Part::Arguments { index, delta } => {
                put(
                    out,
                    format_args!(
                        "\"tool_calls\":[{{\"index\":{index},\"function\":{{\"arguments\":\""
                    ),
                );
                escape(delta, out);
                out.extend_from_slice(b"\"}}]");
            }
        });
    }

    /// Of an answer in one piece, the beginning of the reasoning, under the first of its names or the second.
    pub fn open_reasoning(&self, is_first: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(match is_first {
            true => b",\"reasoning_content\":\"",
            false => b",\"reasoning\":\"",
        });
    }

    /// The end of any text of it.
    pub fn close_string(&self, out: &mut Vec<u8>) {
        out.push(b'"');
    }

    /// The beginning of a call, up to its arguments.
    pub fn open_call(&self, number: usize, call: &Call, out: &mut Vec<u8>) {
        out.extend_from_slice(match number {
            0 => b",\"tool_calls\":[",
            _ => b",",
        });
        out.extend_from_slice(b"{\"id\":\"");
        escape(&call.id, out);
        out.extend_from_slice(b"\",\"type\":\"function\",\"function\":{\"name\":\"");
        escape(&call.name, out);
        out.extend_from_slice(b"\",\"arguments\":\"");
    }

    /// The end of a call.
    pub fn close_call(&self, is_last: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(if is_last { b"\"}}]" } else { b"\"}}" });
    }
}

fn open_call(index: usize, id: &str, name: &str, out: &mut Vec<u8>) {
    put(
        out,
        format_args!("\"tool_calls\":[{{\"index\":{index},\"id\":\""),
    );
    escape(id, out);
    out.extend_from_slice(b"\",\"type\":\"function\",\"function\":{\"name\":\"");
    escape(name, out);
    out.extend_from_slice(b"\",\"arguments\":\"");
}
