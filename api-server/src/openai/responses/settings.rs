//! What an answer repeats of its request, and those fields that have a form of their own here: `text`, `reasoning`, `metadata`,
//! `include`.

use serde_json::{Map, Value, json};

use super::reasoned::Reasoned;
use crate::error::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use crate::openai::table::{self, Door};
use crate::openai::tools::beginning;
use crate::openai::{Params, alternatives, thinking};

/// Most pairs of `metadata`, and their longest texts in characters: OpenAI's bounds.
const PAIRS_MAX: usize = 16;
const KEY_CHARS_MAX: usize = 64;
const VALUE_CHARS_MAX: usize = 512;

/// What `include` asks for log-probabilities with.
const LOGPROBS: &str = "message.output_text.logprobs";

/// What `include` asks for a text of the reasoning with that can be sent back.
const ENCRYPTED: &str = "reasoning.encrypted_content";

/// How long a summary of the reasoning is to be. Here it is all of it.
const SUMMARIES: [&str; 3] = ["auto", "concise", "detailed"];

/// What else it may ask for: of all this there is nothing that is left out without it.
const INCLUDES: [&str; 7] = [
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
    "message.input_text.text",
];

/// What the answer repeats.
pub struct Settings {
    said: Map<String, Value>,
    format: Value,
    wants_logprobs: bool,
    reasoned: Reasoned,
}

impl Settings {
    /// Reads what has no meaning but for the answer, and `text`.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut said = Map::new();
        said.insert("metadata".to_owned(), metadata(fields)?);
        let (wants_logprobs, is_sent_back) = include(fields)?;
        let mut format = json!({"type": "text"});
        let mut text = Map::new();
        if let Some(value) = fields.value("text") {
            let object = table::object(Door::Responses, "text", value)?;
            if let Some(given) = object.get("format").filter(|value| !value.is_null()) {
                format = given.clone();
            }
            if let Some(format) = format.as_object_mut()
                && format.get("type").is_some_and(|kind| kind == "json_schema")
            {
                // Answers say all of it.
                format.entry("description").or_insert(Value::Null);
                format.entry("strict").or_insert(false.into());
            }
            if let Some(verbosity) = object.get("verbosity") {
                text.insert("verbosity".to_owned(), verbosity.clone());
            }
        }
        text.insert("format".to_owned(), format.clone());
        said.insert("text".to_owned(), Value::Object(text));
        Ok(Self {
            said,
            format,
            wants_logprobs,
            reasoned: Reasoned {
                has_summary: false,
                is_sent_back,
            },
        })
    }

    /// Has the answer repeat this.
    pub fn say(&mut self, name: &str, value: Value) {
        self.said.insert(name.to_owned(), value);
    }

    /// The schema that the text must follow, and the path where it stands.
    pub fn format(&self) -> Result<Option<(String, Value)>, ApiError> {
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

    /// How many alternatives to report with each token of the text; none if no log-probabilities are asked for.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn logprobs(&self, fields: &Fields) -> Result<Option<u8>, ApiError> {
        let name = "top_logprobs";
        match (alternatives(fields, name)?, self.wants_logprobs) {
            (top, true) => Ok(Some(top.unwrap_or(0))),
            (None | Some(0), false) => Ok(None),
            (Some(_), false) => {
                let message = format!("{name} needs {LOGPROBS:?} in include");
                Err(ApiError::param(name, message))
            }
        }
    }

    /// Reads `text.verbosity` into the variables of the template.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn verbosity(&self, variables: &mut Map<String, Value>) -> Result<(), ApiError> {
        let name = "text.verbosity";
        match self.said["text"].get("verbosity") {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(words)) => thinking::verbosity(name, words, variables),
            Some(other) => Err(wrong_type(name, "a string", other)),
        }
    }

    /// Reads `reasoning`, for the template and for the answer.
    pub fn reasoning(
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
            // The second is its name of before.
            for field in ["summary", "generate_summary"] {
                let Some(summary) = object.get(field).filter(|value| !value.is_null()) else {
                    continue;
                };
                if !summary.as_str().is_some_and(|it| SUMMARIES.contains(&it)) {
                    let name = format!("reasoning.{field}");
                    let message = format!("{name} must be one of {}", SUMMARIES.join(", "));
                    return Err(ApiError::param(name, message));
                }
                said["summary"] = summary.clone();
                self.reasoned.has_summary = true;
            }
        }
        self.say("reasoning", said);
        Ok(())
    }

    /// What of the reasoning is written besides its text.
    pub fn reasoned(&self) -> Reasoned {
        self.reasoned
    }

    /// All of it.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn finish(
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
            ("top_logprobs", json!(sampling.logprobs.unwrap_or(0))),
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

/// Reads `include`: whether it asks for log-probabilities, and for reasoning that can be sent back.
fn include(fields: &Fields) -> Result<(bool, bool), ApiError> {
    let name = "include";
    let (mut wants_logprobs, mut is_sent_back) = (false, false);
    let list = match fields.value(name) {
        None => return Ok((false, false)),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type(name, "an array of texts", other)),
    };
    for (i, value) in list.iter().enumerate() {
        let param = format!("{name}[{i}]");
        match value.as_str() {
            Some(LOGPROBS) => wants_logprobs = true,
            Some(ENCRYPTED) => is_sent_back = true,
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
    Ok((wants_logprobs, is_sent_back))
}
