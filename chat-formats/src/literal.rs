//! Python's literals as JSON text: the arguments that models write as Python.

use serde_json::Value;

/// Most brackets around a value.
const DEPTH_MAX: usize = 64;

/// A call, `NAME(KEY=VALUE, …)`, as its name and the JSON text of its arguments. `None` if it is not one, or has arguments without
/// a key: no tool says which they are.
pub(crate) fn call(text: &str) -> Option<(String, String)> {
    let mut reader = Reader { rest: text.trim() };
    let name = reader.name()?;
    reader.eat('(')?;
    let mut json = String::from("{");
    loop {
        reader.space();
        if reader.eat(')').is_some() {
            break;
        }
        if json.len() > 1 {
            json.push_str(", ");
        }
        let key = reader.name()?;
        push_string(key, &mut json);
        json.push_str(": ");
        reader.space();
        reader.eat('=')?;
        reader.value(&mut json, 0)?;
        reader.space();
        if reader.eat(',').is_none() {
            reader.eat(')')?;
            break;
        }
    }
    json.push('}');
    reader.rest.is_empty().then(|| (name.to_owned(), json))
}

/// A literal as JSON text.
pub(crate) fn value(text: &str) -> Option<String> {
    let mut reader = Reader { rest: text.trim() };
    let mut json = String::new();
    reader.value(&mut json, 0)?;
    reader.space();
    reader.rest.is_empty().then_some(json)
}

/// Appends a JSON string.
pub(crate) fn push_string(text: &str, json: &mut String) {
    json.push_str(&Value::from(text).to_string());
}

/// Whether a character may stand in a tool's name. Python has no dots there; names of tools do.
pub(crate) fn is_in_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '.' | '-')
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn eat(&mut self, c: char) -> Option<()> {
        self.rest = self.rest.strip_prefix(c)?;
        Some(())
    }

    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// The next so many bytes.
    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        taken
    }

    fn name(&mut self) -> Option<&'a str> {
        self.space();
        let end = self
            .rest
            .find(|c| !is_in_name(c))
            .unwrap_or(self.rest.len());
        (end > 0).then(|| self.take(end))
    }

    fn value(&mut self, json: &mut String, depth: usize) -> Option<()> {
        if depth > DEPTH_MAX {
            return None;
        }
        self.space();
        match self.peek()? {
            '[' => self.items('[', ']', json, depth),
            '(' => self.items('(', ')', json, depth),
            '{' => self.items('{', '}', json, depth),
            '"' | '\'' => {
                let mut text = String::new();
                // Strings beside each other are one.
                while matches!(self.peek(), Some('"' | '\'')) {
                    self.string(&mut text)?;
                    self.space();
                }
                push_string(&text, json);
                Some(())
            }
            _ => self.word(json),
        }
    }

    /// A list, a tuple or a dictionary.
    fn items(&mut self, open: char, close: char, json: &mut String, depth: usize) -> Option<()> {
        self.eat(open)?;
        json.push(if open == '{' { '{' } else { '[' });
        let mut count = 0;
        loop {
            self.space();
            if self.eat(close).is_some() {
                break;
            }
            if count > 0 {
                json.push_str(", ");
            }
            count += 1;
            if open == '{' {
                if !matches!(self.peek(), Some('"' | '\'')) {
                    return None;
                }
                self.value(json, depth + 1)?;
                self.space();
                self.eat(':')?;
                json.push_str(": ");
            }
            self.value(json, depth + 1)?;
            self.space();
            if self.eat(',').is_none() {
                self.eat(close)?;
                break;
            }
        }
        json.push(if open == '{' { '}' } else { ']' });
        Some(())
    }

    fn string(&mut self, text: &mut String) -> Option<()> {
        let quote = self.peek()?;
        let triple = String::from_iter([quote; 3]);
        let end = match self.rest.starts_with(&triple) {
            true => triple,
            false => quote.to_string(),
        };
        self.take(end.len());
        while !self.rest.starts_with(&end) {
            let c = self.peek()?;
            self.take(c.len_utf8());
            match c {
                '\\' => self.escape(text)?,
                '\n' if end.len() == 1 => return None,
                c => text.push(c),
            }
        }
        self.take(end.len());
        Some(())
    }

    fn escape(&mut self, text: &mut String) -> Option<()> {
        let c = self.peek()?;
        self.take(c.len_utf8());
        let digits = match c {
            'n' => return push(text, '\n'),
            't' => return push(text, '\t'),
            'r' => return push(text, '\r'),
            'b' => return push(text, '\u{8}'),
            'f' => return push(text, '\u{c}'),
            '0' => return push(text, '\0'),
            '\\' | '\'' | '"' | '/' => return push(text, c),
            '\n' => return Some(()),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            // Python leaves what it does not know as it is.
            other => {
                text.push('\\');
                return push(text, other);
            }
        };
        let mut code = self.hex(digits)?;
        if (0xd800..0xdc00).contains(&code) && digits == 4 {
            // JSON's way to write what needs more than 16 bits.
            self.rest = self.rest.strip_prefix("\\u")?;
            let low = self
                .hex(4)?
                .checked_sub(0xdc00)
                .filter(|low| *low < 0x400)?;
            code = 0x1_0000 + ((code - 0xd800) << 10) + low;
        }
        push(text, char::from_u32(code)?)
    }

    fn hex(&mut self, digits: usize) -> Option<u32> {
        let text = self.rest.get(..digits)?;
        let is_hex = text.bytes().all(|b| b.is_ascii_hexdigit());
        self.take(digits);
        is_hex.then(|| u32::from_str_radix(text, 16).ok())?
    }

    /// A number, a truth value or nothing.
    fn word(&mut self, json: &mut String) -> Option<()> {
        let ends = |c: char| c.is_whitespace() || matches!(c, ',' | ')' | ']' | '}' | ':');
        let end = self.rest.find(ends).unwrap_or(self.rest.len());
        let word = self.take(end);
        let known = match word {
            "True" | "true" => "true",
            "False" | "false" => "false",
            "None" | "null" => "null",
            _ => "",
        };
        if !known.is_empty() {
            json.push_str(known);
            return Some(());
        }
        let digits = word.strip_prefix('+').unwrap_or(word);
        // Python writes some numbers that JSON does not: `1.`, `.5`.
        let completed = match digits.strip_prefix('-').unwrap_or(digits) {
            number if number.starts_with('.') => digits.replacen('.', "0.", 1),
            number if number.ends_with('.') => format!("{digits}0"),
            _ => digits.to_owned(),
        };
        let is_number = serde_json::from_str::<serde_json::Number>(&completed).is_ok();
        is_number.then(|| json.push_str(&completed))
    }
}

fn push(text: &mut String, c: char) -> Option<()> {
    text.push(c);
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn literals() {
        let cases = [
            ("'a'", Some(r#""a""#)),
            (r#""it's""#, Some(r#""it's""#)),
            (r"'it\'s \u00e9 \x41 \d'", Some(r#""it's é A \\d""#)),
            (r#""\ud83d\ude00""#, Some("\"😀\"")),
            ("'''a\n'b'''", Some(r#""a\n'b""#)),
            ("'a' \"b\"", Some(r#""ab""#)),
            ("True", Some("true")),
            ("None", Some("null")),
            ("-1.5e3", Some("-1.5e3")),
            ("+1", Some("1")),
            (".5", Some("0.5")),
            ("2.", Some("2.0")),
            ("12345678901234567890123", Some("12345678901234567890123")),
            ("[1, 'a', (2, 3,), {}]", Some(r#"[1, "a", [2, 3], {}]"#)),
            ("{'a': {'b': [True]}}", Some(r#"{"a": {"b": [true]}}"#)),
            (r#"{"a": null}"#, Some(r#"{"a": null}"#)),
            ("{1: 2}", None),
            ("[1 2]", None),
            ("1 + 2", None),
            ("x", None),
            ("'a", None),
            ("'a\nb'", None),
            (r"'\ud83d'", None),
            ("", None),
        ];
        for (text, json) in cases {
            assert_eq!(value(text).as_deref(), json, "{text}");
        }
        assert_eq!(value(&"[".repeat(100_000)), None);
    }

    #[test]
    fn calls() {
        let f = |json: &str| Some(("f".to_owned(), json.to_owned()));
        assert_eq!(call("f()"), f("{}"));
        assert_eq!(call(" f( a = 1 , b='x)' ,) "), f(r#"{"a": 1, "b": "x)"}"#));
        for broken in [
            "f",
            "f(",
            "f(1)",
            "f(a=1",
            "f(a=1) g",
            "(a=1)",
            "f(a=1 b=2)",
            "f(a=)",
        ] {
            assert_eq!(call(broken), None, "{broken}");
        }
    }

    proptest! {
        #[test]
        fn what_comes_out_is_json(text in "[\\[\\](){}'\",:\\\\ aux0-9.eT+-]{0,24}") {
            if let Some(json) = value(&text) {
                prop_assert!(serde_json::from_str::<Value>(&json).is_ok(), "{text} {json}");
            }
            if let Some((_, json)) = call(&format!("f(a={text})")) {
                prop_assert!(serde_json::from_str::<Value>(&json).is_ok(), "{text} {json}");
            }
        }

        #[test]
        fn strings_come_through(text in any::<String>()) {
            let json = Value::from(text).to_string();
            prop_assert_eq!(value(&json), Some(json));
        }
    }
}
