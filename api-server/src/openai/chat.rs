//! `POST /v1/chat/completions`: the request.

use baton_chat_formats::Format;
use serde_json::{Map, Value, json};

use super::fields::{Fields, wrong_type};
use super::params::{Params, alternatives};
use super::thinking::template_arguments;
use super::tools::{self, Offer};
use crate::config::Limits;
use crate::error::ApiError;
use crate::text::tokenizer::GenerationDefaults;

/// A chat request, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// Shared parameters.
    pub params: Params,
    /// Messages for the template; `content` is one string.
    pub messages: Vec<Value>,
    /// The tools that may be called.
    pub offer: Offer,
    /// What else the template is told.
    pub template_arguments: Map<String, Value>,
    /// Whether the client wants to see the reasoning.
    pub include_reasoning: bool,
}

impl ChatRequest {
    /// Checks a body.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn parse(
        body: &[u8],
        defaults: &GenerationDefaults,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        refuse_unsupported(&fields)?;
        let offer = Offer::read(&mut fields)?;
        let template_arguments = template_arguments(&mut fields)?;
        let include_reasoning = fields.bool("include_reasoning")?.unwrap_or(true);
        let mut params = Params::read(&fields, defaults, limits)?;
        params.sampling.logprobs = logprobs(&fields)?;
        let messages = messages(fields.take("messages"))?;
        Ok(Self {
            params,
            messages,
            offer,
            template_arguments,
            include_reasoning,
        })
    }

    /// Puts earlier calls and reasoning of the messages as this format's templates want them.
    ///
    /// # Errors
    /// 400 with the field's place.
    pub fn suit(&mut self, format: Format) -> Result<(), ApiError> {
        for (i, message) in self.messages.iter_mut().enumerate() {
            if let Some(message) = message.as_object_mut() {
                tools::earlier_calls(&format!("messages[{i}]"), message, format)?;
                tools::earlier_reasoning(message);
            }
        }
        Ok(())
    }
}

fn logprobs(fields: &Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = alternatives(fields, "top_logprobs")?;
    match (wanted, top) {
        (false, Some(n)) if n > 0 => Err(ApiError::param(
            "top_logprobs",
            "top_logprobs needs logprobs to be true",
        )),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// What would change the answer if it were ignored, and is not there yet.
fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    let unsupported = |param: &str, what: &str| {
        Err(ApiError::param(
            param,
            format!("{what} is not supported by this server"),
        ))
    };
    // OpenAI's older fields for the same.
    for (name, instead) in [("functions", "tools"), ("function_call", "tool_choice")] {
        match fields.value(name) {
            None => {}
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(_) => return unsupported(name, &format!("{name} (say {instead} instead)")),
        }
    }
    if let Some(format) = fields.value("response_format") {
        match format.get("type").and_then(Value::as_str) {
            Some("text") => {}
            Some(kind) => {
                return unsupported("response_format", &format!("response_format {kind:?}"));
            }
            None => {
                return Err(wrong_type(
                    "response_format",
                    "an object with a type",
                    format,
                ));
            }
        }
    }
    if let Some(modalities) = fields.value("modalities")
        && *modalities != json!(["text"])
    {
        return unsupported("modalities", "any modality but text");
    }
    Ok(())
}

fn messages(value: Option<Value>) -> Result<Vec<Value>, ApiError> {
    let list = match value {
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(Value::Array(_)) => {
            return Err(ApiError::param(
                "messages",
                "messages must hold at least one message",
            ));
        }
        Some(other) => return Err(wrong_type("messages", "an array of messages", &other)),
        None => return Err(ApiError::param("messages", "messages is required")),
    };
    list.into_iter()
        .enumerate()
        .map(|(i, message)| self::message(i, message))
        .collect()
}

fn message(i: usize, mut message: Value) -> Result<Value, ApiError> {
    let at = |field: &str| format!("messages[{i}]{field}");
    let Some(object) = message.as_object_mut() else {
        return Err(wrong_type(&at(""), "an object", &message));
    };
    match object.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        Some(other) => return Err(wrong_type(&at(".role"), "a role name", other)),
        None => {
            return Err(ApiError::param(
                at(".role"),
                format!("{} is required", at(".role")),
            ));
        }
    }
    let content = match object.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => joined(&at(".content"), &parts)?,
        // An assistant that only called tools has said nothing.
        Some(Value::Null) | None if object["role"] == "assistant" => String::new(),
        Some(Value::Null) | None => {
            let param = at(".content");
            let message = format!("{param} is required");
            return Err(ApiError::param(param, message));
        }
        Some(other) => {
            return Err(wrong_type(
                &at(".content"),
                "a string or an array of text parts",
                &other,
            ));
        }
    };
    object.insert("content".to_owned(), Value::String(content));
    Ok(message)
}

/// Text parts as one text, a line each.
fn joined(name: &str, parts: &[Value]) -> Result<String, ApiError> {
    let texts = parts.iter().enumerate().map(|(i, part)| {
        let param = format!("{name}[{i}]");
        match (part, part.get("type").and_then(Value::as_str)) {
            (Value::String(text), _) => Ok(text.as_str()),
            (_, Some("text")) => match part.get("text") {
                Some(Value::String(text)) => Ok(text.as_str()),
                other => Err(wrong_type(
                    &param,
                    "a text part",
                    other.unwrap_or(&Value::Null),
                )),
            },
            (_, Some(kind)) => {
                let message = format!("{param} is of type {kind:?}; this model reads only text");
                Err(ApiError::param(param, message))
            }
            (other, None) => Err(wrong_type(&param, "a text part", other)),
        }
    });
    Ok(texts.collect::<Result<Vec<_>, ApiError>>()?.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<ChatRequest, ApiError> {
        let body = body.to_string();
        ChatRequest::parse(
            body.as_bytes(),
            &GenerationDefaults::default(),
            &Limits::default(),
        )
    }

    #[test]
    fn messages_are_checked_one_by_one() {
        let user = json!({"role": "user", "content": "hi"});
        let cases = [
            (json!({}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": [1]}), "messages[0]"),
            (
                json!({"messages": [user, {"content": "x"}]}),
                "messages[1].role",
            ),
            (
                json!({"messages": [{"role": "user"}]}),
                "messages[0].content",
            ),
            (
                json!({"messages": [{"role": "user", "content": 1}]}),
                "messages[0].content",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
                "messages[0].content[0]",
            ),
            (json!({"messages": [user], "tools": [{}]}), "tools[0].type"),
            (json!({"messages": [user], "functions": [{}]}), "functions"),
            (
                json!({"messages": [user], "response_format": {"type": "json_schema"}}),
                "response_format",
            ),
            (
                json!({"messages": [user], "top_logprobs": 2}),
                "top_logprobs",
            ),
            (
                json!({"messages": [user], "logprobs": true, "top_logprobs": 21}),
                "top_logprobs",
            ),
        ];
        for (body, name) in cases {
            let error = parse(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(name), "{body}");
        }
    }

    #[test]
    fn text_parts_are_joined() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let request = parse(json!({"messages": [{"role": "user", "content": parts}],
            "logprobs": true, "top_logprobs": 3, "response_format": {"type": "text"}}))
        .unwrap();
        assert_eq!(request.messages[0]["content"], "a\nb");
        assert_eq!(request.params.sampling.logprobs, Some(3));
    }
}
