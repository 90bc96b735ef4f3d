//! Harmony, the format of gpt-oss: the output is messages, each with a header that says where it goes.
//!
//! `<|channel|>analysis<|message|>…<|end|>` is reasoning, `<|channel|>final<|message|>…<|return|>` the answer, and
//! `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>` a call; the recipient may also stand before the
//! channel. Commentary to nobody is said to the user before calls, so it is content. Further messages begin with
//! `<|start|>assistant`. (Source: OpenAI's description of the format, `openai/harmony`, `docs/format.md`.)

use super::json_text::JsonText;
use crate::NAME_BYTES_MAX;
use crate::lexer::{Mark, Symbol};
use crate::out::Out;

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const CONSTRAIN: &str = "<|constrain|>";
const MESSAGE: &str = "<|message|>";
const END: &str = "<|end|>";
const RETURN: &str = "<|return|>";
const CALL: &str = "<|call|>";

/// The markers.
pub(crate) const MARKS: [&str; 7] = [START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL];

/// The state machine, which reads reasoning, answers and calls.
#[derive(Debug)]
pub(crate) struct Harmony {
    state: State,
    /// Whether calls are told of. Else they are content.
    tells_calls: bool,
    /// All of the header as it was written.
    header: String,
    /// Its parts: before the channel, the channel, after `<|constrain|>`.
    parts: [String; 3],
    part: usize,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Outside messages; the prompt ends with `<|start|>assistant`, so the first header has begun.
    Between,
    Header,
    Reasoning,
    Content,
    /// Before the arguments.
    Call,
    Arguments(JsonText),
    AfterArguments,
}

/// Where a message goes.
enum To {
    Reasoning,
    Content,
    Call(String),
    Unknown,
}

impl Harmony {
    /// Before the first symbol.
    pub fn new(tells_calls: bool) -> Self {
        Self {
            state: State::Between,
            tells_calls,
            header: String::new(),
            parts: Default::default(),
            part: 0,
        }
    }

    /// Takes the next symbol.
    pub fn push(&mut self, symbol: Symbol, out: &mut Out) {
        match symbol {
            Symbol::Char(c) => self.char(c, out),
            Symbol::Mark(mark) => self.mark(mark, out),
        }
    }

    /// The output is over.
    pub fn finish(&mut self, out: &mut Out) {
        if matches!(self.state, State::Header) {
            let [before, channel, kind] = self.parts.each_ref().map(|part| part.trim());
            let names = ["analysis", "commentary", "final"];
            let is_plain = "assistant".starts_with(before)
                && names.iter().any(|name| name.starts_with(channel))
                && kind.is_empty();
            if !is_plain {
                out.contents(&std::mem::take(&mut self.header));
            }
        }
        if matches!(self.state, State::Call) {
            self.begin(out);
        }
    }

    fn mark(&mut self, mark: Mark, out: &mut Out) {
        match (&mut self.state, mark.text) {
            (State::Arguments(json), text) if json.is_in_string() && !mark.special => {
                return out.arguments(text);
            }
            (State::Header, CHANNEL | CONSTRAIN) => {
                self.header.push_str(mark.shown());
                self.part = if mark.text == CHANNEL { 1 } else { 2 };
                return;
            }
            (State::Header, MESSAGE) => {
                self.header.push_str(mark.shown());
                return self.open(out);
            }
            _ => {}
        }
        self.close(out);
        match mark.text {
            START | CHANNEL => {
                self.header.push_str(mark.shown());
                self.part = usize::from(mark.text == CHANNEL);
                self.state = State::Header;
            }
            END | RETURN | CALL => {}
            // Without a header it is an answer.
            MESSAGE => {
                out.new_message(false);
                self.state = State::Content;
            }
            _ => out.contents(mark.shown()),
        }
    }

    fn char(&mut self, c: char, out: &mut Out) {
        match &mut self.state {
            State::Between if c.is_whitespace() => out.content(c),
            State::Between => {
                // A recipient may stand before the first channel.
                self.state = match c {
                    't' => State::Header,
                    _ => State::Content,
                };
                self.char(c, out);
            }
            State::Header => {
                self.header.push(c);
                self.parts[self.part].push(c);
                let is_header = self.part > 0 || self.is_header_begun_well();
                if !is_header || self.header.len() > NAME_BYTES_MAX {
                    self.state = State::Content;
                    out.contents(&std::mem::take(&mut self.header));
                    self.clear();
                }
            }
            State::Reasoning => out.reasoning(c),
            State::Content => out.content(c),
            State::Call if c.is_whitespace() => {}
            State::Call => {
                self.begin(out);
                out.argument(c);
                let mut json = JsonText::default();
                self.state = match c {
                    '{' => {
                        json.push(c);
                        State::Arguments(json)
                    }
                    // No JSON: all of the message.
                    _ => State::Arguments(json),
                };
            }
            State::Arguments(json) => {
                out.argument(c);
                if json.push(c) {
                    out.end();
                    self.state = State::AfterArguments;
                }
            }
            State::AfterArguments => {
                if !c.is_whitespace() {
                    self.state = State::Content;
                }
                out.content(c);
            }
        }
    }

    /// Whether what stands before the channel is the role and a recipient, or the beginning of that.
    fn is_header_begun_well(&self) -> bool {
        let before = self.parts[0].trim();
        let before = before
            .strip_prefix("assistant")
            .unwrap_or(before)
            .trim_start();
        let is_recipient = |text: &str| {
            let name = text.strip_prefix("to=");
            name.is_some_and(|name| !name.contains(char::is_whitespace))
        };
        "assistant".starts_with(before) || "to=".starts_with(before) || is_recipient(before)
    }

    /// The header is over: its message begins.
    fn open(&mut self, out: &mut Out) {
        match self.destination() {
            To::Reasoning => {
                out.new_message(true);
                self.state = State::Reasoning;
            }
            To::Content => {
                out.new_message(false);
                self.state = State::Content;
            }
            // The name is taken from the header when the arguments begin.
            To::Call(_) => return self.state = State::Call,
            To::Unknown => {
                out.contents(&self.header);
                self.state = State::Content;
            }
        }
        self.clear();
    }

    fn destination(&self) -> To {
        let words = self.parts[..2]
            .iter()
            .flat_map(|part| part.split_whitespace());
        let mut recipients = words.filter_map(|word| word.strip_prefix("to="));
        let recipient = recipients.next();
        let mut channel = self.parts[1].split_whitespace();
        let name = channel.next().unwrap_or("");
        // The type of the text may stand there without its marker.
        let is_known = |word: &str| word.starts_with("to=") || ["json", "code"].contains(&word);
        let kind = self.parts[2].trim().to_ascii_lowercase();
        let is_plain = recipients.next().is_none()
            && channel.all(is_known)
            && ["", "json", "code"].contains(&kind.as_str());
        match (name, recipient) {
            _ if !is_plain => To::Unknown,
            ("analysis" | "commentary", Some(to)) => match to.strip_prefix("functions.") {
                Some(name) if self.tells_calls && !name.is_empty() => To::Call(name.to_owned()),
                Some(_) => To::Unknown,
                // Tools of the model's own, which nobody here runs: it talks to itself.
                None => To::Reasoning,
            },
            ("analysis", None) => To::Reasoning,
            ("commentary" | "final", None) => To::Content,
            _ => To::Unknown,
        }
    }

    fn begin(&mut self, out: &mut Out) {
        if let To::Call(name) = self.destination() {
            out.begin(None, name);
        }
        self.clear();
    }

    /// The message is over.
    fn close(&mut self, out: &mut Out) {
        match self.state {
            State::Header if !self.is_header_begun_well() || self.part > 0 => {
                out.contents(&self.header);
            }
            State::Call => {
                self.begin(out);
                out.arguments("{}");
                out.end();
            }
            State::Arguments(_) => out.break_off(),
            _ => out.mark(),
        }
        self.clear();
        self.state = State::Between;
    }

    fn clear(&mut self) {
        self.header.clear();
        self.parts = Default::default();
        self.part = 0;
    }
}
