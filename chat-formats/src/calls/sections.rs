//! A section of calls, each between markers, its head apart from its arguments by another: DeepSeek and Kimi.

use super::Calls;
use super::json_text::JsonText;
use crate::NAME_BYTES_MAX;
use crate::lexer::{Mark, Symbol};
use crate::out::Out;

/// The markers of a family.
#[derive(Debug)]
pub(crate) struct Marks {
    open: &'static str,
    close: &'static str,
    call: &'static str,
    separator: &'static str,
    call_end: &'static str,
    head: Head,
}

/// What stands before the separator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// The name (V3.1), or `function` with the name on the line after the separator and the arguments in a fence (V3).
    NameOrType,
    /// `functions.NAME:NUMBER`, which is also the call's id.
    Id,
}

/// Markers of DeepSeek V3, R1 and V3.1.
pub(crate) static DEEPSEEK: Marks = Marks {
    open: "<｜tool▁calls▁begin｜>",
    close: "<｜tool▁calls▁end｜>",
    call: "<｜tool▁call▁begin｜>",
    separator: "<｜tool▁sep｜>",
    call_end: "<｜tool▁call▁end｜>",
    head: Head::NameOrType,
};

/// Markers of Kimi K2.
pub(crate) static KIMI: Marks = Marks {
    open: "<|tool_calls_section_begin|>",
    close: "<|tool_calls_section_end|>",
    call: "<|tool_call_begin|>",
    separator: "<|tool_call_argument_begin|>",
    call_end: "<|tool_call_end|>",
    head: Head::Id,
};

impl Marks {
    /// All of them.
    pub fn all(&self) -> Vec<&'static str> {
        vec![
            self.open,
            self.close,
            self.call,
            self.separator,
            self.call_end,
        ]
    }
}

/// The fence around arguments.
const FENCE: &str = "```";

/// The state machine.
#[derive(Debug)]
pub(crate) struct Sections {
    marks: &'static Marks,
    state: State,
    /// Whether there was a call since the last section ended: then its closing marker is one.
    is_open: bool,
    /// What is content if no call follows.
    held: String,
    /// Before the separator.
    head: String,
    /// After it, before the arguments.
    lead: String,
    json: JsonText,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Outside calls.
    Text,
    Head,
    Lead,
    Arguments,
    /// After the arguments: what closes the fence, and the end of the call.
    Tail,
}

impl Sections {
    /// Before the first symbol.
    pub fn new(marks: &'static Marks) -> Self {
        Self {
            marks,
            state: State::Text,
            is_open: false,
            held: String::new(),
            head: String::new(),
            lead: String::new(),
            json: JsonText::default(),
        }
    }

    fn mark(&mut self, mark: Mark, out: &mut Out) {
        let marks = self.marks;
        match self.state {
            State::Arguments if self.json.is_in_string() && !mark.special => {
                return out.arguments(mark.text);
            }
            State::Head if mark.text == marks.separator => {
                self.held.push_str(mark.shown());
                self.state = State::Lead;
                return;
            }
            State::Tail if mark.text == marks.call_end && self.tail_is_plain() => {
                self.held.clear();
                self.state = State::Text;
                return out.mark();
            }
            State::Arguments if mark.text == marks.call_end => {
                // The JSON is not whole, but the call is over.
                out.break_off();
                self.state = State::Text;
                return;
            }
            _ => {}
        }
        if self.state != State::Text {
            self.leave(out);
        }
        if mark.text == marks.open {
            self.release(out);
            self.held.push_str(mark.shown());
        } else if mark.text == marks.call {
            self.held.push_str(mark.shown());
            self.head.clear();
            self.lead.clear();
            self.state = State::Head;
        } else if mark.text == marks.close && self.is_open && self.held.is_empty() {
            self.is_open = false;
            out.mark();
        } else {
            self.release(out);
            out.contents(mark.shown());
        }
    }

    fn char(&mut self, c: char, out: &mut Out) {
        match self.state {
            State::Text if self.held.is_empty() => out.content(c),
            State::Text => {
                // Between the section's beginning and its first call.
                self.held.push(c);
                if !c.is_whitespace() || self.held.len() > NAME_BYTES_MAX {
                    self.leave(out);
                }
            }
            State::Head => {
                self.held.push(c);
                self.head.push(c);
                if self.head.len() > NAME_BYTES_MAX {
                    self.leave(out);
                }
            }
            State::Lead if c == '{' => self.begin(c, out),
            State::Lead => {
                self.held.push(c);
                self.lead.push(c);
                if self.lead.len() > NAME_BYTES_MAX {
                    self.leave(out);
                }
            }
            State::Arguments => {
                out.argument(c);
                if self.json.push(c) {
                    out.end();
                    self.state = State::Tail;
                }
            }
            State::Tail => {
                self.held.push(c);
                if !self.tail_is_plain() || self.held.len() > NAME_BYTES_MAX {
                    self.leave(out);
                }
            }
        }
    }

    fn begin(&mut self, c: char, out: &mut Out) {
        let Some((id, name)) = self.called() else {
            self.held.push(c);
            return self.leave(out);
        };
        self.held.clear();
        self.is_open = true;
        out.begin(id, name);
        out.argument(c);
        self.json = JsonText::default();
        self.json.push(c);
        self.state = State::Arguments;
    }

    /// The id, if there is one, and the name.
    fn called(&self) -> Option<(Option<String>, String)> {
        let (head, lead) = (self.head.trim(), self.lead.trim());
        let (id, name) = match self.marks.head {
            Head::NameOrType if lead.is_empty() => (None, head),
            Head::NameOrType => {
                let (name, fence) = lead.split_once('\n').unwrap_or((lead, ""));
                let is_fence = matches!(fence.trim(), "" | "```" | "```json");
                (
                    None,
                    (head == "function" && is_fence).then_some(name.trim())?,
                )
            }
            Head::Id => {
                let name = head.strip_prefix("functions.").unwrap_or(head);
                let name = match name.rsplit_once(':') {
                    Some((name, number)) if number.bytes().all(|b| b.is_ascii_digit()) => name,
                    _ => name,
                };
                let id = (name.len() < head.len()).then(|| head.to_owned());
                (id, lead.is_empty().then_some(name)?)
            }
        };
        let is_name = !name.is_empty() && !name.contains(char::is_whitespace);
        is_name.then(|| (id, name.to_owned()))
    }

    /// Whether what follows the arguments is a fence that closes, or its beginning.
    fn tail_is_plain(&self) -> bool {
        FENCE.starts_with(self.held.trim())
    }

    /// What is no call is content.
    fn leave(&mut self, out: &mut Out) {
        out.break_off();
        self.release(out);
        self.state = State::Text;
    }

    fn release(&mut self, out: &mut Out) {
        out.contents(&std::mem::take(&mut self.held));
    }
}

impl Calls for Sections {
    fn push(&mut self, symbol: Symbol, out: &mut Out) {
        match symbol {
            Symbol::Char(c) => self.char(c, out),
            Symbol::Mark(mark) => self.mark(mark, out),
        }
    }

    fn finish(&mut self, out: &mut Out) {
        if self.state != State::Tail || !self.tail_is_plain() {
            self.release(out);
        }
    }
}
