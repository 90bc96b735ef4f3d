//! The answer: a response object with its items.

use std::sync::Arc;

use baton_protocol::FinishReason;
use serde_json::{Map, Value};

use super::reasoned::Reasoned;
use super::store::{Kept, ResponseStore, Segment};
use crate::error::ApiError;
use crate::openai::{escape, logprob_object, put};
use crate::output::{AnswerWriter, Finish, LogprobEntry, Outcome, Usage};
use crate::text::tokenizer::ModelText;

/// Where a response is kept when it is over.
#[derive(Debug)]
pub struct Keeping {
    /// The store.
    pub store: Arc<ResponseStore>,
    /// The name of the key that asked, where there are keys.
    pub owner: Option<Arc<str>>,
    /// The turns before this one.
    pub before: Vec<Arc<Segment>>,
    /// The items that were asked with, a JSON array.
    pub input: String,
}

/// Writes a response, as a stream or in one piece.
#[derive(Debug)]
pub struct ResponseWriter {
    /// The request's id.
    pub(super) id: String,
    created: u64,
    /// The model's name as the inside of a JSON string.
    model: String,
    /// What is repeated of the request, as fields of an object with a comma before.
    settings: String,
    keeping: Option<Keeping>,
    /// Items that are over, as JSON.
    pub(super) items: Vec<String>,
    /// What of its reasoning it has besides the text.
    pub(super) reasoned: Reasoned,
    /// Of a stream: the item that is under way.
    pub(super) open: Option<Open>,
    /// Of a stream: events so far.
    pub(super) events: u64,
    /// Of a stream: log-probabilities of the message's tokens that no event has had yet, as [`logprobs`] writes them.
    pub(super) waiting: Vec<u8>,
}

/// An item under way.
#[derive(Debug)]
pub(super) struct Open {
    pub kind: Kind,
    /// Its id.
    pub id: String,
    /// The text so far; of a call its arguments.
    pub text: String,
    /// Of a message: the log-probabilities so far, as [`logprobs`] writes them.
    pub logprobs: Vec<u8>,
    reasoned: Reasoned,
}

/// What an item is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Reasoning,
    Message,
    Call { id: String, name: String },
}

impl Kind {
    /// The beginning of its items' ids.
    fn prefix(&self) -> &'static str {
        match self {
            Self::Reasoning => "rs",
            Self::Message => "msg",
            Self::Call { .. } => "fc",
        }
    }
}

impl ResponseWriter {
    /// For the response with this id.
    pub fn new(
        id: &str,
        model: &str,
        settings: &Map<String, Value>,
        keeping: Option<Keeping>,
    ) -> Self {
        let mut repeated = String::new();
        for (name, value) in settings {
            repeated += &format!(",\"{name}\":{value}");
        }
        let mut name = Vec::with_capacity(model.len());
        escape(model, &mut name);
        Self {
            id: id.to_owned(),
            created: unix_now(),
            model: String::from_utf8_lossy(&name).into_owned(),
            settings: repeated,
            keeping,
            items: Vec::new(),
            reasoned: Reasoned::default(),
            open: None,
            events: 0,
            waiting: Vec::new(),
        }
    }

    /// The same with this of its reasoning.
    #[must_use]
    pub fn with_reasoned(mut self, reasoned: Reasoned) -> Self {
        self.reasoned = reasoned;
        self
    }

    /// An item of this kind, with an id of its own.
    pub(super) fn begin(&self, kind: Kind) -> Open {
        Open {
            id: format!("{}_{}_{}", kind.prefix(), self.id, self.items.len()),
            kind,
            text: String::new(),
            logprobs: Vec::new(),
            reasoned: self.reasoned,
        }
    }

    /// The response with the items so far. `usage` is known at its end.
    pub(super) fn object(&self, status: Status<'_>, usage: Option<Usage>, out: &mut Vec<u8>) {
        let Self {
            id,
            created,
            model,
            settings,
            ..
        } = self;
        put(
            out,
            format_args!(
                "{{\"id\":\"resp_{id}\",\"object\":\"response\",\"created_at\":{created},\"model\":\"{model}\",\"status\":\"{}\"",
                status.word()
            ),
        );
        match status {
            Status::Completed => put(out, format_args!(",\"completed_at\":{}", unix_now())),
            _ => out.extend_from_slice(b",\"completed_at\":null"),
        }
        match status {
            Status::Failed(error) => {
                let row = error.kind.row();
                put(
                    out,
                    format_args!(
                        ",\"error\":{{\"code\":\"{}\",\"message\":\"",
                        code(row.status)
                    ),
                );
                escape(&error.message, out);
                out.extend_from_slice(b"\"}");
            }
            _ => out.extend_from_slice(b",\"error\":null"),
        }
        out.extend_from_slice(match status {
            Status::Incomplete => {
                b",\"incomplete_details\":{\"reason\":\"max_output_tokens\"}".as_slice()
            }
            _ => b",\"incomplete_details\":null",
        });
        out.extend_from_slice(b",\"output\":[");
        out.extend_from_slice(self.items.join(",").as_bytes());
        out.extend_from_slice(b"],\"usage\":");
        match usage {
            None => out.extend_from_slice(b"null"),
            Some(usage) => put(
                out,
                format_args!(
                    "{{\"input_tokens\":{},\"input_tokens_details\":{{\"cached_tokens\":{},\"cache_write_tokens\":0}},\
                     \"output_tokens\":{},\"output_tokens_details\":{{\"reasoning_tokens\":{}}},\"total_tokens\":{}}}",
                    usage.prompt,
                    usage.cached,
                    usage.completion,
                    usage.reasoning,
                    usage.prompt + usage.completion
                ),
            ),
        }
        out.extend_from_slice(settings.as_bytes());
        out.push(b'}');
    }

    /// The whole response at its end, which is kept if it is to be.
    pub(super) fn end(&mut self, finish: &Finish, usage: Usage) -> Vec<u8> {
        let mut response = Vec::new();
        self.object(Status::of(finish), Some(usage), &mut response);
        if let Some(Keeping {
            store,
            owner,
            mut before,
            input,
        }) = self.keeping.take()
        {
            let output = format!("[{}]", self.items.join(","));
            before.push(Arc::new(Segment { input, output }));
            let text = String::from_utf8_lossy(&response);
            let kept = Kept {
                response: text.as_ref().into(),
                turns: before,
            };
            store.put(&format!("resp_{}", self.id), owner, kept);
        }
        response
    }
}

/// How far a response is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Status<'a> {
    InProgress,
    Completed,
    Incomplete,
    Failed(&'a ApiError),
}

impl Status<'_> {
    pub fn of(finish: &Finish) -> Self {
        match finish.reason {
            FinishReason::Stop | FinishReason::Whole => Self::Completed,
            FinishReason::Length => Self::Incomplete,
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed(_) => "failed",
        }
    }
}

impl Open {
    /// The item as JSON, with its text if it has any yet.
    pub fn item(&self, status: &str, out: &mut Vec<u8>) {
        let Self { kind, id, text, .. } = self;
        match kind {
            Kind::Reasoning => {
                put(
                    out,
                    format_args!("{{\"type\":\"reasoning\",\"id\":\"{id}\",\"summary\":"),
                );
                self.reasoned.summary(text, out);
                out.extend_from_slice(b",\"content\":[");
                if !text.is_empty() {
                    self.part(out);
                }
                out.extend_from_slice(b"],\"encrypted_content\":");
                self.reasoned.encrypted(text, out);
                put(out, format_args!(",\"status\":\"{status}\"}}"));
            }
            Kind::Message => {
                put(
                    out,
                    format_args!(
                        "{{\"type\":\"message\",\"id\":\"{id}\",\"status\":\"{status}\",\"role\":\"assistant\",\"content\":["
                    ),
                );
                if status != Status::InProgress.word() {
                    self.part(out);
                }
                out.extend_from_slice(b"]}");
            }
            Kind::Call { id: call, name } => {
                put(
                    out,
                    format_args!("{{\"type\":\"function_call\",\"id\":\"{id}\",\"call_id\":\""),
                );
                escape(call, out);
                out.extend_from_slice(b"\",\"name\":\"");
                escape(name, out);
                out.extend_from_slice(b"\",\"arguments\":\"");
                escape(text, out);
                put(out, format_args!("\",\"status\":\"{status}\"}}"));
            }
        }
    }

    pub fn is_reasoning(&self) -> bool {
        self.kind == Kind::Reasoning
    }

    /// Its part, of what has parts.
    pub fn part(&self, out: &mut Vec<u8>) {
        match self.kind {
            Kind::Reasoning => out.extend_from_slice(b"{\"type\":\"reasoning_text\""),
            _ => {
                out.extend_from_slice(b"{\"type\":\"output_text\",\"annotations\":[]");
                logprobs_field(&self.logprobs, out);
            }
        }
        out.extend_from_slice(b",\"text\":\"");
        escape(&self.text, out);
        out.extend_from_slice(b"\"}");
    }
}

/// Appends those of the answer's tokens among these log-probabilities: objects with commas between, and before if there are some.
pub(super) fn logprobs(entries: &[LogprobEntry], model: &ModelText, out: &mut Vec<u8>) {
    for entry in entries.iter().filter(|entry| entry.in_content) {
        if !out.is_empty() {
            out.push(b',');
        }
        logprob_object(entry, false, model, out);
    }
}

/// Writes what [`logprobs`] wrote as a field, with a comma before.
pub(super) fn logprobs_field(logprobs: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b",\"logprobs\":[");
    out.extend_from_slice(logprobs);
    out.push(b']');
}

impl AnswerWriter for ResponseWriter {
    fn whole(mut self: Box<Self>, outcome: Outcome<'_>, model: &ModelText) -> Vec<u8> {
        let calls = outcome.calls.iter().map(|call| {
            let kind = Kind::Call {
                id: call.id.clone(),
                name: call.name.clone(),
            };
            (kind, call.arguments.as_str())
        });
        let mut parts = Vec::new();
        if !outcome.reasoning.is_empty() {
            parts.push((Kind::Reasoning, outcome.reasoning));
        }
        // An answer has an item, and be it an empty one.
        if !outcome.content.is_empty() || (outcome.calls.is_empty() && parts.is_empty()) {
            parts.push((Kind::Message, outcome.content));
        }
        parts.extend(calls);
        let (last, status) = (parts.len(), Status::of(outcome.finish).word());
        for (i, (kind, text)) in parts.into_iter().enumerate() {
            let mut item = self.begin(kind);
            item.text.push_str(text);
            if item.kind == Kind::Message {
                logprobs(outcome.logprobs, model, &mut item.logprobs);
            }
            // What was cut is the last of them.
            let status = if i + 1 == last {
                status
            } else {
                Status::Completed.word()
            };
            self.close(&item, status);
        }
        self.end(outcome.finish, outcome.usage)
    }
}

impl ResponseWriter {
    /// Notes an item that is over.
    pub(super) fn close(&mut self, item: &Open, status: &str) {
        let mut out = Vec::new();
        item.item(status, &mut out);
        self.items.push(String::from_utf8_lossy(&out).into_owned());
    }
}

/// OpenAI's code for a failure.
pub(super) fn code(status: u16) -> &'static str {
    match status {
        429 | 503 => "rate_limit_exceeded",
        400..=499 => "invalid_prompt",
        _ => "server_error",
    }
}

fn unix_now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::output::Call;
    use crate::text::tokenizer::tests::opened;
    use baton_protocol::TopLogprob;

    fn entry(token: u32, in_content: bool) -> LogprobEntry {
        LogprobEntry {
            token,
            logprob: Some(-0.5),
            top: vec![TopLogprob(token, -0.5)],
            offset: 0,
            in_content,
        }
    }

    #[test]
    fn a_response_has_an_item_for_each_part_and_is_kept() {
        let store = Arc::new(ResponseStore::new(1 << 20));
        let keeping = Keeping {
            store: Arc::clone(&store),
            owner: None,
            before: Vec::new(),
            input: "[1]".to_owned(),
        };
        let settings = json!({"temperature": 0.5, "tools": []});
        let writer = ResponseWriter::new(
            "x",
            "a \"model\"",
            settings.as_object().unwrap(),
            Some(keeping),
        );
        let finish = Finish {
            reason: FinishReason::Length,
            has_called: true,
            stop: None,
        };
        let usage = Usage {
            prompt: 10,
            completion: 7,
            cached: 4,
            reasoning: 2,
        };
        let calls = [Call {
            id: "call_1".to_owned(),
            name: "f".to_owned(),
            arguments: "{\"a\": \"Par".to_owned(),
        }];
        let outcome = Outcome {
            content: "né\"",
            reasoning: "Hm\n",
            calls: &calls,
            logprobs: &[entry(5, false), entry(6, true), entry(7, true)],
            finish: &finish,
            usage,
        };
        let model = opened(7, "{}").unwrap();
        let bytes = Box::new(writer).whole(outcome, &model);
        let mut response: Value = serde_json::from_slice(&bytes).unwrap();
        assert!(response["created_at"].is_u64());
        response["created_at"] = 1.into();
        let shown = |token: u32| {
            let bytes = model.vocabulary.bytes(token);
            let named = json!({"token": model.token_text(token), "logprob": -0.5, "bytes": bytes});
            let mut all = named.clone();
            all["top_logprobs"] = json!([named]);
            all
        };
        let output = json!([
            {"type": "reasoning", "id": "rs_x_0", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm\n"}],
             "encrypted_content": null, "status": "completed"},
            {"type": "message", "id": "msg_x_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "annotations": [], "logprobs": [shown(6), shown(7)], "text": "né\""}]},
            {"type": "function_call", "id": "fc_x_2", "call_id": "call_1", "name": "f", "arguments": "{\"a\": \"Par", "status": "incomplete"},
        ]);
        let expected = json!({"id": "resp_x", "object": "response", "created_at": 1, "model": "a \"model\"", "status": "incomplete",
            "completed_at": null, "error": null, "incomplete_details": {"reason": "max_output_tokens"}, "output": output,
            "usage": {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0}, "output_tokens": 7,
                "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 17},
            "temperature": 0.5, "tools": []});
        assert_eq!(response, expected);
        let kept = store.get("resp_x", None).unwrap();
        assert_eq!(kept.response.as_bytes(), bytes);
        assert_eq!((kept.turns.len(), kept.turns[0].input.as_str()), (1, "[1]"));
        assert_eq!(
            serde_json::from_str::<Value>(&kept.turns[0].output).unwrap(),
            output
        );
    }
}
