//! Typed access to the fields of a JSON object, with errors that name the field.

use serde_json::{Map, Value};

use super::table::{self, Door};
use crate::error::{ApiError, ErrorKind};

/// Most values of a body, each item of a list counted: a parsed value takes up to 80 bytes, whatever few it had in the body.
const VALUES_MAX: usize = 1 << 20;

/// The fields of a request: all of them known, and none that would be ignored. `null` is the same as absent.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body that came to this door.
    ///
    /// # Errors
    /// 400 for anything but a JSON object, and for fields that this door does not know or do.
    pub fn parse(door: Door, body: &[u8]) -> Result<Self, ApiError> {
        let bad = |message: String| ApiError::new(ErrorKind::InvalidRequest, message);
        if let Err(error) = std::str::from_utf8(body) {
            return Err(bad(format!(
                "the body is not valid UTF-8 (byte {})",
                error.valid_up_to()
            )));
        }
        if values(body) > VALUES_MAX {
            return Err(bad(format!(
                "the body holds more than {VALUES_MAX} values: send long prompts as text"
            )));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => {
                table::check(door, &map)?;
                Ok(Self(map))
            }
            Ok(_) => Err(bad("the body must be a JSON object".to_owned())),
            Err(error) => Err(bad(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// The field, if it is there.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// The field, taken out.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// Puts a field in its place.
    pub fn put(&mut self, name: &str, value: Value) {
        self.0.insert(name.to_owned(), value);
    }

    /// A boolean.
    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "a boolean", Value::as_bool)
    }

    /// A string.
    pub fn string(&self, name: &str) -> Result<Option<&str>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(name, "a string", other)),
        }
    }

    /// An integer from `min` to `max`.
    pub fn integer(&self, name: &str, min: i64, max: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.typed(name, "an integer", whole)? else {
            return Ok(None);
        };
        if value < min || value > max {
            let bounds = match max {
                i64::MAX => format!("at least {min}"),
                _ => format!("from {min} to {max}"),
            };
            return Err(ApiError::param(
                name,
                format!("{name} must be {bounds}, got {value}"),
            ));
        }
        Ok(Some(value))
    }

    /// A number from `min` to `max`.
    pub fn number(&self, name: &str, min: f64, max: f64) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.typed(name, "a number", Value::as_f64)? else {
            return Ok(None);
        };
        if !(min..=max).contains(&value) {
            let message = format!("{name} must be from {min} to {max}, got {value}");
            return Err(ApiError::param(name, message));
        }
        Ok(Some(value as f32))
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| wrong_type(name, expected, value)),
        }
    }
}

/// How many values a JSON text holds, or somewhat more.
fn values(body: &[u8]) -> usize {
    let (mut count, mut in_string, mut escaped) = (1, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' | b':' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

/// An integer, also when written `5.0`.
pub fn whole(value: &Value) -> Option<i64> {
    let float = |f: f64| (f.fract() == 0.0 && f.abs() < 9e15).then_some(f as i64);
    value.as_i64().or_else(|| match value.as_u64() {
        Some(_) => Some(i64::MAX),
        None => value.as_f64().and_then(float),
    })
}

/// A field of the wrong type.
pub fn wrong_type(name: &str, expected: &str, value: &Value) -> ApiError {
    let got = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::param(name, format!("{name} must be {expected}, got {got}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_of_a_million_little_values_is_refused_before_it_grows() {
        let body = |items: usize| format!("{{\"user\":[{}0]}}", "[0],".repeat(items));
        let error = Fields::parse(Door::Text, body(VALUES_MAX / 2).as_bytes()).unwrap_err();
        assert!(
            error.message.contains("more than 1048576 values"),
            "{error}"
        );
        assert!(Fields::parse(Door::Text, body(VALUES_MAX / 4).as_bytes()).is_ok());
        let text = format!("{{\"user\":\"\\\"{}\"}}", ",[{:".repeat(VALUES_MAX));
        assert!(
            Fields::parse(Door::Text, text.as_bytes()).is_ok(),
            "text is one value"
        );
    }

    #[test]
    fn wrong_types_name_the_field() {
        let fields =
            Fields::parse(Door::Text, br#"{"n":"2","seed":3,"echo":null,"top_k":2.0}"#).unwrap();
        assert_eq!(
            fields.integer("n", 1, 8).unwrap_err().param.as_deref(),
            Some("n")
        );
        assert_eq!(
            fields.integer("seed", 1, 2).unwrap_err().message,
            "seed must be from 1 to 2, got 3"
        );
        assert_eq!(fields.bool("echo").unwrap(), None);
        assert_eq!(fields.integer("top_k", 0, 9).unwrap(), Some(2));
        assert!(Fields::parse(Door::Text, b"[1]").is_err());
        assert!(
            Fields::parse(Door::Text, b"{\"a\":\"\xff\"}")
                .unwrap_err()
                .message
                .contains("UTF-8")
        );
    }
}
