//! Reasoning between two markers, at the beginning of the output.

use crate::calls::Calls;
use crate::lexer::{Mark, Symbol};
use crate::out::Out;

/// The markers of reasoning.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marks {
    open: &'static str,
    close: &'static str,
}

/// `<think>`.
pub(crate) const THINK: Marks = Marks {
    open: "<think>",
    close: "</think>",
};

/// `[THINK]`.
pub(crate) const MISTRAL: Marks = Marks {
    open: "[THINK]",
    close: "[/THINK]",
};

impl Marks {
    /// Both.
    pub fn all(self) -> [&'static str; 2] {
        [self.open, self.close]
    }
}

/// Tells reasoning from the rest, which goes to the format of the calls.
#[derive(Debug)]
pub(crate) struct Thinking {
    marks: Marks,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space came.
    Begin,
    /// The prompt opened it; the model may open it again.
    Opened,
    Inside,
    After,
}

impl Thinking {
    /// Before the first symbol.
    pub fn new(marks: Marks, is_opened: bool) -> Self {
        let state = match is_opened {
            true => State::Opened,
            false => State::Begin,
        };
        Self { marks, state }
    }

    /// Whether all that follows is the rest.
    pub fn is_over(&self) -> bool {
        self.state == State::After
    }

    /// Takes a symbol, or leaves it to others.
    pub fn push(&mut self, symbol: Symbol, out: &mut Out) -> Option<Symbol> {
        match symbol {
            Symbol::Mark(mark) => return self.mark(mark, out),
            Symbol::Char(c) if c.is_whitespace() => match self.state {
                State::Begin => out.content(c),
                State::Opened | State::Inside => out.reasoning(c),
                State::After => return Some(symbol),
            },
            Symbol::Char(c) => match self.state {
                State::Begin | State::After => {
                    self.state = State::After;
                    return Some(symbol);
                }
                State::Opened | State::Inside => {
                    self.state = State::Inside;
                    out.reasoning(c);
                }
            },
        }
        None
    }

    fn mark(&mut self, mark: Mark, out: &mut Out) -> Option<Symbol> {
        let opens = mark.text == self.marks.open;
        let closes = mark.text == self.marks.close;
        match self.state {
            State::Begin | State::Opened if opens => self.state = State::Inside,
            State::Opened | State::Inside if closes => self.state = State::After,
            // A call inside reasoning is talked about, not made.
            State::Opened | State::Inside => {
                self.state = State::Inside;
                for c in mark.shown().chars() {
                    out.reasoning(c);
                }
                return None;
            }
            State::Begin | State::After => {
                self.state = State::After;
                return Some(Symbol::Mark(mark));
            }
        }
        out.mark();
        None
    }

    /// Whether a marker is one of these, which say nothing to the format of the calls.
    pub fn is_own(&self, mark: Mark) -> bool {
        self.marks.all().contains(&mark.text)
    }
}

/// What is left of a marker of reasoning that marks none: its text.
pub(crate) fn as_text(mark: Mark, calls: &mut Option<Box<dyn Calls>>, out: &mut Out) {
    for c in mark.shown().chars() {
        match calls {
            Some(calls) => calls.push(Symbol::Char(c), out),
            None => out.content(c),
        }
    }
}
