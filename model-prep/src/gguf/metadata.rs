//! The key-value pairs of a GGUF file.

use std::collections::HashMap;

/// A value, its number types widened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
}

/// All pairs of a file, read with sentences for what is missing or of the wrong type.
#[derive(Debug, Default)]
pub(crate) struct Metadata(HashMap<String, Value>);

impl Metadata {
    /// Add a pair; `false` if the key is there already.
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        self.0.insert(key, value).is_none()
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, String> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<&[String]>, String> {
        self.typed(key, "a list of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<&[i64]>, String> {
        self.typed(key, "a list of integers", |value| match value {
            Value::Integers(integers) => Some(integers.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<&[f64]>, String> {
        self.typed(key, "a list of floats", |value| match value {
            Value::Floats(floats) => Some(floats.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>, String> {
        self.typed(key, "a float", |value| match value {
            Value::Float(float) => Some(*float),
            _ => None,
        })
    }

    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>, String> {
        self.typed(key, "a whole number", |value| match value {
            Value::Unsigned(n) => usize::try_from(*n).ok(),
            Value::Signed(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A number that may be given once for every layer, if all layers agree.
    pub(crate) fn uniform_count(&self, key: &str) -> Result<Option<usize>, String> {
        match self.0.get(key) {
            Some(Value::Integers(counts)) => match counts.split_first() {
                Some((first, rest)) if rest.iter().all(|n| n == first) => usize::try_from(*first)
                    .map(Some)
                    .map_err(|_| format!("`{key}` is {first}")),
                _ => Err(format!(
                    "`{key}` differs from layer to layer, which is not supported"
                )),
            },
            _ => self.count(key),
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        match self.0.get(key) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| format!("the metadata `{key}` should be {what} and is not")),
        }
    }
}

/// The value, or a sentence that it is missing.
pub(crate) fn required<T>(key: &str, value: Result<Option<T>, String>) -> Result<T, String> {
    value?.ok_or_else(|| format!("the metadata lacks `{key}`"))
}
