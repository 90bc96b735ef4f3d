//! `tools` and `tool_choice`, as chats have them.

use std::sync::Arc;

use baton_chat_formats::grammar::ToolChoice;
use baton_chat_formats::{Tool, Tools};
use serde_json::{Map, Value, json};

use super::blocks::{known, string};
use crate::error::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use crate::openai::table::{self, Door};
use crate::openai::tools::{Offer, beginning};

/// Most tools of one request: agents with many servers of tools have hundreds.
const TOOLS_MAX: usize = 1024;

/// Longest name of a tool, in bytes: Anthropic's bound.
const NAME_BYTES_MAX: usize = 128;

/// Fields of a tool that are read, and after them those that change nothing.
const OF_TOOLS: [&str; 10] = [
    "type",
    "name",
    "description",
    "input_schema",
    "strict",
    "cache_control",
    // of an answer's stream, which sends arguments as they come anyhow
    "eager_input_streaming",
    // only if they say what is so anyhow
    "defer_loading",
    "input_examples",
    "allowed_callers",
];

/// Reads the tools that a request offers.
///
/// # Errors
/// 400 with the parameter's name.
pub fn offer(door: Door, fields: &mut Fields) -> Result<Offer, ApiError> {
    let list = match fields.take("tools") {
        None => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
    };
    if list.len() > TOOLS_MAX {
        let message = format!("tools holds {}; at most {TOOLS_MAX} are taken", list.len());
        return Err(ApiError::param("tools", message));
    }
    let (mut shown, mut tools) = (Vec::with_capacity(list.len()), Vec::new());
    for (i, value) in list.into_iter().enumerate() {
        let (value, tool) = tool(&format!("tools[{i}]"), value)?;
        shown.push(value);
        tools.push(tool);
    }
    let tools = Tools::new(tools);
    let (choice, parallel) = choice(door, fields.value("tool_choice"), &tools)?;
    if choice == ToolChoice::None {
        shown.clear();
    }
    Ok(Offer {
        shown,
        tools: Arc::new(tools),
        choice,
        parallel,
        schema_field: "input_schema",
    })
}

/// A tool as the template is shown it, and as the parser reads it.
fn tool(at: &str, value: Value) -> Result<(Value, Tool), ApiError> {
    let Value::Object(mut object) = value else {
        return Err(wrong_type(at, "a tool", &value));
    };
    object.retain(|_, value| !value.is_null());
    let path = |field: &str| format!("{at}.{field}");
    // Others than the client's own have fields of their own, so this comes first.
    match object.get("type") {
        None => {}
        Some(Value::String(kind)) if kind == "custom" => {}
        Some(Value::String(kind)) => {
            let message = format!(
                "{} is {:?}; only tools that the client runs (\"custom\") are taken",
                path("type"),
                beginning(kind)
            );
            return Err(ApiError::param(path("type"), message));
        }
        Some(other) => return Err(wrong_type(&path("type"), "a string", other)),
    }
    known(at, &object, &OF_TOOLS)?;
    says_nothing(at, &object)?;
    let name = string(at, &mut object, "name")?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(is_plain) {
        let param = path("name");
        let message = format!(
            "{param} must be 1 to {NAME_BYTES_MAX} letters, digits, '_', '-' or '.', got {:?}",
            beginning(&name)
        );
        return Err(ApiError::param(param, message));
    }
    let schema = match object.remove("input_schema") {
        Some(schema @ Value::Object(_)) => schema,
        other => {
            let got = other.unwrap_or_default();
            return Err(wrong_type(&path("input_schema"), "a JSON schema", &got));
        }
    };
    let strict = match object.get("strict") {
        None => false,
        Some(Value::Bool(strict)) => *strict,
        Some(other) => return Err(wrong_type(&path("strict"), "a boolean", other)),
    };
    let mut function = Map::new();
    function.insert("name".to_owned(), name.as_str().into());
    if object.contains_key("description") {
        let description = string(at, &mut object, "description")?;
        function.insert("description".to_owned(), description.into());
    }
    function.insert("parameters".to_owned(), schema.clone());
    if strict {
        function.insert("strict".to_owned(), true.into());
    }
    let tool = Tool {
        strict,
        ..Tool::new(name, schema)
    };
    Ok((json!({"type": "function", "function": function}), tool))
}

/// Refuses what would change which tools the model is shown, or how.
fn says_nothing(at: &str, object: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, harmless, instead) in [
        ("defer_loading", json!(false), "all tools are shown at once"),
        (
            "input_examples",
            json!([]),
            "put examples into the description",
        ),
        (
            "allowed_callers",
            json!(["direct"]),
            "only the model calls tools",
        ),
    ] {
        if object.get(name).is_some_and(|value| *value != harmless) {
            let param = format!("{at}.{name}");
            let message = format!("{param} is not supported by this server: {instead}");
            return Err(ApiError::param(param, message));
        }
    }
    Ok(())
}

/// Whether the model must call, and whether it may more than once.
fn choice(
    door: Door,
    value: Option<&Value>,
    tools: &Tools,
) -> Result<(ToolChoice, bool), ApiError> {
    const NAME: &str = "tool_choice";
    let Some(value) = value else {
        let choice = match tools.as_slice() {
            [] => ToolChoice::None,
            _ => ToolChoice::Auto,
        };
        return Ok((choice, true));
    };
    let object = table::object(door, NAME, value)?;
    let field = |name: &str| object.get(name).filter(|value| !value.is_null());
    let name = match field("name") {
        None => None,
        Some(Value::String(name)) => Some(name),
        Some(other) => return Err(wrong_type("tool_choice.name", "a string", other)),
    };
    let parallel = match field("disable_parallel_tool_use") {
        None => true,
        Some(Value::Bool(disabled)) => !disabled,
        Some(other) => {
            let name = "tool_choice.disable_parallel_tool_use";
            return Err(wrong_type(name, "a boolean", other));
        }
    };
    let bad = |param: &str, message: String| Err(ApiError::param(param, message));
    let kind = field("type");
    let choice = match kind.and_then(Value::as_str) {
        Some("none") => return Ok((ToolChoice::None, parallel)),
        Some("auto") => ToolChoice::Auto,
        Some("any") => ToolChoice::Required,
        Some("tool") => match name {
            None => {
                return bad(
                    "tool_choice.name",
                    "tool_choice.name is required".to_owned(),
                );
            }
            Some(name) => ToolChoice::Named(name.clone()),
        },
        _ => {
            let got = kind.map_or(String::new(), |other| format!(", got {other:.64}"));
            let message =
                format!("tool_choice.type must be \"auto\", \"any\", \"tool\" or \"none\"{got}");
            return bad("tool_choice.type", message);
        }
    };
    match &choice {
        _ if tools.as_slice().is_empty() => bad(NAME, format!("{NAME} needs tools")),
        ToolChoice::Named(name) if tools.find(name).is_none() => {
            let message = format!(
                "tool_choice names the tool {:?}, which is not among the tools",
                beginning(name)
            );
            bad("tool_choice.name", message)
        }
        _ => Ok((choice, parallel)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Offer, ApiError> {
        let mut fields = Fields::parse(Door::Messages, body.to_string().as_bytes())?;
        offer(Door::Messages, &mut fields)
    }

    #[test]
    fn a_schema_that_cannot_be_compiled_is_named_as_this_door_has_it() {
        use baton_chat_formats::{Format, Reasoning};
        let bad = json!({"type": "object", "properties": {"a": {"type": "strnig"}}});
        let tools = json!([{"name": "f", "input_schema": bad}]);
        let offer = read(json!({"tools": tools, "tool_choice": {"type": "any"}})).unwrap();
        let made = offer.grammar(Format::Hermes, Reasoning::None, None, &|_| None);
        let error = made.unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools[0].input_schema"));
        assert!(error.message.contains("strnig"), "{error}");
    }

    #[test]
    fn tools_are_shown_as_chats_show_them() {
        let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}});
        let tools = json!([
            {"name": "weather", "description": "The sky.", "input_schema": schema, "cache_control": {"type": "ephemeral"}},
            {"type": "custom", "name": "now", "input_schema": {"type": "object"}, "strict": true},
        ]);
        let offer = read(json!({"tools": tools})).unwrap();
        assert_eq!(offer.choice, ToolChoice::Auto);
        assert!(offer.parallel);
        let function = json!({"name": "weather", "description": "The sky.", "parameters": schema});
        assert_eq!(
            offer.shown[0],
            json!({"type": "function", "function": function})
        );
        assert!(offer.tools.find("now").unwrap().strict);
        for (choice, expected, shown) in [
            (json!({"type": "any"}), ToolChoice::Required, 2),
            (
                json!({"type": "tool", "name": "now"}),
                ToolChoice::Named("now".to_owned()),
                2,
            ),
            (json!({"type": "none"}), ToolChoice::None, 0),
        ] {
            let offer = read(json!({"tools": tools, "tool_choice": choice})).unwrap();
            assert_eq!((offer.choice, offer.shown.len()), (expected, shown));
        }
        let one = json!({"type": "auto", "disable_parallel_tool_use": true});
        assert!(
            !read(json!({"tools": tools, "tool_choice": one}))
                .unwrap()
                .parallel
        );
    }

    #[test]
    fn what_cannot_be_offered_is_named() {
        let tool = json!({"name": "f", "input_schema": {"type": "object"}});
        let with = |name: &str, value: Value| {
            let mut tool = tool.clone();
            tool[name] = value;
            json!({"tools": [tool]})
        };
        for (body, param) in [
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tools": [{"name": "f"}]}), "tools[0].input_schema"),
            (with("name", json!("a b")), "tools[0].name"),
            (with("type", json!("web_search_20250305")), "tools[0].type"),
            (with("descripton", json!("x")), "tools[0].descripton"),
            (with("defer_loading", json!(true)), "tools[0].defer_loading"),
            (
                with("input_examples", json!([{}])),
                "tools[0].input_examples",
            ),
            (with("strict", json!(1)), "tools[0].strict"),
            (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
            (
                json!({"tools": [tool], "tool_choice": {"type": "required"}}),
                "tool_choice.type",
            ),
            (
                json!({"tools": [tool], "tool_choice": {"type": "tool"}}),
                "tool_choice.name",
            ),
            (
                json!({"tools": [tool], "tool_choice": {"type": "tool", "name": "g"}}),
                "tool_choice.name",
            ),
            (
                json!({"tools": [tool], "tool_choice": {"type": "auto", "nme": "g"}}),
                "tool_choice.nme",
            ),
            (
                json!({"tools": [tool], "tool_choice": "auto"}),
                "tool_choice",
            ),
        ] {
            let error = read(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
        read(with("allowed_callers", json!(["direct"]))).unwrap();
    }
}
