//! How few tokens a text can have, from its length alone.

use serde_json::Value;

use crate::text::detokenize::byte_level;

/// Canonical composition makes of three bytes or fewer at least one: `K` of the Kelvin sign, a syllable of three jamo.
const COMPOSED_BYTES: usize = 4;

/// What is known of the bytes that tokens stand for.
#[derive(Debug)]
pub struct TokenBytes {
    most: Option<usize>,
    /// Bytes of a text that may have no token, for want of one in the vocabulary.
    dropped: Option<Box<[bool; 256]>>,
}

impl TokenBytes {
    /// Those of a tokenizer; `json` is its `tokenizer.json`.
    pub fn of(json: &Value) -> Self {
        known(json).unwrap_or_else(Self::unknown)
    }

    /// One token may stand for any number of bytes: a tokenizer may drop spaces, or take a whole word that it does not know for one
    /// token.
    pub fn unknown() -> Self {
        Self {
            most: None,
            dropped: None,
        }
    }

    /// Most bytes of a text that one token stands for, of those that have tokens.
    pub fn most(&self) -> Option<usize> {
        self.most
    }

    /// How many of these bytes have tokens for certain.
    pub fn counted(&self, bytes: &[u8]) -> usize {
        match &self.dropped {
            None => bytes.len(),
            Some(dropped) => bytes.iter().filter(|b| !dropped[usize::from(**b)]).count(),
        }
    }
}

fn known(json: &Value) -> Option<TokenBytes> {
    let model = &json["model"];
    if !(model["type"] == "BPE" || model["merges"].is_array()) || !json["truncation"].is_null() {
        return None;
    }
    let composed = normalizer_shrinks(&json["normalizer"])?;
    let mut spelled = false;
    keeps_all(&json["pre_tokenizer"], &mut spelled)?;
    let vocabulary = model["vocab"].as_object()?;
    // A token of its own for each character that is not known.
    let unknown_is_one = model["unk_token"].is_string() && model["fuse_unk"] != true;
    let mut dropped = None;
    let longest = match spelled {
        // One character for each byte.
        true => {
            let missing = missing_bytes(|c| vocabulary.contains_key(c));
            if missing.contains(&true) && !unknown_is_one {
                // Of what is composed nobody knows which bytes it has.
                if composed > 1 {
                    return None;
                }
                dropped = Some(Box::new(missing));
            }
            vocabulary.keys().map(|piece| piece.chars().count()).max()?
        }
        false => {
            let has_byte = |byte: u8| vocabulary.contains_key(&format!("<0x{byte:02X}>"));
            let all_bytes = model["byte_fallback"] == true && (0..=255).all(has_byte);
            if !all_bytes && !unknown_is_one {
                return None;
            }
            let longest = vocabulary.keys().map(String::len).max()?;
            longest.max(char::MAX.len_utf8())
        }
    };
    let mut most = longest * composed;
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        // These take in any number of spaces.
        if token["lstrip"] == true || token["rstrip"] == true {
            return None;
        }
        most = most.max(token["content"].as_str()?.len() * composed);
    }
    Some(TokenBytes {
        most: Some(most),
        dropped,
    })
}

/// Bytes that no character of the vocabulary spells. Some vocabularies leave out those that UTF-8 does not have, others
/// control characters too.
fn missing_bytes(has: impl Fn(&str) -> bool) -> [bool; 256] {
    let mut missing = [true; 256];
    for c in (0..0x200).filter_map(char::from_u32) {
        if let Some(byte) = byte_level(c) {
            missing[usize::from(byte)] = !has(c.encode_utf8(&mut [0; 4]));
        }
    }
    for never in [0xc0, 0xc1].into_iter().chain(0xf5..=0xff) {
        missing[never] = false;
    }
    missing
}

/// How many bytes may become one. None for what may drop any number of them.
fn normalizer_shrinks(normalizer: &Value) -> Option<usize> {
    match normalizer["type"].as_str() {
        None if normalizer.is_null() => Some(1),
        Some("NFC") => Some(COMPOSED_BYTES),
        Some("Prepend") => Some(1),
        Some("Replace") => {
            let from = normalizer["pattern"]["String"].as_str()?;
            let to = normalizer["content"].as_str()?;
            (to.len() >= from.len()).then_some(1)
        }
        Some("Sequence") => {
            let parts = normalizer["normalizers"].as_array()?;
            parts
                .iter()
                .map(normalizer_shrinks)
                .try_fold(1, |product, part| Some(product * part?))
        }
        _ => None,
    }
}

/// Whether a pre-tokenizer leaves nothing out; notes whether it spells bytes as characters.
fn keeps_all(stage: &Value, spelled: &mut bool) -> Option<()> {
    match stage["type"].as_str() {
        None if stage.is_null() => Some(()),
        Some("Sequence") => {
            let stages = stage["pretokenizers"].as_array()?;
            stages
                .iter()
                .try_for_each(|stage| keeps_all(stage, spelled))
        }
        Some("ByteLevel") => {
            *spelled = true;
            Some(())
        }
        Some("Split") => (stage["behavior"] != "Removed").then_some(()),
        Some("Digits" | "Metaspace") => Some(()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A tokenizer that spells bytes as characters, with some pieces more.
    fn spelled(more: &[&str]) -> Value {
        let mut vocabulary = serde_json::Map::new();
        let characters = (0..0x200).filter_map(char::from_u32);
        let bytes = characters.filter(|c| byte_level(*c).is_some());
        for piece in bytes
            .map(String::from)
            .chain(more.iter().map(|piece| (*piece).to_owned()))
        {
            let id = vocabulary.len();
            vocabulary.insert(piece, id.into());
        }
        json!({
            "added_tokens": [{"content": "<|im_start|>"}],
            "pre_tokenizer": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": vocabulary},
        })
    }

    fn token_bytes_max(json: &Value) -> Option<usize> {
        TokenBytes::of(json).most()
    }

    #[test]
    fn the_longest_piece_is_the_bound() {
        assert_eq!(token_bytes_max(&spelled(&[])), Some(12));
        let twenty = "\u{120}".repeat(20);
        let mut json = spelled(&[&twenty]);
        assert_eq!(token_bytes_max(&json), Some(20));
        json["normalizer"] = json!({"type": "NFC"});
        assert_eq!(token_bytes_max(&json), Some(80));
    }

    #[test]
    fn what_may_drop_text_has_no_bound() {
        let with = |name: &str, value: Value| {
            let mut json = spelled(&[]);
            json[name] = value;
            token_bytes_max(&json)
        };
        assert_eq!(with("normalizer", json!({"type": "Lowercase"})), None);
        assert_eq!(with("normalizer", json!({"type": "Strip"})), None);
        assert_eq!(with("pre_tokenizer", json!({"type": "Whitespace"})), None);
        assert_eq!(with("truncation", json!({"max_length": 512})), None);
        let wide = json!([{"content": "<mask>", "lstrip": true}]);
        assert_eq!(with("added_tokens", wide), None);
        let mut words = spelled(&[]);
        words["model"]["type"] = "WordLevel".into();
        assert_eq!(token_bytes_max(&words), None);
    }

    #[test]
    fn bytes_that_have_no_token_do_not_count() {
        let mut json = spelled(&[]);
        let bytes = TokenBytes::of(&json);
        assert_eq!(bytes.counted(b"a\x04b"), 3);
        // The character that spells 0x04.
        json["model"]["vocab"]
            .as_object_mut()
            .unwrap()
            .remove("\u{104}");
        let bytes = TokenBytes::of(&json);
        assert_eq!((bytes.counted(b"a\x04b"), bytes.most()), (2, Some(12)));
        json["normalizer"] = json!({"type": "NFC"});
        assert_eq!(token_bytes_max(&json), None);
        json["model"]["unk_token"] = "a".into();
        assert_eq!(TokenBytes::of(&json).counted(b"a\x04b"), 3);
    }

    #[test]
    fn an_unknown_character_is_a_token_of_its_own_or_bytes() {
        let model = |more: Value| {
            let mut model = json!({"type": "BPE", "vocab": {"a": 0, "bcd": 1, "<unk>": 2}});
            for (name, value) in more.as_object().unwrap() {
                model[name] = value.clone();
            }
            token_bytes_max(&json!({"model": model}))
        };
        assert_eq!(model(json!({"unk_token": "<unk>"})), Some(5));
        let fused = json!({"unk_token": "<unk>", "fuse_unk": true});
        assert_eq!(model(fused), None);
        assert_eq!(model(json!({})), None);
        assert_eq!(model(json!({"byte_fallback": true})), None);
    }
}
