//! `tools`, which lie flat here, and `tool_choice`.

use serde_json::{Map, Value, json};

use super::settings::Settings;
use crate::error::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use crate::openai::tools::{Offer, beginning};

/// The tools, which lie flat here, as chats have them.
pub fn offer(fields: &mut Fields, settings: &mut Settings) -> Result<Offer, ApiError> {
    let (mut shown, mut echoed) = (Vec::new(), Vec::new());
    match fields.take("tools") {
        None => {}
        Some(Value::Array(tools)) => {
            for (i, tool) in tools.into_iter().enumerate() {
                let at = format!("tools[{i}]");
                let Value::Object(mut tool) = tool else {
                    return Err(wrong_type(&at, "an object", &tool));
                };
                tool.retain(|_, value| !value.is_null());
                let kind = tool.remove("type").unwrap_or_default();
                let mut echo = Map::from_iter([("type".to_owned(), kind.clone())]);
                for name in ["name", "description", "parameters"] {
                    echo.insert(name.to_owned(), tool.get(name).cloned().unwrap_or_default());
                }
                echo.insert(
                    "strict".to_owned(),
                    tool.get("strict").cloned().unwrap_or(false.into()),
                );
                echoed.push(Value::Object(echo));
                shown.push(json!({"type": kind, "function": tool}));
            }
            fields.put("tools", Value::Array(shown));
        }
        Some(other) => return Err(wrong_type("tools", "an array of tools", &other)),
    }
    settings.say("tools", Value::Array(echoed));
    let choice = fields.take("tool_choice");
    settings.say("tool_choice", choice.clone().unwrap_or("auto".into()));
    let flat = match choice {
        None => None,
        Some(Value::Object(choice)) => match choice.get("type").and_then(Value::as_str) {
            Some("function") => {
                let name = choice.get("name").cloned().unwrap_or_default();
                Some(json!({"type": "function", "function": {"name": name}}))
            }
            Some("allowed_tools") => Some(allowed(fields, &choice)?),
            kind => {
                let message = format!(
                    "tool_choice.type must be \"function\" or \"allowed_tools\", got {:?}",
                    beginning(kind.unwrap_or_default())
                );
                return Err(ApiError::param("tool_choice.type", message));
            }
        },
        Some(other) => Some(other),
    };
    flat.into_iter()
        .for_each(|choice| fields.put("tool_choice", choice));
    let offer = Offer::read(fields).map(|offer| Offer {
        schema_field: "parameters",
        ..offer
    });
    offer.map_err(|error| ApiError {
        message: error.message.replace(".function", ""),
        param: error.param.map(|param| param.replace(".function", "")),
        ..error
    })
}

/// Leaves of the tools those that `allowed_tools` names, and says how they may be called.
fn allowed(fields: &mut Fields, choice: &Map<String, Value>) -> Result<Value, ApiError> {
    let mode = match choice.get("mode").and_then(Value::as_str) {
        Some(mode @ ("auto" | "required")) => mode.to_owned(),
        _ => {
            let message = "tool_choice.mode must be \"auto\" or \"required\"";
            return Err(ApiError::param("tool_choice.mode", message));
        }
    };
    let named = choice.get("tools").and_then(Value::as_array);
    let names: Vec<&str> = named
        .into_iter()
        .flatten()
        .filter_map(|tool| tool.get("name")?.as_str())
        .collect();
    let Some(Value::Array(mut tools)) = fields.take("tools") else {
        return Err(ApiError::param("tool_choice", "tool_choice needs tools"));
    };
    let name_of = |tool: &Value| tool["function"]["name"].as_str().map(str::to_owned);
    if let Some(other) = names.iter().find(|name| {
        !tools
            .iter()
            .any(|tool| name_of(tool).as_deref() == Some(**name))
    }) {
        let message = format!(
            "tool_choice.tools names {:?}, which is not among the tools",
            beginning(other)
        );
        return Err(ApiError::param("tool_choice.tools", message));
    }
    tools.retain(|tool| name_of(tool).is_some_and(|name| names.contains(&name.as_str())));
    if tools.is_empty() {
        return Err(ApiError::param(
            "tool_choice.tools",
            "tool_choice.tools names no tool",
        ));
    }
    fields.put("tools", Value::Array(tools));
    Ok(mode.into())
}
