//! `[TOOL_CALLS]`, and then either a JSON list of calls or a name and its arguments, `NAME[CALL_ID]ID[ARGS]{…}`, where the two
//! markers inside may be missing.

use super::Calls;
use super::json_calls::{JsonCalls, Verdict};
use super::json_text::JsonText;
use crate::NAME_BYTES_MAX;
use crate::lexer::{Mark, Symbol};
use crate::out::Out;

const OPEN: &str = "[TOOL_CALLS]";
const ID: &str = "[CALL_ID]";
const ARGUMENTS: &str = "[ARGS]";

/// The markers.
pub(crate) const MARKS: [&str; 3] = [OPEN, ID, ARGUMENTS];

/// The state machine.
#[derive(Debug)]
pub(crate) struct Mistral {
    state: State,
}

#[derive(Debug)]
enum State {
    Text,
    /// After the opening marker, as long as it may be a list.
    List(JsonCalls),
    Named(Named),
    Arguments(JsonText),
}

/// A call whose arguments have not begun.
#[derive(Debug, Default)]
struct Named {
    /// All of it, should it be no call.
    text: String,
    name: String,
    id: Option<String>,
    /// Only the arguments may follow.
    is_over: bool,
}

impl Named {
    /// Takes a character of the name, the id or the space after them. False if it has no place there.
    fn take(&mut self, c: char) -> bool {
        self.text.push(c);
        let part = self.id.as_mut().unwrap_or(&mut self.name);
        if c.is_whitespace() {
            // White space ends them, if they have begun.
            self.is_over |= !part.is_empty();
        } else if self.is_over || !(c.is_alphanumeric() || "_-.:/".contains(c)) {
            return false;
        } else {
            part.push(c);
        }
        self.text.len() <= NAME_BYTES_MAX
    }
}

impl Mistral {
    /// Before the first symbol.
    pub fn new() -> Self {
        Self { state: State::Text }
    }

    fn mark(&mut self, mark: Mark, out: &mut Out) {
        if let State::List(calls) = &mut self.state
            && calls.takes_mark(mark, out)
        {
            return;
        }
        match &mut self.state {
            State::Arguments(json) if json.is_in_string() && !mark.special => {
                return out.arguments(mark.text);
            }
            State::Named(named) if !named.name.is_empty() && mark.text != OPEN => {
                let is_first = named.id.is_none();
                named.text.push_str(mark.shown());
                if mark.text == ID && is_first {
                    named.id = Some(String::new());
                    named.is_over = false;
                    return;
                }
                if mark.text == ARGUMENTS {
                    named.is_over = true;
                    return;
                }
                return self.leave(out);
            }
            _ => {}
        }
        self.leave(out);
        match mark.text {
            OPEN => self.state = State::List(JsonCalls::new(mark.shown().to_owned())),
            _ => out.contents(mark.shown()),
        }
    }

    fn char(&mut self, c: char, out: &mut Out) {
        match &mut self.state {
            State::Text => out.content(c),
            State::List(calls) if !calls.has_begun() && (c.is_alphanumeric() || c == '_') => {
                let mut named = Named {
                    text: calls.text(),
                    ..Named::default()
                };
                named.take(c);
                self.state = State::Named(named);
            }
            State::List(calls) => match calls.push(c, &|_| true, out) {
                Verdict::More => {}
                Verdict::Over => self.state = State::Text,
                Verdict::Broken => self.leave(out),
            },
            State::Named(named) if c == '{' => {
                let id = named.id.take().filter(|id| !id.is_empty());
                out.begin(id, std::mem::take(&mut named.name));
                out.argument(c);
                let mut json = JsonText::default();
                json.push(c);
                self.state = State::Arguments(json);
            }
            State::Named(named) => {
                if !named.take(c) {
                    self.leave(out);
                }
            }
            State::Arguments(json) => {
                out.argument(c);
                if json.push(c) {
                    out.end();
                    self.state = State::Text;
                }
            }
        }
    }

    /// What is no call is content.
    fn leave(&mut self, out: &mut Out) {
        self.finish(out);
        out.break_off();
        self.state = State::Text;
    }
}

impl Calls for Mistral {
    fn push(&mut self, symbol: Symbol, out: &mut Out) {
        match symbol {
            Symbol::Char(c) => self.char(c, out),
            Symbol::Mark(mark) => self.mark(mark, out),
        }
    }

    fn finish(&mut self, out: &mut Out) {
        match &mut self.state {
            State::List(calls) => out.contents(&calls.text()),
            State::Named(named) => out.contents(&std::mem::take(&mut named.text)),
            State::Text | State::Arguments(_) => {}
        }
    }
}
