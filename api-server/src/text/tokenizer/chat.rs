//! A chat as the model reads it: its template's text, then that text's tokens.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{ModelText, TextError};
use crate::text::template::Prompt;
use crate::text::texts::Until;

/// A rendered chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatPrompt {
    text: String,
    /// Stands in texts of control tokens that came with the messages.
    marker: Option<char>,
}

impl ChatPrompt {
    /// The text that the model reads.
    pub fn text(&self) -> Cow<'_, str> {
        match self.marker {
            None => Cow::Borrowed(&self.text),
            Some(marker) => Cow::Owned(self.text.replace(marker, "")),
        }
    }
}

impl ModelText {
    /// The prompt of a chat, for as long as somebody waits and it may fit the model.
    ///
    /// # Errors
    /// What the template objects to.
    pub fn render_chat(
        &self,
        messages: Vec<Value>,
        until: &Until,
    ) -> Result<ChatPrompt, TextError> {
        self.render_chat_with(messages, Vec::new(), Map::new(), until)
    }

    /// The same with these tools and variables of the template.
    ///
    /// # Errors
    /// As [`Self::render_chat`].
    pub fn render_chat_with(
        &self,
        mut messages: Vec<Value>,
        tools: Vec<Value>,
        arguments: Map<String, Value>,
        until: &Until,
    ) -> Result<ChatPrompt, TextError> {
        let Some(template) = &self.template else {
            let message = "the model has no chat template; use /v1/completions";
            return Err(TextError::Refused(message.to_owned()));
        };
        // Descriptions of tools are the client's texts too.
        let count = messages.len();
        messages.push(Value::Array(tools));
        messages.push(Value::Object(arguments));
        let marker = match &self.control_tokens {
            Some(control) => control.mark(&self.tokenizer, &mut messages),
            None => Ok(None),
        };
        let mut others = messages.split_off(count).into_iter();
        let (Some(Value::Array(tools)), Some(Value::Object(arguments))) =
            (others.next(), others.next())
        else {
            return Err(TextError::Refused("the tools were lost".to_owned()));
        };
        let marker = marker.map_err(TextError::Refused)?;
        let counted = |bytes: &[u8]| self.counted(bytes, marker);
        let mut prompt = Prompt::new(self.text_bytes_max(), &counted, until);
        let rendered = template.render_with(&messages, &tools, &arguments, &mut prompt);
        if prompt.is_over() {
            return Err(self.too_long(self.text_bytes_max() + 1));
        }
        until.check().map_err(TextError::Ended)?;
        let text = rendered.and_then(|()| prompt.into_text());
        match text {
            Ok(text) => Ok(ChatPrompt { text, marker }),
            // It may quote a message.
            Err(error) => Err(TextError::Refused(error.replace(|c| Some(c) == marker, ""))),
        }
    }

    /// Token ids of a chat. Its text already holds its special tokens.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_chat(&self, prompt: &ChatPrompt, until: &Until) -> Result<Vec<u32>, TextError> {
        self.encode_marked(&prompt.text, prompt.marker, false, until)
    }
}
