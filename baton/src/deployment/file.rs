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
                let place = error.location().map(|place| format!(":{}", place.line()));
                (place.unwrap_or_default(), sentence(&error.render()))
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

/// A parser's message as one line, without the place, which stands before it.
fn sentence(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    line
}
