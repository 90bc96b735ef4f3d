//! Calls as JSON objects, `{"name": …, "arguments": {…}}`: one, or a list of them.

use serde_json::Value;

use super::json_text::JsonText;
use crate::HELD_BYTES_MAX;
use crate::lexer::Mark;
use crate::out::Out;

/// Keys that the arguments may have.
const ARGUMENTS_KEYS: [&str; 2] = ["arguments", "parameters"];

/// Keys beside name and arguments: what a family writes there says nothing more. Their values are strings.
const IDLE_KEYS: [&str; 2] = ["id", "type"];

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// There is more to come.
    More,
    /// The calls are over with this character.
    Over,
    /// This is not how calls are written. [`JsonCalls::text`] is what is no part of a call.
    Broken,
}

/// Reads the calls. A call is told of once its name is known and its arguments begin.
#[derive(Debug)]
pub(crate) struct JsonCalls {
    /// What is not yet, or not any more, part of a call.
    text: String,
    is_list: bool,
    state: State,
    object: Object,
    scan: JsonText,
    has_told: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before a list or an object.
    Begin,
    /// In a list, before an object.
    Item,
    /// In a list, after an object.
    Between,
    /// Before a key, or at once the end.
    Key {
        may_end: bool,
    },
    InKey,
    Colon,
    /// Before a value.
    Value,
    /// Inside a string that is held: the name, or what says nothing.
    InString,
    /// Inside arguments of a call whose name is not known yet.
    InEarlyArguments,
    /// Inside arguments.
    InArguments,
    AfterValue,
}

/// One call in the making.
#[derive(Debug, Default)]
struct Object {
    /// From where on in the text the key or value stands that is being read.
    from: usize,
    key: String,
    name: Option<String>,
    early_arguments: Option<String>,
    id: Option<String>,
    is_told: bool,
}

impl JsonCalls {
    /// Before the first character. `text` is what came before that would be content if this is no call.
    pub fn new(text: String) -> Self {
        Self {
            text,
            is_list: false,
            state: State::Begin,
            object: Object::default(),
            scan: JsonText::default(),
            has_told: false,
        }
    }

    /// Whether there was a call.
    pub fn has_told(&self) -> bool {
        self.has_told
    }

    /// What is no part of a call so far, taken out.
    pub fn text(&mut self) -> String {
        std::mem::take(&mut self.text)
    }

    /// Whether a marker here is text of a JSON string, and if so takes it. A special token never is.
    pub fn takes_mark(&mut self, mark: Mark, out: &mut Out) -> bool {
        let in_string = match self.state {
            State::InKey | State::InString => true,
            State::InArguments | State::InEarlyArguments => self.scan.is_in_string(),
            _ => false,
        };
        if !in_string || mark.special {
            return false;
        }
        // No marker holds a quote or a backslash, so nothing ends here; a bound that is reached shows with the next character.
        for c in mark.text.chars() {
            self.push(c, &|_| false, out);
        }
        true
    }

    /// Whether nothing but white space came yet.
    pub fn has_begun(&self) -> bool {
        self.state != State::Begin
    }

    /// Takes the next character. `accept` says whether a call to this name is one.
    pub fn push(&mut self, c: char, accept: &dyn Fn(&str) -> bool, out: &mut Out) -> Verdict {
        if self.state == State::InArguments {
            out.argument(c);
            if self.scan.push(c) {
                out.end();
                self.state = State::AfterValue;
            }
            return Verdict::More;
        }
        self.text.push(c);
        if self.text.len() > HELD_BYTES_MAX {
            return Verdict::Broken;
        }
        match self.step(c, accept, out) {
            Some(true) => Verdict::Over,
            Some(false) => Verdict::More,
            None => Verdict::Broken,
        }
    }

    /// Whether the calls are over; `None` if they are broken.
    fn step(&mut self, c: char, accept: &dyn Fn(&str) -> bool, out: &mut Out) -> Option<bool> {
        let here = self.text.len() - c.len_utf8();
        match self.state {
            State::InKey | State::InString | State::InEarlyArguments => {
                if self.scan.push(c) {
                    self.take_value()?;
                }
            }
            _ if matches!(c, ' ' | '\t' | '\n' | '\r') => {}
            State::Begin if c == '[' => {
                self.is_list = true;
                self.state = State::Item;
            }
            State::Begin | State::Item if c == '{' => {
                self.object = Object::default();
                self.state = State::Key { may_end: true };
            }
            State::Between if c == ',' => self.state = State::Item,
            State::Between if c == ']' => {
                self.text.clear();
                return Some(true);
            }
            State::Key { .. } if c == '"' => self.begin_value(here, c, State::InKey),
            State::Key { may_end: true } if c == '}' => return self.close(accept, out),
            State::Colon if c == ':' => self.state = State::Value,
            State::Value => self.value(here, c, accept, out)?,
            State::AfterValue if c == ',' => self.state = State::Key { may_end: false },
            State::AfterValue if c == '}' => return self.close(accept, out),
            _ => return None,
        }
        Some(false)
    }

    fn begin_value(&mut self, here: usize, c: char, state: State) {
        self.object.from = here;
        self.scan = JsonText::default();
        self.scan.push(c);
        self.state = state;
    }

    /// The first character of a value.
    fn value(
        &mut self,
        here: usize,
        c: char,
        accept: &dyn Fn(&str) -> bool,
        out: &mut Out,
    ) -> Option<()> {
        let object = &self.object;
        let is_arguments = ARGUMENTS_KEYS.contains(&object.key.as_str());
        match (is_arguments, c) {
            (true, '{') if object.is_told || object.early_arguments.is_some() => return None,
            (true, '{') if object.name.is_some() => {
                self.tell(accept, out)?;
                self.begin_value(0, c, State::InArguments);
                out.argument(c);
            }
            (true, '{') => self.begin_value(here, c, State::InEarlyArguments),
            (false, '"') => self.begin_value(here, c, State::InString),
            _ => return None,
        }
        Some(())
    }

    /// The value that ended with the last character.
    fn take_value(&mut self) -> Option<()> {
        let text = &self.text[self.object.from..];
        let object = &mut self.object;
        if self.state == State::InEarlyArguments {
            object.early_arguments = Some(text.to_owned());
            self.state = State::AfterValue;
            return Some(());
        }
        let Ok(Value::String(text)) = serde_json::from_str(text) else {
            return None;
        };
        if self.state == State::InKey {
            object.key = text;
            self.state = State::Colon;
            return Some(());
        }
        match object.key.as_str() {
            "name" if object.name.is_none() && !text.is_empty() => object.name = Some(text),
            // After the arguments it comes too late to be told of.
            "id" if object.id.is_none() => object.id = Some(text),
            key if IDLE_KEYS.contains(&key) => {}
            _ => return None,
        }
        self.state = State::AfterValue;
        Some(())
    }

    /// Tells of the call, whose name is known.
    fn tell(&mut self, accept: &dyn Fn(&str) -> bool, out: &mut Out) -> Option<()> {
        let object = &mut self.object;
        let name = object.name.clone().filter(|name| accept(name))?;
        out.begin(object.id.take(), name);
        object.is_told = true;
        self.has_told = true;
        self.text.clear();
        Some(())
    }

    /// An object ends.
    fn close(&mut self, accept: &dyn Fn(&str) -> bool, out: &mut Out) -> Option<bool> {
        if !self.object.is_told {
            self.tell(accept, out)?;
            // A call without arguments is one with none.
            out.arguments(self.object.early_arguments.as_deref().unwrap_or("{}"));
            out.end();
        }
        self.text.clear();
        self.state = State::Between;
        Some(!self.is_list)
    }
}
