//! Typed access to a JSON object.

use serde_json::{Map, Value};

/// Typed access to a JSON object; `null` counts as absent.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn present(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn required(&self, name: &str) -> Result<usize, String> {
        self.count(name)?
            .ok_or_else(|| format!("there is no `{name}`"))
    }

    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, String> {
        self.typed(name, "a whole number", |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, String> {
        self.typed(name, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, String> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, String> {
        self.typed(name, "a string", Value::as_str)
    }

    fn typed<T>(
        &self,
        name: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        match self.present(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(format!("`{name}` must be {what}, it is {value}")),
            },
        }
    }
}
