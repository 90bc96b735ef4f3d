//! `[NAME(KEY=VALUE, …), …]`: the answer is a Python list of calls and nothing else.
//!
//! A call is translated when all of it is there: what its text means shows only then. Without `<|python_start|>` only tools that were
//! offered are called, and only from the beginning of the answer.

use std::sync::Arc;

use super::Calls;
use crate::HELD_BYTES_MAX;
use crate::lexer::{Mark, Symbol};
use crate::literal;
use crate::out::Out;
use crate::tool::Tools;

const OPEN: &str = "<|python_start|>";
const CLOSE: &str = "<|python_end|>";

/// The markers.
pub(crate) const MARKS: [&str; 2] = [OPEN, CLOSE];

/// The state machine.
#[derive(Debug)]
pub(crate) struct Pythonic {
    tools: Arc<Tools>,
    is_marked: bool,
    state: State,
    /// What is content if no call follows.
    held: String,
    /// From where on in it the call stands.
    call_from: usize,
    brackets: usize,
    string: Quoted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the answer's first character.
    Begin,
    /// Before the list.
    List,
    /// Before a name, or at once the end.
    Item {
        may_end: bool,
    },
    Name,
    Arguments,
    /// After a call.
    Between,
    /// After the list.
    Close,
    Text,
}

/// Where in a string one is.
#[derive(Clone, Copy, Debug, Default)]
struct Quoted {
    quote: Option<char>,
    escaped: bool,
}

impl Quoted {
    /// Whether this character belongs to a string, its quotes included.
    fn push(&mut self, c: char) -> bool {
        match self.quote {
            None => {
                self.quote = matches!(c, '"' | '\'').then_some(c);
                return self.quote.is_some();
            }
            Some(_) if self.escaped => self.escaped = false,
            Some(_) if c == '\\' => self.escaped = true,
            Some(quote) if c == quote => self.quote = None,
            Some(_) => {}
        }
        true
    }
}

impl Pythonic {
    /// Before the first symbol.
    pub fn new(tools: Arc<Tools>) -> Self {
        Self {
            tools,
            is_marked: false,
            state: State::Begin,
            held: String::new(),
            call_from: 0,
            brackets: 0,
            string: Quoted::default(),
        }
    }

    fn mark(&mut self, mark: Mark, out: &mut Out) {
        if self.state == State::Arguments && self.string.quote.is_some() && !mark.special {
            self.held.push_str(mark.text);
            return;
        }
        let closes = self.state == State::Close && mark.text == CLOSE;
        self.leave(out);
        match mark.text {
            OPEN => {
                self.is_marked = true;
                self.held.push_str(mark.shown());
                self.state = State::List;
            }
            _ if closes => out.mark(),
            _ => out.contents(mark.shown()),
        }
    }

    fn char(&mut self, c: char, out: &mut Out) {
        match self.state {
            State::Text => return out.content(c),
            State::Begin if c.is_whitespace() => return out.content(c),
            State::Close if c.is_whitespace() => return out.content(c),
            _ => {}
        }
        self.held.push(c);
        let is_over = self.held.len() > HELD_BYTES_MAX;
        let next = match self.state {
            _ if is_over => None,
            State::Begin | State::List if c == '[' => Some(State::Item { may_end: true }),
            State::Arguments => self.argument(c, out),
            State::Name if c == '(' => {
                let name = self.held[self.call_from..self.held.len() - 1].trim();
                let is_call = self.is_marked || self.tools.find(name).is_some();
                (self.brackets, self.string) = (1, Quoted::default());
                is_call.then_some(State::Arguments)
            }
            State::Name if literal::is_in_name(c) => Some(State::Name),
            state if c.is_whitespace() => Some(state),
            State::Item { .. } if c.is_alphabetic() || c == '_' => {
                self.call_from = self.held.len() - c.len_utf8();
                Some(State::Name)
            }
            State::Item { may_end: false } | State::Between if c == ']' => {
                self.held.clear();
                Some(State::Close)
            }
            State::Between if c == ',' => Some(State::Item { may_end: false }),
            _ => None,
        };
        match next {
            Some(state) => self.state = state,
            None => self.leave(out),
        }
    }

    /// A character inside the brackets of a call.
    fn argument(&mut self, c: char, out: &mut Out) -> Option<State> {
        if self.string.push(c) {
            return Some(State::Arguments);
        }
        match c {
            '(' | '[' | '{' => self.brackets += 1,
            ')' | ']' | '}' => self.brackets -= 1,
            _ => {}
        }
        if self.brackets > 0 {
            return Some(State::Arguments);
        }
        let (name, arguments) = literal::call(&self.held[self.call_from..])?;
        out.begin(None, name);
        out.arguments(&arguments);
        out.end();
        self.held.clear();
        Some(State::Between)
    }

    /// What is no call is content, and so is the rest.
    fn leave(&mut self, out: &mut Out) {
        self.finish(out);
        self.state = State::Text;
    }
}

impl Calls for Pythonic {
    fn push(&mut self, symbol: Symbol, out: &mut Out) {
        match symbol {
            Symbol::Char(c) => self.char(c, out),
            Symbol::Mark(mark) => self.mark(mark, out),
        }
    }

    fn finish(&mut self, out: &mut Out) {
        out.contents(&std::mem::take(&mut self.held));
    }
}
