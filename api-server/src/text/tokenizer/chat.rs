//! A chat as the model reads it: its template's text, then that text's tokens.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{Keep, ModelText, TextError};
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

/// How a chat's template is rendered.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendering {
    /// The template opens the assistant's turn.
    pub add_generation_prompt: bool,
    /// The text ends with that of the last message, whose turn goes on.
    pub continue_final_message: bool,
    /// Tools that the model is shown, in OpenAI's form.
    pub tools: Vec<Value>,
    /// More variables of the template.
    pub variables: Map<String, Value>,
}

impl Default for Rendering {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: Vec::new(),
            variables: Map::new(),
        }
    }
}

/// What may stand where the last message's text ends in a rendered chat: the last two characters of each plane, noncharacters of
/// Unicode, of which the first that neither messages nor variables contain is taken. None is a marker of control tokens.
fn final_ends() -> impl Iterator<Item = char> {
    let codes = (1..=16_u32).flat_map(|plane| [plane << 16 | 0xfffe, plane << 16 | 0xffff]);
    codes.filter_map(char::from_u32)
}

impl ModelText {
    /// The prompt of a chat as it usually is: as [`Self::render_chat_as`].
    ///
    /// # Errors
    /// As [`Self::render_chat_as`].
    pub fn render_chat(
        &self,
        messages: Vec<Value>,
        until: &Until,
    ) -> Result<ChatPrompt, TextError> {
        self.render_chat_as(messages, Rendering::default(), None, until)
    }

    /// The prompt of a chat, for as long as somebody waits and it may fit the model, or may be cut to what is kept.
    ///
    /// # Errors
    /// What the template objects to.
    pub fn render_chat_as(
        &self,
        mut messages: Vec<Value>,
        rendering: Rendering,
        keep: Option<Keep>,
        until: &Until,
    ) -> Result<ChatPrompt, TextError> {
        let refused = |message: &str| TextError::Refused(message.to_owned());
        let Some(template) = &self.template else {
            return Err(refused(
                "the model has no chat template; use /v1/completions",
            ));
        };
        // The client's strings are in all of them: descriptions of tools are its texts too.
        let mut variables = rendering.variables;
        // Templates ask whether there are tools at all.
        if !rendering.tools.is_empty() {
            variables.insert("tools".to_owned(), Value::Array(rendering.tools));
        }
        messages.push(Value::Object(variables));
        let marker = match &self.control_tokens {
            Some(control) => control.mark(&self.tokenizer, &mut messages),
            None => Ok(None),
        };
        let marker = marker.map_err(TextError::Refused)?;
        let end = match rendering.continue_final_message {
            true => Some(final_end(&messages).ok_or_else(|| {
                refused("the messages contain the last two characters of every plane of Unicode, one of which is needed to continue the last: leave one out")
            })?),
            false => None,
        };
        let variables = messages.pop().unwrap_or_default();
        if let (Some(end), Some(last)) = (end, messages.last_mut())
            && let Some(Value::String(text)) = last.get_mut("content")
        {
            text.push(end);
        }
        let counted = |bytes: &[u8]| self.counted(bytes, marker);
        let bytes_max = self.text_bytes_max(keep);
        let mut prompt = Prompt::new(bytes_max, &counted, until);
        let opens = rendering.add_generation_prompt;
        let rendered = template.render(&messages, opens, &variables, &mut prompt);
        if prompt.is_over() {
            return Err(self.too_long(bytes_max + 1));
        }
        until.check().map_err(TextError::Ended)?;
        // It may quote a message.
        let plain = |error: String| error.replace(|c| Some(c) == marker || Some(c) == end, "");
        let text = rendered.and_then(|()| prompt.into_text());
        let mut text = text.map_err(|error| TextError::Refused(plain(error)))?;
        if let Some(end) = end {
            let at = text.rfind(end).ok_or_else(|| {
                refused("the model's chat template does not write the last message's text as it is: continue_final_message cannot go on with it")
            })?;
            text.truncate(at);
            text = text.replace(end, "");
        }
        Ok(ChatPrompt { text, marker })
    }

    /// Token ids of a chat. Its text already holds its special tokens.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_chat(&self, prompt: &ChatPrompt, until: &Until) -> Result<Vec<u32>, TextError> {
        self.encode_chat_as(prompt, false, None, until)
    }

    /// Token ids of a chat, up to what is kept of it; with `add_special_tokens` those that the tokenizer adds too.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_chat_as(
        &self,
        prompt: &ChatPrompt,
        add_special_tokens: bool,
        keep: Option<Keep>,
        until: &Until,
    ) -> Result<Vec<u32>, TextError> {
        self.encode_marked(&prompt.text, prompt.marker, add_special_tokens, keep, until)
    }
}

/// The first of [`final_ends`] that these do not contain.
fn final_end(values: &[Value]) -> Option<char> {
    final_ends().find(|end| !values.iter().any(|value| contains(value, *end)))
}

fn contains(value: &Value, c: char) -> bool {
    match value {
        Value::String(text) => text.contains(c),
        Value::Array(list) => list.iter().any(|value| contains(value, c)),
        Value::Object(object) => object
            .iter()
            .any(|(key, value)| key.contains(c) || contains(value, c)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}
