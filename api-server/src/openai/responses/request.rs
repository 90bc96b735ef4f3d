//! `POST /v1/responses`: the request.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::input::{self, Chat};
use super::reasoned::Reasoned;
use super::references;
use super::settings::Settings;
use super::store::{Kept, Segment};
use super::tools::offer;
use crate::config::Limits;
use crate::error::{ApiError, ErrorKind};
use crate::openai::fields::Fields;
use crate::openai::table::Door;
use crate::openai::tools::beginning;
use crate::openai::{ChatRequest, Params, chat, grammar};
use crate::text::tokenizer::{GenerationDefaults, Side};

/// A request for a response, checked.
pub struct ResponseRequest {
    /// The chat that it comes down to.
    pub chat: ChatRequest,
    /// What the answer repeats of the request.
    pub settings: Map<String, Value>,
    /// The items of `input`, a JSON array.
    pub input: String,
    /// The turns that it goes on from.
    pub before: Vec<Arc<Segment>>,
    /// Whether the response is to be kept.
    pub store: bool,
    /// What of its reasoning is written besides the text.
    pub reasoned: Reasoned,
}

/// Checks a body. `find` looks for an earlier response.
///
/// # Errors
/// 400 with the parameter's name; 404 for an earlier response that is not kept.
pub fn read(
    body: &[u8],
    defaults: &GenerationDefaults,
    limits: &Limits,
    find: &dyn Fn(&str) -> Option<Kept>,
) -> Result<ResponseRequest, ApiError> {
    const DOOR: Door = Door::Responses;
    let mut fields = Fields::parse(DOOR, body)?;
    let mut settings = Settings::read(&mut fields)?;
    let offer = offer(&mut fields, &mut settings)?;
    let mut params = Params::read(DOOR, &fields, 1, defaults, limits)?;
    let most = i64::from(u32::MAX);
    let max_tokens = fields.integer("max_output_tokens", 1, most)?;
    params.max_tokens = max_tokens.map(|tokens| tokens as u32);
    params.sampling.logprobs = settings.logprobs(&fields)?;
    params.truncation = match fields.string("truncation")? {
        None | Some("disabled") => None,
        Some("auto") => Some((None, Side::Left)),
        Some(_) => {
            let message = "truncation must be \"auto\" or \"disabled\"";
            return Err(ApiError::param("truncation", message));
        }
    };
    if let Some((name, schema)) = settings.format()? {
        if let Some(other) = &params.grammar_field {
            let message = format!("{other} and {name} both say what the text must be: send one");
            return Err(ApiError::param(name, message));
        }
        params.grammar = Some(grammar::of_checked_schema(&name, &schema)?);
        params.grammar_field = Some(name);
    }
    let mut offer = offer;
    let mut rendering = chat::rendering(&mut fields)?;
    settings.reasoning(&fields, &mut rendering.variables)?;
    settings.verbosity(&mut rendering.variables)?;
    rendering.tools = std::mem::take(&mut offer.shown);
    let store = fields.bool("store")?.unwrap_or(true);
    let before = match fields.string("previous_response_id")? {
        None => Vec::new(),
        Some(id) => match find(id) {
            Some(kept) => kept.turns,
            None => return Err(not_kept("previous_response_id", id)),
        },
    };
    // A short body must not become more work than the longest.
    let bytes: usize = before
        .iter()
        .map(|turn| turn.input.len() + turn.output.len())
        .sum();
    if bytes > limits.body_bytes_max {
        let message = format!(
            "the conversation of previous_response_id has {bytes} bytes, and with what is asked a request has {} at most: begin another",
            limits.body_bytes_max
        );
        return Err(ApiError::param("previous_response_id", message));
    }
    let mut chat = Chat::new(fields.string("instructions")?);
    for turn in &before {
        for text in [&turn.input, &turn.output] {
            let items: Vec<Value> = serde_json::from_str(text).unwrap_or_default();
            for item in &items {
                chat.add("previous_response_id", item)?;
            }
        }
    }
    let items = input::items(fields.take("input"))?;
    let room = limits.body_bytes_max - bytes;
    let items = references::resolved(items, room, find)?;
    for (i, item) in items.iter().enumerate() {
        chat.add(&format!("input[{i}]"), item)?;
    }
    let messages = chat.finish()?;
    let reasoned = settings.reasoned();
    let settings = settings.finish(&fields, &params, store)?;
    Ok(ResponseRequest {
        chat: ChatRequest {
            params,
            messages,
            rendering,
            offer,
            include_reasoning: true,
        },
        settings,
        input: Value::Array(items).to_string(),
        before,
        store,
        reasoned,
    })
}

/// A response that is not, or no more, kept.
pub fn not_kept(param: &str, id: &str) -> ApiError {
    let message = format!(
        "there is no response {:?} here: each API server keeps those of its own, for a day at most and as long as there is room",
        beginning(id)
    );
    ApiError {
        param: Some(param.to_owned()),
        ..ApiError::new(ErrorKind::UnknownResponse, message)
    }
}

#[cfg(test)]
mod tests {
    use baton_chat_formats::grammar::ToolChoice;
    use baton_protocol::Grammar;
    use serde_json::json;

    use super::*;

    fn ask(more: Value) -> Result<ResponseRequest, ApiError> {
        let mut body = json!({"model": "m", "input": "hi"});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        let earlier = Kept {
            response: "{}".into(),
            turns: vec![Arc::new(Segment {
                input: json!([{"role": "user", "content": "one"}]).to_string(),
                output: json!([{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]}]).to_string(),
            })],
        };
        let find = |id: &str| (id == "resp_1").then(|| earlier.clone());
        read(
            body.to_string().as_bytes(),
            &GenerationDefaults::default(),
            &Limits::default(),
            &find,
        )
    }

    #[test]
    fn log_probabilities_are_asked_for_in_include() {
        let include = json!(["message.output_text.logprobs"]);
        for (more, top) in [
            (json!({}), None),
            (json!({"top_logprobs": 0}), None),
            (json!({"include": include}), Some(0)),
            (json!({"include": include, "top_logprobs": 3}), Some(3)),
        ] {
            let asked = ask(more).unwrap();
            assert_eq!(asked.chat.params.sampling.logprobs, top);
            assert_eq!(asked.settings["top_logprobs"], json!(top.unwrap_or(0)));
        }
        for more in [
            json!({"top_logprobs": 3}),
            json!({"include": include, "top_logprobs": 21}),
        ] {
            let error = ask(more).err().unwrap();
            assert_eq!(error.param.as_deref(), Some("top_logprobs"), "{error}");
        }
    }

    #[test]
    fn a_tools_schema_that_cannot_be_compiled_is_named_as_this_door_has_it() {
        use baton_chat_formats::{Format, Reasoning};
        let bad = json!({"type": "object", "properties": {"a": {"type": "strnig"}}});
        let tools = json!([{"type": "function", "name": "f", "parameters": bad}]);
        let asked = ask(json!({"tools": tools, "tool_choice": "required"})).unwrap();
        let offer = &asked.chat.offer;
        let made = offer.grammar(Format::Hermes, Reasoning::None, None, &|_| None);
        let error = made.unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools[0].parameters"));
    }

    #[test]
    fn a_request_comes_down_to_a_chat() {
        let tool = json!({"type": "function", "name": "f", "parameters": {"type": "object"}, "description": null});
        let asked = ask(json!({
            "instructions": "Be brief.", "previous_response_id": "resp_1", "max_output_tokens": 7, "temperature": 0.7,
            "tools": [tool], "tool_choice": {"type": "function", "name": "f"}, "truncation": "auto", "metadata": {"a": "b"},
            "reasoning": {"effort": "low", "summary": "auto"}, "store": false, "include": ["reasoning.encrypted_content"],
            "stream": true, "stream_options": {"include_obfuscation": false}, "text": {"verbosity": "medium"},
        }))
        .unwrap();
        let ResponseRequest {
            chat,
            settings,
            before,
            store,
            input,
            reasoned,
        } = asked;
        let both = Reasoned {
            has_summary: true,
            is_sent_back: true,
        };
        assert_eq!(reasoned, both);
        let said = |role: &str, text: &str| json!({"role": role, "content": text});
        let expected = [
            said("system", "Be brief."),
            said("user", "one"),
            said("assistant", "two"),
            said("user", "hi"),
        ];
        assert_eq!(chat.messages, expected);
        assert_eq!(
            (chat.params.max_tokens, chat.params.stream),
            (Some(7), true)
        );
        assert_eq!(chat.params.truncation, Some((None, Side::Left)));
        assert_eq!(chat.offer.choice, ToolChoice::Named("f".to_owned()));
        assert_eq!(
            chat.rendering.tools[0]["function"],
            json!({"name": "f", "parameters": {"type": "object"}})
        );
        assert_eq!(chat.rendering.variables["reasoning_effort"], "low");
        assert!(!store && before.len() == 1 && input.contains("\"hi\""));
        assert_eq!(settings["temperature"], json!(0.7));
        assert_eq!(
            settings["tools"][0],
            json!({"type": "function", "name": "f", "description": null, "parameters": {"type": "object"}, "strict": false})
        );
        assert_eq!(
            settings["reasoning"],
            json!({"effort": "low", "summary": "auto"})
        );
        assert_eq!(settings["metadata"], json!({"a": "b"}));
        assert_eq!(
            settings["text"],
            json!({"verbosity": "medium", "format": {"type": "text"}})
        );
    }

    #[test]
    fn a_conversation_has_a_bound() {
        let limits = Limits::default();
        let turn = |bytes: usize| Kept {
            response: "{}".into(),
            turns: vec![Arc::new(Segment {
                input: format!("[{}]", " ".repeat(bytes - 4)),
                output: "[]".to_owned(),
            })],
        };
        let body =
            json!({"model": "m", "input": "hi", "previous_response_id": "resp_1"}).to_string();
        let ask = |bytes: usize| {
            let find = |_: &str| Some(turn(bytes));
            read(
                body.as_bytes(),
                &GenerationDefaults::default(),
                &limits,
                &find,
            )
        };
        assert!(ask(limits.body_bytes_max).is_ok());
        let error = ask(limits.body_bytes_max + 1).err().expect("an error");
        assert_eq!(error.param.as_deref(), Some("previous_response_id"));
    }

    #[test]
    fn a_schema_becomes_a_grammar() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let format = json!({"type": "json_schema", "name": "x", "schema": schema, "strict": true});
        let asked = ask(json!({"text": {"format": format}})).unwrap();
        assert_eq!(
            asked.chat.params.grammar,
            Some(Grammar::JsonSchema(schema.to_string()))
        );
        assert!(asked.store);
    }

    #[test]
    fn tools_may_be_left_out_by_the_choice() {
        let tools = json!([{"type": "function", "name": "f"}, {"type": "function", "name": "g"}]);
        let only = json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]});
        let asked = ask(json!({"tools": tools, "tool_choice": only})).unwrap();
        assert_eq!(asked.chat.offer.choice, ToolChoice::Required);
        assert_eq!(asked.chat.rendering.tools.len(), 1);
        assert_eq!(asked.settings["tools"].as_array().unwrap().len(), 2);
        assert_eq!(asked.settings["tool_choice"], only);
    }

    #[test]
    fn what_is_wrong_is_named_as_this_door_names_it() {
        let tool = json!({"type": "function", "name": "f"});
        for (more, param) in [
            (json!({"input": null}), "input"),
            (
                json!({"previous_response_id": "resp_2"}),
                "previous_response_id",
            ),
            (json!({"max_output_tokens": 0}), "max_output_tokens"),
            (json!({"truncation": "left"}), "truncation"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
            (
                json!({"tools": [{"type": "function", "name": "f", "parameters": 7}]}),
                "tools[0].parameters",
            ),
            (
                json!({"tools": [tool], "tool_choice": {"type": "function", "name": "g"}}),
                "tool_choice",
            ),
            (
                json!({"tools": [tool], "tool_choice": {"type": "mcp"}}),
                "tool_choice.type",
            ),
            (
                json!({"tools": [tool], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "g"}]}}),
                "tool_choice.tools",
            ),
            (
                json!({"text": {"format": {"type": "xml"}}}),
                "text.format.type",
            ),
            (
                json!({"text": {"format": {"type": "json_schema"}}}),
                "text.format.schema",
            ),
            (
                json!({"text": {"format": {"type": "json_schema", "schema": {"type": "string", "pattern": "(?=a)b"}}}}),
                "text.format.schema",
            ),
            (json!({"reasoning": {"effort": "most"}}), "reasoning.effort"),
            (json!({"metadata": {"a": 1}}), "metadata"),
            (json!({"include": ["message.output_audio"]}), "include[0]"),
            (json!({"background": true}), "background"),
            (
                json!({"structured_outputs": {"regex": "a"}, "text": {"format": {"type": "json_object"}}}),
                "text.format",
            ),
        ] {
            let error = ask(more.clone()).err().expect("an error");
            assert_eq!(error.param.as_deref(), Some(param), "{more} {error}");
        }
        let missing = ask(json!({"previous_response_id": "resp_2"}))
            .err()
            .unwrap();
        assert_eq!(missing.kind.row().status, 404);
    }
}
