//! The answer is JSON and nothing else: `{"name": …, "parameters": {…}}`, or a list, or several with a character between them.
//!
//! No marker tells it from an answer that happens to be JSON, so only tools that were offered are called, and only from the beginning
//! of the answer. Llama's `<|python_tag|>` is a marker: after it any name is a call.

use std::sync::Arc;

use super::Calls;
use super::json_calls::{JsonCalls, Verdict};
use crate::lexer::Symbol;
use crate::out::Out;
use crate::tool::Tools;

/// The markers of Llama; plain JSON has none.
pub(crate) const MARKS: [&str; 1] = ["<|python_tag|>"];

/// The state machine.
#[derive(Debug)]
pub(crate) struct WholeAnswer {
    tools: Arc<Tools>,
    /// Between two calls.
    separator: char,
    is_marked: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Begin,
    Calls(JsonCalls),
    /// After calls, with the separator if it came.
    Between(String),
    Text,
}

impl WholeAnswer {
    /// Before the first symbol.
    pub fn new(tools: Arc<Tools>, separator: char) -> Self {
        Self {
            tools,
            separator,
            is_marked: false,
            state: State::Begin,
        }
    }

    fn char(&mut self, c: char, out: &mut Out) {
        match &mut self.state {
            State::Text => out.content(c),
            State::Begin if c.is_whitespace() => out.content(c),
            State::Begin if matches!(c, '{' | '[') => self.calls(String::new(), c, out),
            State::Begin => {
                self.state = State::Text;
                out.content(c);
            }
            State::Calls(calls) => {
                let (tools, is_marked) = (&self.tools, self.is_marked);
                let accept = |name: &str| is_marked || tools.find(name).is_some();
                match calls.push(c, &accept, out) {
                    Verdict::More => {}
                    Verdict::Over => self.state = State::Between(String::new()),
                    Verdict::Broken => self.leave(out),
                }
            }
            State::Between(text) => {
                text.push(c);
                if c == '{' {
                    text.pop();
                    let text = std::mem::take(text);
                    self.calls(text, c, out);
                } else if c == self.separator && !text[..text.len() - 1].contains(c) {
                    // Another call may follow.
                } else if !c.is_whitespace() || text.len() > crate::NAME_BYTES_MAX {
                    self.leave(out);
                }
            }
        }
    }

    fn calls(&mut self, text: String, first: char, out: &mut Out) {
        self.state = State::Calls(JsonCalls::new(text));
        self.char(first, out);
    }

    /// What is no call is content, and so is the rest.
    fn leave(&mut self, out: &mut Out) {
        self.finish(out);
        out.break_off();
        self.state = State::Text;
    }
}

impl Calls for WholeAnswer {
    fn push(&mut self, symbol: Symbol, out: &mut Out) {
        match symbol {
            Symbol::Char(c) => self.char(c, out),
            Symbol::Mark(mark) => {
                if let State::Calls(calls) = &mut self.state
                    && calls.takes_mark(mark, out)
                {
                    return;
                }
                self.leave(out);
                self.is_marked = true;
                self.state = State::Calls(JsonCalls::new(mark.shown().to_owned()));
            }
        }
    }

    fn finish(&mut self, out: &mut Out) {
        match &mut self.state {
            State::Calls(calls) => out.contents(&calls.text()),
            State::Between(text) => out.contents(&std::mem::take(text)),
            State::Begin | State::Text => {}
        }
    }
}
