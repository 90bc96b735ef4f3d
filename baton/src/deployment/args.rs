//! From fields to flags: one rule for all, since both have one name.

use serde::Serialize;
use serde_json::Value;

/// The command line that says what the fields of `part` say: `--name value` for each that has a value, `--name` for one that is
/// true, `--name value` again for each of a list. Fields named in `but` are left out.
pub fn of_flags(part: &impl Serialize, but: &[&str]) -> Vec<String> {
    let mut words = Vec::new();
    // Plain structures of strings, numbers and lists: nothing in them that JSON could not hold.
    let Ok(Value::Object(fields)) = serde_json::to_value(part) else {
        return words;
    };
    for (name, value) in fields {
        if but.contains(&name.as_str()) {
            continue;
        }
        let values = match value {
            Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let flag = format!("--{name}");
            match value {
                Value::Null | Value::Bool(false) => {}
                Value::Bool(true) => words.push(flag),
                // One word, so that a value that begins with a dash is no flag.
                Value::String(text) if text.starts_with('-') => {
                    words.push(format!("{flag}={text}"))
                }
                Value::String(text) => words.extend([flag, text]),
                value => words.extend([flag, value.to_string()]),
            }
        }
    }
    words
}
