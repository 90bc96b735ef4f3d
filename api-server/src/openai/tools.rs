//! `tools` and what goes with it, and earlier calls among the messages.

use std::sync::Arc;

use baton_chat_formats::grammar::ToolChoice;
use baton_chat_formats::{Format, Tool, Tools};
use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type};
use crate::error::ApiError;

/// Most tools of one request: OpenAI's bound.
const TOOLS_MAX: usize = 128;

/// Longest name of a tool, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// The tools that a request offers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offer {
    /// As the template reads them; empty if there are none or none may be called: a model is not shown what it must not use.
    pub shown: Vec<Value>,
    /// As the parser and the grammar read them.
    pub tools: Arc<Tools>,
    /// Whether the model must call.
    pub choice: ToolChoice,
    /// Whether it may call more than once.
    pub parallel: bool,
    /// Where the door has a tool's schema, in the tool.
    pub schema_field: &'static str,
}

impl Offer {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let shown = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(list)) => list,
            Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
        };
        if shown.len() > TOOLS_MAX {
            let message = format!("tools holds {}; at most {TOOLS_MAX} are taken", shown.len());
            return Err(ApiError::param("tools", message));
        }
        let tools = shown.iter().enumerate().map(|(i, value)| tool(i, value));
        let tools = tools.collect::<Result<Vec<Tool>, _>>()?;
        let tools = Tools::new(tools);
        let choice = choice(fields.value("tool_choice"), &tools)?;
        let shown = match choice {
            ToolChoice::None => Vec::new(),
            _ => shown,
        };
        Ok(Self {
            shown,
            tools: Arc::new(tools),
            choice,
            parallel,
            schema_field: "function.parameters",
        })
    }

    /// Whether the model must call.
    pub fn is_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// Whether it may.
    pub fn may_be_called(&self) -> bool {
        self.choice != ToolChoice::None
    }

    /// The format in which calls are written and looked for. A call that must come takes a grammar and no help of the model's: where the
    /// model's format is not known it is JSON. `shows_tools`: the model's template shows it the tools.
    ///
    /// # Errors
    /// 400 if the model is to call when it wants to, and its format is not known or it does not see the tools.
    pub fn format(&self, of_model: Format, shows_tools: bool) -> Result<Format, ApiError> {
        match of_model {
            _ if !self.may_be_called() => Ok(Format::None),
            Format::None if self.is_forced() => Ok(Format::Json),
            Format::None => {
                let message = "this model calls no tools in a way that this server knows: say which must be called in tool_choice, leave \
                               tools out, or have the server started with --tool-format";
                Err(ApiError::param("tools", message))
            }
            _ if !self.is_forced() && !shows_tools => {
                let message = "the chat template of this model does not show it the tools, so it would not know of them: say which must \
                               be called in tool_choice, describe the tools in a message and read the calls from the text, or serve a model \
                               whose template takes tools";
                Err(ApiError::param("tools", message))
            }
            known => Ok(known),
        }
    }
}

fn tool(i: usize, value: &Value) -> Result<Tool, ApiError> {
    let at = |field: &str| format!("tools[{i}]{field}");
    if !value.is_object() {
        return Err(wrong_type(&at(""), "an object", value));
    }
    match value.get("type").and_then(Value::as_str) {
        Some("function") => {}
        Some(kind) => {
            let message = format!(
                "{} is {:?}; only functions are taken",
                at(".type"),
                beginning(kind)
            );
            return Err(ApiError::param(at(".type"), message));
        }
        None => {
            return Err(ApiError::param(
                at(".type"),
                format!("{} is required", at(".type")),
            ));
        }
    }
    let function = value.get("function").unwrap_or(&Value::Null);
    let Some(object) = function.as_object() else {
        return Err(wrong_type(&at(".function"), "an object", function));
    };
    let name = object.get("name").unwrap_or(&Value::Null);
    let Some(name) = name.as_str() else {
        return Err(wrong_type(&at(".function.name"), "a string", name));
    };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(is_plain) {
        let param = at(".function.name");
        let message = format!(
            "{param} must be 1 to {NAME_BYTES_MAX} letters, digits, '_', '-' or '.', got {:?}",
            beginning(name)
        );
        return Err(ApiError::param(param, message));
    }
    let parameters = match object.get("parameters") {
        None | Some(Value::Null) => Value::Null,
        Some(schema @ Value::Object(fields)) => {
            let takes_object = match fields.get("type") {
                None => true,
                Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "object"),
                Some(kind) => kind == "object",
            };
            if !takes_object {
                let param = at(".function.parameters.type");
                let message = format!("{param} must be \"object\": arguments have names");
                return Err(ApiError::param(param, message));
            }
            schema.clone()
        }
        Some(other) => {
            return Err(wrong_type(
                &at(".function.parameters"),
                "a JSON schema",
                other,
            ));
        }
    };
    let strict = match object.get("strict") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(strict)) => *strict,
        Some(other) => return Err(wrong_type(&at(".function.strict"), "a boolean", other)),
    };
    Ok(Tool {
        strict,
        ..Tool::new(name, parameters)
    })
}

fn choice(value: Option<&Value>, tools: &Tools) -> Result<ToolChoice, ApiError> {
    let Some(value) = value else {
        return Ok(match tools.as_slice() {
            [] => ToolChoice::None,
            _ => ToolChoice::Auto,
        });
    };
    let bad = |message: String| Err(ApiError::param("tool_choice", message));
    if *value == "none" {
        return Ok(ToolChoice::None);
    }
    if tools.as_slice().is_empty() {
        return bad("tool_choice needs tools".to_owned());
    }
    match value {
        Value::String(word) => match word.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "required" => Ok(ToolChoice::Required),
            other => bad(format!(
                "tool_choice must be \"none\", \"auto\", \"required\" or a function, got {:?}",
                beginning(other)
            )),
        },
        Value::Object(object) => match object.get("function").and_then(|f| f.get("name")) {
            Some(Value::String(name)) if tools.find(name).is_some() => {
                Ok(ToolChoice::Named(name.clone()))
            }
            Some(Value::String(name)) => bad(format!(
                "tool_choice names the function {:?}, which is not among the tools",
                beginning(name)
            )),
            _ => bad("tool_choice must have a function with a name".to_owned()),
        },
        other => Err(wrong_type("tool_choice", "a string or an object", other)),
    }
}

/// As much of a client's text as an error quotes.
pub fn beginning(text: &str) -> &str {
    &text[..text.floor_char_boundary(NAME_BYTES_MAX)]
}

/// Puts earlier calls and reasoning of these messages as this format's templates want them.
///
/// # Errors
/// 400 with the field's place.
pub fn suit(messages: &mut [Value], format: Format) -> Result<(), ApiError> {
    for (i, message) in messages.iter_mut().enumerate() {
        if let Some(message) = message.as_object_mut() {
            earlier_calls(&format!("messages[{i}]"), message, format)?;
            earlier_reasoning(message);
        }
    }
    Ok(())
}

/// Earlier calls of a message are checked, and their arguments, which clients send as JSON text, become what templates take:
/// values for nearly all, text for those of DeepSeek, which put it between texts of their own.
///
/// # Errors
/// 400 with the field's place.
fn earlier_calls(
    at: &str,
    message: &mut Map<String, Value>,
    format: Format,
) -> Result<(), ApiError> {
    let calls = match message.get_mut("tool_calls") {
        None => return Ok(()),
        Some(Value::Null) => {
            message.remove("tool_calls");
            return Ok(());
        }
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(wrong_type(&format!("{at}.tool_calls"), "an array", other)),
    };
    let wants_text = matches!(format, Format::DeepSeekV3 | Format::DeepSeekV31);
    for (i, call) in calls.iter_mut().enumerate() {
        let at = format!("{at}.tool_calls[{i}].function");
        let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
            return Err(ApiError::param(&at, format!("{at} is required")));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(ApiError::param(
                format!("{at}.name"),
                format!("{at}.name is required"),
            ));
        }
        match function.get("arguments") {
            Some(Value::String(text)) if !wants_text => {
                // A call without arguments may have an empty text. What is no JSON is what a model once wrote: it reads it again.
                let value = match text.trim() {
                    "" => Value::Object(Map::new()),
                    text => serde_json::from_str(text).unwrap_or_else(|_| Value::from(text)),
                };
                function.insert("arguments".to_owned(), value);
            }
            Some(Value::String(_)) => {}
            Some(value @ Value::Object(_)) if wants_text => {
                let text = Value::from(value.to_string());
                function.insert("arguments".to_owned(), text);
            }
            Some(Value::Object(_)) => {}
            Some(Value::Null) | None => {
                let none = match wants_text {
                    true => Value::from("{}"),
                    false => Value::Object(Map::new()),
                };
                function.insert("arguments".to_owned(), none);
            }
            Some(other) => {
                return Err(wrong_type(&format!("{at}.arguments"), "JSON text", other));
            }
        }
    }
    if message["tool_calls"].as_array().is_some_and(Vec::is_empty) {
        // Templates ask whether the field is there.
        message.remove("tool_calls");
    }
    Ok(())
}

/// Earlier reasoning has two names among clients and a third in a template: each finds its own.
fn earlier_reasoning(message: &mut Map<String, Value>) {
    let names = ["reasoning_content", "reasoning"];
    let found = names
        .iter()
        .find_map(|name| message.get(*name).filter(|value| value.is_string()));
    let Some(found) = found.cloned() else { return };
    for name in ["reasoning_content", "thinking"] {
        message.entry(name).or_insert_with(|| found.clone());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::openai::table::Door;

    fn read(body: Value) -> Result<Offer, ApiError> {
        Offer::read(&mut Fields::parse(Door::Chat, body.to_string().as_bytes())?)
    }

    #[test]
    fn tools_and_choices_are_checked() {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
        let cases = [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tools": [{}]}), "tools[0].type"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (
                json!({"tools": [{"type": "function"}]}),
                "tools[0].function",
            ),
            (
                json!({"tools": [{"type": "function", "function": {}}]}),
                "tools[0].function.name",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
                "tools[0].function.name",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}),
                "tools[0].function.parameters.type",
            ),
            (
                json!({"tools": [tool], "tool_choice": "maybe"}),
                "tool_choice",
            ),
            (json!({"tools": [tool], "tool_choice": 1}), "tool_choice"),
            (
                json!({"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice",
            ),
            (json!({"tool_choice": "auto"}), "tool_choice"),
            (json!({"tools": [], "tool_choice": "auto"}), "tool_choice"),
            (json!({"tools": vec![tool.clone(); 129]}), "tools"),
            (
                json!({"tools": [tool], "parallel_tool_calls": "no"}),
                "parallel_tool_calls",
            ),
        ];
        for (body, name) in cases {
            let error = read(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(name), "{body}");
        }
        let offer = read(json!({"tools": [tool], "parallel_tool_calls": false})).unwrap();
        assert_eq!(
            (offer.choice.clone(), offer.parallel, offer.shown.len()),
            (ToolChoice::Auto, false, 1)
        );
        assert_eq!(offer.format(Format::Hermes, true).unwrap(), Format::Hermes);
        assert_eq!(
            offer
                .format(Format::None, true)
                .unwrap_err()
                .param
                .as_deref(),
            Some("tools")
        );
        let error = offer.format(Format::Hermes, false).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools"));
        assert!(
            error.message.contains("does not show it the tools"),
            "{error}"
        );
        let named = json!({"type": "function", "function": {"name": "f"}});
        for choice in [json!("required"), named] {
            let offer = read(json!({"tools": [tool], "tool_choice": choice})).unwrap();
            assert!(offer.is_forced() && offer.shown.len() == 1);
            assert_eq!(offer.format(Format::Hermes, true).unwrap(), Format::Hermes);
            assert_eq!(offer.format(Format::Hermes, false).unwrap(), Format::Hermes);
            assert_eq!(offer.format(Format::None, false).unwrap(), Format::Json);
        }
        let offer = read(json!({"tools": [tool], "tool_choice": "none"})).unwrap();
        assert_eq!(
            (
                offer.shown.len(),
                offer.format(Format::Hermes, true).unwrap()
            ),
            (0, Format::None)
        );
        for body in [json!({}), json!({"tools": [], "tool_choice": "none"})] {
            assert_eq!(read(body).unwrap().choice, ToolChoice::None);
        }
    }

    #[test]
    fn earlier_calls_are_as_templates_want_them() {
        let message = json!({"tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
            {"function": {"name": "f", "arguments": ""}},
            {"function": {"name": "f"}},
            {"function": {"name": "f", "arguments": "{oops"}},
        ]});
        let arguments = |format| {
            let mut message = message.as_object().unwrap().clone();
            earlier_calls("messages[0]", &mut message, format).unwrap();
            let calls = message["tool_calls"].as_array().unwrap().clone();
            calls
                .into_iter()
                .map(|call| call["function"]["arguments"].clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            arguments(Format::Hermes),
            [json!({"a": 1}), json!({}), json!({}), json!("{oops")]
        );
        assert_eq!(
            arguments(Format::DeepSeekV3),
            [json!("{\"a\": 1}"), json!(""), json!("{}"), json!("{oops")]
        );
        for bad in [
            json!(1),
            json!([{}]),
            json!([{"function": {}}]),
            json!([{"function": {"name": "f", "arguments": 1}}]),
        ] {
            let mut message = json!({"tool_calls": bad}).as_object().unwrap().clone();
            assert!(
                earlier_calls("messages[0]", &mut message, Format::Hermes).is_err(),
                "{bad}"
            );
        }
    }
}
