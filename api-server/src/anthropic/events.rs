//! The answer as a stream of Anthropic's events. Written by hand around text that alone is escaped: a token costs no JSON value.

use super::answer::{MessageWriter, Opened, SIGNATURE, open_call, open_usage, write_usage};
use crate::error::ApiError;
use crate::openai::{escape, put};
use crate::output::{Finish, Part, Piece, StreamWriter, Usage};
use crate::text::tokenizer::ModelText;

impl StreamWriter for MessageWriter {
    fn open(&mut self, _: usize, usage: Usage, out: &mut Vec<u8>) {
        begin("message_start", out);
        out.extend_from_slice(b",\"message\":");
        self.head(out);
        out.extend_from_slice(b"],\"container\":null,\"stop_details\":null,\"stop_reason\":null,\"stop_sequence\":null,\"usage\":");
        write_usage(usage, out);
        out.extend_from_slice(b"}}\n\n");
        begin("ping", out);
        out.extend_from_slice(b"}\n\n");
    }

    fn text(&mut self, _: usize, piece: Piece<'_>, _: Usage, _: &ModelText, out: &mut Vec<u8>) {
        self.content(piece.text, out);
    }

    fn part(
        &mut self,
        _: usize,
        part: &Part,
        _: Piece<'_>,
        _: Usage,
        _: &ModelText,
        out: &mut Vec<u8>,
    ) {
        match part {
            Part::Content(text) => self.content(text, out),
            Part::Reasoning(text) if text.is_empty() => {}
            Part::Reasoning(text) => {
                self.within(Opened::Thinking, out);
                self.delta("thinking_delta", "thinking", text, out);
            }
            Part::Call { id, name, .. } => {
                self.close(out);
                self.start(Opened::Call, out);
                open_call(id, name, out);
                out.extend_from_slice(b"{}}}\n\n");
            }
            Part::Arguments { delta, .. } => {
                self.delta("input_json_delta", "partial_json", delta, out);
            }
        }
    }

    fn finish(&mut self, _: usize, finish: &Finish, usage: Usage, out: &mut Vec<u8>) {
        self.close(out);
        begin("message_delta", out);
        out.extend_from_slice(b",\"delta\":{");
        self.stop(finish, usage, out);
        out.extend_from_slice(b"},\"usage\":");
        open_usage(usage, out);
        out.extend_from_slice(b"}}\n\n");
    }

    fn done(&mut self, _: Usage, out: &mut Vec<u8>) {
        begin("message_stop", out);
        out.extend_from_slice(b"}\n\n");
    }

    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        let body = error.anthropic_body(Some(&self.request));
        put(out, format_args!("event: error\ndata: {body}\n\n"));
    }
}

impl MessageWriter {
    fn content(&mut self, text: &str, out: &mut Vec<u8>) {
        if !text.is_empty() {
            self.within(Opened::Text, out);
            self.delta("text_delta", "text", text, out);
        }
    }

    /// Has a block of this kind open, one that was open before or a new one.
    fn within(&mut self, kind: Opened, out: &mut Vec<u8>) {
        if self.open == Some(kind) {
            return;
        }
        self.close(out);
        self.start(kind, out);
        out.extend_from_slice(match kind {
            Opened::Thinking => {
                b"{\"type\":\"thinking\",\"thinking\":\"\",\"signature\":\"\"}}\n\n".as_slice()
            }
            _ => b"{\"type\":\"text\",\"text\":\"\"}}\n\n",
        });
    }

    /// The beginning of a block's first event, up to the block.
    fn start(&mut self, kind: Opened, out: &mut Vec<u8>) {
        begin("content_block_start", out);
        put(
            out,
            format_args!(",\"index\":{},\"content_block\":", self.blocks),
        );
        self.open = Some(kind);
        self.blocks += 1;
    }

    /// Ends the block that is open.
    fn close(&mut self, out: &mut Vec<u8>) {
        let Some(kind) = self.open else { return };
        if kind == Opened::Thinking {
            self.delta("signature_delta", "signature", SIGNATURE, out);
        }
        begin("content_block_stop", out);
        put(
            out,
            format_args!(",\"index\":{}}}\n\n", self.blocks.saturating_sub(1)),
        );
        self.open = None;
    }

    fn delta(&self, kind: &str, field: &str, text: &str, out: &mut Vec<u8>) {
        begin("content_block_delta", out);
        put(
            out,
            format_args!(
                ",\"index\":{},\"delta\":{{\"type\":\"{kind}\",\"{field}\":\"",
                self.blocks.saturating_sub(1)
            ),
        );
        escape(text, out);
        out.extend_from_slice(b"\"}}\n\n");
    }
}

/// The beginning of an event, in its object.
fn begin(kind: &str, out: &mut Vec<u8>) {
    for text in ["event: ", kind, "\ndata: {\"type\":\"", kind, "\""] {
        out.extend_from_slice(text.as_bytes());
    }
}
