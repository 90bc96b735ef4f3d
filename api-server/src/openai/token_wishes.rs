//! `allowed_token_ids` and `bad_words`: which tokens an output may have.

use baton_protocol::limits::{BAD_WORD_TOKENS_MAX, BAD_WORDS_MAX};
use baton_protocol::{PackedTokens, TokenRules};
use serde_json::Value;

use super::fields::{Fields, wrong_type};
use super::params::token_ids;
use crate::error::ApiError;
use crate::text::texts::Until;
use crate::text::tokenizer::ModelText;

const ALLOWED: &str = "allowed_token_ids";
const BAD_WORDS: &str = "bad_words";

/// Most bad words: each becomes two sequences of tokens.
const WORDS_MAX: usize = BAD_WORDS_MAX / 2;

/// Longest bad word, in bytes.
const WORD_BYTES_MAX: usize = 1024;

/// What a client says of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenWishes {
    allowed: Option<Vec<u32>>,
    /// Without space before them.
    bad_words: Vec<String>,
}

impl TokenWishes {
    /// Reads them.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn read(fields: &Fields) -> Result<Self, ApiError> {
        let allowed = token_ids(fields, ALLOWED)?;
        if allowed.as_ref().is_some_and(Vec::is_empty) {
            let message = format!("{ALLOWED} must hold at least one id: leave it out to allow all");
            return Err(ApiError::param(ALLOWED, message));
        }
        Ok(Self {
            allowed,
            bad_words: bad_words(fields)?,
        })
    }

    /// In tokens of this model, if anything is said. A bad word is tokenized as it stands at the beginning of a text, and as it does
    /// after a space.
    ///
    /// # Errors
    /// 400 with the parameter's name.
    pub fn rules(&self, model: &ModelText, until: &Until) -> Result<Option<TokenRules>, ApiError> {
        if *self == Self::default() {
            return Ok(None);
        }
        let mut allowed = self.allowed.clone();
        if let Some(ids) = &mut allowed {
            ids.sort_unstable();
            ids.dedup();
            let vocabulary = model.vocabulary.count() as u32;
            if let Some(id) = ids.last().filter(|id| **id >= vocabulary) {
                let message =
                    format!("{ALLOWED} names token {id}; the vocabulary has {vocabulary}");
                return Err(ApiError::param(ALLOWED, message));
            }
        }
        let mut words: Vec<Vec<u32>> = Vec::with_capacity(2 * self.bad_words.len());
        let mut tokens = 0;
        for word in &self.bad_words {
            for text in [word.clone(), format!(" {word}")] {
                let ids = model.encode(&text, false, until);
                let ids = ids.map_err(|error| error.of(BAD_WORDS, model))?;
                if ids.is_empty() {
                    let message = format!("{BAD_WORDS} holds {word:?}, which has no tokens");
                    return Err(ApiError::param(BAD_WORDS, message));
                }
                tokens += ids.len();
                words.push(ids);
            }
            if tokens > BAD_WORD_TOKENS_MAX {
                let message = format!("{BAD_WORDS} have more than {BAD_WORD_TOKENS_MAX} tokens");
                return Err(ApiError::param(BAD_WORDS, message));
            }
        }
        words.sort_unstable();
        words.dedup();
        if let Some(ids) = &allowed
            && ids.iter().all(|id| words.binary_search(&vec![*id]).is_ok())
        {
            let message = format!("{ALLOWED} has only tokens that are {BAD_WORDS}: none is left");
            return Err(ApiError::param(ALLOWED, message));
        }
        Ok(Some(TokenRules {
            allowed: allowed.map(PackedTokens),
            bad_words: words.into_iter().map(PackedTokens).collect(),
        }))
    }
}

fn bad_words(fields: &Fields) -> Result<Vec<String>, ApiError> {
    const EXPECTED: &str = "an array of strings";
    let list = match fields.value(BAD_WORDS) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= WORDS_MAX => list,
        Some(Value::Array(list)) => {
            let count = list.len();
            let message = format!("{BAD_WORDS} takes at most {WORDS_MAX} texts, got {count}");
            return Err(ApiError::param(BAD_WORDS, message));
        }
        Some(other) => return Err(wrong_type(BAD_WORDS, EXPECTED, other)),
    };
    let word = |(i, value): (usize, &Value)| {
        let param = format!("{BAD_WORDS}[{i}]");
        let text = value.as_str();
        let text = text.ok_or_else(|| wrong_type(&param, EXPECTED, value))?;
        let word = text.trim_start();
        match (1..=WORD_BYTES_MAX).contains(&word.len()) {
            true => Ok(word.to_owned()),
            false => {
                let message = format!(
                    "{param} must have 1 to {WORD_BYTES_MAX} bytes after the spaces that it begins with"
                );
                Err(ApiError::param(param, message))
            }
        }
    };
    list.iter().enumerate().map(word).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::openai::table::Door;
    use crate::text::tokenizer::fixtures::{EOS, byte_model};

    fn rules(body: Value) -> Result<Option<TokenRules>, ApiError> {
        let fields = Fields::parse(Door::Text, body.to_string().as_bytes())?;
        TokenWishes::read(&fields)?.rules(byte_model(), &Until::forever())
    }

    #[test]
    fn a_bad_word_is_tokenized_with_and_without_a_space() {
        let model = byte_model();
        let rules = rules(json!({"bad_words": [" hey", "hey"], "allowed_token_ids": [7, 5, 7]}));
        let rules = rules.unwrap().expect("there are rules");
        let ids = |text: &str| PackedTokens(model.encode(text, false, &Until::forever()).unwrap());
        let mut words = vec![ids("hey"), ids(" hey")];
        words.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(rules.bad_words, words);
        assert_eq!(rules.allowed, Some(PackedTokens(vec![5, 7])));
        assert_eq!(
            super::TokenWishes::default().rules(model, &Until::forever()),
            Ok(None)
        );
    }

    #[test]
    fn what_cannot_be_followed_names_its_parameter() {
        let letter = b'a';
        let cases = [
            (json!({"allowed_token_ids": []}), ALLOWED),
            (json!({"allowed_token_ids": 5}), ALLOWED),
            (json!({"allowed_token_ids": [-1]}), ALLOWED),
            (json!({"allowed_token_ids": ["a"]}), ALLOWED),
            (json!({"allowed_token_ids": [1, 1_000_000]}), ALLOWED),
            (
                json!({"allowed_token_ids": [letter], "bad_words": ["a"]}),
                ALLOWED,
            ),
            (json!({"bad_words": "a"}), BAD_WORDS),
            (json!({"bad_words": vec!["a"; 1025]}), BAD_WORDS),
            (json!({"bad_words": vec!["xyz".repeat(300); 50]}), BAD_WORDS),
            (json!({"bad_words": ["a", 1]}), "bad_words[1]"),
            (json!({"bad_words": [""]}), "bad_words[0]"),
            (json!({"bad_words": ["a", " \n"]}), "bad_words[1]"),
            (json!({"bad_words": ["a".repeat(1025)]}), "bad_words[0]"),
        ];
        for (body, name) in cases {
            let error = rules(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(name), "{body}");
        }
        assert_eq!(
            rules(json!({"bad_words": [], "allowed_token_ids": null})),
            Ok(None)
        );
        assert!(rules(json!({"allowed_token_ids": [EOS]})).is_ok());
    }
}
