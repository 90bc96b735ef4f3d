//! `POST /v1/messages` and `/v1/messages/count_tokens`: the requests.

use serde_json::Value;

use super::chat;
use super::thinking::{self, Wanted};
use super::tools;
use crate::config::Limits;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::table::Door;
use crate::openai::tools::Offer;
use crate::openai::{ChatRequest, Params, grammar, rendering, stops};
use crate::text::tokenizer::{GenerationDefaults, Rendering};

/// Checks a body of `/v1/messages`.
///
/// # Errors
/// 400 with the parameter's name.
pub fn read(
    body: &[u8],
    defaults: &GenerationDefaults,
    limits: &Limits,
) -> Result<ChatRequest, ApiError> {
    let mut fields = Fields::parse(Door::Messages, body)?;
    let mut params = Params::read(Door::Messages, &fields, 1, defaults, limits)?;
    if params.max_tokens.is_none() {
        return Err(ApiError::param("max_tokens", "max_tokens is required"));
    }
    params.fills_room = true;
    params.stops = stops(&fields, "stop_sequences", limits.stops_max)?;
    let Spoken {
        messages,
        rendering,
        offer,
        wanted,
    } = Spoken::read(Door::Messages, &mut fields)?;
    if let Some((name, schema)) = wanted.schema {
        if rendering.continue_final_message {
            let message = format!(
                "the last message is the assistant's, which goes on with it, and {name} says what the whole answer is: leave one out"
            );
            return Err(ApiError::param(name, message));
        }
        params.grammar = Some(grammar::of_checked_schema(&name, &schema)?);
        params.grammar_field = Some(name);
    }
    Ok(ChatRequest {
        params,
        messages,
        rendering,
        offer,
        include_reasoning: wanted.shows_thinking,
    })
}

/// A request for the number of a chat's tokens, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct CountRequest {
    /// Name of the model.
    pub model: Option<String>,
    /// Messages for the template.
    pub messages: Vec<Value>,
    /// How it is rendered.
    pub rendering: Rendering,
    /// The tools that may be called; what of them is shown to the model is in `rendering`.
    pub offer: Offer,
}

impl CountRequest {
    /// Checks a body.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(Door::CountTokens, body)?;
        let model = fields.string("model")?.map(str::to_owned);
        let Spoken {
            messages,
            rendering,
            offer,
            ..
        } = Spoken::read(Door::CountTokens, &mut fields)?;
        Ok(Self {
            model,
            messages,
            rendering,
            offer,
        })
    }
}

/// What both doors read: all that the prompt is made of.
struct Spoken {
    messages: Vec<Value>,
    rendering: Rendering,
    offer: Offer,
    wanted: Wanted,
}

impl Spoken {
    fn read(door: Door, fields: &mut Fields) -> Result<Self, ApiError> {
        let mut offer = tools::offer(door, fields)?;
        let mut rendering = rendering(fields)?;
        let wanted = thinking::read(door, fields, &mut rendering.variables)?;
        rendering.tools = std::mem::take(&mut offer.shown);
        let (messages, goes_on) = chat::messages(fields.take("system"), fields.take("messages"))?;
        rendering.continue_final_message = goes_on;
        rendering.add_generation_prompt = !goes_on;
        Ok(Self {
            messages,
            rendering,
            offer,
            wanted,
        })
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::Grammar;
    use serde_json::json;

    use super::*;

    fn ask(more: Value) -> Result<ChatRequest, ApiError> {
        let mut body =
            json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        let body = body.to_string();
        read(
            body.as_bytes(),
            &GenerationDefaults::default(),
            &Limits::default(),
        )
    }

    #[test]
    fn what_is_said_is_asked_for() {
        let chat = ask(json!({"stop_sequences": ["a", "b"], "top_k": 3, "temperature": 0.5, "stream": true, "seed": 7,
            "system": "Be brief.", "metadata": {"user_id": "u"}}))
        .unwrap();
        let params = &chat.params;
        assert_eq!(params.stops, ["a", "b"]);
        assert_eq!((params.max_tokens, params.stream), (Some(9), true));
        assert_eq!(
            (params.sampling.top_k, params.sampling.temperature),
            (3, 0.5)
        );
        assert!(params.seeded && params.fills_room && params.n == 1);
        assert_eq!(
            chat.messages[0],
            json!({"role": "system", "content": "Be brief."})
        );
        assert!(chat.rendering.add_generation_prompt);
    }

    #[test]
    fn a_schema_becomes_a_grammar() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let format = json!({"type": "json_schema", "schema": schema});
        for more in [
            json!({"output_config": {"format": format}}),
            json!({"output_format": format}),
        ] {
            let chat = ask(more).unwrap();
            assert_eq!(
                chat.params.grammar,
                Some(Grammar::JsonSchema(schema.to_string()))
            );
        }
        let cannot =
            json!({"type": "json_schema", "schema": {"type": "string", "pattern": "(?=a)b"}});
        let prefilled =
            json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "{"}]);
        for (more, param) in [
            (
                json!({"output_config": {"format": cannot}}),
                "output_config.format",
            ),
            (
                json!({"output_format": format, "output_config": {"format": format}}),
                "output_format",
            ),
            (
                json!({"output_format": format, "messages": prefilled}),
                "output_format",
            ),
            (
                json!({"output_config": {"format": {"type": "json_object"}}}),
                "output_config.format.type",
            ),
        ] {
            let error = ask(more.clone()).expect_err(&more.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{more} {error}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        for (body, param) in [
            (json!({"model": "m", "messages": []}), "max_tokens"),
            (json!({"model": "m", "max_tokens": 0}), "max_tokens"),
            (json!({"model": "m", "max_tokens": 1}), "messages"),
        ] {
            let body = body.to_string();
            let (defaults, limits) = (GenerationDefaults::default(), Limits::default());
            let error = read(body.as_bytes(), &defaults, &limits).expect_err(&body);
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
        let named = |body: &[u8]| CountRequest::parse(body).unwrap().model;
        assert_eq!(
            named(br#"{"messages":[{"role":"user","content":"hi"}]}"#),
            None
        );
    }
}
