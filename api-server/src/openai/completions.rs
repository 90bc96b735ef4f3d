//! `POST /v1/completions`: the request.

use serde_json::Value;

use super::fields::{Fields, whole, wrong_type};
use super::params::{Params, alternatives};
use super::table::Door;
use crate::config::Limits;
use crate::error::ApiError;
use crate::text::tokenizer::GenerationDefaults;

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// As text.
    Text(String),
    /// As token ids.
    Tokens(Vec<u32>),
}

/// A text completion request, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    /// Shared parameters.
    pub params: Params,
    /// The prompts; at least one.
    pub prompts: Vec<Prompt>,
    /// Begin each answer with its prompt.
    pub echo: bool,
}

impl CompletionRequest {
    /// Checks a body.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn parse(
        body: &[u8],
        defaults: &GenerationDefaults,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(Door::Text, body)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let max_tokens_min = if echo { 0 } else { 1 };
        let mut params = Params::read(Door::Text, &fields, max_tokens_min, defaults, limits)?;
        params.sampling.logprobs = alternatives(&fields, "logprobs")?;
        let prompts = prompts(fields.take("prompt"))?;
        let choices = prompts.len() * params.n as usize;
        if choices > limits.choices_max {
            let message = format!(
                "{} prompts with n = {} make {choices} choices; a request may have {}",
                prompts.len(),
                params.n,
                limits.choices_max
            );
            return Err(ApiError::param("n", message));
        }
        Ok(Self {
            params,
            prompts,
            echo,
        })
    }
}

fn prompts(value: Option<Value>) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str =
        "a string, an array of strings, an array of token ids, or an array of these";
    let wrong = |value: &Value| wrong_type("prompt", EXPECTED, value);
    let list = match value {
        None => return Err(ApiError::param("prompt", "prompt is required")),
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(&other)),
    };
    let ids = |list: &[Value]| -> Result<Vec<u32>, ApiError> {
        let id = |value: &Value| {
            let id = whole(value).and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| wrong(value))
        };
        list.iter().map(id).collect()
    };
    match list.first() {
        None => Err(ApiError::param("prompt", "prompt must not be empty")),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(ids(&list)?)]),
        Some(_) => list
            .into_iter()
            .map(|prompt| match prompt {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(list) if list.is_empty() => {
                    Err(ApiError::param("prompt", "prompt must not be empty"))
                }
                Value::Array(list) => Ok(Prompt::Tokens(ids(&list)?)),
                other => Err(wrong(&other)),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: Value) -> Result<CompletionRequest, ApiError> {
        let body = body.to_string();
        CompletionRequest::parse(
            body.as_bytes(),
            &GenerationDefaults::default(),
            &Limits::default(),
        )
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let text = |t: &str| Prompt::Text(t.to_owned());
        let cases = [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (
                json!([[1], [2, 3]]),
                vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])],
            ),
        ];
        for (prompt, expected) in cases {
            assert_eq!(parse(json!({"prompt": prompt})).unwrap().prompts, expected);
        }
        for wrong in [
            json!([]),
            json!([1, "a"]),
            json!([[-1]]),
            json!({}),
            json!([[]]),
            json!(3),
        ] {
            let error = parse(json!({"prompt": wrong})).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("prompt"), "{wrong}");
        }
    }

    #[test]
    fn nothing_but_a_prompt_that_is_repeated_is_an_answer_of_its_own() {
        let nothing = |echo: bool| parse(json!({"prompt": "a", "max_tokens": 0, "echo": echo}));
        assert_eq!(nothing(true).unwrap().params.max_tokens, Some(0));
        assert_eq!(
            nothing(false).unwrap_err().param.as_deref(),
            Some("max_tokens")
        );
    }

    #[test]
    fn choices_are_bounded_over_all_prompts() {
        let error = parse(json!({"prompt": vec!["a"; 100], "n": 2})).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("n"));
    }
}
