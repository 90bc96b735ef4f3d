//! Texts cut anywhere where it is allowed, for the patterns of the families that are served.

use proptest::prelude::*;
use serde_json::json;
use tokenizers::Tokenizer;

use super::*;
use crate::text::detokenize::byte_level;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: &str = r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn byte_level_stage(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn sequence(stages: &[Value]) -> Value {
    json!({"type": "Sequence", "pretokenizers": stages})
}

/// What splits texts, by family.
fn families() -> Vec<(&'static str, Value)> {
    let plain = byte_level_stage(false);
    let digits = json!({"type": "Digits", "individual_digits": true});
    vec![
        ("gpt2", byte_level_stage(true)),
        ("smollm2", sequence(&[digits, byte_level_stage(true)])),
        ("llama3", sequence(&[split(LLAMA3), plain.clone()])),
        ("qwen2", sequence(&[split(QWEN2), plain.clone()])),
        ("o200k", sequence(&[split(O200K), plain.clone()])),
        (
            "deepseek",
            sequence(&[
                split(r"\p{N}{1,3}"),
                split("[一-龥぀-ゟ゠-ヿ]+"),
                split(DEEPSEEK),
                plain,
            ]),
        ),
    ]
}

/// What texts are made of here.
const ATOMS: [&str; 34] = [
    "a", "B", "s", "ll", "'", "1", "2", "37", " ", "  ", "\n", "\r\n", "\t", ",", ".", "，", "。",
    "漢", "字", "か", "é", "e\u{301}", "ж", "<|end|>", "<|", "-", "\"", "_", "(", "/", "🎉",
    "\u{a0}", "²", "ǅ",
];

/// A tokenizer that merges any two bytes of those texts that it sees together: a boundary that is lost or made shows.
fn tokenizer(pre_tokenizer: &Value) -> (Value, Tokenizer) {
    let characters = (0..0x200).filter_map(char::from_u32);
    let spelled: Vec<(u8, char)> = characters
        .filter_map(|c| byte_level(c).map(|byte| (byte, c)))
        .collect();
    let mut vocabulary = serde_json::Map::new();
    for (_, c) in &spelled {
        vocabulary.insert(c.to_string(), vocabulary.len().into());
    }
    let used: Vec<char> = spelled
        .iter()
        .filter(|(byte, _)| ATOMS.iter().any(|atom| atom.as_bytes().contains(byte)))
        .map(|(_, c)| *c)
        .collect();
    let mut merges = Vec::new();
    for (one, other) in used
        .iter()
        .flat_map(|one| used.iter().map(move |other| (one, other)))
    {
        vocabulary.insert(format!("{one}{other}"), vocabulary.len().into());
        merges.push(json!([one.to_string(), other.to_string()]));
    }
    let end = vocabulary.len();
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": end, "content": "<|end|>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": byte_level_stage(false),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges},
    });
    let tokenizer = json.to_string().parse().unwrap();
    (json, tokenizer)
}

fn cuts_of(cuts: &Cuts, text: &str) -> Vec<usize> {
    let places = text.char_indices().skip(1).map(|(at, _)| at);
    places.filter(|at| cuts.allows(text, *at)).collect()
}

#[test]
fn every_family_has_cuts_that_texts_have() {
    for (family, stage) in families() {
        let (json, _) = tokenizer(&stage);
        let cuts = Cuts::new(&json);
        for (text, at) in [("word word", 4), ("漢字，漢字", 6)] {
            assert!(cuts_of(&cuts, text).contains(&at), "{family}: {text}");
        }
        for text in ["it's", "a  b"] {
            let first = if text.contains(' ') { vec![1] } else { vec![] };
            assert_eq!(cuts_of(&cuts, text), first, "{family}: {text}");
        }
        let behind_a_marker = cuts_of(&cuts, "a\u{fdd0} b\u{fdd0},c");
        assert_eq!(behind_a_marker, [] as [usize; 0], "{family}");
        let digits = cuts_of(&cuts, "1234567");
        let single = ["smollm2", "qwen2"].contains(&family);
        assert_eq!(digits.is_empty(), !single, "{family}");
    }
}

#[test]
fn where_nothing_is_known_nothing_is_cut() {
    let with = |stage: Value| Cuts::new(&tokenizer(&stage).0).is_empty();
    assert!(with(byte_level_stage(false)), "one word");
    assert!(with(json!({"type": "Whitespace"})));
    let prefixed = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true});
    assert!(with(prefixed));
    for pattern in [
        r"(?<=a)\s+|\S+",
        r"\S++\s|\s+",
        r"\S+|\s++",
        r"\S+|\s+(?!\S)",
        r"\b\w+|\s+",
        r"\S+(?!x)|\s+",
        r"x*",
        r",?",
        r".+",
    ] {
        assert!(with(split(pattern)), "{pattern}");
    }
    let (mut json, _) = tokenizer(&byte_level_stage(true));
    for (name, value) in [
        ("truncation", json!({"max_length": 3})),
        ("normalizer", json!({"type": "Lowercase"})),
        (
            "added_tokens",
            json!([{"content": "<mask>", "lstrip": true}]),
        ),
    ] {
        let before = std::mem::replace(&mut json[name], value);
        assert!(Cuts::new(&json).is_empty(), "{name}");
        json[name] = before;
    }
    assert!(!Cuts::new(&json).is_empty());
    json["added_tokens"][0]["content"] = "new york".into();
    assert!(cuts_of(&Cuts::new(&json), "new york").is_empty());
}

#[test]
fn a_piece_ends_at_the_last_cut_or_the_first_after_it() {
    let cuts = Cuts::new(&tokenizer(&byte_level_stage(true)).0);
    let words = "word ".repeat(PIECE_BYTES);
    let piece = cuts.piece(&words).unwrap();
    assert!((PIECE_BYTES - 5..=PIECE_BYTES).contains(&piece), "{piece}");
    assert!(words[piece..].starts_with(' '));
    let long = "w".repeat(2 * PIECE_BYTES) + " word";
    assert_eq!(cuts.piece(&long), Ok(2 * PIECE_BYTES));
    let longest = "w".repeat(UNCUT_BYTES_MAX);
    assert_eq!(cuts.piece(&longest), Ok(UNCUT_BYTES_MAX));
    assert_eq!(cuts.piece(&(longest + "w")), Err(Uncut));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn pieces_have_the_tokens_of_the_whole(atoms in prop::collection::vec(0..ATOMS.len(), 1..24)) {
        thread_local! {
            static FAMILIES: Vec<(&'static str, Cuts, Tokenizer)> = families()
                .into_iter()
                .map(|(family, stage)| {
                    let (json, tokenizer) = tokenizer(&stage);
                    (family, Cuts::new(&json), tokenizer)
                })
                .collect();
        }
        let text: String = atoms.iter().map(|atom| ATOMS[*atom]).collect();
        FAMILIES.with(|families| {
            for (family, cuts, tokenizer) in families {
                let ids = |text: &str| tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
                let whole = ids(&text);
                for at in cuts_of(cuts, &text) {
                    let mut pieces = ids(&text[..at]);
                    pieces.extend(ids(&text[at..]));
                    prop_assert_eq!(&pieces, &whole, "{}: {:?} cut at {}", family, &text, at);
                }
            }
            Ok(())
        })?;
    }
}
