//! `reasoning_effort`: how much the model is to think, which its template tells it.

use serde_json::{Map, Value};

use super::fields::Fields;
use super::tools::beginning;
use crate::error::ApiError;

/// OpenAI's words, and those of models that know more.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// Reads `reasoning_effort` into these variables of the template, where they do not say it themselves.
///
/// # Errors
/// 400 with the parameter's name.
pub fn effort(fields: &Fields, variables: &mut Map<String, Value>) -> Result<(), ApiError> {
    match fields.string("reasoning_effort")? {
        Some(effort) => say("reasoning_effort", effort, variables),
        None => Ok(()),
    }
}

/// Tells these variables how much, which this field says.
///
/// # Errors
/// 400 with the field's name.
pub fn say(name: &str, effort: &str, variables: &mut Map<String, Value>) -> Result<(), ApiError> {
    if !EFFORTS.contains(&effort) {
        let message = format!(
            "{name} must be one of {}, got {:?}",
            EFFORTS.join(", "),
            beginning(effort)
        );
        return Err(ApiError::param(name, message));
    }
    if effort == "none" {
        // How templates whose models think or do not think are told.
        variables
            .entry("enable_thinking")
            .or_insert(Value::Bool(false));
    }
    variables
        .entry("reasoning_effort")
        .or_insert_with(|| effort.into());
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
        effort(&fields, &mut variables)?;
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
        ] {
            assert_eq!(read(body, variables).unwrap(), expected);
        }
        let error = read(json!({"reasoning_effort": "most"}), json!({})).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("reasoning_effort"));
    }
}
