//! What a tokenizer adds at the ends of a bare text.

use tokenizers::Tokenizer;

/// Special tokens before and after a text, if they are the same for every text.
#[derive(Debug, Default)]
pub struct Ends {
    known: Option<(Vec<u32>, Vec<u32>)>,
}

impl Ends {
    /// Those of a tokenizer, as seen of texts that have tokens.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let seen = ["a", "1 b"].map(|text| around(tokenizer, text));
        let [one, other] = seen;
        Self {
            known: one.filter(|one| Some(one) == other.as_ref()),
        }
    }

    /// Whether they are the same for every text.
    pub fn are_known(&self) -> bool {
        self.known.is_some()
    }

    /// Those before and those after a text.
    pub fn ids(&self) -> (&[u32], &[u32]) {
        match &self.known {
            Some((first, last)) => (first, last),
            None => Default::default(),
        }
    }
}

fn around(tokenizer: &Tokenizer, text: &str) -> Option<(Vec<u32>, Vec<u32>)> {
    let bare = tokenizer.encode(text, false).ok()?;
    let whole = tokenizer.encode(text, true).ok()?;
    let (bare, whole, added) = (
        bare.get_ids(),
        whole.get_ids(),
        whole.get_special_tokens_mask(),
    );
    let first = added.iter().take_while(|added| **added == 1).count();
    let rest = whole.get(first..)?;
    let last = rest.strip_prefix(bare)?;
    (!bare.is_empty()).then(|| (whole[..first].to_vec(), last.to_vec()))
}
