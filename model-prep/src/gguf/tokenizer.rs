//! `tokenizer.json`, rebuilt from a GGUF file's metadata.

mod byte_level;
mod sentence_piece;
#[cfg(test)]
mod tests;

use baton_model::UniformSpec;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::metadata::{Metadata, required};

/// What the metadata says about text and tokens.
pub(crate) struct RebuiltTokenizer {
    /// Content of `tokenizer.json`, known to load.
    pub json: Vec<u8>,
    /// Content of `tokenizer_config.json`.
    pub config: Value,
    pub chat_template: Option<String>,
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer; at least one.
    pub eos_token_ids: Vec<u32>,
}

/// A vocabulary: text and kind of each token, by id.
pub(crate) struct Vocabulary<'a> {
    pub tokens: &'a [String],
    pub kinds: Vec<TokenKind>,
}

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Control tokens that end a turn in the chat formats of the supported families. They end an answer even
/// where the metadata names another token as the end of a text.
const TURN_ENDS: [&str; 3] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>"];

/// Longest token. Real ones stay under 300 bytes; every way to cut a token into two is looked at, so time grows with the
/// square of its length.
const TOKEN_BYTES_MAX: usize = 1 << 10;

pub(crate) fn rebuild(metadata: &Metadata, spec: &UniformSpec) -> Result<RebuiltTokenizer, String> {
    let vocabulary = vocabulary(metadata, spec)?;
    let token = |key: &str| token_id(metadata, key, &vocabulary);
    let bos_token_id = token("tokenizer.ggml.bos_token_id")?;
    let unknown = token("tokenizer.ggml.unknown_token_id")?;
    let padding = token("tokenizer.ggml.padding_token_id")?;
    let mut eos_token_ids: Vec<u32> = Vec::new();
    for key in ["eos", "eot", "eom"] {
        eos_token_ids.extend(token(&format!("tokenizer.ggml.{key}_token_id"))?);
    }
    let eos = eos_token_ids.first().copied();
    let turn_ends = (0u32..).zip(vocabulary.tokens.iter().zip(&vocabulary.kinds));
    eos_token_ids.extend(
        turn_ends
            .filter(|(_, (text, kind))| {
                **kind == TokenKind::Control && TURN_ENDS.contains(&text.as_str())
            })
            .map(|(id, _)| id),
    );
    dedup(&mut eos_token_ids);
    if eos_token_ids.is_empty() {
        return Err(
            "the metadata names no token that ends an answer (`tokenizer.ggml.eos_token_id`)"
                .to_owned(),
        );
    }

    let model = required(
        "tokenizer.ggml.model",
        metadata.text("tokenizer.ggml.model"),
    )?;
    let mut parts = match model {
        "gpt2" => byte_level::parts(metadata, &vocabulary)?,
        "llama" => sentence_piece::parts(metadata, &vocabulary, unknown)?,
        other => {
            return Err(format!(
                "its tokenizer {other:?} is not supported; \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece) are"
            ));
        }
    };
    let add_bos = metadata
        .flag("tokenizer.ggml.add_bos_token")?
        .unwrap_or(parts.adds_bos);
    let text = |id: Option<u32>| id.map(|id| vocabulary.tokens[id as usize].clone());
    if let (true, Some(id), Some(bos)) = (add_bos, bos_token_id, text(bos_token_id)) {
        parts.post_processor = prepend_token(&bos, id, parts.post_processor);
    }

    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(&vocabulary),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": parts.post_processor,
        "decoder": parts.decoder,
        "model": parts.model,
    });
    // Written by the library that reads it: one spelling, whatever the order of keys above.
    let json = Tokenizer::from_bytes(json.to_string())
        .and_then(|tokenizer| tokenizer.to_string(false))
        .map_err(|e| format!("no tokenizer can be built from its metadata: {e}"))?
        .into_bytes();

    let chat_template = metadata.text("tokenizer.chat_template")?.map(str::to_owned);
    let config = json!({
        "add_bos_token": add_bos,
        "bos_token": text(bos_token_id),
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": false,
        "eos_token": text(eos),
        "model_max_length": spec.tokens_max,
        "pad_token": text(padding),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": text(unknown),
    });
    Ok(RebuiltTokenizer {
        json,
        config,
        chat_template,
        bos_token_id,
        eos_token_ids,
    })
}

/// The parts of a `tokenizer.json` that differ between kinds of tokenizers.
pub(crate) struct Parts {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub post_processor: Value,
    pub decoder: Value,
    pub model: Value,
    /// Whether this kind begins a text with the `bos` token where the metadata does not say.
    pub adds_bos: bool,
}

fn vocabulary<'a>(metadata: &'a Metadata, spec: &UniformSpec) -> Result<Vocabulary<'a>, String> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    const TYPES: &str = "tokenizer.ggml.token_type";
    let tokens = required(TOKENS, metadata.texts(TOKENS))?;
    if tokens.is_empty() || tokens.len() > spec.vocab {
        return Err(format!(
            "`{TOKENS}` has {} entries, the embedding {} rows",
            tokens.len(),
            spec.vocab
        ));
    }
    let mut numbered = tokens.iter().enumerate();
    if let Some((id, token)) = numbered.find(|(_, token)| token.len() > TOKEN_BYTES_MAX) {
        return Err(format!(
            "token {id} has {} bytes, at most {TOKEN_BYTES_MAX} are read",
            token.len()
        ));
    }
    let kinds = match metadata.integers(TYPES)? {
        None => vec![TokenKind::Normal; tokens.len()],
        Some(types) if types.len() == tokens.len() => types
            .iter()
            .map(|&kind| {
                Ok(match kind {
                    0 | 1 => TokenKind::Normal,
                    2 => TokenKind::Unknown,
                    3 => TokenKind::Control,
                    4 => TokenKind::UserDefined,
                    5 => TokenKind::Unused,
                    6 => TokenKind::Byte,
                    _ => return Err(format!("`{TYPES}` has the unknown type {kind}")),
                })
            })
            .collect::<Result<_, _>>()?,
        Some(types) => {
            return Err(format!(
                "`{TYPES}` has {} entries for {} tokens",
                types.len(),
                tokens.len()
            ));
        }
    };
    Ok(Vocabulary { tokens, kinds })
}

impl Vocabulary<'_> {
    /// `{"text": id}` of all tokens. Two ids for one text would make one of them unreachable.
    pub(crate) fn ids(&self) -> Result<serde_json::Map<String, Value>, String> {
        let mut ids = serde_json::Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.clone(), id.into()) {
                return Err(format!("tokens {first} and {id} are both {token:?}"));
            }
        }
        Ok(ids)
    }
}

fn token_id(
    metadata: &Metadata,
    key: &str,
    vocabulary: &Vocabulary,
) -> Result<Option<u32>, String> {
    match metadata.count(key)? {
        None => Ok(None),
        Some(id) if id < vocabulary.tokens.len() => Ok(u32::try_from(id).ok()),
        // Some converters write -1 or 2^32 - 1 for "none".
        Some(id) if id as u64 == u64::from(u32::MAX) => Ok(None),
        Some(id) => Err(format!(
            "`{key}` is {id}, there are {} tokens",
            vocabulary.tokens.len()
        )),
    }
}

/// Tokens that are found in text before anything else. Control tokens are special: they do not show when
/// ids are decoded for reading.
fn added_tokens(vocabulary: &Vocabulary) -> Vec<Value> {
    let kinds = vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate();
    kinds
        .filter(|(_, (_, kind))| {
            matches!(
                kind,
                TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined
            )
        })
        .map(|(id, (text, kind))| {
            json!({
                "id": id,
                "content": text,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind != TokenKind::UserDefined,
            })
        })
        .collect()
}

/// Begin every text with a token.
fn prepend_token(token: &str, id: u32, then: Value) -> Value {
    let special = |type_id: u32| json!({ "SpecialToken": { "id": token, "type_id": type_id } });
    let sequence =
        |name: &str, type_id: u32| json!({ "Sequence": { "id": name, "type_id": type_id } });
    let mut special_tokens = serde_json::Map::new();
    special_tokens.insert(
        token.to_owned(),
        json!({ "id": token, "ids": [id], "tokens": [token] }),
    );
    let template = json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": special_tokens,
    });
    match then {
        Value::Null => template,
        then => json!({ "type": "Sequence", "processors": [then, template] }),
    }
}

fn dedup(ids: &mut Vec<u32>) {
    let mut seen = Vec::new();
    ids.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
}
