//! The prepared model directory, as far as text goes: tokenizer, chat template, defaults, limits.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use baton_chat_formats::{Choice, Facts, Format, Reasoning, choose};
use baton_protocol::ModelFingerprint;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;
use tokenizers::models::ModelWrapper;

use crate::config::{GenerationConfig, SpecialTokensInContent};
use crate::error::{ApiError, ApiServerError, ErrorKind};
use crate::text::control_tokens::ControlTokens;
use crate::text::detokenize::{Detokenizer, Vocabulary};
use crate::text::template::ChatTemplate;
use crate::text::texts::Until;

use self::bounds::TokenBytes;
pub use self::chat::Rendering;
#[cfg(test)]
pub(crate) use self::cuts::PIECE_BYTES;
use self::cuts::{Cuts, UNCUT_BYTES_MAX, Uncut};
pub use self::defaults::GenerationDefaults;
use self::ends::Ends;
pub use self::keep::{Keep, Side};

mod bounds;
mod chat;
mod cuts;
mod defaults;
mod ends;
mod keep;
mod shown_tools;

/// Longest prompt text of a tokenizer of which nobody knows how many bytes a token may stand for.
const PROMPT_BYTES_MAX: usize = 64 << 20;

/// Words of which the tokenizers crate keeps the tokens, on each thread: up to 8 KiB each, as long as the thread lives.
const CACHED_WORDS: usize = 2_048;

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

/// The formats of a model, as its directory tells. `config` is its `config.json`, which says nothing if it is no JSON.
fn formats(
    name: &str,
    template: Option<&str>,
    tokenizer: &Tokenizer,
    config: Option<String>,
) -> Choice {
    let added = tokenizer.get_added_tokens_decoder();
    let added: Vec<&str> = added.values().map(|token| token.content.as_str()).collect();
    let config: Value = config
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default();
    let architectures = config.get("architectures").and_then(Value::as_array);
    let architectures: Vec<&str> = architectures
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    choose(&Facts {
        template,
        added_tokens: &added,
        architectures: &architectures,
        name,
    })
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
    /// How it writes reasoning and calls.
    pub formats: Choice,
    /// Texts of all tokens.
    pub vocabulary: Vocabulary,
    pub(crate) tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    /// Whether the template shows the model its tools.
    pub shows_tools: bool,
    /// What message strings must not contain; `None` if they may.
    control_tokens: Option<ControlTokens>,
    token_bytes: TokenBytes,
    cuts: Cuts,
    ends: Ends,
}

/// Why a text was not made into tokens.
#[derive(Debug)]
pub enum TextError {
    /// It has this many tokens at least, and that is too many.
    TooLong(usize),
    /// It has no place to cut it for too long.
    Uncut,
    /// Nobody waits any more.
    Ended(ApiError),
    /// What the template or the tokenizer objects to.
    Refused(String),
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
        let mut tokenizer: Tokenizer = text
            .parse()
            .map_err(|error| fault("tokenizer.json", &error))?;
        bound_cache(&mut tokenizer);
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
        let formats = formats(
            &manifest.name,
            source.as_deref(),
            &tokenizer,
            optional("config.json")?,
        );
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
        let shows_tools = template.as_ref().is_some_and(shown_tools::shows_tools);
        let last = tokenizer.get_vocab(true).into_values().max();
        if last.is_some_and(|id| id as usize >= VOCABULARY_MAX) {
            let error = format!("it has a token of id {}", last.unwrap_or_default());
            return Err(fault("tokenizer.json", &error));
        }
        let control_tokens = ControlTokens::new(&tokenizer, &json)
            .map_err(|error| fault("tokenizer.json", &error))?;
        let tokenizer = Arc::new(tokenizer);
        Ok(Self {
            name: manifest.name,
            fingerprint: manifest.fingerprint,
            tokens_max: manifest.tokens_max,
            eos_token_ids: manifest.eos_token_ids,
            defaults,
            formats,
            vocabulary: Vocabulary::new(Arc::clone(&tokenizer), &json),
            token_bytes: TokenBytes::of(&json),
            cuts: Cuts::new(&json),
            ends: Ends::of(&tokenizer),
            tokenizer,
            template,
            shows_tools,
            control_tokens: Some(control_tokens),
        })
    }

    /// The same with this rule for control tokens in messages; [`SpecialTokensInContent::Plain`] without.
    #[must_use]
    pub fn with_special_tokens_in_content(mut self, rule: SpecialTokensInContent) -> Self {
        if rule == SpecialTokensInContent::Allow {
            self.control_tokens = None;
        }
        self
    }

    /// The same with sampling defaults from there.
    #[must_use]
    pub fn with_generation_config(mut self, from: GenerationConfig) -> Self {
        if from == GenerationConfig::None {
            self.defaults = GenerationDefaults::default();
        }
        self
    }

    /// The same with these formats where they are named, instead of those that its directory tells of.
    #[must_use]
    pub fn with_formats(mut self, format: Option<Format>, reasoning: Option<Reasoning>) -> Self {
        self.formats.format = format.unwrap_or(self.formats.format);
        self.formats.reasoning = reasoning.unwrap_or(self.formats.reasoning);
        self
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
            formats: Choice::default(),
            vocabulary: Vocabulary::new(Arc::clone(&tokenizer), &json),
            token_bytes: TokenBytes::unknown(),
            cuts: Cuts::default(),
            ends: Ends::default(),
            tokenizer,
            template: None,
            shows_tools: false,
            control_tokens: None,
        })
    }

    /// Longest text that may fit the model, in bytes that count. What is cut to fit has no bound but that of all prompts.
    fn text_bytes_max(&self, keep: Option<Keep>) -> usize {
        if keep.is_some() {
            return PROMPT_BYTES_MAX;
        }
        let longest = self.token_bytes.most().unwrap_or(usize::MAX);
        longest
            .saturating_mul(self.tokens_max as usize)
            .min(PROMPT_BYTES_MAX)
    }

    /// The bytes of a text that its tokens stand for: at least so many. Markers are taken out before it is tokenised.
    fn counted(&self, bytes: &[u8], marker: Option<char>) -> usize {
        let counted = self.token_bytes.counted(bytes);
        let Some(marker) = marker else {
            return counted;
        };
        let mut spelled = [0; 4];
        let spelled = marker.encode_utf8(&mut spelled).as_bytes();
        let markers = bytes.windows(spelled.len()).filter(|at| *at == spelled);
        counted.saturating_sub(markers.count() * spelled.len())
    }

    /// Token ids of a text, control tokens included; with `add_special_tokens` those that the tokenizer adds at its ends
    /// too. A text that cannot fit the model is not looked at, or not to its end; a long one is cut into pieces, and between
    /// them it is asked whether somebody still waits.
    ///
    /// # Errors
    /// What the tokenizer says, or why it was not asked.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        until: &Until,
    ) -> Result<Vec<u32>, TextError> {
        self.encode_marked(text, None, add_special_tokens, None, until)
    }

    /// As [`Self::encode`], of a text of which no more than this is kept, if anything is said of it.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_kept(
        &self,
        text: &str,
        add_special_tokens: bool,
        keep: Option<Keep>,
        until: &Until,
    ) -> Result<Vec<u32>, TextError> {
        self.encode_marked(text, None, add_special_tokens, keep, until)
    }

    /// As [`Self::encode`], of a text in which this marker stands in what must not become control tokens.
    fn encode_marked(
        &self,
        text: &str,
        marker: Option<char>,
        add_special_tokens: bool,
        keep: Option<Keep>,
        until: &Until,
    ) -> Result<Vec<u32>, TextError> {
        let bytes_max = self.text_bytes_max(keep);
        if text.len() > bytes_max {
            let counted = self.counted(text.as_bytes(), marker);
            if counted > bytes_max {
                return Err(self.too_long(counted));
            }
        }
        let whole = text.len() <= cuts::PIECE_BYTES;
        let in_pieces = !self.cuts.is_empty() && (self.ends.are_known() || !add_special_tokens);
        if !whole && !in_pieces && text.len() > UNCUT_BYTES_MAX {
            return Err(TextError::Uncut);
        }
        if keep.is_none() && (whole || !in_pieces) {
            return self.encode_piece(text, marker, add_special_tokens);
        }
        let (first, last) = match add_special_tokens {
            true => self.ends.ids(),
            false => Default::default(),
        };
        // What stands at the ends stays there, whatever is taken away between.
        let inner = keep.map(|keep| keep.less(first.len() + last.len()));
        if whole || !in_pieces {
            let add = add_special_tokens && !self.ends.are_known();
            let mut ids = self.encode_piece(text, marker, add)?;
            inner.iter().for_each(|inner| inner.cut(&mut ids));
            ids.splice(0..0, first.iter().copied());
            ids.extend_from_slice(last);
            keep.iter().for_each(|keep| keep.cut(&mut ids));
            return Ok(ids);
        }
        let mut ids = first.to_vec();
        let mut rest = text;
        while !rest.is_empty() {
            until.check().map_err(TextError::Ended)?;
            if let Some(inner) = inner {
                if inner.is_full(ids.len() - first.len()) {
                    break;
                }
            } else if ids.len() >= self.tokens_max as usize {
                return Err(TextError::TooLong(ids.len() + 1));
            }
            let bytes = self.cuts.piece(rest).map_err(|Uncut| TextError::Uncut)?;
            let (piece, more) = rest.split_at(bytes);
            ids.extend(self.encode_piece(piece, marker, false)?);
            rest = more;
            if let Some(inner) = inner {
                let mut text = ids.split_off(first.len());
                inner.cut(&mut text);
                ids.append(&mut text);
            }
        }
        ids.extend_from_slice(last);
        keep.iter().for_each(|keep| keep.cut(&mut ids));
        Ok(ids)
    }

    fn encode_piece(
        &self,
        text: &str,
        marker: Option<char>,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TextError> {
        if let (Some(marker), Some(control)) = (marker, &self.control_tokens)
            && text.contains(marker)
        {
            let ids = control.encode(&self.tokenizer, text, marker);
            return ids.map_err(TextError::Refused);
        }
        match self.tokenizer.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => {
                let message = format!("the text cannot be tokenised: {error}");
                Err(TextError::Refused(message))
            }
        }
    }

    /// For a text of so many bytes, which cannot fit the model.
    fn too_long(&self, bytes: usize) -> TextError {
        let longest = self.token_bytes.most().unwrap_or(usize::MAX);
        TextError::TooLong(bytes.div_ceil(longest).max(self.tokens_max as usize))
    }

    /// What answers depend on besides their requests: which release serves which model.
    pub fn system_fingerprint(&self) -> String {
        let model: String = self.fingerprint.as_str().chars().take(12).collect();
        format!("baton-{}-{model}", env!("CARGO_PKG_VERSION"))
    }

    /// The id of the special token with this text; `None` if there is none, or one that is not special.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        let id = self.tokenizer.token_to_id(text)?;
        self.vocabulary.special(id).then_some(id)
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

    /// The text of these tokens, special ones included.
    pub fn whole_text(&self, tokens: &[u32]) -> String {
        let mut text = String::new();
        let mut detokenizer = Detokenizer::default();
        for token in tokens {
            detokenizer.push_special_too(&self.vocabulary, *token, &mut text);
        }
        detokenizer.finish(&self.vocabulary, &mut text);
        text
    }

    /// The name of a token in the vocabulary, spelled as the vocabulary spells it; none for an id out of range.
    pub fn token_name(&self, token: u32) -> Option<String> {
        self.tokenizer.id_to_token(token)
    }

    /// The text of one token as log-probabilities name it, special tokens included.
    pub fn token_text(&self, token: u32) -> Cow<'_, str> {
        String::from_utf8_lossy(self.vocabulary.bytes(token))
    }
}

impl TextError {
    /// As a client is told, of this parameter and this model.
    pub fn of(self, param: &str, model: &ModelText) -> ApiError {
        let kind = match self {
            Self::TooLong(_) => ErrorKind::ContextLength,
            Self::Ended(error) => return error,
            Self::Uncut | Self::Refused(_) => ErrorKind::InvalidRequest,
        };
        let message = match self {
            Self::TooLong(tokens) => format!(
                "the prompt has {tokens} tokens or more, and the model holds {} with at least one for the \
                 output: shorten the prompt",
                model.tokens_max
            ),
            Self::Uncut => format!(
                "the prompt has more than {UNCUT_BYTES_MAX} bytes without a break between words, which cannot be \
                 tokenised: shorten it, or send token ids to /v1/completions"
            ),
            Self::Ended(ApiError { message, .. }) | Self::Refused(message) => message,
        };
        ApiError {
            param: Some(param.to_owned()),
            ..ApiError::new(kind, message)
        }
    }
}

fn bound_cache(tokenizer: &mut Tokenizer) {
    let mut model: ModelWrapper = tokenizer.get_model().clone();
    model.resize_cache(CACHED_WORDS);
    tokenizer.with_model(model);
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
pub(crate) mod fixtures;
#[cfg(test)]
pub(crate) mod tests;
