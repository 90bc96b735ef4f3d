//! What answers look like. Chunks of a stream are written by hand around text that alone is escaped:
//! a token costs no JSON value.

use std::io::Write as _;

use baton_protocol::{FinishReason, TopLogprob};

use super::Usage;
use crate::error::ApiError;
use crate::text::tokenizer::ModelText;

/// Which of the two APIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiKind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
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
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Why the generation did.
    pub reason: FinishReason,
    /// Whether the model called tools.
    pub has_called: bool,
}

impl Finish {
    /// OpenAI's word for it.
    pub fn label(self) -> &'static str {
        match (self.reason, self.has_called) {
            (FinishReason::Stop, false) => "stop",
            (FinishReason::Stop, true) => "tool_calls",
            // Whatever it was doing, it was not done.
            (FinishReason::Length, _) => "length",
        }
    }
}

/// What all pieces of one answer share.
#[derive(Clone, Debug)]
pub struct Shape {
    kind: ApiKind,
    include_usage: bool,
    logprobs: bool,
    /// `"id":…,"object":…,"created":…,"model":…`
    head: String,
}

impl Shape {
    /// The shape of the answer to one request.
    pub fn new(
        kind: ApiKind,
        id: &str,
        model: &str,
        stream: bool,
        include_usage: bool,
        logprobs: bool,
    ) -> Self {
        let (prefix, object) = match (kind, stream) {
            (ApiKind::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
            (ApiKind::Chat, false) => ("chatcmpl", "chat.completion"),
            (ApiKind::Completion, _) => ("cmpl", "text_completion"),
        };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let created = now.map_or(0, |since| since.as_secs());
        let mut head = format!(
            "\"id\":\"{prefix}-{id}\",\"object\":\"{object}\",\"created\":{created},\"model\":\""
        )
        .into_bytes();
        escape(model, &mut head);
        head.push(b'"');
        let head = String::from_utf8_lossy(&head).into_owned();
        Self {
            kind,
            include_usage,
            logprobs,
            head,
        }
    }

    /// The first chunk of a choice. Only chats have one.
    pub fn role_chunk(&self, index: usize, out: &mut Vec<u8>) {
        if self.kind == ApiKind::Chat {
            self.open_chunk(index, out);
            out.extend_from_slice(
                b"\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null",
            );
            self.close_chunk(None, out);
        }
    }

    /// A chunk with text.
    pub fn text_chunk(
        &self,
        index: usize,
        text: &str,
        logprobs: &[LogprobEntry],
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        self.open_chunk(index, out);
        match self.kind {
            ApiKind::Chat => {
                out.extend_from_slice(b"\"delta\":{\"content\":\"");
                escape(text, out);
                out.extend_from_slice(b"\"},\"logprobs\":");
            }
            ApiKind::Completion => {
                out.extend_from_slice(b"\"text\":\"");
                escape(text, out);
                out.extend_from_slice(b"\",\"logprobs\":");
            }
        }
        self.logprobs(logprobs, model, out);
        self.close_chunk(None, out);
    }

    /// A chunk of a chat with this delta, the inside of an object.
    pub(super) fn delta_chunk(
        &self,
        index: usize,
        logprobs: &[LogprobEntry],
        model: &ModelText,
        out: &mut Vec<u8>,
        delta: impl FnOnce(&mut Vec<u8>),
    ) {
        self.open_chunk(index, out);
        out.extend_from_slice(b"\"delta\":{");
        delta(out);
        out.extend_from_slice(b"},\"logprobs\":");
        self.logprobs(logprobs, model, out);
        self.close_chunk(None, out);
    }

    /// The last chunk of a choice.
    pub fn finish_chunk(&self, index: usize, finish: Finish, out: &mut Vec<u8>) {
        self.open_chunk(index, out);
        out.extend_from_slice(match self.kind {
            ApiKind::Chat => b"\"delta\":{},\"logprobs\":null",
            ApiKind::Completion => b"\"text\":\"\",\"logprobs\":null",
        });
        self.close_chunk(Some(finish), out);
    }

    /// The end of a stream.
    pub fn done(&self, usage: Usage, out: &mut Vec<u8>) {
        if self.include_usage {
            out.extend_from_slice(b"data: {");
            out.extend_from_slice(self.head.as_bytes());
            out.extend_from_slice(b",\"choices\":[],\"usage\":");
            write_usage(usage, out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// An error in mid-stream.
    pub fn error_event(error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(b"event: error\ndata: ");
        out.extend_from_slice(error.body().as_bytes());
        out.extend_from_slice(b"\n\n");
    }

    /// The head of an answer in one piece.
    pub fn open_answer(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(b",\"choices\":[");
    }

    /// The beginning of one choice of it, up to its text.
    ///
    /// With `has_content` the text is a string, to be followed by [`Self::text`]; else it is null.
    pub fn open_choice(&self, index: usize, has_content: bool, out: &mut Vec<u8>) {
        if index > 0 {
            out.push(b',');
        }
        put(out, format_args!("{{\"index\":{index},"));
        out.extend_from_slice(match self.kind {
            ApiKind::Chat if !has_content => {
                b"\"message\":{\"role\":\"assistant\",\"content\":null"
            }
            ApiKind::Chat => b"\"message\":{\"role\":\"assistant\",\"content\":\"",
            ApiKind::Completion => b"\"text\":\"",
        });
    }

    /// A part of its text.
    pub fn text(&self, text: &str, out: &mut Vec<u8>) {
        escape(text, out);
    }

    /// From its message or its text to its log-probabilities.
    pub fn close_message(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(match self.kind {
            ApiKind::Chat => b",\"refusal\":null},\"logprobs\":",
            ApiKind::Completion => b",\"logprobs\":",
        });
    }

    /// The beginning of one of the arrays that hold its log-probabilities, with the end of the one before. False after the last, of
    /// which this is the end.
    pub fn open_logprobs(&self, array: usize, out: &mut Vec<u8>) -> bool {
        let begins: &[&str] = match self.kind {
            _ if !self.logprobs => &[],
            ApiKind::Chat => &["{\"content\":["],
            ApiKind::Completion => &[
                "{\"tokens\":[",
                "],\"token_logprobs\":[",
                "],\"top_logprobs\":[",
                "],\"text_offset\":[",
            ],
        };
        let end = match self.kind {
            _ if !self.logprobs => "null",
            ApiKind::Chat => "],\"refusal\":null}",
            ApiKind::Completion => "]}",
        };
        let begin = begins.get(array);
        out.extend_from_slice(begin.copied().unwrap_or(end).as_bytes());
        begin.is_some()
    }

    /// One entry of such an array.
    pub fn logprob(
        &self,
        array: usize,
        index: usize,
        entry: &LogprobEntry,
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        if index > 0 {
            out.push(b',');
        }
        match (self.kind, array) {
            (ApiKind::Chat, _) => chat_logprob(entry, model, out),
            (ApiKind::Completion, 0) => token_text(entry.token, model, out),
            (ApiKind::Completion, 1) => match entry.logprob {
                Some(logprob) => put(out, format_args!("{}", finite(logprob))),
                None => out.extend_from_slice(b"null"),
            },
            (ApiKind::Completion, 2) => top_logprobs(entry, model, out),
            (ApiKind::Completion, _) => put(out, format_args!("{}", entry.offset)),
        }
    }

    /// The end of one choice.
    pub fn close_choice(&self, finish: Finish, out: &mut Vec<u8>) {
        put(
            out,
            format_args!(",\"finish_reason\":\"{}\"}}", finish.label()),
        );
    }

    /// The end of it.
    pub fn close_answer(&self, usage: Usage, out: &mut Vec<u8>) {
        out.extend_from_slice(b"],\"usage\":");
        write_usage(usage, out);
        out.push(b'}');
    }

    fn open_chunk(&self, index: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: {");
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(b",\"choices\":[{\"index\":");
        put(out, format_args!("{index}"));
        out.push(b',');
    }

    fn close_chunk(&self, finish: Option<Finish>, out: &mut Vec<u8>) {
        match finish {
            None => out.extend_from_slice(b",\"finish_reason\":null}]"),
            Some(finish) => {
                put(
                    out,
                    format_args!(",\"finish_reason\":\"{}\"}}]", finish.label()),
                );
            }
        }
        if self.include_usage {
            out.extend_from_slice(b",\"usage\":null");
        }
        out.extend_from_slice(b"}\n\n");
    }

    fn logprobs(&self, entries: &[LogprobEntry], model: &ModelText, out: &mut Vec<u8>) {
        let mut array = 0;
        while self.open_logprobs(array, out) {
            for (index, entry) in entries.iter().enumerate() {
                self.logprob(array, index, entry, model, out);
            }
            array += 1;
        }
    }
}

fn chat_logprob(entry: &LogprobEntry, model: &ModelText, out: &mut Vec<u8>) {
    let one = |token: u32, logprob: f32, out: &mut Vec<u8>| {
        out.extend_from_slice(b"{\"token\":");
        token_text(token, model, out);
        put(
            out,
            format_args!(",\"logprob\":{},\"bytes\":[", finite(logprob)),
        );
        separated(model.vocabulary.bytes(token), out, |byte, out| {
            put(out, format_args!("{byte}"))
        });
        out.push(b']');
    };
    one(entry.token, entry.logprob.unwrap_or(0.0), out);
    out.extend_from_slice(b",\"top_logprobs\":[");
    separated(&entry.top, out, |TopLogprob(token, logprob), out| {
        one(*token, *logprob, out);
        out.push(b'}');
    });
    out.extend_from_slice(b"]}");
}

fn top_logprobs(entry: &LogprobEntry, model: &ModelText, out: &mut Vec<u8>) {
    if entry.top.is_empty() {
        return out.extend_from_slice(b"null");
    }
    out.push(b'{');
    separated(&entry.top, out, |TopLogprob(token, logprob), out| {
        token_text(*token, model, out);
        put(out, format_args!(":{}", finite(*logprob)));
    });
    out.push(b'}');
}

fn token_text(token: u32, model: &ModelText, out: &mut Vec<u8>) {
    out.push(b'"');
    escape(&model.token_text(token), out);
    out.push(b'"');
}

fn write_usage(usage: Usage, out: &mut Vec<u8>) {
    put(
        out,
        format_args!(
            "{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{},\
             \"prompt_tokens_details\":{{\"cached_tokens\":{}}}}}",
            usage.prompt,
            usage.completion,
            usage.prompt + usage.completion,
            usage.cached
        ),
    );
}

/// JSON has no infinity; OpenAI's stand-in for an impossible token is -9999.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        -9999.0
    }
}

fn separated<T>(items: &[T], out: &mut Vec<u8>, mut write: impl FnMut(&T, &mut Vec<u8>)) {
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write(item, out);
    }
}

pub(super) fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to memory cannot fail.
    let _ = out.write_fmt(text);
}

/// Appends text as the inside of a JSON string.
pub fn escape(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    let mut plain = 0;
    for (i, byte) in bytes.iter().enumerate() {
        if *byte >= 0x20 && *byte != b'"' && *byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[plain..i]);
        plain = i + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            other => put(out, format_args!("\\u{other:04x}")),
        }
    }
    out.extend_from_slice(&bytes[plain..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn escaped_text_is_what_json_reads_back(text in any::<String>()) {
            let mut out = vec![b'"'];
            escape(&text, &mut out);
            out.push(b'"');
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }
}
