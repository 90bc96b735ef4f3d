//! The answer: a message of content blocks, in one piece.

use baton_protocol::FinishReason;

use crate::openai::{escape, put};
use crate::output::{AnswerWriter, Call, Finish, Outcome, Stop, Usage};
use crate::text::tokenizer::ModelText;

/// What stands for Anthropic's signature of a thinking block. Nothing is signed here, and none is checked; many clients send a block
/// back only if it has one.
pub const SIGNATURE: &str = "baton";

/// Writes the message, as a stream or in one piece.
#[derive(Debug)]
pub struct MessageWriter {
    /// From the id to the model's name, as JSON.
    head: String,
    /// The request's name.
    pub(super) request: String,
    max_tokens: u32,
    /// Of a stream: the block that is open.
    pub(super) open: Option<Opened>,
    /// Of a stream: blocks so far.
    pub(super) blocks: usize,
}

/// What kind of block is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    Thinking,
    Text,
    Call,
}

impl MessageWriter {
    /// For the answer with this id, to the request of this name that asked for so many tokens at most.
    pub fn new(id: &str, model: &str, request: &str, max_tokens: u32) -> Self {
        let inside = |text: &str| {
            let mut out = Vec::with_capacity(text.len());
            escape(text, &mut out);
            String::from_utf8_lossy(&out).into_owned()
        };
        Self {
            head: format!(
                "\"id\":\"msg_{id}\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"{}\"",
                inside(model)
            ),
            request: request.to_owned(),
            max_tokens,
            open: None,
            blocks: 0,
        }
    }

    /// The beginning of the message, up to its content.
    pub(super) fn head(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(b",\"content\":[");
    }

    /// Why it ended, and where it ran, which is nowhere: fields of an object.
    pub(super) fn stop(&self, finish: &Finish, usage: Usage, out: &mut Vec<u8>) {
        let (reason, text) = match (&finish.stop, finish.reason) {
            (Some(Stop::Text(text)), _) => ("stop_sequence", Some(text)),
            // There was no room for all that was asked for.
            (_, FinishReason::Length) if usage.completion < u64::from(self.max_tokens) => {
                ("model_context_window_exceeded", None)
            }
            // Whatever it was doing, it was not done.
            (_, FinishReason::Length) => ("max_tokens", None),
            (_, FinishReason::Stop | FinishReason::Whole) if finish.has_called => {
                ("tool_use", None)
            }
            (_, FinishReason::Stop | FinishReason::Whole) => ("end_turn", None),
        };
        put(
            out,
            format_args!(
                "\"container\":null,\"stop_details\":null,\"stop_reason\":\"{reason}\",\"stop_sequence\":"
            ),
        );
        match text {
            None => out.extend_from_slice(b"null"),
            Some(text) => {
                out.push(b'"');
                escape(text, out);
                out.push(b'"');
            }
        }
    }
}

/// Tokens used so far, as the end of a stream tells them, but for the end of the object: Anthropic's input tokens are without those that
/// were cached.
pub(super) fn open_usage(usage: Usage, out: &mut Vec<u8>) {
    put(
        out,
        format_args!(
            "{{\"input_tokens\":{},\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":{},\"output_tokens\":{},\
             \"output_tokens_details\":{{\"thinking_tokens\":{}}},\"server_tool_use\":null",
            usage.prompt.saturating_sub(usage.cached),
            usage.cached,
            usage.completion,
            usage.reasoning
        ),
    );
}

/// Tokens used, as a message tells them.
pub(super) fn write_usage(usage: Usage, out: &mut Vec<u8>) {
    open_usage(usage, out);
    out.extend_from_slice(
        b",\"cache_creation\":null,\"inference_geo\":null,\"service_tier\":\"standard\"}",
    );
}

impl AnswerWriter for MessageWriter {
    fn whole(self: Box<Self>, outcome: Outcome<'_>, _: &ModelText) -> Vec<u8> {
        let calls: usize = outcome
            .calls
            .iter()
            .map(|call| call.arguments.len() + 256)
            .sum();
        let bytes = outcome.content.len() + outcome.reasoning.len() + calls;
        let mut out = Vec::with_capacity(512 + bytes + bytes / 8);
        self.head(&mut out);
        let mut begin = Separator::default();
        if !outcome.reasoning.is_empty() {
            begin.next(&mut out);
            out.extend_from_slice(b"{\"type\":\"thinking\",\"thinking\":\"");
            escape(outcome.reasoning, &mut out);
            put(&mut out, format_args!("\",\"signature\":\"{SIGNATURE}\"}}"));
        }
        if !outcome.content.is_empty() {
            begin.next(&mut out);
            out.extend_from_slice(b"{\"type\":\"text\",\"text\":\"");
            escape(outcome.content, &mut out);
            out.extend_from_slice(b"\"}");
        }
        for Call {
            id,
            name,
            arguments,
        } in outcome.calls
        {
            begin.next(&mut out);
            open_call(id, name, &mut out);
            out.extend_from_slice(input(arguments).as_bytes());
            out.push(b'}');
        }
        out.extend_from_slice(b"],");
        self.stop(outcome.finish, outcome.usage, &mut out);
        out.extend_from_slice(b",\"usage\":");
        write_usage(outcome.usage, &mut out);
        out.push(b'}');
        out
    }
}

/// A call's block, up to its input.
pub(super) fn open_call(id: &str, name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"type\":\"tool_use\",\"caller\":{\"type\":\"direct\"},\"id\":\"");
    escape(id, out);
    out.extend_from_slice(b"\",\"name\":\"");
    escape(name, out);
    out.extend_from_slice(b"\",\"input\":");
}

/// A call's arguments, which have to be an object. Those that are none, being cut short or written wrongly, are not to be called with:
/// what is there of them might be taken for all.
fn input(arguments: &str) -> &str {
    match serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(arguments) {
        Ok(_) => arguments,
        Err(_) => "{}",
    }
}

/// A comma before every item but the first.
#[derive(Default)]
struct Separator {
    any: bool,
}

impl Separator {
    fn next(&mut self, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.any, true) {
            out.push(b',');
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::text::tokenizer::tests::opened;

    fn whole(outcome: Outcome<'_>) -> Value {
        let writer = MessageWriter::new("1", "a \"model\"", "name", 7);
        let model = opened(7, "{}").unwrap();
        serde_json::from_slice(&Box::new(writer).whole(outcome, &model)).unwrap()
    }

    #[test]
    fn a_message_has_a_block_for_each_part() {
        let call = |arguments: &str| Call {
            id: "c".to_owned(),
            name: "f".to_owned(),
            arguments: arguments.to_owned(),
        };
        let finish = Finish {
            reason: FinishReason::Stop,
            has_called: true,
            stop: None,
        };
        let usage = Usage {
            prompt: 10,
            completion: 7,
            cached: 4,
            reasoning: 2,
        };
        let message = whole(Outcome {
            content: "né\"",
            reasoning: "Hm\n",
            calls: &[
                call("{\"a\": [1]}"),
                call("{\"a\": \"Par"),
                call("[1]"),
                call(""),
            ],
            logprobs: &[],
            finish: &finish,
            usage,
        });
        let input = |input: Value| json!({"type": "tool_use", "caller": {"type": "direct"}, "id": "c", "name": "f", "input": input});
        let content = json!([
            {"type": "thinking", "thinking": "Hm\n", "signature": SIGNATURE},
            {"type": "text", "text": "né\""},
            input(json!({"a": [1]})), input(json!({})), input(json!({})), input(json!({})),
        ]);
        let usage = json!({"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4,
            "output_tokens": 7, "output_tokens_details": {"thinking_tokens": 2}, "server_tool_use": null, "cache_creation": null,
            "inference_geo": null, "service_tier": "standard"});
        let expected = json!({"id": "msg_1", "type": "message", "role": "assistant", "model": "a \"model\"", "content": content,
            "container": null, "stop_details": null, "stop_reason": "tool_use", "stop_sequence": null, "usage": usage});
        assert_eq!(message, expected);
    }

    #[test]
    fn the_reason_is_the_first_thing_that_ended_it() {
        use FinishReason::{Length, Stop as End, Whole};
        let text = || Some(Stop::Text("\"!".into()));
        for (reason, has_called, stop, completion, expected, sequence) in [
            (End, false, None, 3, "end_turn", Value::Null),
            (Whole, false, None, 3, "end_turn", Value::Null),
            (End, false, Some(Stop::Token(3)), 3, "end_turn", Value::Null),
            (End, true, None, 3, "tool_use", Value::Null),
            (Whole, true, None, 3, "tool_use", Value::Null),
            (End, false, text(), 3, "stop_sequence", json!("\"!")),
            // It may have cut the call.
            (End, true, text(), 3, "stop_sequence", json!("\"!")),
            (Length, true, None, 7, "max_tokens", Value::Null),
            (
                Length,
                false,
                None,
                3,
                "model_context_window_exceeded",
                Value::Null,
            ),
        ] {
            let finish = Finish {
                reason,
                has_called,
                stop,
            };
            let usage = Usage {
                completion,
                ..Usage::default()
            };
            let message = whole(Outcome {
                content: "",
                reasoning: "",
                calls: &[],
                logprobs: &[],
                finish: &finish,
                usage,
            });
            assert_eq!(message["content"], json!([]));
            assert_eq!(
                (&message["stop_reason"], &message["stop_sequence"]),
                (&json!(expected), &sequence)
            );
        }
    }
}
