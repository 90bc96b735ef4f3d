//! `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several one after the other, with text between them or not.

use super::Calls;
use super::json_calls::{JsonCalls, Verdict};
use crate::lexer::{Mark, Symbol};
use crate::out::Out;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// The markers.
pub(crate) const MARKS: [&str; 2] = [OPEN, CLOSE];

/// The state machine.
#[derive(Debug)]
pub(crate) struct Hermes {
    state: State,
}

#[derive(Debug)]
enum State {
    Text,
    Calls(JsonCalls),
    /// After the JSON: its closing marker, or none.
    Close,
}

impl Hermes {
    /// Before the first symbol.
    pub fn new() -> Self {
        Self { state: State::Text }
    }

    fn mark(&mut self, mark: Mark, out: &mut Out) {
        if let State::Calls(calls) = &mut self.state {
            if calls.takes_mark(mark, out) {
                return;
            }
            self.leave(out);
        }
        let closes = matches!(self.state, State::Close) && mark.text == CLOSE;
        self.state = State::Text;
        match mark.text {
            OPEN => self.state = State::Calls(JsonCalls::new(mark.shown().to_owned())),
            _ if closes => out.mark(),
            _ => out.contents(mark.shown()),
        }
    }

    /// What is no call is content.
    fn leave(&mut self, out: &mut Out) {
        let State::Calls(calls) = &mut self.state else {
            return;
        };
        let text = calls.text();
        // A call whose JSON is not whole ends here; its closing marker may follow.
        let is_call = calls.has_told() && text.trim().is_empty();
        out.break_off();
        out.contents(&text);
        self.state = match is_call {
            true => State::Close,
            false => State::Text,
        };
    }
}

impl Calls for Hermes {
    fn push(&mut self, symbol: Symbol, out: &mut Out) {
        let c = match symbol {
            Symbol::Mark(mark) => return self.mark(mark, out),
            Symbol::Char(c) => c,
        };
        match &mut self.state {
            State::Text => out.content(c),
            State::Calls(calls) => match calls.push(c, &|_| true, out) {
                Verdict::More => {}
                Verdict::Over => self.state = State::Close,
                Verdict::Broken => self.leave(out),
            },
            State::Close => {
                if !c.is_whitespace() {
                    self.state = State::Text;
                }
                out.content(c);
            }
        }
    }

    fn finish(&mut self, out: &mut Out) {
        if let State::Calls(calls) = &mut self.state {
            out.contents(&calls.text());
        }
    }
}
