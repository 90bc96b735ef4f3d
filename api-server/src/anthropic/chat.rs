//! `system` and `messages` as the messages of a chat template.
//!
//! Anthropic's roles are two, and its blocks stand in any order; templates want a tool's result as a message of its own, an answer's
//! text beside its calls, and turns that take turns. Messages in a row of one role are one, as at Anthropic.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::blocks::{Block, append, blocks, known, string, text};
use crate::error::ApiError;
use crate::openai::fields::wrong_type;
use crate::openai::tools::beginning;

/// The messages for the template, and whether the answer goes on with the last of them, which then is the assistant's.
///
/// # Errors
/// 400 that names the message, or the block in it.
pub fn messages(
    system: Option<Value>,
    messages: Option<Value>,
) -> Result<(Vec<Value>, bool), ApiError> {
    let list = match messages {
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(Value::Array(_)) => {
            let message = "messages must hold at least one message";
            return Err(ApiError::param("messages", message));
        }
        Some(other) => return Err(wrong_type("messages", "an array of messages", &other)),
        None => return Err(ApiError::param("messages", "messages is required")),
    };
    let mut chat = Chat::default();
    if let Some(system) = system {
        chat.system(text("system", system, true)?);
    }
    for (i, message) in list.into_iter().enumerate() {
        chat.add(&format!("messages[{i}]"), message)?;
    }
    chat.release();
    let goes_on = match chat.messages.last() {
        Some(last) if last.role == Role::Assistant => {
            if !last.calls.is_empty() {
                let message = "the last message calls tools: send what they said in a message of the user's, as tool_result blocks";
                return Err(ApiError::param("messages", message));
            }
            true
        }
        _ => false,
    };
    let messages = chat.messages.into_iter().map(Message::value).collect();
    Ok((messages, goes_on))
}

/// A chat in the making.
#[derive(Default)]
struct Chat {
    messages: Vec<Message>,
    /// What the system said between a call and its result.
    held: Vec<String>,
    /// The tools of the calls so far, by the calls' ids.
    names: HashMap<String, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
    Tool,
}

struct Message {
    role: Role,
    text: String,
    reasoning: String,
    calls: Vec<Value>,
    /// Of a tool's message: the call's id, and the tool's name if it is known.
    answers: Option<(String, Option<String>)>,
}

impl Chat {
    fn add(&mut self, at: &str, message: Value) -> Result<(), ApiError> {
        let Value::Object(mut message) = message else {
            return Err(wrong_type(at, "an object", &message));
        };
        known(at, &message, &["role", "content"])?;
        let role = string(at, &mut message, "role")?;
        let path = format!("{at}.content");
        let Some(content) = message.remove("content") else {
            return Err(ApiError::param(&path, format!("{path} is required")));
        };
        match role.as_str() {
            "system" => self.system(text(&path, content, true)?),
            "user" => self.user(&path, blocks(&path, content)?)?,
            "assistant" => self.assistant(&path, blocks(&path, content)?)?,
            other => {
                let param = format!("{at}.role");
                let message = format!(
                    "{param} must be \"user\", \"assistant\" or \"system\", got {:?}",
                    beginning(other)
                );
                return Err(ApiError::param(param, message));
            }
        }
        Ok(())
    }

    /// What the system says before everything else is the system prompt. Few templates take more of it later on: there it is part of what
    /// the user or the tool said last, so that the prompt before it stays as it is.
    fn system(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        match self.messages.last_mut() {
            None => self.messages.push(Message::new(Role::System, text)),
            Some(last) if last.role != Role::Assistant => append(&mut last.text, &text),
            // A call's result comes right after it.
            Some(last) if !last.calls.is_empty() => self.held.push(text),
            Some(_) => self.messages.push(Message::new(Role::User, text)),
        }
    }

    /// Puts in what was held.
    fn release(&mut self) {
        for text in std::mem::take(&mut self.held) {
            match self.messages.last_mut() {
                Some(last) if last.role != Role::Assistant => append(&mut last.text, &text),
                _ => self.messages.push(Message::new(Role::User, text)),
            }
        }
    }

    /// Results first, in their order; then what the user says.
    fn user(&mut self, at: &str, blocks: Vec<Block>) -> Result<(), ApiError> {
        let (mut said, mut has_results) = (None, false);
        for (i, block) in blocks.into_iter().enumerate() {
            match block {
                Block::Text(text) => append(said.get_or_insert_default(), &text),
                Block::Result { id, text } => {
                    has_results = true;
                    let name = self.names.get(&id).cloned();
                    let mut message = Message::new(Role::Tool, text);
                    message.answers = Some((id, name));
                    self.messages.push(message);
                }
                other => return Err(misplaced(at, i, &other, "an assistant's")),
            }
        }
        match said {
            None if has_results => {}
            said => {
                let said: String = said.unwrap_or_default();
                match self.messages.last_mut() {
                    Some(last) if last.role == Role::User => append(&mut last.text, &said),
                    _ => self.messages.push(Message::new(Role::User, said)),
                }
            }
        }
        self.release();
        Ok(())
    }

    fn assistant(&mut self, at: &str, blocks: Vec<Block>) -> Result<(), ApiError> {
        self.release();
        if self
            .messages
            .last()
            .is_none_or(|last| last.role != Role::Assistant)
        {
            self.messages
                .push(Message::new(Role::Assistant, String::new()));
        }
        for (i, block) in blocks.into_iter().enumerate() {
            // It was just put there.
            let Some(message) = self.messages.last_mut() else {
                break;
            };
            match block {
                Block::Text(text) => append(&mut message.text, &text),
                Block::Thinking(text) => append(&mut message.reasoning, &text),
                Block::Call { id, name, input } => {
                    let function = json!({"name": name, "arguments": input});
                    message
                        .calls
                        .push(json!({"id": id, "type": "function", "function": function}));
                    self.names.insert(id, name);
                }
                Block::Nothing => {}
                other => return Err(misplaced(at, i, &other, "a user's")),
            }
        }
        Ok(())
    }
}

fn misplaced(at: &str, i: usize, block: &Block, whose: &str) -> ApiError {
    let param = format!("{at}[{i}]");
    let message = format!(
        "{param} is of type {:?}, which only {whose} message has",
        block.kind()
    );
    ApiError::param(param, message)
}

impl Message {
    fn new(role: Role, text: String) -> Self {
        Self {
            role,
            text,
            reasoning: String::new(),
            calls: Vec::new(),
            answers: None,
        }
    }

    /// As templates read it.
    fn value(self) -> Value {
        let role = match self.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        };
        let mut value = Map::new();
        let mut put = |name: &str, field: Value| value.insert(name.to_owned(), field);
        put("role", role.into());
        put("content", self.text.into());
        if !self.reasoning.is_empty() {
            put("reasoning_content", self.reasoning.into());
        }
        if !self.calls.is_empty() {
            put("tool_calls", self.calls.into());
        }
        if let Some((id, name)) = self.answers {
            put("tool_call_id", id.into());
            if let Some(name) = name {
                put("name", name.into());
            }
        }
        Value::Object(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(system: Value, list: Value) -> Result<(Value, bool), ApiError> {
        let system = Some(system).filter(|system| !system.is_null());
        let (messages, goes_on) = messages(system, Some(list))?;
        Ok((messages.into(), goes_on))
    }

    #[test]
    fn an_agents_turns_are_a_chats() {
        let list = json!([
            {"role": "user", "content": [
                {"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}, "citations": null},
                {"type": "text", "text": "And time?"},
            ]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Paris"}, "caller": {"type": "direct"}},
                {"type": "tool_use", "id": "b", "name": "now", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "text", "text": "Go on."},
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "Sun"}]},
                {"type": "tool_result", "tool_use_id": "b", "content": "no clock", "is_error": true},
                {"type": "tool_result", "tool_use_id": "c"},
            ]},
        ]);
        let system = json!([
            {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
            {"type": "text", "text": "Be brief."},
            {"type": "text", "text": "Be kind."},
        ]);
        let call = |id: &str, name: &str, arguments: Value| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let expected = json!([
            {"role": "system", "content": "Be brief.\nBe kind."},
            {"role": "user", "content": "Weather?\nAnd time?"},
            {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.",
             "tool_calls": [call("a", "weather", json!({"city": "Paris"})), call("b", "now", json!({}))]},
            {"role": "tool", "content": "Sun", "tool_call_id": "a", "name": "weather"},
            {"role": "tool", "content": "Error: no clock", "tool_call_id": "b", "name": "now"},
            {"role": "tool", "content": "", "tool_call_id": "c"},
            {"role": "user", "content": "Go on."},
        ]);
        assert_eq!(of(system, list).unwrap(), (expected, false));
    }

    #[test]
    fn turns_take_turns_and_the_last_may_go_on() {
        let said = |role: &str, text: &str| json!({"role": role, "content": text});
        let list = json!([
            said("user", "a"),
            said("user", "b"),
            said("assistant", "c"),
            said("assistant", "d")
        ]);
        let expected = json!([said("user", "a\nb"), said("assistant", "c\nd")]);
        assert_eq!(of(Value::Null, list).unwrap(), (expected, true));
        // The system's later words are part of what was said last.
        let call = json!({"type": "tool_use", "id": "a", "name": "f", "input": {}});
        let result = json!({"type": "tool_result", "tool_use_id": "a", "content": "r"});
        let list = json!([
            said("system", "s"), said("user", "a"), said("system", "t"),
            said("assistant", "b"), said("system", "u"), said("user", "c"),
            {"role": "assistant", "content": [call]}, said("system", "v"), {"role": "user", "content": [result]},
        ]);
        let (messages, goes_on) = of(json!("first"), list).unwrap();
        let short = messages.as_array().unwrap().iter();
        let short: Vec<_> = short
            .map(|m| (m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
            .collect();
        let expected = [
            ("system", "first\ns"),
            ("user", "a\nt"),
            ("assistant", "b"),
            ("user", "u\nc"),
            ("assistant", ""),
            ("tool", "r\nv"),
        ];
        assert_eq!((short.as_slice(), goes_on), (expected.as_slice(), false));
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let block = |role: &str, block: Value| json!([{"role": "user", "content": "x"}, {"role": role, "content": [block]}]);
        for (list, param) in [
            (json!([]), "messages"),
            (json!("hi"), "messages"),
            (json!([1]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (
                json!([{"role": "tool", "content": "x"}]),
                "messages[0].role",
            ),
            (json!([{"role": "user"}]), "messages[0].content"),
            (
                json!([{"role": "user", "content": 1}]),
                "messages[0].content",
            ),
            (
                json!([{"role": "user", "content": "x", "name": "y"}]),
                "messages[0].name",
            ),
            (
                block("user", json!({"type": "image", "source": {}})),
                "messages[1].content[0]",
            ),
            (
                block("user", json!({"type": "document"})),
                "messages[1].content[0]",
            ),
            (
                block("user", json!({"text": "x"})),
                "messages[1].content[0].type",
            ),
            (
                block("user", json!({"type": "text"})),
                "messages[1].content[0].text",
            ),
            (
                block(
                    "user",
                    json!({"type": "text", "text": "x", "citations": [{}]}),
                ),
                "messages[1].content[0].citations",
            ),
            (
                block("user", json!({"type": "thinking", "thinking": "x"})),
                "messages[1].content[0]",
            ),
            (
                block("user", json!({"type": "tool_result", "content": "x"})),
                "messages[1].content[0].tool_use_id",
            ),
            (
                block(
                    "user",
                    json!({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
                ),
                "messages[1].content[0].content[0]",
            ),
            (
                block(
                    "user",
                    json!({"type": "tool_result", "tool_use_id": "a", "is_eror": true}),
                ),
                "messages[1].content[0].is_eror",
            ),
            (
                block(
                    "assistant",
                    json!({"type": "tool_result", "tool_use_id": "a"}),
                ),
                "messages[1].content[0]",
            ),
            (
                block(
                    "assistant",
                    json!({"type": "redacted_thinking", "data": "x"}),
                ),
                "messages[1].content[0].data",
            ),
            (
                block(
                    "assistant",
                    json!({"type": "tool_use", "id": "a", "name": "f", "input": "{}"}),
                ),
                "messages[1].content[0].input",
            ),
            (
                block(
                    "assistant",
                    json!({"type": "tool_use", "id": "a", "name": "f", "input": {}}),
                ),
                "messages",
            ),
            (
                block(
                    "system",
                    json!({"type": "tool_use", "id": "a", "name": "f", "input": {}}),
                ),
                "messages[1].content[0]",
            ),
        ] {
            let error = of(Value::Null, list.clone()).expect_err(&list.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{list}");
        }
        let error = of(
            json!([{"type": "image"}]),
            json!([{"role": "user", "content": "x"}]),
        )
        .unwrap_err();
        assert_eq!(error.param.as_deref(), Some("system[0]"));
        let empty = block(
            "assistant",
            json!({"type": "redacted_thinking", "data": ""}),
        );
        assert!(of(Value::Null, empty).is_ok());
    }
}
