//! `chat_template_kwargs`, `reasoning_effort` and `include_reasoning`: what a request says to the template, and of reasoning.

use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type};
use super::tools::beginning;
use crate::error::ApiError;

/// What the template gets from elsewhere.
const TAKEN: [&str; 6] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
];

/// OpenAI's words, and those of models that know more.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// What a request says to the template besides its messages.
///
/// # Errors
/// 400 with the parameter's name.
pub fn template_arguments(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let mut arguments = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(other) => return Err(wrong_type("chat_template_kwargs", "an object", &other)),
    };
    if let Some(name) = TAKEN.iter().find(|name| arguments.contains_key(**name)) {
        let param = format!("chat_template_kwargs.{name}");
        let message = format!("{param} cannot be set: the server says it to the template itself");
        return Err(ApiError::param(param, message));
    }
    if let Some(effort) = fields.string("reasoning_effort")? {
        if !EFFORTS.contains(&effort) {
            let message = format!(
                "reasoning_effort must be one of {}, got {:?}",
                EFFORTS.join(", "),
                beginning(effort)
            );
            return Err(ApiError::param("reasoning_effort", message));
        }
        if effort == "none" {
            // How templates whose models think or do not think are told.
            arguments
                .entry("enable_thinking")
                .or_insert(Value::Bool(false));
        }
        arguments
            .entry("reasoning_effort")
            .or_insert_with(|| effort.into());
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Value, ApiError> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        template_arguments(&mut fields).map(Value::Object)
    }

    #[test]
    fn arguments_reach_the_template() {
        let body =
            json!({"chat_template_kwargs": {"enable_thinking": true}, "reasoning_effort": "low"});
        assert_eq!(
            read(body).unwrap(),
            json!({"enable_thinking": true, "reasoning_effort": "low"})
        );
        let none = read(json!({"reasoning_effort": "none"})).unwrap();
        assert_eq!(
            none,
            json!({"enable_thinking": false, "reasoning_effort": "none"})
        );
        assert_eq!(read(json!({})).unwrap(), json!({}));
        for (body, name) in [
            (json!({"chat_template_kwargs": []}), "chat_template_kwargs"),
            (
                json!({"chat_template_kwargs": {"messages": []}}),
                "chat_template_kwargs.messages",
            ),
            (json!({"reasoning_effort": "most"}), "reasoning_effort"),
        ] {
            assert_eq!(read(body).unwrap_err().param.as_deref(), Some(name));
        }
    }
}
