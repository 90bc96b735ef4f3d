//! Which tokens an output may have at all.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::PackedTokens;
use crate::limits::{BAD_WORD_TOKENS_MAX, BAD_WORDS_MAX};

/// Tokens that an output may have, besides all else. They hold for tokens that end it, too: an output whose `allowed` has no stop
/// id goes on to `max_tokens`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenRules {
    /// Only these ids are chosen, if there are any here: at least one, each in the vocabulary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed: Option<PackedTokens>,
    /// None of these sequences stands anywhere in the output; each has at least one id. The prompt does not count: a sequence whose
    /// first tokens end the prompt may be completed by the output.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bad_words: Vec<PackedTokens>,
}

impl TokenRules {
    /// Whether they are within their bounds.
    ///
    /// # Errors
    /// What is not, as a sentence.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.allowed.as_ref().is_some_and(|ids| ids.0.is_empty()) {
            return Err("no token is allowed");
        }
        if self.bad_words.iter().any(|word| word.0.is_empty()) {
            return Err("a bad word has no tokens");
        }
        let tokens: usize = self.bad_words.iter().map(|word| word.0.len()).sum();
        if self.bad_words.len() > BAD_WORDS_MAX || tokens > BAD_WORD_TOKENS_MAX {
            return Err("there are too many bad words");
        }
        Ok(())
    }

    /// All ids that they name.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        let lists = self.allowed.iter().chain(&self.bad_words);
        lists.flat_map(|ids| ids.0.iter().copied())
    }
}

/// Written as if they were not shared: there may be a vocabulary of them, and as many choices of one request.
pub(crate) mod shared {
    use super::*;

    pub fn serialize<S: Serializer>(
        rules: &Option<Arc<TokenRules>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        rules.as_deref().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Arc<TokenRules>>, D::Error> {
        let rules = Option::<TokenRules>::deserialize(deserializer)?;
        Ok(rules.map(Arc::new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_beyond_their_bounds_are_told() {
        let rules = |allowed: Option<Vec<u32>>, bad_words: Vec<Vec<u32>>| TokenRules {
            allowed: allowed.map(PackedTokens),
            bad_words: bad_words.into_iter().map(PackedTokens).collect(),
        };
        let says = |rules: TokenRules| rules.check().err().unwrap_or_default();
        assert_eq!(says(rules(None, vec![])), "");
        assert_eq!(says(rules(Some(vec![1]), vec![vec![1, 2]])), "");
        assert_eq!(says(rules(Some(vec![]), vec![])), "no token is allowed");
        assert_eq!(says(rules(None, vec![vec![]])), "a bad word has no tokens");
        let many = [
            vec![vec![1]; BAD_WORDS_MAX + 1],
            vec![vec![1; BAD_WORD_TOKENS_MAX + 1]],
        ];
        for bad_words in many {
            assert_eq!(says(rules(None, bad_words)), "there are too many bad words");
        }
    }
}
