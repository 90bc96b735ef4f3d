//! Token ids back to text, one token at a time.
//!
//! Nearly every tokenizer's decoder maps each token to its own bytes, whatever stands around it; then
//! one table holds all of them, and a token costs a copy. Others go through the tokenizers crate.

use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer;

/// Tokens of context that the slow path decodes together with new ones.
const WINDOW_TOKENS: usize = 6;

/// Tokens that one character may be spread over: UTF-8 has at most four bytes.
const CHARACTER_TOKENS: usize = 4;

/// The text of every token.
pub struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    /// `bytes[starts[id]..starts[id + 1]]`.
    starts: Vec<u32>,
    bytes: Vec<u8>,
    special: Vec<bool>,
    /// Whether the decoder joins tokens by nothing but their bytes.
    exact: bool,
}

impl Vocabulary {
    /// The table of a tokenizer; `json` is its `tokenizer.json`.
    pub fn new(tokenizer: Arc<Tokenizer>, json: &Value) -> Self {
        let spelling = Spelling::of(json);
        let added = tokenizer.get_added_tokens_decoder();
        let last = tokenizer.get_vocab(true).into_values().max();
        let count = last.map_or(0, |id| id as usize + 1);
        let mut table = Self {
            tokenizer: Arc::clone(&tokenizer),
            starts: Vec::with_capacity(count + 1),
            bytes: Vec::new(),
            special: vec![false; count],
            exact: spelling.is_some(),
        };
        table.starts.push(0);
        for id in 0..count as u32 {
            if let Some(token) = added.get(&id) {
                table.special[id as usize] = token.special;
                table.bytes.extend_from_slice(token.content.as_bytes());
            } else if let Some(piece) = tokenizer.id_to_token(id) {
                spelling
                    .unwrap_or(Spelling::Plain)
                    .push(&piece, &mut table.bytes);
            }
            table.starts.push(table.bytes.len() as u32);
        }
        table
    }

    /// Number of ids.
    pub fn count(&self) -> usize {
        self.special.len()
    }

    /// Bytes of one token; none for an id out of range.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id + 1)) {
            (Some(from), Some(to)) => &self.bytes[*from as usize..*to as usize],
            _ => &[],
        }
    }

    /// Whether the token is for the model only and has no place in the text.
    pub fn special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// How a vocabulary writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's alphabet: each byte one printable character.
    ByteLevel,
    /// SentencePiece: `▁` for a space, `<0x0A>` for a byte.
    SentencePiece,
    /// As it is.
    Plain,
}

impl Spelling {
    /// The spelling that `decoder` in `tokenizer.json` undoes, if it works token by token.
    fn of(json: &Value) -> Option<Self> {
        let decoder = json.get("decoder")?;
        match decoder.get("type")?.as_str()? {
            "ByteLevel" => Some(Self::ByteLevel),
            "Metaspace" => Some(Self::SentencePiece),
            "Sequence" => {
                let parts: Vec<&str> = decoder
                    .get("decoders")?
                    .as_array()?
                    .iter()
                    .map(|part| part.get("type").and_then(Value::as_str).unwrap_or(""))
                    .collect();
                if parts.contains(&"ByteLevel") {
                    return Some(Self::ByteLevel);
                }
                // Strip takes the space before the very first word of a text away. What follows a
                // prompt is not the first word, so the space stays.
                let known = ["Replace", "ByteFallback", "Fuse", "Strip"];
                let llama = parts.iter().all(|part| known.contains(part));
                (llama && parts.contains(&"ByteFallback")).then_some(Self::SentencePiece)
            }
            _ => None,
        }
    }

    fn push(self, piece: &str, out: &mut Vec<u8>) {
        match self {
            Self::Plain => out.extend_from_slice(piece.as_bytes()),
            Self::ByteLevel => {
                for c in piece.chars() {
                    match byte_level(c) {
                        Some(byte) => out.push(byte),
                        None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
            }
            Self::SentencePiece => match fallback_byte(piece) {
                Some(byte) => out.push(byte),
                None => out.extend_from_slice(piece.replace('\u{2581}', " ").as_bytes()),
            },
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for.
pub fn byte_level(c: char) -> Option<u8> {
    let plain = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(c);
    if plain(code) {
        return u8::try_from(code).ok();
    }
    // The other 68 bytes follow at 256, in order.
    let nth = code.checked_sub(256)? as usize;
    (0..=255u8).filter(|byte| !plain(u32::from(*byte))).nth(nth)
}

fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// One text in the making.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    /// Bytes of a character that is not whole yet.
    partial: Vec<u8>,
    /// The slow path: latest tokens, all of which have text, and how much of it was given out.
    window: Vec<u32>,
    sent: usize,
    /// The slow path: tokens in a row whose text ended in a broken character.
    held: usize,
}

impl Detokenizer {
    /// Appends the text that this token completes. Special tokens have none.
    pub fn push(&mut self, vocabulary: &Vocabulary, token: u32, out: &mut String) {
        if !vocabulary.special(token) {
            self.push_special_too(vocabulary, token, out);
        }
    }

    /// How many characters this token finds broken before it: one, if it does not go on with the character that tokens before it
    /// began. That character's replacement comes with this token and stands before the token's own text.
    pub fn broken_before(&self, vocabulary: &Vocabulary, token: u32) -> usize {
        let Some(next) = vocabulary.bytes(token).first() else {
            return 0;
        };
        let mut bytes = self.partial.clone();
        bytes.push(*next);
        let error = std::str::from_utf8(&bytes).err();
        let broken = error.and_then(|error| error.error_len());
        usize::from(broken.is_some_and(|broken| broken <= self.partial.len()))
    }

    /// Appends the text that this token completes; special tokens have theirs too.
    pub fn push_special_too(&mut self, vocabulary: &Vocabulary, token: u32, out: &mut String) {
        if !vocabulary.exact {
            return self.push_slow(vocabulary, token, out);
        }
        let bytes = vocabulary.bytes(token);
        if self.partial.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return out.push_str(text);
        }
        self.partial.extend_from_slice(bytes);
        let used = push_valid(&self.partial, out);
        self.partial.drain(..used);
    }

    /// The text is over: what is left of a broken character becomes one replacement character.
    pub fn finish(&mut self, vocabulary: &Vocabulary, out: &mut String) {
        if !vocabulary.exact {
            let text = vocabulary
                .tokenizer
                .decode(&self.window, false)
                .unwrap_or_default();
            if let Some(rest) = text.get(self.sent..) {
                out.push_str(rest);
            }
            return;
        }
        if !std::mem::take(&mut self.partial).is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }

    fn push_slow(&mut self, vocabulary: &Vocabulary, token: u32, out: &mut String) {
        self.window.push(token);
        let text = vocabulary
            .tokenizer
            .decode(&self.window, false)
            .unwrap_or_default();
        // A character that is not whole shows as a replacement character at the end. One that is not whole
        // after so many tokens is broken for good.
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.held + 1 < CHARACTER_TOKENS {
            self.held += 1;
            return;
        }
        self.held = 0;
        if let Some(new) = text.get(self.sent..) {
            out.push_str(new);
        }
        if self.window.len() > WINDOW_TOKENS {
            self.window.drain(..self.window.len() - WINDOW_TOKENS / 2);
            let kept = vocabulary
                .tokenizer
                .decode(&self.window, false)
                .unwrap_or_default();
            self.sent = kept.len();
        } else {
            self.sent = text.len();
        }
    }
}

/// Appends all whole characters, with a replacement character for each broken one, and returns how many
/// bytes are done with; what is left is the beginning of a character.
fn push_valid(bytes: &[u8], out: &mut String) -> usize {
    let mut used = 0;
    loop {
        match std::str::from_utf8(&bytes[used..]) {
            Ok(text) => {
                out.push_str(text);
                return bytes.len();
            }
            Err(error) => {
                let valid = used + error.valid_up_to();
                // `valid_up_to` says that this much is UTF-8.
                out.push_str(&String::from_utf8_lossy(&bytes[used..valid]));
                let Some(broken) = error.error_len() else {
                    return valid;
                };
                out.push(char::REPLACEMENT_CHARACTER);
                used = valid + broken;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gpt2s_alphabet() {
        assert_eq!(byte_level('A'), Some(b'A'));
        assert_eq!(byte_level('Ġ'), Some(b' '));
        assert_eq!(byte_level('Ċ'), Some(b'\n'));
        assert_eq!(byte_level('é'), Some(0xe9));
        assert_eq!(byte_level('Ń'), Some(0xad));
        assert_eq!(byte_level('漢'), None);
    }

    #[test]
    fn sentencepiece_bytes_and_spaces() {
        let mut out = Vec::new();
        Spelling::SentencePiece.push("\u{2581}a", &mut out);
        Spelling::SentencePiece.push("<0xF0>", &mut out);
        assert_eq!(out, b" a\xf0");
    }

    /// A tokenizer whose decoder joins pieces in a way of its own: words by spaces, `##` by nothing.
    fn word_pieces() -> Vocabulary {
        let pieces = [
            "[UNK]",
            "hand",
            "##ball",
            "##s",
            "Köln",
            "runs",
            "🎉",
            "##\u{4e16}",
        ];
        let vocab: serde_json::Map<_, _> = pieces
            .iter()
            .enumerate()
            .map(|(id, piece)| ((*piece).to_owned(), id.into()))
            .collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [{"id": 0, "content": "[UNK]", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab},
        });
        let tokenizer = Arc::new(json.to_string().parse().unwrap());
        Vocabulary::new(tokenizer, &json)
    }

    #[test]
    fn the_slow_road_is_taken_for_decoders_of_their_own() {
        let vocabulary = word_pieces();
        assert!(!vocabulary.exact);
        let mut texts = Vec::new();
        let mut detokenizer = Detokenizer::default();
        for token in [1, 2, 3, 0, 4, 5] {
            let mut text = String::new();
            detokenizer.push(&vocabulary, token, &mut text);
            texts.push(text);
        }
        assert_eq!(texts, ["hand", "ball", "s", "", " Köln", " runs"]);
    }

    proptest! {
        #[test]
        fn the_slow_road_gives_the_whole_text(tokens in prop::collection::vec(0u32..8, 0..60)) {
            let vocabulary = word_pieces();
            let mut out = String::new();
            let mut detokenizer = Detokenizer::default();
            for token in &tokens {
                detokenizer.push(&vocabulary, *token, &mut out);
            }
            detokenizer.finish(&vocabulary, &mut out);
            prop_assert_eq!(out, vocabulary.tokenizer.decode(&tokens, true).unwrap());
        }

        #[test]
        fn cutting_bytes_anywhere_gives_the_lossy_text(bytes in prop::collection::vec(any::<u8>(), 0..40), cut in 1usize..5) {
            let mut out = String::new();
            let mut partial: Vec<u8> = Vec::new();
            for piece in bytes.chunks(cut) {
                partial.extend_from_slice(piece);
                let used = push_valid(&partial, &mut out);
                partial.drain(..used);
            }
            if !partial.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
