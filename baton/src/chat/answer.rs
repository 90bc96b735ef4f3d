//! What came of an answer so far.

use serde_json::{Value, json};

/// Tool calls of one answer that are kept; who sends more is no server of ours.
const CALLS_MAX: usize = 128;

/// An answer as it comes, event by event.
#[derive(Debug, Default)]
pub struct Answer {
    pub content: String,
    pub reasoning: String,
    pub calls: Vec<Call>,
    /// Why it ended.
    pub finish: Option<String>,
    /// As the server says.
    pub usage: Value,
    /// All of it was there.
    pub done: bool,
    pub error: Option<String>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Call {
    pub id: String,
    pub name: String,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

impl Answer {
    /// Takes the data of one event in.
    pub fn take(&mut self, data: &[u8]) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        let Ok(event) = serde_json::from_slice::<Value>(data) else {
            self.error = Some(format!(
                "an event that is no JSON: {}",
                String::from_utf8_lossy(data)
            ));
            return;
        };
        if let Some(message) = event["error"]["message"].as_str() {
            self.error = Some(message.to_owned());
        }
        if event["usage"].is_object() {
            self.usage = event["usage"].clone();
        }
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        let text = |field: &str| delta[field].as_str().unwrap_or_default();
        self.content.push_str(text("content"));
        self.reasoning.push_str(text("reasoning_content"));
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            self.call(call);
        }
        if let Some(finish) = choice["finish_reason"].as_str() {
            self.finish = Some(finish.to_owned());
        }
    }

    /// A piece of a tool call: its name comes whole, its arguments in pieces.
    fn call(&mut self, piece: &Value) {
        let index = piece["index"].as_u64().map_or(0, |index| index as usize);
        if index >= CALLS_MAX {
            return;
        }
        if self.calls.len() <= index {
            self.calls.resize(index + 1, Call::default());
        }
        let call = &mut self.calls[index];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        call.id += &text(&piece["id"]);
        call.name += &text(&piece["function"]["name"]);
        call.arguments += &text(&piece["function"]["arguments"]);
    }

    /// As the conversation goes on with it.
    pub fn message(&self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.content});
        if !self.calls.is_empty() {
            message["tool_calls"] = self.calls.iter().map(Call::to_json).collect();
        }
        message
    }

    /// As scripts read it.
    pub fn to_json(&self, model: &str) -> Value {
        let mut answer = json!({"model": model, "content": self.content});
        if !self.reasoning.is_empty() {
            answer["reasoning"] = self.reasoning.as_str().into();
        }
        if !self.calls.is_empty() {
            answer["tool_calls"] = self.calls.iter().map(Call::to_json).collect();
        }
        answer["finish_reason"] = self.finish.clone().into();
        answer["usage"] = self.usage.clone();
        answer
    }
}

impl Call {
    fn to_json(&self) -> Value {
        let function = json!({"name": self.name, "arguments": self.arguments});
        json!({"id": self.id, "type": "function", "function": function})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_put_together_and_its_end_noticed() {
        let mut answer = Answer::default();
        for event in [
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"reasoning_content":"Hm."}}]}"#,
            r#"{"choices":[{"delta":{"content":"Hel"}}]}"#,
            r#"{"choices":[{"delta":{"content":"lo"},"finish_reason":null}],"usage":null}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"completion_tokens":2}}"#,
        ] {
            answer.take(event.as_bytes());
            assert!(!answer.done && answer.error.is_none(), "{event}");
        }
        answer.take(b"[DONE]");
        assert!(answer.done);
        let told = json!({"model": "m", "content": "Hello", "reasoning": "Hm.", "finish_reason": "stop", "usage": {"completion_tokens": 2}});
        assert_eq!(answer.to_json("m"), told);
        let message = json!({"role": "assistant", "content": "Hello"});
        assert_eq!(answer.message(), message);
    }

    #[test]
    fn tool_calls_are_put_together_and_bounded() {
        let mut answer = Answer::default();
        for piece in [
            json!({"index": 0, "id": "a", "function": {"name": "look", "arguments": ""}}),
            json!({"index": 0, "function": {"arguments": "{\"x\""}}),
            json!({"index": 1, "id": "b", "function": {"name": "hear", "arguments": "{}"}}),
            json!({"index": 0, "function": {"arguments": ":1}"}}),
            json!({"index": 1_u64 << 40, "id": "c"}),
        ] {
            let event = json!({"choices": [{"delta": {"tool_calls": [piece]}}]});
            answer.take(event.to_string().as_bytes());
        }
        let function = |name: &str, arguments: &str| json!({"name": name, "arguments": arguments});
        let calls = json!([
            {"id": "a", "type": "function", "function": function("look", "{\"x\":1}")},
            {"id": "b", "type": "function", "function": function("hear", "{}")},
        ]);
        assert_eq!(answer.message()["tool_calls"], calls);
    }

    #[test]
    fn an_error_in_the_stream_is_an_error() {
        let mut answer = Answer::default();
        answer.take(br#"{"error":{"message":"decode worker lost"}}"#);
        assert_eq!(answer.error.as_deref(), Some("decode worker lost"));
        answer.take(b"nonsense");
        assert!(answer.error.is_some_and(|error| error.contains("no JSON")));
    }
}
