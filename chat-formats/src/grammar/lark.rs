//! The text of a grammar in the making.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::Value;

/// Rules, each once.
pub(crate) struct Lark<'a> {
    text: String,
    names: BTreeSet<String>,
    token: &'a dyn Fn(&str) -> Option<u32>,
}

impl<'a> Lark<'a> {
    /// A grammar in which text is `TEXT`: any, but for special tokens.
    pub fn new(token: &'a dyn Fn(&str) -> Option<u32>) -> Self {
        Self {
            text: String::new(),
            names: BTreeSet::new(),
            token,
        }
    }

    /// Adds a rule; upper case is a terminal.
    pub fn rule(&mut self, name: &str, body: &str) {
        if self.names.insert(name.to_owned()) {
            // Writing to memory cannot fail.
            let _ = writeln!(self.text, "{name}: {}", body.trim());
        }
    }

    /// Adds a rule for a value that follows a JSON schema.
    pub fn json(&mut self, name: &str, schema: &Value) {
        self.rule(name, &format!("%json {schema}"));
    }

    /// Adds a rule for text up to this marker, which is part of it.
    pub fn until(&mut self, name: &str, mark: &str) {
        self.text();
        match self.is_token(mark) {
            true => {
                let mark = self.mark(mark);
                self.rule(name, &format!("TEXT {mark}"));
            }
            false => self.rule(&format!("{name}[lazy]"), &format!("TEXT {}", literal(mark))),
        }
    }

    /// Sees to it that there is `TEXT`.
    pub fn text(&mut self) {
        self.rule("TEXT", "/(?s:.*)/");
    }

    /// A marker: its token, or its text.
    pub fn mark(&self, text: &str) -> String {
        match (self.token)(text) {
            Some(id) => format!("<[{id}]>"),
            None => literal(text),
        }
    }

    /// Whether a marker is a special token.
    pub fn is_token(&self, text: &str) -> bool {
        (self.token)(text).is_some()
    }

    /// The grammar.
    pub fn finish(mut self) -> String {
        if self.text.contains("TEXT") {
            self.text();
        }
        self.text
    }
}

/// A text as it stands.
pub(crate) fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
