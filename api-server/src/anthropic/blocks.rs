//! Content blocks of a message, one by one.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::openai::fields::wrong_type;
use crate::openai::table::misspelled;
use crate::openai::tools::beginning;

/// What Claude Code's first system block begins with: a line for Anthropic's books with a number of its own for each request, which
/// would keep prompts from sharing KV.
const BILLING: &str = "x-anthropic-billing-header";

/// A content block.
#[derive(Debug, PartialEq)]
pub enum Block {
    /// Text.
    Text(String),
    /// Earlier reasoning.
    Thinking(String),
    /// An earlier call.
    Call {
        /// Its id.
        id: String,
        /// The tool.
        name: String,
        /// Its arguments, an object.
        input: Value,
    },
    /// What the tool said.
    Result {
        /// The call's id.
        id: String,
        /// What came.
        text: String,
    },
    /// Nothing for the model.
    Nothing,
}

/// The blocks of this content, in which a string is one of text.
///
/// # Errors
/// 400 that names the block.
pub fn blocks(at: &str, content: Value) -> Result<Vec<Block>, ApiError> {
    match content {
        Value::String(text) => Ok(vec![Block::Text(text)]),
        Value::Array(list) => {
            let list = list.into_iter().enumerate();
            list.map(|(i, value)| block(&format!("{at}[{i}]"), value))
                .collect()
        }
        other => Err(wrong_type(
            at,
            "a string or an array of content blocks",
            &other,
        )),
    }
}

/// The text of content that has nothing else, a line for each block. That of the system's blocks is without Claude Code's line for
/// Anthropic's books.
///
/// # Errors
/// 400 that names the block.
pub fn text(at: &str, content: Value, is_system: bool) -> Result<String, ApiError> {
    let mut all = String::new();
    for (i, block) in blocks(at, content)?.into_iter().enumerate() {
        match block {
            Block::Text(text) if is_system && text.starts_with(BILLING) => {}
            Block::Text(text) => append(&mut all, &text),
            Block::Nothing => {}
            other => {
                let param = format!("{at}[{i}]");
                let message = format!(
                    "{param} is of type {:?}; only text can be here",
                    other.kind()
                );
                return Err(ApiError::param(param, message));
            }
        }
    }
    Ok(all)
}

/// Puts this after that, on a line of its own.
pub fn append(text: &mut String, more: &str) {
    if !text.is_empty() && !more.is_empty() {
        text.push('\n');
    }
    text.push_str(more);
}

fn block(at: &str, value: Value) -> Result<Block, ApiError> {
    let Value::Object(mut object) = value else {
        return Err(wrong_type(at, "a content block", &value));
    };
    object.retain(|_, value| !value.is_null());
    let kind = match object.get("type") {
        Some(Value::String(kind)) => kind.clone(),
        other => {
            let got = other.unwrap_or(&Value::Null);
            return Err(wrong_type(&format!("{at}.type"), "a string", got));
        }
    };
    let known = |names: &[&'static str]| known(at, &object, names);
    match kind.as_str() {
        "text" => {
            known(&["type", "text", "cache_control", "citations"])?;
            only(at, &object, "citations", &[Value::Array(Vec::new())])?;
            Ok(Block::Text(string(at, &mut object, "text")?))
        }
        "thinking" => {
            known(&["type", "thinking", "signature", "cache_control"])?;
            Ok(Block::Thinking(string(at, &mut object, "thinking")?))
        }
        "redacted_thinking" => {
            known(&["type", "data", "cache_control"])?;
            only(at, &object, "data", &[Value::from("")])?;
            Ok(Block::Nothing)
        }
        "tool_use" => {
            known(&[
                "type",
                "id",
                "name",
                "input",
                "cache_control",
                "caller",
                "toolset_name",
            ])?;
            only(
                at,
                &object,
                "caller",
                &[serde_json::json!({"type": "direct"})],
            )?;
            only(at, &object, "toolset_name", &[])?;
            let input = match object.remove("input") {
                Some(input @ Value::Object(_)) => input,
                other => {
                    let got = other.unwrap_or_default();
                    return Err(wrong_type(&format!("{at}.input"), "an object", &got));
                }
            };
            Ok(Block::Call {
                id: string(at, &mut object, "id")?,
                name: string(at, &mut object, "name")?,
                input,
            })
        }
        "tool_result" => {
            known(&[
                "type",
                "tool_use_id",
                "content",
                "is_error",
                "cache_control",
                "toolset_name",
            ])?;
            only(at, &object, "toolset_name", &[])?;
            let text = match object.remove("content") {
                None => String::new(),
                Some(content) => text(&format!("{at}.content"), content, false)?,
            };
            // No template has a place for it: it is said.
            let text = match object.get("is_error") {
                None | Some(Value::Bool(false)) => text,
                Some(Value::Bool(true)) => format!("Error: {text}"),
                Some(other) => {
                    return Err(wrong_type(&format!("{at}.is_error"), "a boolean", other));
                }
            };
            let id = string(at, &mut object, "tool_use_id")?;
            Ok(Block::Result { id, text })
        }
        other => {
            let message = format!(
                "{at} is of type {:?}; this model reads only text, thinking, tool_use and tool_result",
                beginning(other)
            );
            Err(ApiError::param(at, message))
        }
    }
}

impl Block {
    /// Its type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Thinking(_) => "thinking",
            Self::Call { .. } => "tool_use",
            Self::Result { .. } => "tool_result",
            Self::Nothing => "redacted_thinking",
        }
    }
}

/// A field that has to be there, taken out.
///
/// # Errors
/// 400 with its path.
pub fn string(at: &str, object: &mut Map<String, Value>, name: &str) -> Result<String, ApiError> {
    let param = format!("{at}.{name}");
    match object.remove(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong_type(&param, "a string", &other)),
        None => {
            let message = format!("{param} is required");
            Err(ApiError::param(param, message))
        }
    }
}

/// Refuses fields with other names than these.
///
/// # Errors
/// 400 with the first one's path, and the name that was meant.
pub fn known(
    at: &str,
    object: &Map<String, Value>,
    names: &[&'static str],
) -> Result<(), ApiError> {
    let mut others = object.keys().filter(|name| !names.contains(&name.as_str()));
    let Some(other) = others.next() else {
        return Ok(());
    };
    let param = format!("{at}.{}", beginning(other));
    let message = match misspelled(other, names) {
        Some(meant) => format!("there is no field {param}: do you mean {meant}?"),
        None => format!("there is no field {param}"),
    };
    Err(ApiError::param(param, message))
}

/// Refuses this field but for these values, which ask for nothing.
fn only(
    at: &str,
    object: &Map<String, Value>,
    name: &str,
    harmless: &[Value],
) -> Result<(), ApiError> {
    match object.get(name) {
        Some(value) if !harmless.contains(value) => {
            let param = format!("{at}.{name}");
            let message =
                format!("{param} is not supported by this server: the model cannot read it");
            Err(ApiError::param(param, message))
        }
        _ => Ok(()),
    }
}
