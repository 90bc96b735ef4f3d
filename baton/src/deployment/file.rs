//! The file of a deployment: read with the place of what is wrong in it, and written.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::Deployment;
use crate::Failure;

/// A deployment takes some kilobytes.
const BYTES_MAX: u64 = 1 << 20;
/// As much of a line is shown.
const LINE_CHARS_MAX: usize = 80;

impl Deployment {
    /// Reads a file and checks what it says.
    ///
    /// # Errors
    /// A sentence with the file, the line or the field, what is wrong, and what to do.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let unreadable = |error| format!("cannot read {}: {error}", path.display());
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(BYTES_MAX + 1).read_to_string(&mut text))
            .map_err(unreadable)?;
        if text.len() as u64 > BYTES_MAX {
            let why = "it is larger than 1 MiB: is it the right file?";
            return Err(format!("cannot read {}: {why}", path.display()).into());
        }
        Self::of_yaml(&text)
            .map_err(|(place, why)| format!("{}{place}: {why}", path.display()).into())
    }

    /// From the text of a file. An error is the place (`:LINE`, or nothing) and a sentence.
    pub fn of_yaml(text: &str) -> Result<Self, (String, String)> {
        let options = serde_saphyr::options! { with_snippet: false };
        let deployment: Self =
            serde_saphyr::from_str_with_options(text, options).map_err(|error| {
                let error = error.without_snippet();
                let line = error.location().map(|place| place.line());
                let place = line.map(|line| format!(":{line}")).unwrap_or_default();
                (place, sentence(&error.render(), line, text))
            })?;
        let refused = |refusal: super::Refusal| (String::new(), refusal.to_string());
        deployment.check().map_err(refused)?;
        deployment.check_secrets().map_err(refused)?;
        Ok(deployment)
    }

    /// The text of a file that means the same: what has no value is left out.
    ///
    /// # Errors
    /// None that comes from a value.
    pub fn to_yaml(&self) -> Result<String, Failure> {
        to_yaml(&pruned(serde_json::to_value(self)?))
    }
}

/// YAML of a value.
///
/// # Errors
/// None that comes from a value.
pub fn to_yaml(value: &impl Serialize) -> Result<String, Failure> {
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    Ok(serde_saphyr::to_string_with_options(value, options)?)
}

/// Without fields that say nothing.
fn pruned(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields
                .into_iter()
                .map(|(name, value)| (name, pruned(value)));
            let says = |value: &Value| match value {
                Value::Null | Value::Bool(false) => false,
                Value::Array(list) => !list.is_empty(),
                Value::Object(fields) => !fields.is_empty(),
                _ => true,
            };
            Value::Object(fields.filter(|(_, value)| says(value)).collect())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(pruned).collect()),
        value => value,
    }
}

/// A parser's message as one line, with the line of the file that it is about.
fn sentence(message: &str, line: Option<u64>, text: &str) -> String {
    let words: Vec<_> = message.split_whitespace().collect();
    let message = words.join(" ");
    // The place stands before it already.
    let message = message
        .split_once(" at line ")
        .map_or(message.as_str(), |(message, _)| message);
    let message = match message {
        "invalid u64" | "invalid u32" | "invalid u16" => "a whole number is expected",
        "invalid floating point" => "a number is expected",
        "invalid boolean" => "true or false is expected",
        "expected string scalar" => "a text is expected",
        "expected sequence start" => "a list is expected",
        "expected mapping start" => "fields with values are expected",
        message => message,
    };
    let at = line.and_then(|line| usize::try_from(line).ok()?.checked_sub(1));
    let told = at.and_then(|at| text.lines().nth(at)).map(str::trim);
    match told {
        Some(told) if !told.is_empty() => {
            let told: String = told.chars().take(LINE_CHARS_MAX).collect();
            format!("{message}, in `{told}`; docs/deployment.md lists the fields")
        }
        _ => format!("{message}; docs/deployment.md lists the fields"),
    }
}
