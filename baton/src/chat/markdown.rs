//! Markdown on a terminal, as it comes: bold, italics, code, lists, headings, quotes, blocks of code.
//!
//! Text comes in pieces that are cut anywhere. What may still become a mark is held back until that is known, at the end of its line at
//! the latest and never longer than [`HELD_MAX`] bytes. What turns out to be no mark is shown as it was written: nothing of a text is
//! lost but marks that took effect. What could steer the terminal is dropped: a model may write anything.

/// What is held back at most, in bytes; longer marks are shown as they were written.
const HELD_MAX: usize = 1024;

const RESET: &str = "\x1b[0m";
const DIM: &str = "\x1b[2m";
const CODE: &str = "\x1b[36m";
const HEADING: &str = "\x1b[1;4m";

/// Turns Markdown into what a terminal shows.
#[derive(Debug, Default)]
pub struct Markdown {
    /// Of the current line, what is not shown yet.
    held: String,
    /// What stands before that.
    before: Option<char>,
    line: Line,
    /// The marks that began a block of code, which ends it.
    fence: Option<String>,
}

/// What the current line is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Line {
    /// Nothing of it was shown: it may be anything.
    #[default]
    Begins,
    Text,
    Heading,
    /// Of a block of code.
    Code,
}

/// How a stretch of text is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Style {
    is_heading: bool,
    is_bold: bool,
    is_italic: bool,
}

impl Markdown {
    /// What is to be shown after these further bytes of the text.
    pub fn push(&mut self, text: &str) -> String {
        let mut out = String::new();
        for char in text.chars() {
            match char {
                '\n' => {
                    self.show(true, &mut out);
                    if self.line == Line::Heading {
                        out.push_str(RESET);
                    }
                    out.push('\n');
                    (self.line, self.before) = (Line::Begins, None);
                }
                '\t' => self.held.push(char),
                char if char.is_control() => {}
                char => self.held.push(char),
            }
        }
        self.show(false, &mut out);
        out
    }

    /// What is left at the end of the text.
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        self.show(true, &mut out);
        if self.line == Line::Heading {
            out.push_str(RESET);
        }
        *self = Self::default();
        out
    }

    /// Shows what is known of the line; all of it if this is its end.
    fn show(&mut self, is_whole: bool, out: &mut String) {
        let is_whole = is_whole || self.held.len() > HELD_MAX;
        if self.line == Line::Begins && !self.begin(is_whole, out) {
            return;
        }
        let held = std::mem::take(&mut self.held);
        let style = Style {
            is_heading: self.line == Line::Heading,
            ..Style::default()
        };
        match self.line {
            Line::Code if held.is_empty() => {}
            Line::Code => {
                out.push_str(CODE);
                out.push_str(&held);
                out.push_str(RESET);
            }
            Line::Begins | Line::Text | Line::Heading => {
                let shown = inline(&held, self.before, style, is_whole, out);
                self.before = held[..shown].chars().next_back().or(self.before);
                self.held.push_str(&held[shown..]);
            }
        }
    }

    /// Takes the marks at the beginning of a line. False if it is not known yet what it is.
    fn begin(&mut self, is_whole: bool, out: &mut String) -> bool {
        let text = self.held.trim_start_matches(' ');
        let indent = self.held.len() - text.len();
        if let Some(fence) = fence(text) {
            if !is_whole {
                return false;
            }
            let ends = match &self.fence {
                Some(began) => fence.starts_with(began.as_str()) && text.trim_end() == fence,
                // A line of text may begin with code.
                None => !text[fence.len()..].contains('`'),
            };
            if ends {
                self.fence = match self.fence.take() {
                    Some(_) => None,
                    None => Some(fence.to_owned()),
                };
                *out += &format!("{DIM}{}{RESET}", self.held);
                self.held.clear();
                self.line = Line::Text;
                return true;
            }
        }
        let may_be_fence = ["", "`", "``", "~", "~~"].contains(&text);
        if self.fence.is_some() {
            let is_known = is_whole || !may_be_fence;
            if is_known {
                self.line = Line::Code;
            }
            return is_known;
        }
        if !is_whole && (may_be_fence || may_be_mark(text)) {
            return false;
        }
        self.line = Line::Text;
        let spaces = " ".repeat(indent);
        let hashes = text.bytes().take_while(|&byte| byte == b'#').count();
        if is_whole && is_rule(text) {
            *out += &format!("{DIM}{}{RESET}", "─".repeat(40));
            self.held.clear();
        } else if (1..=6).contains(&hashes) && text[hashes..].starts_with(' ') {
            self.line = Line::Heading;
            out.push_str(HEADING);
            self.held = text[hashes + 1..].to_owned();
        } else if let Some(rest) = ["- ", "* ", "+ "]
            .iter()
            .find_map(|mark| text.strip_prefix(mark))
        {
            *out += &format!("{spaces}• ");
            self.held = rest.to_owned();
        } else if let Some(rest) = text.strip_prefix("> ") {
            *out += &format!("{spaces}{DIM}│{RESET} ");
            self.held = rest.to_owned();
        }
        true
    }
}

/// Three marks or more of a block of code, if the line begins with them.
fn fence(text: &str) -> Option<&str> {
    let mark = text.bytes().next().filter(|mark| b"`~".contains(mark))?;
    let marks = text.bytes().take_while(|&byte| byte == mark).count();
    (marks >= 3).then(|| &text[..marks])
}

/// Whether more of the line has to come to know what it is.
fn may_be_mark(text: &str) -> bool {
    let is_heading_so_far = text.len() <= 6 && is_all(text, "#");
    is_heading_so_far || ["-", "*", "+", ">"].contains(&text) || is_marks(text) || is_rule(text)
}

/// A line across.
fn is_rule(text: &str) -> bool {
    let text = text.trim_end_matches(' ');
    text.len() >= 3 && is_marks(text)
}

fn is_marks(text: &str) -> bool {
    ["-", "*", "_"].iter().any(|mark| is_all(text, mark))
}

fn is_all(text: &str, mark: &str) -> bool {
    text.chars().all(|char| mark.contains(char))
}

impl Style {
    fn codes(self) -> String {
        let mut codes = String::from(RESET);
        for (is_set, code) in [
            (self.is_heading, HEADING),
            (self.is_bold, "\x1b[1m"),
            (self.is_italic, "\x1b[3m"),
        ] {
            if is_set {
                codes.push_str(code);
            }
        }
        codes
    }
}

/// Shows text that stands after `before` with the marks in it, and gives how much of it: where it is not the whole line, marks that have no
/// end yet are left.
fn inline(
    text: &str,
    before: Option<char>,
    style: Style,
    is_whole: bool,
    out: &mut String,
) -> usize {
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let Some(found) = rest.find(['\\', '`', '*', '_']) else {
            out.push_str(rest);
            return text.len();
        };
        out.push_str(&rest[..found]);
        at += found;
        let rest = &text[at..];
        if let Some(escaped) = rest.strip_prefix('\\') {
            match escaped.chars().next() {
                None if !is_whole => return at,
                Some(char) if char.is_ascii_punctuation() => {
                    out.push(char);
                    at += 2;
                }
                _ => {
                    out.push('\\');
                    at += 1;
                }
            }
            continue;
        }
        let before = text[..at].chars().next_back().or(before);
        match span(text, at, before, is_whole) {
            Span::Ends(marks, end) => {
                let inner = &text[at + marks..end];
                if rest.starts_with('`') {
                    out.push_str(CODE);
                    out.push_str(inner);
                } else {
                    let inner_style = Style {
                        is_bold: style.is_bold || marks >= 2,
                        is_italic: style.is_italic || marks != 2,
                        ..style
                    };
                    out.push_str(&inner_style.codes());
                    inline(inner, None, inner_style, true, out);
                }
                out.push_str(&style.codes());
                at = end + marks;
            }
            Span::Open(_) if !is_whole => return at,
            Span::Open(marks) | Span::Plain(marks) => {
                out.push_str(&rest[..marks]);
                at += marks;
            }
        }
    }
    text.len()
}

/// What a run of marks begins.
enum Span {
    /// So many marks, and where those that end it begin.
    Ends(usize, usize),
    /// So many marks, whose end is not there.
    Open(usize),
    /// So many marks that mean nothing.
    Plain(usize),
}

fn span(text: &str, at: usize, before: Option<char>, is_whole: bool) -> Span {
    let bytes = text.as_bytes();
    let mark = bytes[at];
    let run = |from: usize| {
        let same = bytes[from..]
            .iter()
            .take_while(|&&byte| byte == bytes[from]);
        same.count()
    };
    let marks = run(at);
    let after = text[at + marks..].chars().next();
    let is_code = mark == b'`';
    // Names are made of `_`, and sums and globs of `*`.
    let is_in_word = |beside: Option<char>| {
        beside.is_some_and(char::is_alphanumeric) && (mark == b'_' || marks == 1)
    };
    let Some(after) = after else {
        return Span::Open(marks);
    };
    if !is_code && (marks > 3 || after.is_whitespace() || is_in_word(before)) {
        return Span::Plain(marks);
    }
    let limit = bytes.len().min(at + HELD_MAX);
    let mut from = at + marks;
    while from < limit {
        let close = from;
        let closing = run(close);
        from += closing;
        match bytes[close] {
            // What is in code is no mark.
            b'`' if !is_code => match code_end(bytes, close, closing, limit) {
                Some(end) if end < bytes.len() || is_whole => from = end,
                // What follows may be code, or more of its marks.
                _ if !is_whole => return Span::Open(marks),
                _ => {}
            },
            byte if byte == mark => {
                // More of it may come, or what makes it part of a word.
                if from == bytes.len() && !is_whole {
                    return Span::Open(marks);
                }
                // `**a *b***` ends both.
                let inner_marks = match closing {
                    _ if closing == marks => 0,
                    3 if !is_code && marks < 3 => 3 - marks,
                    _ => continue,
                };
                let (inner, follows) = around(text, close, from);
                let is_no_end = inner.is_some_and(|inner| inner.is_whitespace() || inner == '\\');
                if is_code || !is_no_end && !is_in_word(follows) {
                    return Span::Ends(marks, close + inner_marks);
                }
            }
            _ => {}
        }
    }
    Span::Open(marks)
}

/// Where code ends that these marks begin.
fn code_end(bytes: &[u8], at: usize, marks: usize, limit: usize) -> Option<usize> {
    let mut from = at + marks;
    while from < limit {
        let closing = bytes[from..]
            .iter()
            .take_while(|&&byte| byte == b'`')
            .count();
        match closing {
            0 => from += 1,
            closing if closing == marks => return Some(from + closing),
            closing => from += closing,
        }
    }
    None
}

/// The characters before `from` and at `to`.
fn around(text: &str, from: usize, to: usize) -> (Option<char>, Option<char>) {
    (text[..from].chars().next_back(), text[to..].chars().next())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Shown in pieces of so many characters, without what only their bounds make.
    fn shown(text: &str, piece: usize) -> String {
        let mut markdown = Markdown::default();
        let chars: Vec<char> = text.chars().collect();
        let mut out = String::new();
        for piece in chars.chunks(piece) {
            out += &markdown.push(&piece.iter().collect::<String>());
        }
        out += &markdown.finish();
        out.replace(&format!("{RESET}{CODE}"), "")
    }

    /// With names for what a terminal would do.
    fn named(text: &str) -> String {
        let mut text = shown(text, 1 << 20);
        for (code, name) in [
            (RESET, "</>"),
            (HEADING, "<h>"),
            (DIM, "<dim>"),
            (CODE, "<code>"),
            ("\x1b[1m", "<b>"),
            ("\x1b[3m", "<i>"),
        ] {
            text = text.replace(code, name);
        }
        text
    }

    #[test]
    fn marks_are_shown_as_what_they_mean() {
        for (written, meant) in [
            ("plain text", "plain text"),
            ("a **b** c", "a </><b>b</> c"),
            ("*i* and _i_", "</><i>i</> and </><i>i</>"),
            ("***both***", "</><b><i>both</>"),
            ("**a *b* c**", "</><b>a </><b><i>b</><b> c</>"),
            ("**a *b***", "</><b>a </><b><i>b</><b></>"),
            ("use `a*b*c` so", "use <code>a*b*c</> so"),
            ("``a ` b``", "<code>a ` b</>"),
            ("*a `*` b*", "</><i>a <code>*</><i> b</>"),
            ("# Title `x`\ntext", "<h>Title <code>x</><h></>\ntext"),
            ("- one\n  * two\n1. three", "• one\n  • two\n1. three"),
            ("> said", "<dim>│</> said"),
            (
                "```rust\nlet a = *b;\n```\nend",
                "<dim>```rust</>\n<code>let a = *b;</>\n<dim>```</>\nend",
            ),
            ("~~~\n```\n~~~", "<dim>~~~</>\n<code>```</>\n<dim>~~~</>"),
            (r"\*a\* \n", r"*a* \n"),
        ] {
            assert_eq!(named(written), meant, "{written:?}");
        }
        assert!(named("---\n").starts_with("<dim>──"));
    }

    #[test]
    fn what_is_no_mark_is_shown_as_it_is() {
        for text in [
            "2 * 3 * 4",
            "2*3*4",
            "ls *.rs",
            "snake_case_name",
            "**no end",
            "`no end\nnext line",
            "#hashtag",
            "####### seven",
            "-no list",
            ">no quote",
            "a ** b ** c",
            "--",
            "ends with \\",
        ] {
            assert_eq!(shown(text, 1 << 20), text, "{text:?}");
        }
    }

    #[test]
    fn nothing_that_steers_a_terminal_gets_through() {
        let out = shown("a\x1b[2Jb\x07c\u{9b}31md\re\tf", 1);
        assert_eq!(out, "a[2Jbc31mde\tf");
    }

    #[test]
    fn what_is_held_back_is_bounded() {
        let mut markdown = Markdown::default();
        let mut out = markdown.push("**");
        for _ in 0..HELD_MAX {
            out += &markdown.push("ab");
            assert!(markdown.held.len() <= HELD_MAX + 2);
        }
        assert!(out.starts_with("**abab"), "{out}");
        // Text without marks is shown at once.
        let mut markdown = Markdown::default();
        assert_eq!(markdown.push("Hel"), "Hel");
        assert_eq!(markdown.push("lo **wo"), "lo ");
        assert_eq!(markdown.push("rld** "), "\x1b[0m\x1b[1mworld\x1b[0m ");
    }

    proptest! {
        #[test]
        fn text_may_be_cut_anywhere(text in "[ab *_`#>~\\\\\n-]{0,40}", piece in 1_usize..5) {
            prop_assert_eq!(shown(&text, piece), shown(&text, 1 << 20));
        }
    }
}
