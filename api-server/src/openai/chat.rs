//! `POST /v1/chat/completions`: the request.

use baton_chat_formats::Format;
use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type};
use super::params::{Params, alternatives};
use super::table::{Door, misspelled};
use super::thinking;
use super::tools::{self, Offer};
use crate::config::Limits;
use crate::error::ApiError;
use crate::text::tokenizer::{GenerationDefaults, Rendering};

/// A chat request, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// Shared parameters.
    pub params: Params,
    /// Messages for the template; `content` is one string.
    pub messages: Vec<Value>,
    /// How the template is rendered.
    pub rendering: Rendering,
    /// The tools that may be called; what of them is shown to the model is in `rendering`.
    pub offer: Offer,
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
        let mut fields = Fields::parse(Door::Chat, body)?;
        let mut offer = Offer::read(&mut fields)?;
        let include_reasoning = fields.bool("include_reasoning")?.unwrap_or(true);
        let mut params = Params::read(Door::Chat, &fields, 1, defaults, limits)?;
        params.sampling.logprobs = logprobs(&fields)?;
        let mut rendering = rendering(&mut fields)?;
        let excludes_reasoning = thinking::hints(&fields, &mut rendering.variables)?;
        rendering.tools = std::mem::take(&mut offer.shown);
        let messages = messages(fields.take("messages"))?;
        Ok(Self {
            params,
            messages,
            rendering,
            offer,
            include_reasoning: include_reasoning && !excludes_reasoning,
        })
    }

    /// As [`tools::suit`].
    ///
    /// # Errors
    /// As there.
    pub fn suit(&mut self, format: Format) -> Result<(), ApiError> {
        tools::suit(&mut self.messages, format)
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

/// How the template is to be rendered.
///
/// # Errors
/// 400 with the parameter's name.
pub fn rendering(fields: &mut Fields) -> Result<Rendering, ApiError> {
    const VARIABLES: &str = "chat_template_kwargs";
    let continues = fields.bool("continue_final_message")?.unwrap_or(false);
    let opens = fields.bool("add_generation_prompt")?;
    if continues && opens == Some(true) {
        let message = "continue_final_message goes on with the last message, and add_generation_prompt begins another: ask for one of them";
        return Err(ApiError::param("continue_final_message", message));
    }
    let variables = match fields.take(VARIABLES) {
        None => Map::new(),
        Some(Value::Object(variables)) => variables,
        Some(other) => return Err(wrong_type(VARIABLES, "an object", &other)),
    };
    if let Some(name) = RESERVED.iter().find(|name| variables.contains_key(**name)) {
        let param = format!("{VARIABLES}.{name}");
        let message = format!(
            "{param} is not for the request to set there: name other variables of the template"
        );
        return Err(ApiError::param(param, message));
    }
    Ok(Rendering {
        add_generation_prompt: opens.unwrap_or(!continues),
        continue_final_message: continues,
        tools: Vec::new(),
        variables,
    })
}

/// Variables of the template that have a field of their own, or are the model's.
const RESERVED: [&str; 8] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "chat_template",
    "tokenize",
];

/// Fields of a message that Baton or templates know. Others reach the template too, unless they are misspelled.
const OF_MESSAGES: [&str; 8] = [
    "role",
    "content",
    "name",
    "refusal",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
];

/// Fields of a message that would change what the model reads, and that no template knows.
const NOT_OF_MESSAGES: [(&str, &str); 4] = [
    ("function_call", "say it in tool_calls"),
    ("audio", "models here read only text"),
    ("prefix", "use continue_final_message"),
    ("partial", "use continue_final_message"),
];

/// Fields of a text part.
const OF_PARTS: [&str; 5] = [
    "type",
    "text",
    "refusal",
    // of prompt caches that are told where prefixes end
    "cache_control",
    "prompt_cache_breakpoint",
];

/// The messages of a chat, ready for the template.
///
/// # Errors
/// 400 that names the message.
pub fn messages(value: Option<Value>) -> Result<Vec<Value>, ApiError> {
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
    // A client that sends back what it got sends all that was not there as null, and templates ask what is there.
    object.retain(|_, value| !value.is_null());
    check_fields(object, &at(""))?;
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
        // An assistant that refused has said that; one that only called tools has said nothing.
        None if object["role"] == "assistant" => match object.remove("refusal") {
            None => String::new(),
            Some(Value::String(text)) => text,
            Some(other) => return Err(wrong_type(&at(".refusal"), "a string", &other)),
        },
        None => {
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

/// Refuses fields of a message, or of this path, that are not what their sender thinks.
fn check_fields(message: &Map<String, Value>, path: &str) -> Result<(), ApiError> {
    for (name, value) in message {
        let at = || format!("{path}.{name}");
        if let Some((_, instead)) = NOT_OF_MESSAGES.iter().find(|(not, _)| not == name) {
            if *value != Value::Bool(false) {
                let message = format!("{} is not supported by this server: {instead}", at());
                return Err(ApiError::param(at(), message));
            }
        } else if let Some(meant) = misspelled(name, &OF_MESSAGES) {
            let message = format!("there is no field {}: do you mean {meant}?", at());
            return Err(ApiError::param(at(), message));
        }
    }
    Ok(())
}

/// Text parts as one text, a line each.
fn joined(name: &str, parts: &[Value]) -> Result<String, ApiError> {
    let texts = parts.iter().enumerate().map(|(i, part)| {
        let param = format!("{name}[{i}]");
        let mut names = part.as_object().into_iter().flat_map(Map::keys);
        let other = names.find(|name| !OF_PARTS.contains(&name.as_str()));
        let kind = part.get("type").and_then(Value::as_str);
        match (part, kind) {
            (Value::String(text), _) => Ok(text.as_str()),
            (_, Some(kind @ ("text" | "refusal"))) => match (part.get(kind), other) {
                (Some(Value::String(text)), None) => Ok(text.as_str()),
                (_, Some(other)) => {
                    let other: String = other.chars().take(64).collect();
                    let param = format!("{param}.{other}");
                    let message = format!("there is no field {param} in a text part");
                    Err(ApiError::param(param, message))
                }
                (text, None) => Err(wrong_type(
                    &param,
                    "a text part",
                    text.unwrap_or(&Value::Null),
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
    use serde_json::json;

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
            (
                json!({"messages": [{"role": "assistant", "contents": "x"}]}),
                "messages[0].contents",
            ),
            (
                json!({"messages": [{"role": "assistant", "content": "x", "prefix": true}]}),
                "messages[0].prefix",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "detail": 1}]}]}),
                "messages[0].content[0].detail",
            ),
            (
                json!({"messages": [user], "continue_final_message": true, "add_generation_prompt": true}),
                "continue_final_message",
            ),
            (
                json!({"messages": [user], "chat_template_kwargs": {"eos_token": "x"}}),
                "chat_template_kwargs.eos_token",
            ),
            (json!({"messages": [user], "tools": [{}]}), "tools[0].type"),
            (json!({"messages": [user], "functions": [{}]}), "functions"),
            (
                json!({"messages": [user], "response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
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

    /// As `model_dump()` of an SDK's message gives it.
    #[test]
    fn a_message_may_be_sent_back_as_it_came() {
        let back = json!({"role": "assistant", "content": "yes", "refusal": null, "annotations": [], "audio": null,
            "function_call": null, "tool_calls": null, "reasoning_content": null});
        let refused = json!({"role": "assistant", "content": null, "refusal": "No."});
        let request = parse(json!({"messages": [back, refused]})).unwrap();
        let kept = json!({"role": "assistant", "content": "yes", "annotations": []});
        assert_eq!(request.messages[0], kept);
        assert_eq!(request.messages[1]["content"], "No.");
    }

    #[test]
    fn a_chat_that_goes_on_opens_no_turn() {
        let user = json!({"role": "user", "content": "hi"});
        let rendering = |more: Value| {
            let mut body = json!({"messages": [user]});
            for (name, value) in more.as_object().unwrap() {
                body[name] = value.clone();
            }
            let rendering = parse(body).unwrap().rendering;
            (
                rendering.add_generation_prompt,
                rendering.continue_final_message,
            )
        };
        assert_eq!(rendering(json!({})), (true, false));
        assert_eq!(
            rendering(json!({"continue_final_message": true})),
            (false, true)
        );
        assert_eq!(
            rendering(json!({"add_generation_prompt": false})),
            (false, false)
        );
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
