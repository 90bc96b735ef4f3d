//! Message strings never become control tokens.
//!
//! A chat template puts the client's strings between control tokens, and the tokenizer finds those again by their text: a
//! message that holds the text `<|im_end|>` would end its own turn. So each such text in a string of the messages gets a
//! marker after its first character before the template is rendered: the template carries it through, the search for added
//! tokens does not see the text as one, and before words are split the marker is taken out again. What the model reads is
//! the same text, spelled in ordinary tokens. Without such a text there is no marker, and nothing is done otherwise.
//!
//! Strings could also make a control token together with their surroundings, as `<|im_` at the end of one and `end|>` at
//! the beginning of the next. So their ends are marked too where they are the beginning or the rest of such a text.
//! What a template makes of characters that it picks out of a string one by one is out of reach.

use std::collections::HashSet;

use aho_corasick::AhoCorasick;
use serde_json::Value;
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizer, Tokenizer,
    tokenizer::normalizer::Range,
};

/// Noncharacters of Unicode: for internal use, with no meaning, case, width or decomposition. The first that no message
/// contains is the marker.
const MARKERS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// Roles that templates know. Some write control tokens around them (`<|user|>`) and compare them, so they stay as they are.
const ROLES: [&str; 8] = [
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "observation",
];

/// The control tokens of a tokenizer: all that it calls special, and added tokens that are written `<|…|>` or `<｜…｜>`. Other
/// added tokens, such as `<think>`, are part of what is said and stay tokens in messages too.
pub struct ControlTokens {
    /// Finds their texts in any case: a template may change it.
    finder: AhoCorasick,
    /// All texts in lower case, one a line.
    lines: String,
    /// Beginnings and rests of these, the whole left out.
    beginnings: HashSet<Box<str>>,
    rests: HashSet<Box<str>>,
    /// First and last characters of the texts, to pass over what cannot be an end of one.
    firsts: HashSet<char>,
    lasts: HashSet<char>,
    /// Longest text, in bytes.
    bytes_max: usize,
    /// Texts as the normalizer makes them, of those that are looked for after it.
    normalized: Vec<String>,
    /// Their ids, but for that which stands for what is unknown.
    ids: HashSet<u32>,
}

/// Which string of a message it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Role,
    /// A content or a name: templates write it between texts of their own.
    Written,
    Other,
}

impl Kind {
    /// Of the string that a message has under this key.
    fn of(key: &str) -> Self {
        match key {
            "role" => Self::Role,
            "content" | "name" => Self::Written,
            _ => Self::Other,
        }
    }
}

impl ControlTokens {
    /// The control tokens of a tokenizer; `json` is its `tokenizer.json`.
    ///
    /// # Errors
    /// If there are more of them than can be searched for.
    pub fn new(tokenizer: &Tokenizer, json: &Value) -> Result<Self, String> {
        let unknown = &json["model"]["unk_token"];
        let unknown_id = json["model"]["unk_id"].as_u64();
        let is_unknown = |id: u32, text: &str| {
            unknown.as_str() == Some(text) || unknown_id == Some(u64::from(id))
        };
        // A single character has no inside where a marker could stand. No such token opens or ends a turn.
        let tokens: Vec<_> = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special || is_bracketed(&token.content))
            .filter(|(_, token)| token.content.chars().count() > 1)
            .collect();
        let finder = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .build(tokens.iter().map(|(_, token)| &token.content))
            .map_err(|error| format!("its special tokens: {error}"))?;
        let mut this = Self {
            finder,
            lines: String::new(),
            beginnings: HashSet::new(),
            rests: HashSet::new(),
            firsts: HashSet::new(),
            lasts: HashSet::new(),
            bytes_max: 0,
            normalized: Vec::new(),
            ids: HashSet::new(),
        };
        for (id, token) in tokens {
            let text = token.content.to_ascii_lowercase();
            for (at, _) in text.char_indices().skip(1) {
                this.beginnings.insert(text[..at].into());
                this.rests.insert(text[at..].into());
            }
            this.firsts.extend(text.chars().next());
            this.lasts.extend(text.chars().next_back());
            this.bytes_max = this.bytes_max.max(text.len());
            this.lines.push_str(&text);
            this.lines.push('\n');
            if token.normalized
                && let Some(normalized) = normalized(tokenizer, &token.content)
            {
                this.normalized.push(normalized);
            }
            if !is_unknown(id, &token.content) {
                this.ids.insert(id);
            }
        }
        Ok(this)
    }

    /// Marks the strings of these messages, and says with what; `None` if nothing needed it.
    ///
    /// # Errors
    /// A sentence, if the messages contain every possible marker themselves.
    pub fn mark(
        &self,
        tokenizer: &Tokenizer,
        messages: &mut [Value],
    ) -> Result<Option<char>, String> {
        let any = |is: &mut dyn FnMut(&str, Kind) -> bool| {
            let mut is = |text: &str, kind| is(text, kind);
            messages
                .iter()
                .any(|message| any_string(message, Kind::Other, &mut is))
        };
        if !any(&mut |text, kind| !self.marks(tokenizer, text, kind).is_empty()) {
            return Ok(None);
        }
        let marker = MARKERS
            .into_iter()
            .find(|marker| !any(&mut |text, _| text.contains(*marker)));
        let marker = marker.ok_or(
            "the messages contain texts of control tokens and each of the characters U+FDD0 to U+FDEF, one of which is \
             needed to mark them: leave one out",
        )?;
        for message in messages {
            change_strings(message, Kind::Other, &mut |text, kind| {
                let marks = self.marks(tokenizer, text, kind);
                if !marks.is_empty() {
                    *text = with_marks(text, &marks, marker);
                }
            });
        }
        Ok(Some(marker))
    }

    /// Before which bytes of a string markers are needed, in order.
    fn marks(&self, tokenizer: &Tokenizer, text: &str, kind: Kind) -> Vec<usize> {
        if kind == Kind::Role && ROLES.contains(&text) {
            return Vec::new();
        }
        if !self.normalized.is_empty() && self.is_after_normalizing(tokenizer, text) {
            return text.char_indices().map(|(at, _)| at).collect();
        }
        let second = |at: usize| at + text[at..].chars().next().map_or(0, char::len_utf8);
        let inside = self.finder.find_overlapping_iter(text);
        let mut marks: Vec<usize> = inside.map(|found| second(found.start())).collect();
        // Templates trim.
        let trimmed = text.trim_end();
        let tail_from = trimmed.ceil_char_boundary(trimmed.len().saturating_sub(self.bytes_max));
        let tail = trimmed[tail_from..].to_ascii_lowercase();
        let begins = tail
            .char_indices()
            .filter(|(at, c)| self.firsts.contains(c) && self.beginnings.contains(&tail[*at..]));
        marks.extend(begins.map(|(at, _)| second(tail_from + at)));
        let trimmed = text.trim_start();
        let head = &trimmed[..trimmed.floor_char_boundary(self.bytes_max)];
        let head = head.to_ascii_lowercase();
        let rest_ends = head
            .char_indices()
            .filter(|(_, c)| self.lasts.contains(c))
            .map(|(at, c)| at + c.len_utf8());
        let is_rest = rest_ends
            .into_iter()
            .any(|end| self.rests.contains(&head[..end]));
        let is_within = || {
            let text = text.trim().to_ascii_lowercase();
            !text.is_empty()
                && text.len() < self.bytes_max
                && !text.contains('\n')
                && self.lines.contains(&text)
        };
        if is_rest || (matches!(kind, Kind::Role | Kind::Written) && is_within()) {
            marks.push(text.len() - trimmed.len());
        }
        marks.sort_unstable();
        marks.dedup();
        marks
    }

    /// Whether the normalizer makes the text of a control token of some of this. It needs many bytes for each of the text's, so it
    /// gets windows of it.
    fn is_after_normalizing(&self, tokenizer: &Tokenizer, text: &str) -> bool {
        const WINDOW_BYTES: usize = 16 << 10;
        // A character may become shorter by being normalized: four bytes to one.
        let overlap = 4 * self.bytes_max;
        (0..text.len()).step_by(WINDOW_BYTES).any(|from| {
            let window = text.floor_char_boundary(from)
                ..text.ceil_char_boundary(from + WINDOW_BYTES + overlap);
            let Some(normalized) = normalized(tokenizer, &text[window]) else {
                return false;
            };
            let mut controls = self.normalized.iter();
            controls.any(|control| normalized.contains(control))
        })
    }

    /// Token ids of a rendered text with markers: what the tokenizer itself would give without them, but that it takes no
    /// marked text for a control token.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        marker: char,
    ) -> Result<Vec<u32>, String> {
        self.try_encode(tokenizer, text, marker)
            .map_err(|error| format!("the text cannot be tokenised: {error}"))
    }

    // The steps of `Tokenizer::encode`, with one between the first and the second.
    fn try_encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        marker: char,
    ) -> tokenizers::Result<Vec<u32>> {
        let normalizer = tokenizer.get_normalizer();
        let added = tokenizer.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(normalizer, text);
        let spelled = marker_normalized(tokenizer, marker)?;
        pieces.normalize(|piece| {
            if spelled.chars().eq([marker]) {
                piece.filter(|c| c != marker);
            } else if !spelled.is_empty() {
                piece.replace(spelled.as_str(), "")?;
            }
            Ok(())
        })?;
        if let Some(splitter) = tokenizer.get_pre_tokenizer() {
            splitter.pre_tokenize(&mut pieces)?;
        }
        let model = tokenizer.get_model();
        pieces.tokenize(|word| {
            let is_marked = |offsets: (usize, usize)| {
                let range = word.convert_offsets(Range::Normalized(offsets.0..offsets.1));
                range
                    .and_then(|range| word.get_original().get(range))
                    .is_none_or(|text| text.contains(marker))
            };
            let mut tokens = Vec::new();
            for token in model.tokenize(word.get())? {
                match self.ids.contains(&token.id) && is_marked(token.offsets) {
                    false => tokens.push(token),
                    true => tokens.extend(self.by_characters(tokenizer, &token.value)?),
                }
            }
            Ok(tokens)
        })?;
        let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
        let tokens = splits
            .into_iter()
            .filter_map(|(_, _, tokens)| tokens.as_ref());
        Ok(tokens.flatten().map(|token| token.id).collect())
    }

    /// The tokens of a word's characters, where the model itself makes a control token of a marked word: some list them among
    /// their words.
    fn by_characters(
        &self,
        tokenizer: &Tokenizer,
        word: &str,
    ) -> tokenizers::Result<Vec<tokenizers::Token>> {
        let mut tokens = Vec::new();
        for c in word.chars() {
            tokens.extend(tokenizer.get_model().tokenize(c.encode_utf8(&mut [0; 4]))?);
        }
        match tokens.iter().find(|token| self.ids.contains(&token.id)) {
            Some(token) => Err(format!("{:?} is only a control token", token.value).into()),
            None => Ok(tokens),
        }
    }
}

/// `<|…|>` or `<｜…｜>`.
fn is_bracketed(text: &str) -> bool {
    let inside = |open, close| {
        text.strip_prefix(open)
            .and_then(|rest| rest.strip_suffix(close))
    };
    inside("<|", "|>")
        .or_else(|| inside("<｜", "｜>"))
        .is_some()
}

/// The text as the tokenizer's normalizer makes it; `None` without one.
fn normalized(tokenizer: &Tokenizer, text: &str) -> Option<String> {
    let mut text = NormalizedString::from(text);
    tokenizer.get_normalizer()?.normalize(&mut text).ok()?;
    Some(text.get().to_owned())
}

/// What the normalizer makes of a marker within a text.
fn marker_normalized(tokenizer: &Tokenizer, marker: char) -> tokenizers::Result<String> {
    let Some(text) = normalized(tokenizer, &format!("x{marker}x")) else {
        return Ok(marker.to_string());
    };
    match (text.find('x'), text.rfind('x')) {
        (Some(from), Some(to)) if from < to => Ok(text[from + 1..to].to_owned()),
        _ => Err("its normalizer takes letters away".into()),
    }
}

/// The text with the marker before each of these bytes.
fn with_marks(text: &str, marks: &[usize], marker: char) -> String {
    let mut out = String::with_capacity(text.len() + marks.len() * marker.len_utf8());
    let mut done = 0;
    for at in marks {
        out.push_str(&text[done..*at]);
        out.push(marker);
        done = *at;
    }
    out.push_str(&text[done..]);
    out
}

/// Whether any string of a value, keys included, is one that `is` picks.
fn any_string(value: &Value, kind: Kind, is: &mut impl FnMut(&str, Kind) -> bool) -> bool {
    match value {
        Value::String(text) => is(text, kind),
        Value::Array(list) => list.iter().any(|value| any_string(value, kind, is)),
        Value::Object(object) => object
            .iter()
            .any(|(key, value)| is(key, Kind::Other) || any_string(value, Kind::of(key), is)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Lets every string of a value, keys included, be changed.
fn change_strings(value: &mut Value, kind: Kind, change: &mut impl FnMut(&mut String, Kind)) {
    match value {
        Value::String(text) => change(text, kind),
        Value::Array(list) => {
            for value in list {
                change_strings(value, kind, change);
            }
        }
        Value::Object(object) => {
            for (mut key, mut value) in std::mem::take(object) {
                change_strings(&mut value, Kind::of(&key), change);
                change(&mut key, Kind::Other);
                object.insert(key, value);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod templates;
#[cfg(test)]
mod tests;
