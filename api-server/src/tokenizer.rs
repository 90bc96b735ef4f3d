//! The prepared model directory, as far as text goes: tokenizer, chat template, defaults, limits.

use std::path::Path;
use std::sync::Arc;

use baton_protocol::ModelFingerprint;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::detokenize::{Detokenizer, Vocabulary};
use crate::error::ApiServerError;
use crate::template::ChatTemplate;

/// Texts over this size are tokenised on a thread of their own, to keep the HTTP threads free.
pub const INLINE_BYTES_MAX: usize = 8 << 10;

/// Most ids of a vocabulary: some times that of the largest there are. Tables are as long as the largest id.
const VOCABULARY_MAX: usize = 1 << 22;

/// What `manifest.json` says, of which this crate needs a part.
#[derive(Clone, Debug, Deserialize)]
struct Manifest {
    name: String,
    fingerprint: ModelFingerprint,
    tokens_max: u32,
    #[serde(default)]
    eos_token_ids: Vec<u32>,
}

/// Sampling defaults of `generation_config.json`, which stand in where a request says nothing.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct GenerationDefaults {
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Most likely tokens.
    pub top_k: Option<i64>,
    /// Share of the most likely token.
    pub min_p: Option<f32>,
    /// Of prompt and output.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// What is wrong with them, if anything: workers would refuse every request that does not say otherwise.
    fn fault(&self) -> Option<String> {
        let positive = |value: f32| value >= f32::MIN_POSITIVE && value.is_finite();
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let top_k = self.top_k.filter(|k| *k > i64::from(u32::MAX));
        [
            (
                "temperature",
                self.temperature,
                self.temperature.is_none_or(|t| t >= 0.0 && t.is_finite()),
            ),
            (
                "top_p",
                self.top_p,
                self.top_p.is_none_or(|p| share(p) && p > 0.0),
            ),
            ("min_p", self.min_p, self.min_p.is_none_or(share)),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty.is_none_or(positive),
            ),
            ("top_k", top_k.map(|k| k as f32), top_k.is_none()),
        ]
        .into_iter()
        .find(|(.., fine)| !fine)
        .map(|(name, value, _)| format!("{name} is {}", value.unwrap_or_default()))
    }
}

/// A model's text side.
pub struct ModelText {
    /// Name in the manifest.
    pub name: String,
    /// Which model.
    pub fingerprint: ModelFingerprint,
    /// Longest sequence, prompt and output.
    pub tokens_max: u32,
    /// Ids that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Sampling defaults.
    pub defaults: GenerationDefaults,
    /// Texts of all tokens.
    pub vocabulary: Vocabulary,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
}

impl ModelText {
    /// Reads a prepared model directory.
    ///
    /// # Errors
    /// [`ApiServerError::Model`] that names the file at fault.
    pub fn open(directory: &Path) -> Result<Self, ApiServerError> {
        let fault = |file: &str, error: &dyn std::fmt::Display| {
            ApiServerError::Model(format!(
                "{}: {error}; --tokenizer takes a directory that `baton model-prep` made",
                directory.join(file).display()
            ))
        };
        let read = |file: &str| {
            std::fs::read_to_string(directory.join(file)).map_err(|error| fault(file, &error))
        };
        let optional = |file: &str| match std::fs::read_to_string(directory.join(file)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(fault(file, &error)),
        };

        let manifest: Manifest = serde_json::from_str(&read("manifest.json")?)
            .map_err(|error| fault("manifest.json", &error))?;
        let text = read("tokenizer.json")?;
        // First, because the tokenizers crate panics over some texts that are no JSON.
        let json: Value =
            serde_json::from_str(&text).map_err(|error| fault("tokenizer.json", &error))?;
        if let Some(token) = unknown_special(&json["post_processor"]) {
            let error = format!("its post-processor adds {token:?} and does not say what that is");
            return Err(fault("tokenizer.json", &error));
        }
        let tokenizer: Tokenizer = text
            .parse()
            .map_err(|error| fault("tokenizer.json", &error))?;
        let config: Value = match optional("tokenizer_config.json")? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| fault("tokenizer_config.json", &error))?,
            None => Value::Null,
        };
        let defaults: GenerationDefaults = match optional("generation_config.json")? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| fault("generation_config.json", &error))?,
            None => GenerationDefaults::default(),
        };
        if let Some(error) = defaults.fault() {
            return Err(fault("generation_config.json", &error));
        }
        let source = match optional("chat_template.jinja")? {
            Some(text) => Some(text),
            None => config
                .get("chat_template")
                .and_then(Value::as_str)
                .map(str::to_owned),
        };
        let template = source
            .map(|source| {
                ChatTemplate::new(
                    &source,
                    &named(&config, "bos_token"),
                    &named(&config, "eos_token"),
                )
            })
            .transpose()
            .map_err(|error| fault("chat_template.jinja", &error))?;
        let last = tokenizer.get_vocab(true).into_values().max();
        if last.is_some_and(|id| id as usize >= VOCABULARY_MAX) {
            let error = format!("it has a token of id {}", last.unwrap_or_default());
            return Err(fault("tokenizer.json", &error));
        }
        let tokenizer = Arc::new(tokenizer);
        Ok(Self {
            name: manifest.name,
            fingerprint: manifest.fingerprint,
            tokens_max: manifest.tokens_max,
            eos_token_ids: manifest.eos_token_ids,
            defaults,
            vocabulary: Vocabulary::new(Arc::clone(&tokenizer), &json),
            tokenizer,
            template,
        })
    }

    /// A model without text, for those who speak in tokens.
    ///
    /// # Errors
    /// [`ApiServerError::Model`], if the tokenizer library takes no empty vocabulary.
    #[cfg(feature = "simulation")]
    pub fn wordless(
        name: &str,
        fingerprint: ModelFingerprint,
        tokens_max: u32,
    ) -> Result<Self, ApiServerError> {
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [],
            "model": { "type": "WordLevel", "vocab": {}, "unk_token": "" },
        });
        let tokenizer: Tokenizer = serde_json::from_value(json.clone())
            .map_err(|error| ApiServerError::Model(format!("an empty tokenizer: {error}")))?;
        let tokenizer = Arc::new(tokenizer);
        Ok(Self {
            name: name.to_owned(),
            fingerprint,
            tokens_max,
            eos_token_ids: Vec::new(),
            defaults: GenerationDefaults::default(),
            vocabulary: Vocabulary::new(Arc::clone(&tokenizer), &json),
            tokenizer,
            template: None,
        })
    }

    /// The prompt text of a chat.
    ///
    /// # Errors
    /// What the template objects to.
    pub fn render_chat(&self, messages: &[Value]) -> Result<String, String> {
        match &self.template {
            Some(template) => template.render(&messages),
            None => Err("the model has no chat template; use /v1/completions".to_owned()),
        }
    }

    /// Token ids of a text. A chat's text already holds its special tokens; a bare text gets those
    /// that the tokenizer adds at its ends.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        match self.tokenizer.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(format!("the text cannot be tokenised: {error}")),
        }
    }

    /// The text of these tokens, without special ones.
    pub fn text(&self, tokens: &[u32]) -> String {
        let mut text = String::new();
        let mut detokenizer = Detokenizer::default();
        tokens
            .iter()
            .for_each(|token| detokenizer.push(&self.vocabulary, *token, &mut text));
        detokenizer.finish(&self.vocabulary, &mut text);
        text
    }

    /// The text of one token as log-probabilities name it, special tokens included.
    pub fn token_text(&self, token: u32) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(self.vocabulary.bytes(token))
    }
}

/// A special token that a post-processor puts around texts and does not define. The tokenizers crate finds out with the first
/// text, and panics.
fn unknown_special(processor: &Value) -> Option<&str> {
    if let Some(parts) = processor["processors"].as_array() {
        return parts.iter().find_map(unknown_special);
    }
    let pieces = |name: &str| processor[name].as_array().into_iter().flatten();
    // Of a single text there is no second part.
    let second = pieces("single").find(|piece| piece["Sequence"]["id"] == "B");
    let special = pieces("single").chain(pieces("pair"));
    second.map(|_| "B").or_else(|| {
        special
            .filter_map(|piece| piece["SpecialToken"]["id"].as_str())
            .find(|token| processor["special_tokens"].get(token).is_none())
    })
}

/// A special token of `tokenizer_config.json`: a string, or an object with `content`.
fn named(config: &Value, key: &str) -> String {
    let token = config.get(key);
    let text = token.and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
    text.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
