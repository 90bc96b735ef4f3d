//! Prompts cut to a number of tokens.

/// Which end of a prompt is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its beginning.
    Left,
    /// Its end.
    Right,
}

/// How much of a prompt is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Most tokens.
    pub tokens: usize,
    /// What is taken away of more.
    pub side: Side,
}

impl Keep {
    /// The same with fewer tokens.
    #[must_use]
    pub fn less(self, tokens: usize) -> Self {
        Self {
            tokens: self.tokens.saturating_sub(tokens),
            ..self
        }
    }

    /// Takes away what is too much.
    pub fn cut(self, ids: &mut Vec<u32>) {
        match self.side {
            Side::Left => drop(ids.drain(..ids.len().saturating_sub(self.tokens))),
            Side::Right => ids.truncate(self.tokens),
        }
    }

    /// Whether nothing that follows so many tokens would be kept.
    pub fn is_full(self, tokens: usize) -> bool {
        self.side == Side::Right && tokens >= self.tokens
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::text::texts::Until;
    use crate::text::tokenizer::ModelText;
    use crate::text::tokenizer::fixtures::{BOS, EOS, EOS_TEXT, byte_level, opened_with};

    /// The id of [`BOS`].
    const BEGIN: u32 = 256;

    /// A model of 8 tokens whose tokenizer puts a token at each end of a text.
    fn model() -> ModelText {
        let mut tokenizer = byte_level(&[BOS, EOS_TEXT], &[]);
        let special = |text: &str| json!({"SpecialToken": {"id": text, "type_id": 0}});
        let of = |text: &str, id: u32| json!({"id": text, "ids": [id], "tokens": [text]});
        tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [special(BOS), {"Sequence": {"id": "A", "type_id": 0}}, special(EOS_TEXT)],
            "pair": [],
            "special_tokens": {BOS: of(BOS, BEGIN), EOS_TEXT: of(EOS_TEXT, EOS)},
        });
        opened_with(&tokenizer.to_string(), "{}").unwrap()
    }

    #[test]
    fn what_the_tokenizer_adds_stays_at_its_ends() {
        let model = model();
        let kept = |tokens: usize, side: Side| {
            let keep = Some(Keep { tokens, side });
            model
                .encode_kept("abcdefghijkl", true, keep, &Until::forever())
                .unwrap()
        };
        let [j, k, l] = [b'j', b'k', b'l'].map(u32::from);
        assert_eq!(kept(5, Side::Left), [BEGIN, j, k, l, EOS]);
        let [a, b, c] = [b'a', b'b', b'c'].map(u32::from);
        assert_eq!(kept(5, Side::Right), [BEGIN, a, b, c, EOS]);
        assert_eq!(kept(1, Side::Right), [BEGIN]);
        assert_eq!(
            kept(100, Side::Left).len(),
            14,
            "more than the model holds, and not refused"
        );
    }

    proptest! {
        /// However long the text, and in how many pieces it is tokenised.
        #[test]
        fn what_is_kept_is_an_end_of_the_whole(
            words in prop::collection::vec("[a-d]{1,9}", 0..4_000),
            tokens in 1usize..9_000,
            left in any::<bool>(),
        ) {
            let (text, model, until) = (words.join(" "), model(), Until::forever());
            let side = if left { Side::Left } else { Side::Right };
            let keep = Keep { tokens, side };
            let mut whole: Vec<u32> = text.bytes().map(u32::from).collect();
            let kept = model.encode_kept(&text, false, Some(keep), &until).unwrap();
            keep.cut(&mut whole);
            prop_assert_eq!(&kept, &whole);
            prop_assert!(kept.len() <= tokens);
        }
    }
}
