//! A prompt that is repeated before its output (`echo`): its text, and where in it each token begins.

use std::sync::Arc;

use crate::text::detokenize::{Detokenizer, Vocabulary};

/// A prompt to be repeated.
pub struct Echo {
    /// Its tokens.
    pub tokens: Arc<[u32]>,
    /// Its text.
    pub text: String,
    /// Where each token begins in the text: the number of characters that end before it. Never decreasing. Empty if nobody asked
    /// for it.
    pub offsets: Vec<usize>,
    /// Characters of the text.
    pub characters: usize,
    /// Holds the beginning of a character that the output may complete.
    pub detokenizer: Detokenizer,
}

impl Echo {
    /// A prompt that came as token ids. Its text is that of all its tokens, special ones included.
    pub fn of_tokens(vocabulary: &Vocabulary, tokens: Arc<[u32]>) -> Self {
        let mut echo = Self {
            text: String::new(),
            offsets: Vec::with_capacity(tokens.len()),
            characters: 0,
            detokenizer: Detokenizer::default(),
            tokens,
        };
        for token in echo.tokens.iter() {
            let broken = echo.detokenizer.broken_before(vocabulary, *token);
            echo.offsets.push(echo.characters + broken);
            let before = echo.text.len();
            echo.detokenizer
                .push_special_too(vocabulary, *token, &mut echo.text);
            echo.characters += echo.text[before..].chars().count();
        }
        echo
    }

    /// A prompt that came as text, which is repeated as it came. Where the tokenizer changed it (a normalizer did) and each
    /// token is to be found in it, it is the text of the tokens instead.
    pub fn of_text(
        vocabulary: &Vocabulary,
        text: String,
        tokens: Arc<[u32]>,
        with_offsets: bool,
    ) -> Self {
        let offsets = match with_offsets {
            true => offsets_in(vocabulary, &text, &tokens),
            false => Some(Vec::new()),
        };
        match offsets {
            Some(offsets) => Self {
                tokens,
                characters: text.chars().count(),
                text,
                offsets,
                detokenizer: Detokenizer::default(),
            },
            None => Self::of_tokens(vocabulary, tokens),
        }
    }
}

/// Where each token begins in the text that it was made of, in characters; `None` if they do not make this text. A special
/// token that the tokenizer put at an end of it takes no place there, nor does a space that it put before a word.
fn offsets_in(vocabulary: &Vocabulary, text: &str, tokens: &[u32]) -> Option<Vec<usize>> {
    let (mut at, mut characters) = (0, 0);
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(characters);
        let bytes = vocabulary.bytes(*token);
        let rest = &text.as_bytes()[at..];
        let taken = if rest.starts_with(bytes) {
            bytes.len()
        } else if vocabulary.special(*token) {
            0
        } else {
            let word = bytes.strip_prefix(b" ")?;
            rest.starts_with(word).then_some(word.len())?
        };
        let ends = (at + 1..=at + taken).filter(|end| text.is_char_boundary(*end));
        characters += ends.count();
        at += taken;
    }
    (at == text.len()).then_some(offsets)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tokenizer::fixtures::{EOS, byte_model};

    /// A character that is spread over tokens begins where the first of them does, and the next character after the last.
    #[test]
    fn offsets_of_characters_split_over_tokens_do_not_go_backwards() {
        let model = byte_model();
        let tokens: Arc<[u32]> = "a🎉é!".bytes().map(u32::from).collect();
        let echo = Echo::of_tokens(&model.vocabulary, Arc::clone(&tokens));
        assert_eq!(echo.offsets, [0, 1, 1, 1, 1, 2, 2, 3]);
        assert_eq!((echo.text.as_str(), echo.characters), ("a🎉é!", 4));
        let echo = Echo::of_text(&model.vocabulary, "a🎉é!".to_owned(), tokens, true);
        assert_eq!(echo.offsets, [0, 1, 1, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn special_tokens_of_a_prompt_in_ids_are_in_its_text() {
        let model = byte_model();
        let tokens: Arc<[u32]> = [EOS, 0x61, 0xc3, EOS, 0x62].into();
        let echo = Echo::of_tokens(&model.vocabulary, tokens);
        assert_eq!(echo.text, "</s>a\u{fffd}</s>b");
        assert_eq!(echo.offsets, [0, 4, 5, 6, 10]);
    }

    #[test]
    fn what_the_tokenizer_adds_to_a_text_takes_no_place_in_it() {
        let model = byte_model();
        let echo = |text: &str, tokens: &[u32]| {
            Echo::of_text(&model.vocabulary, text.to_owned(), tokens.into(), true)
        };
        let around = echo("ab", &[EOS, 0x61, 0x62, EOS]);
        assert_eq!(
            (around.text.as_str(), around.offsets),
            ("ab", vec![0, 0, 1, 2])
        );
        let written = echo("</s>b", &[EOS, EOS, 0x62]);
        assert_eq!(
            (written.text.as_str(), written.offsets),
            ("</s>b", vec![0, 4, 4])
        );
        let changed = echo("AB", &[0x61, 0x62]);
        assert_eq!((changed.text.as_str(), changed.offsets), ("ab", vec![0, 1]));
    }

    proptest! {
        /// A token's offset is the number of characters that end before it begins, those that are broken included.
        #[test]
        fn offsets_count_the_characters_that_end_before_each_token(
            tokens in prop::collection::vec(prop_oneof![0u32..256, 0xc2u32..0xf5, 0x80u32..0xc0, 256u32..260], 0..60),
        ) {
            let model = byte_model();
            let echo = Echo::of_tokens(&model.vocabulary, tokens.clone().into());
            let mut whole = echo.text.clone();
            echo.detokenizer.clone().finish(&model.vocabulary, &mut whole);
            let bytes: Vec<u8> = tokens.iter().flat_map(|id| model.vocabulary.bytes(*id).to_vec()).collect();
            prop_assert_eq!(&whole, &String::from_utf8_lossy(&bytes));
            prop_assert_eq!(echo.text.chars().count(), echo.characters);
            let mut ends = Vec::new();
            let mut end = 0;
            for chunk in bytes.utf8_chunks() {
                ends.extend(chunk.valid().char_indices().map(|(at, c)| end + at + c.len_utf8()));
                end += chunk.valid().len() + chunk.invalid().len();
                ends.extend((!chunk.invalid().is_empty()).then_some(end));
            }
            let mut begin = 0;
            for (token, offset) in tokens.iter().zip(&echo.offsets) {
                prop_assert_eq!(*offset, ends.iter().filter(|end| **end <= begin).count());
                begin += model.vocabulary.bytes(*token).len();
            }
        }

        /// A text and its own tokens, however it is cut: the text as it came, and offsets in it.
        #[test]
        fn a_text_is_repeated_as_it_came(text in "[a-c <>/s🎉é漢]{0,30}") {
            let model = byte_model();
            let tokens: Arc<[u32]> = model
                .encode(&text, false, &crate::text::texts::Until::forever())
                .unwrap().into();
            let echo = Echo::of_text(&model.vocabulary, text.clone(), Arc::clone(&tokens), true);
            prop_assert_eq!(&echo.text, &text);
            prop_assert_eq!(echo.offsets, Echo::of_tokens(&model.vocabulary, tokens).offsets);
        }
    }
}
