//! `thinking` and `output_config`: whether the model is to think, how much, and what its answer must be.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::openai::fields::{Fields, whole, wrong_type};
use crate::openai::table::{self, Door};
use crate::openai::tools::beginning;

/// Anthropic's words.
const EFFORTS: [&str; 5] = ["low", "medium", "high", "xhigh", "max"];

/// What these fields ask for, besides what is told to the template.
#[derive(Debug)]
pub struct Wanted {
    /// The reasoning is part of the answer.
    pub shows_thinking: bool,
    /// The answer's JSON schema, and the field that has it.
    pub schema: Option<(String, Value)>,
}

/// Reads them, into these variables of the template where they do not say it themselves.
///
/// # Errors
/// 400 with the parameter's name.
pub fn read(
    door: Door,
    fields: &mut Fields,
    variables: &mut Map<String, Value>,
) -> Result<Wanted, ApiError> {
    let thinking = match fields.value("thinking") {
        None => Thinking::default(),
        Some(value) => Thinking::read(door, value)?,
    };
    let mut schemas = Vec::new();
    if let Some(config) = fields.take("output_config") {
        let name = "output_config";
        let config = table::object(door, name, &config)?;
        if let Some(effort) = effort(config.get("effort"))? {
            say(variables, "reasoning_effort", effort.into());
        }
        schemas.extend(schema(format!("{name}.format"), config.get("format"))?);
    }
    // Its name of before.
    let name = "output_format";
    schemas.extend(schema(name.to_owned(), fields.value(name))?);
    if let [_, (name, _)] = &schemas[..] {
        let message = format!("{name} is output_config.format: send one of them");
        return Err(ApiError::param(name.as_str(), message));
    }
    let schema = schemas.pop();
    let thinks = match thinking.state {
        State::Unsaid => None,
        State::Disabled => Some(false),
        State::Enabled | State::Adaptive => Some(true),
    };
    if let Some(thinks) = thinks {
        // How templates are told: most by the first name, DeepSeek's and some others by the second.
        say(variables, "enable_thinking", thinks.into());
        say(variables, "thinking", thinks.into());
    }
    if let Some(budget) = thinking.budget {
        say(variables, "thinking_budget", budget.into());
    }
    Ok(Wanted {
        shows_thinking: !thinking.is_omitted,
        schema,
    })
}

fn say(variables: &mut Map<String, Value>, name: &str, value: Value) {
    variables.entry(name).or_insert(value);
}

#[derive(Debug, Default, PartialEq)]
enum State {
    #[default]
    Unsaid,
    Enabled,
    Adaptive,
    Disabled,
}

#[derive(Debug, Default)]
struct Thinking {
    state: State,
    budget: Option<i64>,
    is_omitted: bool,
}

impl Thinking {
    fn read(door: Door, value: &Value) -> Result<Self, ApiError> {
        let object = table::object(door, "thinking", value)?;
        let field = |name: &str| object.get(name).filter(|value| !value.is_null());
        let budget = match field("budget_tokens") {
            None => None,
            Some(value) => {
                let name = "thinking.budget_tokens";
                let budget =
                    whole(value).filter(|tokens| (1..=i64::from(u32::MAX)).contains(tokens));
                let budget = budget
                    .ok_or_else(|| wrong_type(name, "a number of tokens, at least 1", value))?;
                Some(budget)
            }
        };
        let is_omitted = match field("display") {
            None => false,
            Some(value) => match value.as_str() {
                Some("summarized") => false,
                Some("omitted") => true,
                _ => {
                    let name = "thinking.display";
                    return Err(wrong_type(name, "\"summarized\" or \"omitted\"", value));
                }
            },
        };
        let state = match field("type").map(|value| (value, value.as_str())) {
            Some((_, Some("enabled"))) => State::Enabled,
            Some((_, Some("adaptive"))) => State::Adaptive,
            Some((_, Some("disabled"))) => State::Disabled,
            other => {
                let name = "thinking.type";
                let message = format!(
                    "{name} must be \"enabled\", \"adaptive\" or \"disabled\"{}",
                    other.map_or(String::new(), |(other, _)| format!(", got {other:.64}"))
                );
                return Err(ApiError::param(name, message));
            }
        };
        Ok(Self {
            state,
            budget,
            is_omitted,
        })
    }
}

fn effort(value: Option<&Value>) -> Result<Option<&str>, ApiError> {
    let name = "output_config.effort";
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(effort)) if EFFORTS.contains(&effort.as_str()) => Ok(Some(effort)),
        Some(Value::String(other)) => {
            let message = format!(
                "{name} must be one of {}, got {:?}",
                EFFORTS.join(", "),
                beginning(other)
            );
            Err(ApiError::param(name, message))
        }
        Some(other) => Err(wrong_type(name, "a string", other)),
    }
}

/// The schema of an output format.
fn schema(name: String, value: Option<&Value>) -> Result<Option<(String, Value)>, ApiError> {
    let object = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(object)) => object,
        Some(other) => return Err(wrong_type(&name, "an object", other)),
    };
    if let Some(other) = object
        .keys()
        .find(|key| !["type", "schema"].contains(&key.as_str()))
    {
        let param = format!("{name}.{}", beginning(other));
        let message = format!("there is no field {param}");
        return Err(ApiError::param(param, message));
    }
    if object.get("type").is_none_or(|kind| kind != "json_schema") {
        let param = format!("{name}.type");
        let message = format!("{param} must be \"json_schema\"");
        return Err(ApiError::param(param, message));
    }
    match object.get("schema") {
        Some(schema @ Value::Object(_)) => Ok(Some((name, schema.clone()))),
        other => {
            let got = other.unwrap_or(&Value::Null);
            Err(wrong_type(&format!("{name}.schema"), "a JSON schema", got))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(body: Value) -> Result<(Value, bool), ApiError> {
        let mut fields = Fields::parse(Door::Messages, body.to_string().as_bytes())?;
        let mut variables = Map::new();
        let wanted = read(Door::Messages, &mut fields, &mut variables)?;
        Ok((Value::Object(variables), wanted.shows_thinking))
    }

    #[test]
    fn thinking_reaches_the_template() {
        let on = json!({"enable_thinking": true, "thinking": true, "thinking_budget": 2048});
        let off = json!({"enable_thinking": false, "thinking": false});
        let format = json!({"type": "json_schema", "schema": {"type": "object"}});
        for (body, expected) in [
            (json!({}), (json!({}), true)),
            (
                json!({"thinking": {"type": "enabled", "budget_tokens": 2048}}),
                (on.clone(), true),
            ),
            (
                json!({"thinking": {"type": "enabled", "budget_tokens": 2048, "display": "omitted"}}),
                (on.clone(), false),
            ),
            (json!({"thinking": {"type": "disabled"}}), (off, true)),
            // Also before an answer by a schema.
            (
                json!({"thinking": {"type": "adaptive"}, "output_format": format}),
                (json!({"enable_thinking": true, "thinking": true}), true),
            ),
            (
                json!({"thinking": {"type": "enabled", "budget_tokens": 2048}, "output_config": {"format": format}}),
                (on.clone(), true),
            ),
            (
                json!({"output_config": {"effort": "max"}}),
                (json!({"reasoning_effort": "max"}), true),
            ),
        ] {
            assert_eq!(told(body.clone()).unwrap(), expected, "{body}");
        }
        for (body, param) in [
            (
                json!({"thinking": {"type": "between_tools"}}),
                "thinking.type",
            ),
            (json!({"thinking": {}}), "thinking.type"),
            (
                json!({"thinking": {"type": "enabled", "budget_tokens": 0}}),
                "thinking.budget_tokens",
            ),
            (
                json!({"thinking": {"type": "enabled", "budget": 2}}),
                "thinking.budget",
            ),
            (
                json!({"thinking": {"type": "enabled", "display": "all"}}),
                "thinking.display",
            ),
            (
                json!({"output_config": {"effort": "most"}}),
                "output_config.effort",
            ),
            (
                json!({"output_config": {"format": {"type": "json_schema"}}}),
                "output_config.format.schema",
            ),
        ] {
            let error = told(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }
}
