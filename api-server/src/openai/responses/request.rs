//! `POST /v1/responses`: the request.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::input::{self, Chat};
use super::store::{Kept, Segment};
use crate::config::Limits;
use crate::error::{ApiError, ErrorKind};
use crate::openai::fields::{Fields, wrong_type};
use crate::openai::table::{self, Door};
use crate::openai::tools::{Offer, beginning};
use crate::openai::{ChatRequest, Params, chat, grammar, thinking};
use crate::text::tokenizer::{GenerationDefaults, Side};

/// Most pairs of `metadata`, and their longest texts in characters: OpenAI's bounds.
const PAIRS_MAX: usize = 16;
const KEY_CHARS_MAX: usize = 64;
const VALUE_CHARS_MAX: usize = 512;

/// What `include` may ask for: of all this there is nothing that is left out without it.
const INCLUDES: [&str; 8] = [
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
    "message.input_text.text",
];

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
    for (i, item) in items.iter().enumerate() {
        chat.add(&format!("input[{i}]"), item)?;
    }
    let messages = chat.finish()?;
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

/// The tools, which lie flat here, as chats have them.
fn offer(fields: &mut Fields, settings: &mut Settings) -> Result<Offer, ApiError> {
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
    Offer::read(fields).map_err(|error| ApiError {
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

/// What the answer repeats.
struct Settings {
    said: Map<String, Value>,
    format: Value,
}

impl Settings {
    /// Reads what has no meaning but for the answer, and `text`.
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut said = Map::new();
        said.insert("metadata".to_owned(), metadata(fields)?);
        include(fields)?;
        let mut format = json!({"type": "text"});
        let mut text = Map::new();
        if let Some(value) = fields.value("text") {
            let object = table::object(Door::Responses, "text", value)?;
            if let Some(given) = object.get("format").filter(|value| !value.is_null()) {
                format = given.clone();
            }
            if let Some(verbosity) = object.get("verbosity") {
                text.insert("verbosity".to_owned(), verbosity.clone());
            }
        }
        text.insert("format".to_owned(), format.clone());
        said.insert("text".to_owned(), Value::Object(text));
        Ok(Self { said, format })
    }

    fn say(&mut self, name: &str, value: Value) {
        self.said.insert(name.to_owned(), value);
    }

    /// The schema that the text must follow, and the path where it stands.
    fn format(&self) -> Result<Option<(String, Value)>, ApiError> {
        let name = "text.format";
        let Value::Object(format) = &self.format else {
            return Err(wrong_type(name, "an object", &self.format));
        };
        match format.get("type").and_then(Value::as_str) {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some((name.to_owned(), json!({"type": "object"})))),
            Some("json_schema") => {
                let path = "text.format.schema";
                match format.get("schema") {
                    Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                        Ok(Some((path.to_owned(), schema.clone())))
                    }
                    other => Err(wrong_type(
                        path,
                        "a JSON schema",
                        other.unwrap_or(&Value::Null),
                    )),
                }
            }
            _ => {
                let message = "text.format.type must be text, json_object or json_schema";
                Err(ApiError::param("text.format.type", message))
            }
        }
    }

    /// Reads `reasoning`, for the template and for the answer.
    fn reasoning(
        &mut self,
        fields: &Fields,
        variables: &mut Map<String, Value>,
    ) -> Result<(), ApiError> {
        let mut said = json!({"effort": null, "summary": null});
        if let Some(value) = fields.value("reasoning") {
            let object = table::object(Door::Responses, "reasoning", value)?.clone();
            if let Some(effort) = object.get("effort").filter(|value| !value.is_null()) {
                said["effort"] = effort.clone();
                let name = "reasoning.effort";
                let Some(effort) = effort.as_str() else {
                    return Err(wrong_type(name, "a string", effort));
                };
                thinking::say(name, effort, variables)?;
            }
            if let Some(summary) = object.get("summary") {
                said["summary"] = summary.clone();
            }
        }
        self.say("reasoning", said);
        Ok(())
    }

    fn finish(
        mut self,
        fields: &Fields,
        params: &Params,
        store: bool,
    ) -> Result<Map<String, Value>, ApiError> {
        // As it is written, not as its bits are.
        let number = |value: f32| serde_json::from_str(&value.to_string()).unwrap_or(Value::Null);
        let sampling = &params.sampling;
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let tier = "default";
        for (name, value) in [
            ("background", json!(false)),
            ("frequency_penalty", number(sampling.frequency_penalty)),
            ("instructions", json!(fields.string("instructions")?)),
            ("max_output_tokens", json!(params.max_tokens)),
            ("max_tool_calls", Value::Null),
            ("parallel_tool_calls", json!(parallel)),
            ("presence_penalty", number(sampling.presence_penalty)),
            (
                "previous_response_id",
                json!(fields.string("previous_response_id")?),
            ),
            (
                "prompt_cache_key",
                fields
                    .value("prompt_cache_key")
                    .cloned()
                    .unwrap_or_default(),
            ),
            (
                "safety_identifier",
                fields
                    .value("safety_identifier")
                    .cloned()
                    .unwrap_or_default(),
            ),
            ("service_tier", json!(tier)),
            ("store", json!(store)),
            ("temperature", number(sampling.temperature)),
            ("top_logprobs", json!(0)),
            ("top_p", number(sampling.top_p)),
            (
                "truncation",
                json!(fields.string("truncation")?.unwrap_or("disabled")),
            ),
            ("user", fields.value("user").cloned().unwrap_or_default()),
        ] {
            self.say(name, value);
        }
        Ok(self.said)
    }
}

fn metadata(fields: &mut Fields) -> Result<Value, ApiError> {
    let name = "metadata";
    let Some(value) = fields.take(name) else {
        return Ok(json!({}));
    };
    let Value::Object(pairs) = &value else {
        return Err(wrong_type(name, "an object of texts", &value));
    };
    let fits = |(key, value): (&String, &Value)| {
        key.chars().count() <= KEY_CHARS_MAX
            && value
                .as_str()
                .is_some_and(|value| value.chars().count() <= VALUE_CHARS_MAX)
    };
    if pairs.len() > PAIRS_MAX || !pairs.iter().all(fits) {
        let message = format!(
            "{name} holds at most {PAIRS_MAX} texts of up to {VALUE_CHARS_MAX} characters, with names of up to {KEY_CHARS_MAX}"
        );
        return Err(ApiError::param(name, message));
    }
    Ok(value)
}

fn include(fields: &Fields) -> Result<(), ApiError> {
    let name = "include";
    let list = match fields.value(name) {
        None => return Ok(()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type(name, "an array of texts", other)),
    };
    for (i, value) in list.iter().enumerate() {
        let param = format!("{name}[{i}]");
        match value.as_str() {
            Some(what) if INCLUDES.contains(&what) => {}
            Some(what) => {
                let message = format!(
                    "{param} asks for {:?}, which answers here do not have",
                    beginning(what)
                );
                return Err(ApiError::param(param, message));
            }
            None => return Err(wrong_type(&param, "a text", value)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use baton_chat_formats::grammar::ToolChoice;
    use baton_protocol::Grammar;

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
        } = asked;
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
            (
                json!({"include": ["message.output_text.logprobs"]}),
                "include[0]",
            ),
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
