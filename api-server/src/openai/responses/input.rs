//! `input` and `instructions` as the messages of a chat template.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::reasoned::sent_back;
use crate::error::ApiError;
use crate::openai::fields::wrong_type;
use crate::openai::table::misspelled;
use crate::openai::tools::beginning;

/// Fields of items that are read or that answers have. Others change nothing, unless they are misspelled.
const OF_ITEMS: [&str; 16] = [
    "type",
    "role",
    "content",
    "id",
    "status",
    "phase",
    "call_id",
    "name",
    "arguments",
    "output",
    "summary",
    "encrypted_content",
    "namespace",
    "caller",
    "created_by",
    "tool_call_id",
];

/// The items of `input`; a text is one message of the user's.
///
/// # Errors
/// 400 if it is neither.
pub fn items(input: Option<Value>) -> Result<Vec<Value>, ApiError> {
    match input {
        Some(Value::String(text)) => Ok(vec![
            json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}),
        ]),
        Some(Value::Array(items)) if !items.is_empty() => Ok(items),
        Some(Value::Array(_)) => Err(ApiError::param(
            "input",
            "input must hold at least one item",
        )),
        Some(other) => Err(wrong_type("input", "a text or an array of items", &other)),
        None => Err(ApiError::param("input", "input is required")),
    }
}

/// A chat in the making.
#[derive(Default)]
pub struct Chat {
    messages: Vec<Value>,
    /// Reasoning of the assistant's message that comes next.
    reasoning: String,
    /// The functions of the calls so far, by the calls' ids.
    names: HashMap<String, String>,
    /// The last message is the assistant's turn, to which calls and text may be added.
    is_open: bool,
}

impl Chat {
    /// With instructions, which come first.
    pub fn new(instructions: Option<&str>) -> Self {
        let mut chat = Self::default();
        if let Some(text) = instructions.filter(|text| !text.is_empty()) {
            chat.messages
                .push(json!({"role": "system", "content": text}));
        }
        chat
    }

    /// Adds an item, which stands at this path.
    ///
    /// # Errors
    /// 400 that names the item or the field in it.
    pub fn add(&mut self, at: &str, item: &Value) -> Result<(), ApiError> {
        let Value::Object(item) = item else {
            return Err(wrong_type(at, "an item", item));
        };
        for name in item.keys() {
            if let Some(meant) = misspelled(name, &OF_ITEMS) {
                let param = format!("{at}.{name:.64}");
                let message = format!("there is no field {param}: do you mean {meant}?");
                return Err(ApiError::param(param, message));
            }
        }
        match item.get("type") {
            None | Some(Value::Null) => self.message(at, item),
            Some(Value::String(kind)) => match kind.as_str() {
                "message" => self.message(at, item),
                "function_call" => self.call(at, item),
                "function_call_output" => self.result(at, item),
                "reasoning" => self.reasoned(at, item),
                other => {
                    let param = format!("{at}.type");
                    let message = format!(
                        "{param} is {:?}; messages, function calls, their outputs and reasoning are taken",
                        beginning(other)
                    );
                    Err(ApiError::param(param, message))
                }
            },
            Some(other) => Err(wrong_type(&format!("{at}.type"), "a string", other)),
        }
    }

    /// The messages.
    ///
    /// # Errors
    /// 400 if there are none.
    pub fn finish(mut self) -> Result<Vec<Value>, ApiError> {
        self.assistant();
        match self.messages.is_empty() {
            true => Err(ApiError::param("input", "input holds no message")),
            false => Ok(self.messages),
        }
    }

    fn message(&mut self, at: &str, item: &Map<String, Value>) -> Result<(), ApiError> {
        let role = string(at, item, "role")?;
        let path = format!("{at}.content");
        let text = text(&path, item.get("content").unwrap_or(&Value::Null))?;
        let role = match role {
            "assistant" => {
                // A text after the turn's first is the next one's.
                let goes_on = self.is_open
                    && self
                        .messages
                        .last()
                        .is_some_and(|last| last["content"] == "");
                if !goes_on {
                    self.close();
                }
                let message = self.turn();
                message["content"] = Value::from(text);
                return Ok(());
            }
            "developer" => "system",
            "system" | "user" => role,
            other => {
                let param = format!("{at}.role");
                let message = format!(
                    "{param} must be \"user\", \"assistant\", \"system\" or \"developer\", got {:?}",
                    beginning(other)
                );
                return Err(ApiError::param(param, message));
            }
        };
        self.assistant();
        self.messages.push(json!({"role": role, "content": text}));
        Ok(())
    }

    fn call(&mut self, at: &str, item: &Map<String, Value>) -> Result<(), ApiError> {
        let (id, name) = (string(at, item, "call_id")?, string(at, item, "name")?);
        let arguments = string(at, item, "arguments")?;
        let function = json!({"name": name, "arguments": arguments});
        let call = json!({"id": id, "type": "function", "function": function});
        self.names.insert(id.to_owned(), name.to_owned());
        let message = self.turn();
        if let Some(message) = message.as_object_mut() {
            let calls = message.entry("tool_calls").or_insert_with(|| json!([]));
            calls
                .as_array_mut()
                .into_iter()
                .for_each(|calls| calls.push(call.clone()));
        }
        Ok(())
    }

    fn result(&mut self, at: &str, item: &Map<String, Value>) -> Result<(), ApiError> {
        let id = string(at, item, "call_id")?;
        let path = format!("{at}.output");
        let text = text(&path, item.get("output").unwrap_or(&Value::Null))?;
        self.assistant();
        let mut message = json!({"role": "tool", "tool_call_id": id, "content": text});
        if let Some(name) = self.names.get(id) {
            message["name"] = name.as_str().into();
        }
        self.messages.push(message);
        Ok(())
    }

    fn reasoned(&mut self, at: &str, item: &Map<String, Value>) -> Result<(), ApiError> {
        // A client that keeps the text hidden has it there alone; others have it in `content` too.
        let encrypted = item.get("encrypted_content");
        let hidden = match encrypted.filter(|value| !value.is_null()) {
            None => None,
            Some(value) => {
                let text = value.as_str().and_then(sent_back);
                let text = text.ok_or_else(|| {
                    let param = format!("{at}.encrypted_content");
                    let message = format!("{param} is not of this server and cannot be read here");
                    ApiError::param(param, message)
                })?;
                Some(text)
            }
        };
        self.close();
        for field in ["content", "summary"] {
            let Some(value) = item.get(field).filter(|value| !value.is_null()) else {
                continue;
            };
            let path = format!("{at}.{field}");
            let text = text(&path, value)?;
            if !text.is_empty() {
                self.reasoning.push_str(&text);
                return Ok(());
            }
        }
        if let Some(text) = hidden {
            self.reasoning.push_str(&text);
        }
        Ok(())
    }

    /// The assistant's turn, begun if there is none.
    fn turn(&mut self) -> &mut Value {
        if !std::mem::replace(&mut self.is_open, true) {
            let mut message = json!({"role": "assistant", "content": ""});
            if !self.reasoning.is_empty() {
                message["reasoning_content"] = std::mem::take(&mut self.reasoning).into();
            }
            self.messages.push(message);
        }
        let last = self.messages.len() - 1;
        &mut self.messages[last]
    }

    /// The assistant's turn is over; what comes of it next is another.
    fn close(&mut self) {
        self.is_open = false;
    }

    /// The assistant's turn is over. Reasoning alone is one too.
    fn assistant(&mut self) {
        if !self.reasoning.is_empty() {
            self.close();
            self.turn();
        }
        self.close();
    }
}

/// Kinds of parts that are text.
const TEXTS: [&str; 6] = [
    "input_text",
    "output_text",
    "text",
    "reasoning_text",
    "summary_text",
    "refusal",
];

/// A text, or parts that are texts, one after the other.
fn text(at: &str, value: &Value) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => return Err(wrong_type(at, "a text or an array of text parts", other)),
    };
    let mut whole = String::new();
    for (i, part) in parts.iter().enumerate() {
        let at = format!("{at}[{i}]");
        let kind = part.get("type").and_then(Value::as_str);
        match kind {
            Some(kind) if TEXTS.contains(&kind) => {
                let field = if kind == "refusal" { "refusal" } else { "text" };
                match part.get(field) {
                    Some(Value::String(text)) => {
                        if i > 0 {
                            whole.push('\n');
                        }
                        whole.push_str(text);
                    }
                    other => {
                        let got = other.unwrap_or(&Value::Null);
                        return Err(wrong_type(&format!("{at}.{field}"), "a string", got));
                    }
                }
            }
            Some(other) => {
                let message = format!(
                    "{at} is of type {:?}; this model reads only text",
                    beginning(other)
                );
                return Err(ApiError::param(at, message));
            }
            None => return Err(wrong_type(&at, "a text part", part)),
        }
    }
    Ok(whole)
}

fn string<'a>(at: &str, item: &'a Map<String, Value>, field: &str) -> Result<&'a str, ApiError> {
    match item.get(field) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) => {
            let param = format!("{at}.{field}");
            let message = format!("{param} is required");
            Err(ApiError::param(param, message))
        }
        Some(other) => Err(wrong_type(&format!("{at}.{field}"), "a string", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(instructions: Option<&str>, input: Value) -> Result<Value, ApiError> {
        let mut chat = Chat::new(instructions);
        for (i, item) in items(Some(input))?.iter().enumerate() {
            chat.add(&format!("input[{i}]"), item)?;
        }
        chat.finish().map(Value::Array)
    }

    #[test]
    fn items_become_turns() {
        let user = |text: &str| json!({"role": "user", "content": text});
        assert_eq!(
            chat(Some("Be brief."), json!("hi")).unwrap(),
            json!([{"role": "system", "content": "Be brief."}, user("hi")])
        );
        let call = |id: &str| json!({"type": "function_call", "id": "fc", "call_id": id, "name": "f", "arguments": "{\"a\":1}"});
        let called = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}});
        let result = |id: &str| json!({"type": "function_call_output", "call_id": id, "output": [{"type": "input_text", "text": "7"}]});
        let answer = |text: &str| {
            json!({"type": "message", "id": "m", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]})
        };
        let thought = json!({"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]});
        let items = json!([
            {"role": "developer", "content": "Think."}, user("hi"), thought, answer("Let me see."), call("1"), call("2"),
            result("1"), result("2"), thought, call("3"), result("3"), answer("Done."), answer("Really."), thought,
        ]);
        let expected = json!([
            {"role": "system", "content": "Think."},
            user("hi"),
            {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": [called("1"), called("2")]},
            {"role": "tool", "tool_call_id": "1", "content": "7", "name": "f"},
            {"role": "tool", "tool_call_id": "2", "content": "7", "name": "f"},
            {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [called("3")]},
            {"role": "tool", "tool_call_id": "3", "content": "7", "name": "f"},
            {"role": "assistant", "content": "Done."},
            {"role": "assistant", "content": "Really."},
            {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        ]);
        assert_eq!(chat(None, items).unwrap(), expected);
    }

    #[test]
    fn reasoning_that_is_sent_back_hidden_is_read() {
        let hidden = |encrypted: &str| json!({"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": encrypted});
        // "Hm." as this server hides it.
        let items = json!([{"role": "user", "content": "hi"}, hidden("baton:SG0u"), {"role": "assistant", "content": "Yes."}]);
        let messages = chat(None, items).unwrap();
        assert_eq!(messages[1]["reasoning_content"], "Hm.");
        // Where the text is there it is not read twice.
        let mut shown = hidden("baton:SG0u");
        shown["content"] = json!([{"type": "reasoning_text", "text": "Hm."}]);
        let messages = chat(None, json!([{"role": "user", "content": "hi"}, shown])).unwrap();
        assert_eq!(messages[1]["reasoning_content"], "Hm.");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let image = json!({"type": "input_image", "image_url": "x"});
        for (input, param) in [
            (json!(7), "input"),
            (json!([]), "input"),
            (json!([7]), "input[0]"),
            (
                json!([{"type": "item_reference", "id": "x"}]),
                "input[0].type",
            ),
            (json!([{"role": "user"}]), "input[0].content"),
            (json!([{"role": "robot", "content": "x"}]), "input[0].role"),
            (json!([{"content": "x"}]), "input[0].role"),
            (
                json!([{"role": "user", "contents": "x"}]),
                "input[0].contents",
            ),
            (
                json!([{"role": "user", "content": [image]}]),
                "input[0].content[0]",
            ),
            (
                json!([{"role": "user", "content": [{"type": "input_text"}]}]),
                "input[0].content[0].text",
            ),
            (
                json!([{"type": "function_call", "name": "f", "arguments": "{}"}]),
                "input[0].call_id",
            ),
            (
                json!([{"type": "function_call_output", "call_id": "1"}]),
                "input[0].output",
            ),
            (
                json!([{"type": "reasoning", "encrypted_content": "x"}]),
                "input[0].encrypted_content",
            ),
        ] {
            let error = chat(None, input.clone()).expect_err(&input.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{input}");
        }
    }
}
