//! Reasoning items for clients of OpenAI's reasoning models. OpenAI hides the text: a client shows the summary and sends back
//! `encrypted_content`. Baton has the text in `content`. If the client asks for a summary, that is the whole text again; if it asks for
//! `encrypted_content`, that is the text in base64, not encrypted. So such clients show the reasoning and send it back.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::answer::{Open, ResponseWriter};
use crate::openai::{escape, put};

/// What `encrypted_content` begins with.
const MARK: &str = "baton:";

/// What of the reasoning is written besides its text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasoned {
    /// A summary, which is all of it.
    pub has_summary: bool,
    /// A text to send back.
    pub is_sent_back: bool,
}

/// The reasoning in an `encrypted_content` that this server wrote.
pub fn sent_back(encrypted: &str) -> Option<String> {
    let bytes = STANDARD.decode(encrypted.strip_prefix(MARK)?).ok()?;
    String::from_utf8(bytes).ok()
}

impl Reasoned {
    /// Writes the summary of this reasoning: an array.
    pub(super) fn summary(self, text: &str, out: &mut Vec<u8>) {
        out.push(b'[');
        if self.has_summary && !text.is_empty() {
            part(text, out);
        }
        out.push(b']');
    }

    /// Writes what a client sends back of it: a text or null.
    pub(super) fn encrypted(self, text: &str, out: &mut Vec<u8>) {
        match self.is_sent_back && !text.is_empty() {
            true => put(out, format_args!("\"{MARK}{}\"", STANDARD.encode(text))),
            false => out.extend_from_slice(b"null"),
        }
    }
}

fn part(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"type\":\"summary_text\",\"text\":\"");
    escape(text, out);
    out.extend_from_slice(b"\"}");
}

/// The events of a summary, where one is asked for.
impl ResponseWriter {
    /// As the item begins.
    pub(super) fn begin_summary(&mut self, open: &Open, out: &mut Vec<u8>) {
        if self.summarises(open) {
            self.summary_event("response.reasoning_summary_part.added", open, out);
            out.extend_from_slice(b",\"part\":");
            part("", out);
            out.extend_from_slice(b"}\n\n");
        }
    }

    /// With each piece of its text.
    pub(super) fn summary_delta(&mut self, open: &Open, text: &str, out: &mut Vec<u8>) {
        if self.summarises(open) {
            self.summary_event("response.reasoning_summary_text.delta", open, out);
            out.extend_from_slice(b",\"delta\":\"");
            escape(text, out);
            out.extend_from_slice(b"\"}\n\n");
        }
    }

    /// As it ends.
    pub(super) fn end_summary(&mut self, open: &Open, out: &mut Vec<u8>) {
        if self.summarises(open) {
            self.summary_event("response.reasoning_summary_text.done", open, out);
            out.extend_from_slice(b",\"text\":\"");
            escape(&open.text, out);
            out.extend_from_slice(b"\"}\n\n");
            self.summary_event("response.reasoning_summary_part.done", open, out);
            out.extend_from_slice(b",\"part\":");
            part(&open.text, out);
            out.extend_from_slice(b"}\n\n");
        }
    }

    fn summarises(&self, open: &Open) -> bool {
        self.reasoned.has_summary && open.is_reasoning()
    }

    fn summary_event(&mut self, kind: &str, open: &Open, out: &mut Vec<u8>) {
        self.event(kind, out);
        self.place(&open.id, false, out);
        out.extend_from_slice(b",\"summary_index\":0");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_back_is_what_was_sent() {
        let reasoned = Reasoned {
            has_summary: true,
            is_sent_back: true,
        };
        let mut out = Vec::new();
        reasoned.encrypted("Hm \"ü\"", &mut out);
        let text: String = serde_json::from_slice(&out).unwrap();
        assert_eq!(sent_back(&text).as_deref(), Some("Hm \"ü\""));
        for other in ["", "baton:!", "gAAAAAB", "baton:/w=="] {
            assert_eq!(sent_back(other), None, "{other}");
        }
        let mut out = Vec::new();
        Reasoned::default().encrypted("Hm", &mut out);
        Reasoned::default().summary("Hm", &mut out);
        assert_eq!(out, b"null[]");
    }
}
