//! What answers look like. Chunks of a stream are written by hand around text that alone is escaped:
//! a token costs no JSON value.

use std::io::Write as _;
use std::sync::Arc;

use baton_protocol::{FinishReason, TopLogprob};

use super::logprobs::{finite, logprob_object, separated, token_name, token_text};
use crate::output::{Finish, LogprobEntry, Piece, Stop, Usage};
use crate::text::tokenizer::ModelText;

/// Which of the two APIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApiKind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What an answer shows besides its text.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// It is a stream.
    pub stream: bool,
    /// Usage at the end of the stream.
    pub include_usage: bool,
    /// And with each event.
    pub continuous_usage: bool,
    /// Log-probabilities.
    pub logprobs: bool,
    /// Those of prompts.
    pub prompt_logprobs: bool,
    /// In which tokens are named by their ids.
    pub tokens_as_ids: bool,
    /// The answer is calls: it has no content.
    pub calls_only: bool,
    /// Token ids: those of each prompt, and how many choices it has.
    pub token_ids: Option<(Vec<Arc<[u32]>>, usize)>,
}

/// OpenAI's word for why a choice ended.
fn label(finish: &Finish) -> &'static str {
    match (finish.reason, finish.has_called) {
        (FinishReason::Stop | FinishReason::Whole, true) => "tool_calls",
        // One that was cut was not done, whatever it was doing.
        (reason, _) => reason.label(),
    }
}

/// What all pieces of one answer share.
#[derive(Clone, Debug)]
pub struct Shape {
    kind: ApiKind,
    shown: Shown,
    /// `"id":…,"object":…,"created":…,"model":…`
    head: String,
    /// `,"system_fingerprint":…`: in answers in one piece, and at the end of streams.
    fingerprint: String,
}

impl Shape {
    /// The shape of the answer to one request.
    pub fn new(kind: ApiKind, id: &str, model: &str, fingerprint: &str, shown: Shown) -> Self {
        let (prefix, object) = match (kind, shown.stream) {
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
            shown,
            head,
            fingerprint: format!(",\"system_fingerprint\":\"{fingerprint}\""),
        }
    }

    /// The first chunk of a choice. Completions have one only if they show the prompt's token ids.
    pub fn role_chunk(&self, index: usize, usage: Usage, out: &mut Vec<u8>) {
        match self.kind {
            ApiKind::Chat => {
                out.extend_from_slice(b"data: {");
                out.extend_from_slice(self.head.as_bytes());
                self.prompt_token_ids(index, out);
                put(out, format_args!(",\"choices\":[{{\"index\":{index},"));
                out.extend_from_slice(match self.shown.calls_only {
                    true => {
                        b"\"delta\":{\"role\":\"assistant\",\"content\":null},\"logprobs\":null"
                            .as_slice()
                    }
                    false => {
                        b"\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null"
                    }
                });
            }
            ApiKind::Completion if self.shown.token_ids.is_none() => return,
            ApiKind::Completion => {
                self.open_chunk(index, out);
                out.extend_from_slice(b"\"text\":\"\",\"logprobs\":null");
                self.prompt_token_ids(index, out);
            }
        }
        self.close_chunk(&[], None, usage, out);
    }

    /// A chunk with text.
    pub fn text_chunk(
        &self,
        index: usize,
        piece: Piece<'_>,
        usage: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        let text = piece.text;
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
        self.logprobs(piece.logprobs, model, out);
        self.close_chunk(piece.token_ids, None, usage, out);
    }

    /// A chunk of a chat with this delta, the inside of an object, in place of text.
    pub(super) fn delta_chunk(
        &self,
        index: usize,
        piece: Piece<'_>,
        usage: Usage,
        model: &ModelText,
        out: &mut Vec<u8>,
        delta: impl FnOnce(&mut Vec<u8>),
    ) {
        self.open_chunk(index, out);
        out.extend_from_slice(b"\"delta\":{");
        delta(out);
        out.extend_from_slice(b"},\"logprobs\":");
        self.logprobs(piece.logprobs, model, out);
        self.close_chunk(piece.token_ids, None, usage, out);
    }

    /// The last chunk of a choice.
    pub fn finish_chunk(&self, index: usize, finish: &Finish, usage: Usage, out: &mut Vec<u8>) {
        self.open_chunk(index, out);
        out.extend_from_slice(match self.kind {
            ApiKind::Chat => b"\"delta\":{},\"logprobs\":null",
            ApiKind::Completion => b"\"text\":\"\",\"logprobs\":null",
        });
        self.close_chunk(&[], Some(finish), usage, out);
    }

    /// The end of all chunks.
    pub fn end_chunks(&self, usage: Usage, out: &mut Vec<u8>) {
        if self.shown.include_usage {
            out.extend_from_slice(b"data: {");
            out.extend_from_slice(self.head.as_bytes());
            out.extend_from_slice(self.fingerprint.as_bytes());
            out.extend_from_slice(b",\"choices\":[],\"usage\":");
            write_usage(usage, out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// The head of an answer in one piece, up to what its prompt has.
    pub fn open_answer(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(self.fingerprint.as_bytes());
        if self.kind == ApiKind::Chat {
            self.prompt_token_ids(0, out);
        }
    }

    /// Whether all choices of an answer have one prompt, whose log-probabilities stand before them and not in each.
    pub fn has_one_prompt(&self) -> bool {
        self.kind == ApiKind::Chat
    }

    /// The beginning of a prompt's log-probabilities. False, and nothing, if they are not shown.
    pub fn open_prompt(&self, out: &mut Vec<u8>) -> bool {
        if self.shown.prompt_logprobs {
            out.extend_from_slice(b",\"prompt_logprobs\":[");
        }
        self.shown.prompt_logprobs
    }

    /// Those of one token: as vLLM has them, by ids, the token itself first. The rank of a token that is none of the alternatives is
    /// not known.
    pub fn prompt_logprob(
        &self,
        index: usize,
        entry: &LogprobEntry,
        model: &ModelText,
        out: &mut Vec<u8>,
    ) {
        if index > 0 {
            out.push(b',');
        }
        let Some(logprob) = entry.logprob else {
            return out.extend_from_slice(b"null");
        };
        let one = |token: u32, logprob: f32, rank: Option<usize>, out: &mut Vec<u8>| {
            let logprob = finite(logprob);
            put(
                out,
                format_args!("\"{token}\":{{\"logprob\":{logprob},\"rank\":"),
            );
            match rank {
                Some(rank) => put(out, format_args!("{rank}")),
                None => out.extend_from_slice(b"null"),
            }
            out.extend_from_slice(b",\"decoded_token\":");
            token_text(token, model, out);
            out.push(b'}');
        };
        let itself = |top: &TopLogprob| top.0 == entry.token;
        let rank = entry.top.iter().position(itself).map(|place| place + 1);
        out.push(b'{');
        one(entry.token, logprob, rank, out);
        for (place, top) in entry.top.iter().enumerate() {
            if !itself(top) {
                out.push(b',');
                one(top.0, top.1, Some(place + 1), out);
            }
        }
        out.push(b'}');
    }

    /// Their end.
    pub fn close_prompt(&self, out: &mut Vec<u8>) {
        out.push(b']');
    }

    /// The beginning of its choices.
    pub fn open_choices(&self, out: &mut Vec<u8>) {
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
            ApiKind::Chat => b",\"refusal\":null,\"annotations\":[]},\"logprobs\":",
            ApiKind::Completion => b",\"logprobs\":",
        });
    }

    /// The beginning of one of the arrays that hold its log-probabilities, with the end of the one before. False after the last, of
    /// which this is the end.
    pub fn open_logprobs(&self, array: usize, out: &mut Vec<u8>) -> bool {
        let begins: &[&str] = match self.kind {
            _ if !self.shown.logprobs => &[],
            ApiKind::Chat => &["{\"content\":["],
            ApiKind::Completion => &[
                "{\"tokens\":[",
                "],\"token_logprobs\":[",
                "],\"top_logprobs\":[",
                "],\"text_offset\":[",
            ],
        };
        let end = match self.kind {
            _ if !self.shown.logprobs => "null",
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
            (ApiKind::Chat, _) => logprob_object(entry, self.shown.tokens_as_ids, model, out),
            (ApiKind::Completion, 0) => {
                token_name(entry.token, self.shown.tokens_as_ids, model, out)
            }
            (ApiKind::Completion, 1) => match entry.logprob {
                Some(logprob) => put(out, format_args!("{}", finite(logprob))),
                None => out.extend_from_slice(b"null"),
            },
            (ApiKind::Completion, 2) => self.top_logprobs(entry, model, out),
            (ApiKind::Completion, _) => put(out, format_args!("{}", entry.offset)),
        }
    }

    /// The end of one choice.
    pub fn close_choice(
        &self,
        index: usize,
        token_ids: &[u32],
        finish: &Finish,
        out: &mut Vec<u8>,
    ) {
        if self.shown.token_ids.is_some() {
            ids(",\"token_ids\":", token_ids, out);
            if self.kind == ApiKind::Completion {
                self.prompt_token_ids(index, out);
            }
        }
        self.finish_reason(finish, out);
        out.push(b'}');
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
        number(index, out);
        out.push(b',');
    }

    fn close_chunk(
        &self,
        token_ids: &[u32],
        finish: Option<&Finish>,
        usage: Usage,
        out: &mut Vec<u8>,
    ) {
        if !token_ids.is_empty() {
            ids(",\"token_ids\":", token_ids, out);
        }
        match finish {
            None => out.extend_from_slice(b",\"finish_reason\":null}]"),
            Some(finish) => {
                self.finish_reason(finish, out);
                out.extend_from_slice(b"}]");
                out.extend_from_slice(self.fingerprint.as_bytes());
            }
        }
        if self.shown.continuous_usage {
            out.extend_from_slice(b",\"usage\":");
            write_usage(usage, out);
        } else if self.shown.include_usage {
            out.extend_from_slice(b",\"usage\":null");
        }
        out.extend_from_slice(b"}\n\n");
    }

    /// Why a choice ended, and as vLLM has it, with which stop of the client's.
    fn finish_reason(&self, finish: &Finish, out: &mut Vec<u8>) {
        put(
            out,
            format_args!(",\"finish_reason\":\"{}\",\"stop_reason\":", label(finish)),
        );
        match &finish.stop {
            None => out.extend_from_slice(b"null"),
            Some(Stop::Token(token)) => put(out, format_args!("{token}")),
            Some(Stop::Text(text)) => {
                out.push(b'"');
                escape(text, out);
                out.push(b'"');
            }
        }
    }

    /// Those of this choice's prompt, if ids are shown. All at once: they are no more than the model holds.
    fn prompt_token_ids(&self, index: usize, out: &mut Vec<u8>) {
        if let Some((prompts, choices_each)) = &self.shown.token_ids
            && let Some(prompt) = prompts.get(index / choices_each.max(&1))
        {
            ids(",\"prompt_token_ids\":", prompt, out);
        }
    }

    /// The most likely tokens, and the chosen one, which need not be among them: of 0 alternatives, that one alone.
    fn top_logprobs(&self, entry: &LogprobEntry, model: &ModelText, out: &mut Vec<u8>) {
        let Some(chosen) = entry.logprob else {
            return out.extend_from_slice(b"null");
        };
        out.push(b'{');
        separated(&entry.top, out, |TopLogprob(token, logprob), out| {
            token_name(*token, self.shown.tokens_as_ids, model, out);
            put(out, format_args!(":{}", finite(*logprob)));
        });
        let mut top = entry.top.iter();
        if !top.any(|TopLogprob(token, _)| *token == entry.token) {
            if !entry.top.is_empty() {
                out.push(b',');
            }
            token_name(entry.token, self.shown.tokens_as_ids, model, out);
            put(out, format_args!(":{}", finite(chosen)));
        }
        out.push(b'}');
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

/// An array of token ids, after this.
fn ids(before: &str, ids: &[u32], out: &mut Vec<u8>) {
    out.extend_from_slice(before.as_bytes());
    out.push(b'[');
    separated(ids, out, |id, out| put(out, format_args!("{id}")));
    out.push(b']');
}

fn write_usage(usage: Usage, out: &mut Vec<u8>) {
    put(
        out,
        format_args!(
            "{{\"prompt_tokens\":{},\"completion_tokens\":{},\"total_tokens\":{},\
             \"prompt_tokens_details\":{{\"cached_tokens\":{}}},\
             \"completion_tokens_details\":{{\"reasoning_tokens\":{}}}}}",
            usage.prompt,
            usage.completion,
            usage.prompt + usage.completion,
            usage.cached,
            usage.reasoning
        ),
    );
}

/// Appends this.
pub fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to memory cannot fail.
    let _ = out.write_fmt(text);
}

/// Appends a number. Most streams have one choice, and each of their events its number.
fn number(number: usize, out: &mut Vec<u8>) {
    match u8::try_from(number) {
        Ok(digit @ 0..=9) => out.push(b'0' + digit),
        _ => put(out, format_args!("{number}")),
    }
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
