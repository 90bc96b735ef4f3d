//! `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`, translated to JSON.
//!
//! A value is text; its schema says what JSON it stands for. Values that are strings are streamed, others are translated when all
//! of them is there. Models leave markers out, `<tool_call>` and `</parameter>` above all: a function opens a call by itself, and a
//! value ends at the next parameter or at the end of the function too.

use std::sync::Arc;

use serde_json::Value;

use super::Calls;
use crate::lexer::{Mark, Symbol};
use crate::out::Out;
use crate::tool::Tools;
use crate::{HELD_BYTES_MAX, NAME_BYTES_MAX, literal};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// The markers.
pub(crate) const MARKS: [&str; 6] = [
    OPEN,
    CLOSE,
    FUNCTION,
    FUNCTION_END,
    PARAMETER,
    PARAMETER_END,
];

/// The state machine.
#[derive(Debug)]
pub(crate) struct QwenXml {
    tools: Arc<Tools>,
    state: State,
    /// What is content if no call follows; then the name of the function or of a parameter.
    held: String,
    /// Where the name begins in it.
    name_from: usize,
    function: String,
    /// Whether the call has a parameter.
    has_some: bool,
    value: Argument,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Text,
    /// After `<tool_call>`.
    Open,
    /// After `<function=`.
    Name,
    /// Between parameters.
    Body,
    /// After `<parameter=`.
    Key,
    Value,
    /// After the function: the end of the call, or another function.
    Close,
}

/// A parameter's value in the making.
#[derive(Debug, Default)]
struct Argument {
    /// Types that it may have.
    types: Vec<String>,
    /// What is not yet translated; of a string, at most the line end that may be its last character.
    held: String,
    is_string: bool,
    /// Nothing came yet: the line end after the marker is none of the value.
    is_fresh: bool,
}

impl Argument {
    fn new(types: Vec<&str>) -> Self {
        Self {
            is_string: types.iter().all(|name| *name == "string"),
            types: types.into_iter().map(str::to_owned).collect(),
            held: String::new(),
            is_fresh: true,
        }
    }

    fn push(&mut self, c: char, out: &mut Out) {
        if std::mem::take(&mut self.is_fresh) {
            if self.is_string {
                out.argument('"');
            }
            if c == '\n' {
                return;
            }
        }
        if self.is_string {
            if !self.held.is_empty() {
                escape(&std::mem::take(&mut self.held), out);
            }
            match c {
                '\n' => self.held.push(c),
                c => escape(c.encode_utf8(&mut [0; 4]), out),
            }
            return;
        }
        self.held.push(c);
        if self.held.len() > HELD_BYTES_MAX {
            // Too long to be anything but a text.
            self.is_string = true;
            out.argument('"');
            let held = std::mem::take(&mut self.held);
            escape(held.trim_end_matches('\n'), out);
            self.held
                .push_str(&held[held.trim_end_matches('\n').len()..]);
        }
    }

    /// The value is over.
    fn end(&mut self, out: &mut Out) {
        if self.is_string {
            if self.is_fresh {
                out.argument('"');
            }
            return out.argument('"');
        }
        let text = std::mem::take(&mut self.held);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        match translated(text, &self.types) {
            Some(json) => out.arguments(&json),
            None => {
                let mut json = String::new();
                literal::push_string(text, &mut json);
                out.arguments(&json);
            }
        }
    }

    /// The output is over inside the value.
    fn cut(&mut self, out: &mut Out) {
        if !self.is_string {
            let held = std::mem::take(&mut self.held);
            out.arguments(held.trim_end());
        }
    }
}

/// A value of one of these types as JSON text.
fn translated(text: &str, types: &[String]) -> Option<String> {
    let text = text.trim();
    let json = match serde_json::from_str::<Value>(text) {
        Ok(_) => text.to_owned(),
        Err(_) => literal::value(text)?,
    };
    let kinds: &[&str] = match serde_json::from_str::<Value>(&json).ok()? {
        Value::Null => &["null"],
        Value::Bool(_) => &["boolean"],
        Value::Number(number) if number.is_f64() => &["number"],
        Value::Number(_) => &["integer", "number"],
        // Quotes around a string are part of it.
        Value::String(_) => &[],
        Value::Array(_) => &["array"],
        Value::Object(_) => &["object"],
    };
    types
        .iter()
        .any(|name| kinds.contains(&name.as_str()))
        .then_some(json)
}

/// Appends the inside of a JSON string.
fn escape(text: &str, out: &mut Out) {
    for c in text.chars() {
        match c {
            '"' => out.arguments("\\\""),
            '\\' => out.arguments("\\\\"),
            '\n' => out.arguments("\\n"),
            c if u32::from(c) < 0x20 => out.arguments(&format!("\\u{:04x}", u32::from(c))),
            c => out.argument(c),
        }
    }
}

impl QwenXml {
    /// Before the first symbol.
    pub fn new(tools: Arc<Tools>) -> Self {
        Self {
            tools,
            state: State::Text,
            held: String::new(),
            name_from: 0,
            function: String::new(),
            has_some: false,
            value: Argument::default(),
        }
    }

    fn mark(&mut self, mark: Mark, out: &mut Out) {
        match (self.state, mark.text) {
            (State::Value, PARAMETER | PARAMETER_END | FUNCTION_END) => {
                self.value.end(out);
                self.state = State::Body;
                if mark.text != PARAMETER_END {
                    self.mark(mark, out);
                }
            }
            (State::Value, text) if !mark.special => {
                for c in text.chars() {
                    self.value.push(c, out);
                }
            }
            (State::Body, PARAMETER) => {
                self.held.clear();
                self.state = State::Key;
            }
            (State::Body, FUNCTION_END) => {
                self.close(out);
                self.state = State::Close;
            }
            (State::Body, CLOSE) => {
                self.close(out);
                self.state = State::Text;
            }
            (State::Close, CLOSE) => {
                out.mark();
                self.state = State::Text;
            }
            (State::Text | State::Close, OPEN) => {
                self.held.push_str(mark.shown());
                self.state = State::Open;
            }
            (State::Text | State::Open | State::Close, FUNCTION) => {
                self.held.push_str(mark.text);
                self.name_from = self.held.len();
                self.state = State::Name;
            }
            (State::Text | State::Close, _) => {
                self.state = State::Text;
                out.contents(mark.shown());
            }
            _ => {
                self.leave(out);
                self.mark(mark, out);
            }
        }
    }

    fn char(&mut self, c: char, out: &mut Out) {
        match self.state {
            State::Text => out.content(c),
            State::Value => self.value.push(c, out),
            State::Name if c == '>' => self.begin(out),
            State::Key if c == '>' => self.begin_value(out),
            State::Close if c.is_whitespace() => out.content(c),
            State::Body if c.is_whitespace() => {}
            State::Close => {
                self.state = State::Text;
                out.content(c);
            }
            State::Body => {
                self.leave(out);
                out.content(c);
            }
            State::Open | State::Name | State::Key => {
                self.held.push(c);
                let has_place = match self.state {
                    State::Open => c.is_whitespace(),
                    _ => c != '\n',
                };
                if !has_place || self.held.len() > NAME_BYTES_MAX {
                    self.leave(out);
                }
            }
        }
    }

    fn begin(&mut self, out: &mut Out) {
        let name = self.held[self.name_from..].trim();
        if name.is_empty() {
            self.held.push('>');
            return self.leave(out);
        }
        self.function = name.to_owned();
        out.begin(None, self.function.clone());
        self.held.clear();
        self.has_some = false;
        self.state = State::Body;
    }

    fn begin_value(&mut self, out: &mut Out) {
        let key = std::mem::take(&mut self.held);
        let key = key.trim();
        let mut json = String::from(if self.has_some { ", " } else { "{" });
        literal::push_string(key, &mut json);
        json.push_str(": ");
        out.arguments(&json);
        self.has_some = true;
        let tool = self.tools.find(&self.function);
        let types = tool.map_or(Vec::new(), |tool| tool.types(key));
        self.value = Argument::new(types);
        self.state = State::Value;
    }

    /// The call's arguments are over.
    fn close(&mut self, out: &mut Out) {
        out.arguments(if self.has_some { "}" } else { "{}" });
        out.end();
    }

    /// This is no call, or none any more: what is held is content. A call that has begun ends as it is, because what the model
    /// left out of its arguments is not known.
    fn leave(&mut self, out: &mut Out) {
        if self.state == State::Value {
            self.value.cut(out);
        }
        out.break_off();
        if self.state == State::Key {
            out.contents(PARAMETER);
        }
        out.contents(&std::mem::take(&mut self.held));
        self.state = State::Text;
    }
}

impl Calls for QwenXml {
    fn push(&mut self, symbol: Symbol, out: &mut Out) {
        match symbol {
            Symbol::Char(c) => self.char(c, out),
            Symbol::Mark(mark) => self.mark(mark, out),
        }
    }

    fn finish(&mut self, out: &mut Out) {
        match self.state {
            State::Value => self.value.cut(out),
            State::Key => {
                out.arguments(if self.has_some { ", \"" } else { "{\"" });
                escape(&std::mem::take(&mut self.held), out);
            }
            _ => out.contents(&std::mem::take(&mut self.held)),
        }
    }
}
