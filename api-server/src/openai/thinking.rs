//! Hints: `reasoning_effort`, `reasoning` and `verbosity`. They go to the template as variables; what a template does not know changes
//! nothing.

use serde_json::{Map, Value};

use super::fields::{Fields, wrong_type};
use super::table::{self, Door};
use super::tools::beginning;
use crate::error::ApiError;

/// OpenAI's words, and those of models that know more.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// OpenAI's words for how long an answer is to be.
const VERBOSITIES: [&str; 3] = ["low", "medium", "high"];

/// Reads a chat's `reasoning_effort`, `reasoning` and `verbosity` into these variables of the template, where they do not say it
/// themselves. True if the reasoning is to be left out of the answer.
///
/// # Errors
/// 400 with the parameter's name.
pub fn hints(fields: &Fields, variables: &mut Map<String, Value>) -> Result<bool, ApiError> {
    let effort = fields.string("reasoning_effort")?;
    let mut excludes = false;
    if let Some(value) = fields.value("reasoning") {
        let reasoning = table::object(Door::Chat, "reasoning", value)?;
        let flag = |name: &str| match reasoning.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong_type(&format!("reasoning.{name}"), "a boolean", other)),
        };
        excludes = flag("exclude")?.unwrap_or(false);
        let name = "reasoning.effort";
        match reasoning.get("effort") {
            None | Some(Value::Null) => {}
            Some(Value::String(other)) if effort.is_some_and(|effort| effort != other) => {
                let message = format!("{name} and reasoning_effort say different things: send one");
                return Err(ApiError::param(name, message));
            }
            Some(Value::String(effort)) => say(name, effort, variables)?,
            Some(other) => return Err(wrong_type(name, "a string", other)),
        }
        match flag("enabled")? {
            None => {}
            Some(true) => hint("enable_thinking", true.into(), variables),
            Some(false) => say("reasoning.enabled", "none", variables)?,
        }
    }
    if let Some(effort) = effort {
        say("reasoning_effort", effort, variables)?;
    }
    if let Some(words) = fields.string("verbosity")? {
        verbosity("verbosity", words, variables)?;
    }
    Ok(excludes)
}

/// Puts a hint among the variables, unless it is there.
fn hint(name: &str, value: Value, variables: &mut Map<String, Value>) {
    variables.entry(name).or_insert(value);
}

/// Tells these variables how long the answer is to be, which this field says.
///
/// # Errors
/// 400 with the field's name.
pub fn verbosity(
    name: &str,
    words: &str,
    variables: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    check(name, words, &VERBOSITIES)?;
    hint("verbosity", words.into(), variables);
    Ok(())
}

/// # Errors
/// 400 with the field's name, if it says none of these.
fn check(name: &str, said: &str, known: &[&str]) -> Result<(), ApiError> {
    if known.contains(&said) {
        return Ok(());
    }
    let message = format!(
        "{name} must be one of {}, got {:?}",
        known.join(", "),
        beginning(said)
    );
    Err(ApiError::param(name, message))
}

/// Tells these variables how much, which this field says.
///
/// # Errors
/// 400 with the field's name.
pub fn say(name: &str, effort: &str, variables: &mut Map<String, Value>) -> Result<(), ApiError> {
    check(name, effort, &EFFORTS)?;
    if effort == "none" {
        // How templates whose models think or do not think are told.
        hint("enable_thinking", false.into(), variables);
    }
    hint("reasoning_effort", effort.into(), variables);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::openai::table::Door;

    fn read(body: Value, variables: Value) -> Result<Value, ApiError> {
        let fields = Fields::parse(Door::Chat, body.to_string().as_bytes())?;
        let mut variables = variables.as_object().cloned().unwrap_or_default();
        hints(&fields, &mut variables)?;
        Ok(Value::Object(variables))
    }

    #[test]
    fn the_effort_reaches_the_template() {
        let thinks = json!({"enable_thinking": true});
        for (body, variables, expected) in [
            (
                json!({"reasoning_effort": "low"}),
                thinks.clone(),
                json!({"enable_thinking": true, "reasoning_effort": "low"}),
            ),
            (
                json!({"reasoning_effort": "none"}),
                json!({}),
                json!({"enable_thinking": false, "reasoning_effort": "none"}),
            ),
            // What is said to the template itself wins.
            (
                json!({"reasoning_effort": "none"}),
                json!({"enable_thinking": true, "reasoning_effort": "max"}),
                json!({"enable_thinking": true, "reasoning_effort": "max"}),
            ),
            (json!({}), thinks.clone(), thinks),
            // OpenRouter's form.
            (
                json!({"reasoning": {"effort": "high", "summary": "auto"}}),
                json!({}),
                json!({"reasoning_effort": "high"}),
            ),
            (
                json!({"reasoning": {"enabled": false}}),
                json!({}),
                json!({"enable_thinking": false, "reasoning_effort": "none"}),
            ),
            (
                json!({"reasoning": {"enabled": true, "effort": null}}),
                json!({}),
                json!({"enable_thinking": true}),
            ),
            (
                json!({"verbosity": "low"}),
                json!({}),
                json!({"verbosity": "low"}),
            ),
        ] {
            assert_eq!(read(body, variables).unwrap(), expected);
        }
        for (body, param) in [
            (json!({"reasoning_effort": "most"}), "reasoning_effort"),
            (json!({"reasoning": {"effort": "most"}}), "reasoning.effort"),
            (
                json!({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}),
                "reasoning.effort",
            ),
            (
                json!({"reasoning": {"max_tokens": 9}}),
                "reasoning.max_tokens",
            ),
            (
                json!({"reasoning": {"enabled": "yes"}}),
                "reasoning.enabled",
            ),
            (json!({"verbosity": "huge"}), "verbosity"),
        ] {
            let error = read(body, json!({})).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }
}
