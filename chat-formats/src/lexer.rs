//! Text to symbols: characters and markers.

use crate::event::Piece;

/// What the parsers read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Symbol {
    /// A character of the text.
    Char(char),
    /// A marker of the format.
    Mark(Mark),
}

/// A marker, as one special token or spelled in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Its text.
    pub text: &'static str,
    /// Whether it was a special token. Where such a one has no meaning it is dropped, not shown.
    pub special: bool,
}

impl Mark {
    /// Its text as the client sees it where it marks nothing.
    pub fn shown(self) -> &'static str {
        match self.special {
            true => "",
            false => self.text,
        }
    }
}

/// Finds markers across the ends of pieces. It works on one character at a time, so how the text was cut cannot matter.
#[derive(Debug)]
pub(crate) struct Lexer {
    marks: Vec<&'static str>,
    /// The beginning of a marker, or of several: shorter than the longest.
    held: String,
}

impl Lexer {
    /// A lexer for these markers. None of them begins another.
    pub fn new(marks: Vec<&'static str>) -> Self {
        debug_assert!(marks.iter().enumerate().all(|(i, one)| {
            let mut others = marks.iter().enumerate();
            !one.is_empty() && others.all(|(j, other)| i == j || !other.starts_with(one))
        }));
        Self {
            marks,
            held: String::new(),
        }
    }

    /// Takes a piece; `symbol` gets what is certain.
    pub fn push(&mut self, piece: Piece<'_>, symbol: &mut impl FnMut(Symbol)) {
        if piece.special {
            // A marker is not put together of a token and text.
            self.finish(symbol);
            let known = self.marks.iter().find(|mark| **mark == piece.text);
            if let Some(text) = known {
                let special = true;
                symbol(Symbol::Mark(Mark { text, special }));
            }
            return;
        }
        for c in piece.text.chars() {
            self.push_char(c, symbol);
        }
    }

    /// The text is over: what was held is no marker.
    pub fn finish(&mut self, symbol: &mut impl FnMut(Symbol)) {
        for c in std::mem::take(&mut self.held).chars() {
            symbol(Symbol::Char(c));
        }
    }

    fn push_char(&mut self, c: char, symbol: &mut impl FnMut(Symbol)) {
        if self.held.is_empty() && !self.marks.iter().any(|mark| mark.starts_with(c)) {
            return symbol(Symbol::Char(c));
        }
        self.held.push(c);
        while let Some(first) = self.held.chars().next() {
            let mut begun = self
                .marks
                .iter()
                .filter(|mark| mark.starts_with(&self.held));
            if let Some(text) = begun.next() {
                if text.len() == self.held.len() {
                    let special = false;
                    symbol(Symbol::Mark(Mark { text, special }));
                    self.held.clear();
                }
                return;
            }
            symbol(Symbol::Char(first));
            self.held.drain(..first.len_utf8());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn symbols(pieces: &[Piece<'_>]) -> Vec<Symbol> {
        let mut lexer = Lexer::new(vec!["<a>", "<ab>", "<<", "é]"]);
        let mut all = Vec::new();
        for piece in pieces {
            lexer.push(*piece, &mut |symbol| all.push(symbol));
        }
        lexer.finish(&mut |symbol| all.push(symbol));
        all
    }

    fn mark(text: &'static str, special: bool) -> Symbol {
        Symbol::Mark(Mark { text, special })
    }

    #[test]
    fn special_tokens_are_markers_or_nothing() {
        let pieces = [
            Piece::text("<a"),
            Piece::special("<a>"),
            Piece::special("<eos>"),
            Piece::text("><ab>"),
        ];
        let expected = [
            Symbol::Char('<'),
            Symbol::Char('a'),
            mark("<a>", true),
            Symbol::Char('>'),
            mark("<ab>", false),
        ];
        assert_eq!(symbols(&pieces), expected);
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_and_all_of_it(text in "[<>abé\\]]{0,24}", cut in 1usize..5) {
            let chars: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = chars.chunks(cut).map(|piece| piece.iter().collect()).collect();
            let pieces: Vec<Piece<'_>> = pieces.iter().map(|piece| Piece::text(piece)).collect();
            let found = symbols(&pieces);
            prop_assert_eq!(&found, &symbols(&[Piece::text(&text)]));
            let mut joined = String::new();
            for symbol in found {
                match symbol {
                    Symbol::Char(c) => joined.push(c),
                    Symbol::Mark(mark) => joined.push_str(mark.text),
                }
            }
            prop_assert_eq!(joined, text);
        }
    }
}
