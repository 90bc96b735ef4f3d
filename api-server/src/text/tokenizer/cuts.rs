//! Where a text may be cut so that its pieces, tokenised one by one, give the very tokens of the whole.
//!
//! A cut lies between two characters, `before` and `after`. It is sound if the tokenizer always splits there before its model
//! sees the text, and if nothing on one side depends on the other. Both are derived from the tokenizer's own patterns, each
//! read as a set of strings:
//!
//! - no string of any pattern holds `before` followed by `after`, so no match reaches over the cut, and a search that stands
//!   at the cut finds what it would find in the right piece alone: patterns that look back are not cut at all, and the one
//!   that looks ahead, `\s+(?!\S)`, looks at the character after a space, which `before` never is;
//! - one pattern has `after` alone among its strings: a search that stands at the cut matches there, so it is a boundary, and
//!   patterns that come later see two pieces.
//!
//! An added token is found before all that. None that holds `before` followed by `after`, or takes in spaces or words
//! around it, is allowed.

use regex_syntax::Parser;
use regex_syntax::hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind};
use serde_json::Value;

/// Bytes of one piece, if there is a cut within: its work takes some ten milliseconds and some ten megabytes.
pub const PIECE_BYTES: usize = 64 << 10;

/// Longest text without a cut. The tokenizers crate takes some 210 bytes of memory for each of these.
pub const UNCUT_BYTES_MAX: usize = 512 << 10;

/// The pattern of GPT-2, which `ByteLevel` has built in.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The only way to look ahead that is understood.
const LOOKAHEAD: &str = r"\s+(?!\S)";

/// Characters that a piece may begin with.
const AFTER: &str = " \n\t,.;:!?\"#$%&()*+-/<=>@[]_`{|}~0123456789，。、；：！？…「」（）《》“”";

/// What a piece may end with, each the larger the better. Not a noncharacter: one may be a marker, which is taken out of the text
/// before it is split (`control_tokens`).
const BEFORE: [&str; 4] = [
    r"[\S&&[^\x{FDD0}-\x{FDEF}]]",
    r"[\p{L}\p{N}]",
    r"\p{L}",
    r"\p{N}",
];

/// Where texts may be cut: characters that a piece may begin with, and those that must stand before it.
#[derive(Debug, Default)]
pub struct Cuts {
    places: Vec<(char, ClassUnicode)>,
}

impl Cuts {
    /// The cuts of a tokenizer; `json` is its `tokenizer.json`. None where no cut can be shown to be sound.
    pub fn new(json: &Value) -> Self {
        let Some(stages) = Stages::of(json) else {
            return Self::default();
        };
        let befores = BEFORE.map(class);
        let places = AFTER.chars().filter_map(|after| {
            let sound = |before: &&ClassUnicode| stages.cut(before, after);
            let before = befores.iter().flatten().find(sound)?;
            Some((after, before.clone()))
        });
        Self {
            places: places.collect(),
        }
    }

    /// Whether texts may be cut at all.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Bytes of the first piece of a text.
    ///
    /// # Errors
    /// If there is no cut within [`UNCUT_BYTES_MAX`].
    pub fn piece(&self, text: &str) -> Result<usize, Uncut> {
        if text.len() <= PIECE_BYTES {
            return Ok(text.len());
        }
        let middle = text.floor_char_boundary(PIECE_BYTES);
        let most = text.floor_char_boundary(UNCUT_BYTES_MAX);
        let before = text[..middle].char_indices().rev();
        let last = before
            .map(|(at, _)| at)
            .take_while(|at| *at > 0)
            .find(|at| self.allows(text, *at));
        let cut = last.or_else(|| {
            let after = text[middle..most].char_indices();
            let mut after = after.map(|(at, _)| middle + at);
            after.find(|at| self.allows(text, *at))
        });
        match cut {
            Some(at) => Ok(at),
            None if text.len() <= UNCUT_BYTES_MAX => Ok(text.len()),
            None => Err(Uncut),
        }
    }

    fn allows(&self, text: &str, at: usize) -> bool {
        let Some(after) = text[at..].chars().next() else {
            return false;
        };
        let Some((_, allowed)) = self.places.iter().find(|(c, _)| *c == after) else {
            return false;
        };
        text[..at]
            .chars()
            .next_back()
            .is_some_and(|before| holds(allowed, before))
    }
}

/// A text has no cut for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uncut;

/// What splits a text before the model sees it.
struct Stages {
    patterns: Vec<Pattern>,
    added: Vec<String>,
}

/// One pattern of it, twice: with what only sometimes matches, because it looks ahead, and without.
struct Pattern {
    all: Hir,
    always: Hir,
}

impl Stages {
    fn of(json: &Value) -> Option<Self> {
        let model = &json["model"];
        let is_bpe = model["type"] == "BPE" || model["merges"].is_array();
        let dropout = model["dropout"].as_f64().unwrap_or(0.0);
        // What shortens, pads or alters each text as a whole would do so to each piece.
        let plain = json["truncation"].is_null() && json["padding"].is_null();
        // Composes a letter and its marks, of which a cut parts none.
        let normalizer = &json["normalizer"];
        let normalized = normalizer.is_null() || normalizer["type"] == "NFC";
        if !is_bpe || dropout > 0.0 || !plain || !normalized {
            return None;
        }
        let mut added = Vec::new();
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let wide = ["lstrip", "rstrip", "single_word"];
            if wide.iter().any(|name| token[name] == true) {
                return None;
            }
            added.push(token["content"].as_str()?.to_owned());
        }
        let mut patterns = Vec::new();
        collect(&json["pre_tokenizer"], &mut patterns, &mut false)?;
        Some(Self { patterns, added })
    }

    /// Whether every cut between one of `before` and `after` is sound.
    fn cut(&self, before: &ClassUnicode, after: char) -> bool {
        let pairs = |content: &str| {
            let pairs = content.chars().zip(content.chars().skip(1));
            pairs
                .into_iter()
                .any(|(b, a)| a == after && holds(before, b))
        };
        if self.added.iter().any(|content| pairs(content)) {
            return false;
        }
        let next = ClassUnicode::new([ClassUnicodeRange::new(after, after)]);
        for pattern in &self.patterns {
            match strings(&pattern.all, before, &next) {
                Some(strings) if !strings.joined && !strings.empty => {}
                _ => return false,
            }
            let always = strings(&pattern.always, before, &next);
            if always.is_some_and(|strings| holds(&strings.single, after)) {
                // What comes after this stage sees two pieces, whichever way they came to be.
                return true;
            }
        }
        false
    }
}

/// The patterns of a pre-tokenizer. None if there is something else in it, or something after bytes were `spelled` as characters:
/// it would not see the text as it was.
fn collect(stage: &Value, patterns: &mut Vec<Pattern>, spelled: &mut bool) -> Option<()> {
    if *spelled {
        return None;
    }
    match stage["type"].as_str()? {
        "Sequence" => {
            let stages = stage["pretokenizers"].as_array()?;
            let mut stages = stages.iter();
            stages.try_for_each(|stage| collect(stage, patterns, spelled))
        }
        "ByteLevel" => {
            // A space before each piece that has none.
            if stage["add_prefix_space"] != false {
                return None;
            }
            if stage["use_regex"] != false {
                patterns.push(Pattern::new(GPT2)?);
            }
            *spelled = true;
            Some(())
        }
        "Digits" => {
            let digits = match stage["individual_digits"] == true {
                true => r"\p{N}",
                false => r"\p{N}+",
            };
            patterns.push(Pattern::new(digits)?);
            Some(())
        }
        "Split" => {
            let matches_stay = stage["behavior"] == "Isolated" && stage["invert"] != true;
            let only_matches = stage["behavior"] == "Removed" && stage["invert"] == true;
            if !matches_stay && !only_matches {
                return None;
            }
            let pattern = match &stage["pattern"] {
                pattern if pattern["Regex"].is_string() => pattern["Regex"].as_str()?.to_owned(),
                pattern => regex_syntax::escape(pattern["String"].as_str()?),
            };
            patterns.push(Pattern::new(&pattern)?);
            Some(())
        }
        _ => None,
    }
}

impl Pattern {
    fn new(pattern: &str) -> Option<Self> {
        // What takes all it can and gives nothing back may take more before a cut than after it.
        if is_possessive(pattern) || pattern.contains(r"\|") {
            return None;
        }
        let all = pattern.replace(LOOKAHEAD, r"\s+");
        // Only as an alternative of its own can it be left out.
        let mut always = pattern.replace(&format!("|{LOOKAHEAD}|"), "|");
        if let Some(rest) = always.strip_prefix(&format!("{LOOKAHEAD}|")) {
            always = rest.to_owned();
        }
        if let Some(rest) = always.strip_suffix(&format!("|{LOOKAHEAD}")) {
            always = rest.to_owned();
        }
        // The parser knows no other way to look ahead, nor one to look back.
        Some(Self {
            all: Parser::new().parse(&all).ok()?,
            always: Parser::new().parse(&always).ok()?,
        })
    }
}

/// Whether a pattern has a repetition that gives nothing back, such as `\s++`; a sign inside a class is none.
fn is_possessive(pattern: &str) -> bool {
    let mut chars = pattern.chars().peekable();
    let (mut depth, mut repeated) = (0_usize, false);
    while let Some(c) = chars.next() {
        let was_repeated = std::mem::take(&mut repeated);
        match c {
            '\\' => {
                let named = matches!(chars.next(), Some('p' | 'P' | 'x' | 'u'));
                if named && chars.peek() == Some(&'{') {
                    // The braces of a name are no repetition.
                    chars.by_ref().take_while(|c| *c != '}').for_each(drop);
                }
            }
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            '+' if depth == 0 && was_repeated => return true,
            '*' | '+' | '?' | '}' => repeated = depth == 0,
            _ => {}
        }
    }
    false
}

/// What is asked of a set of strings.
struct Strings {
    first: ClassUnicode,
    last: ClassUnicode,
    /// Strings of one character.
    single: ClassUnicode,
    /// The empty string is one of them.
    empty: bool,
    /// A string has a character of `before` followed by one of `after`, or may have.
    joined: bool,
}

impl Strings {
    fn none() -> Self {
        Self {
            first: ClassUnicode::empty(),
            last: ClassUnicode::empty(),
            single: ClassUnicode::empty(),
            empty: false,
            joined: false,
        }
    }

    fn only_empty() -> Self {
        Self {
            empty: true,
            ..Self::none()
        }
    }

    fn character(class: &ClassUnicode) -> Self {
        Self {
            first: class.clone(),
            last: class.clone(),
            single: class.clone(),
            ..Self::none()
        }
    }

    /// Each of these followed by each of `next`.
    fn then(mut self, next: Self, before: &ClassUnicode, after: &ClassUnicode) -> Self {
        self.joined |= next.joined || meet(&self.last, before) && meet(&next.first, after);
        let mut single = ClassUnicode::empty();
        if next.empty {
            single.union(&self.single);
        }
        if self.empty {
            single.union(&next.single);
            self.first.union(&next.first);
        }
        let mut last = next.last;
        if next.empty {
            last.union(&self.last);
        }
        Self {
            last,
            single,
            empty: self.empty && next.empty,
            ..self
        }
    }

    fn or(mut self, other: Self) -> Self {
        self.first.union(&other.first);
        self.last.union(&other.last);
        self.single.union(&other.single);
        self.empty |= other.empty;
        self.joined |= other.joined;
        self
    }
}

/// The strings of a pattern. None if it looks around itself.
fn strings(hir: &Hir, before: &ClassUnicode, after: &ClassUnicode) -> Option<Strings> {
    let parts = |parts: &[Hir]| -> Option<Vec<Strings>> {
        let parts = parts.iter().map(|part| strings(part, before, after));
        parts.collect()
    };
    Some(match hir.kind() {
        HirKind::Empty => Strings::only_empty(),
        HirKind::Literal(literal) => {
            let text = std::str::from_utf8(&literal.0).ok()?;
            text.chars().fold(Strings::only_empty(), |so_far, c| {
                let class = ClassUnicode::new([ClassUnicodeRange::new(c, c)]);
                so_far.then(Strings::character(&class), before, after)
            })
        }
        HirKind::Class(Class::Unicode(class)) => Strings::character(class),
        HirKind::Class(Class::Bytes(class)) => Strings::character(&class.to_unicode_class()?),
        HirKind::Look(_) => return None,
        HirKind::Repetition(repetition) => {
            let mut once = strings(&repetition.sub, before, after)?;
            if repetition.max != Some(1) {
                once.joined |= meet(&once.last, before) && meet(&once.first, after);
            }
            if repetition.min > 1 && !once.empty {
                once.single = ClassUnicode::empty();
            }
            once.empty |= repetition.min == 0;
            once
        }
        HirKind::Capture(capture) => strings(&capture.sub, before, after)?,
        HirKind::Concat(list) => parts(list)?
            .into_iter()
            .fold(Strings::only_empty(), |so_far, next| {
                so_far.then(next, before, after)
            }),
        HirKind::Alternation(list) => parts(list)?.into_iter().fold(Strings::none(), Strings::or),
    })
}

fn class(pattern: &str) -> Option<ClassUnicode> {
    match Parser::new().parse(pattern).ok()?.into_kind() {
        HirKind::Class(Class::Unicode(class)) => Some(class),
        _ => None,
    }
}

fn meet(one: &ClassUnicode, other: &ClassUnicode) -> bool {
    let mut both = one.clone();
    both.intersect(other);
    !both.ranges().is_empty()
}

fn holds(class: &ClassUnicode, c: char) -> bool {
    let ranges = class.ranges();
    let after = ranges.partition_point(|range| range.end() < c);
    ranges.get(after).is_some_and(|range| range.start() <= c)
}

#[cfg(test)]
mod tests;
