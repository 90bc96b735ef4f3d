//! Where a JSON value ends.

/// Follows the text of one JSON value, character by character. It looks at brackets and strings only: a model's small errors
/// elsewhere are the client's to judge, who gets the text.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct JsonText {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonText {
    /// Whether the next character is one of a string.
    pub fn is_in_string(&self) -> bool {
        self.in_string
    }

    /// Takes the next character of an object, a list or a string, the first included. True if the value ends with it.
    pub fn push(&mut self, c: char) -> bool {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => {
                self.in_string = !self.in_string;
                return !self.in_string && self.depth == 0;
            }
            _ if self.in_string => {}
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_end_where_they_end() {
        for text in [
            "{}",
            "[]",
            r#""a\"b""#,
            r#"{"a":{"b":[1,{}]},"c":"}]\\"}"#,
            r#"["\\\"]",[{}]]"#,
        ] {
            let mut json = JsonText::default();
            let last = text.chars().count() - 1;
            for (i, c) in text.chars().enumerate() {
                assert_eq!(json.push(c), i == last, "{text} at {i}");
            }
        }
    }
}
