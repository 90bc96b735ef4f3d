//! `POST /tokenize` and `/detokenize`: the requests, of vLLM's shapes.

use serde_json::Value;

use super::chat::{messages, rendering};
use super::fields::{Fields, whole, wrong_type};
use super::table::Door;
use super::tools::Offer;
use crate::error::ApiError;
use crate::text::tokenizer::Rendering;

/// What is to be made into tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum ToTokenize {
    /// A text.
    Text(String),
    /// A chat.
    Chat(Vec<Value>, Rendering),
}

/// A request for tokens, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizeRequest {
    /// Name of the model, if the client says.
    pub model: Option<String>,
    /// Of what.
    pub what: ToTokenize,
    /// Those that the tokenizer adds at its ends too.
    pub add_special_tokens: bool,
    /// Their names too.
    pub token_strs: bool,
}

impl TokenizeRequest {
    /// Checks a body.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(Door::Tokenize, body)?;
        let mut rendering = rendering(&mut fields)?;
        rendering.tools = Offer::read(&mut fields)?.shown;
        let what = match (fields.take("prompt"), fields.take("messages")) {
            (Some(Value::String(text)), None) => ToTokenize::Text(text),
            (Some(other), None) => return Err(wrong_type("prompt", "a string", &other)),
            (None, chat @ Some(_)) => ToTokenize::Chat(messages(chat)?, rendering),
            (Some(_), Some(_)) => {
                let message = "prompt and messages are both given: send one of them";
                return Err(ApiError::param("prompt", message));
            }
            (None, None) => {
                let message = "prompt or messages is required";
                return Err(ApiError::param("prompt", message));
            }
        };
        // A template writes those of a chat itself.
        let default = matches!(what, ToTokenize::Text(_));
        Ok(Self {
            model: fields.string("model")?.map(str::to_owned),
            what,
            add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(default),
            token_strs: fields.bool("return_token_strs")?.unwrap_or(false),
        })
    }
}

/// A request for the text of tokens, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct DetokenizeRequest {
    /// Name of the model, if the client says.
    pub model: Option<String>,
    /// The tokens.
    pub tokens: Vec<u32>,
}

impl DetokenizeRequest {
    /// Checks a body.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        const EXPECTED: &str = "an array of token ids";
        let mut fields = Fields::parse(Door::Detokenize, body)?;
        let list = match fields.take("tokens") {
            Some(Value::Array(list)) => list,
            Some(other) => return Err(wrong_type("tokens", EXPECTED, &other)),
            None => return Err(ApiError::param("tokens", "tokens is required")),
        };
        let id = |value: &Value| {
            let id = whole(value).and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| wrong_type("tokens", EXPECTED, value))
        };
        Ok(Self {
            model: fields.string("model")?.map(str::to_owned),
            tokens: list.iter().map(id).collect::<Result<_, _>>()?,
        })
    }
}
