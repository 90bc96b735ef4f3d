//! The tools that a request offers.

use serde_json::{Value, json};

/// A tool.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments; an object. [`Value::Null`] if it was left out: then any object.
    pub parameters: Value,
    /// Whether the arguments must follow the schema.
    pub strict: bool,
}

impl Tool {
    /// A tool.
    pub fn new(name: impl Into<String>, parameters: Value) -> Self {
        Self {
            name: name.into(),
            parameters,
            strict: false,
        }
    }

    /// The schema of its arguments, which says that they are an object where theirs leaves it open.
    pub fn schema(&self) -> Value {
        match &self.parameters {
            Value::Object(schema) => {
                let mut schema = schema.clone();
                if !schema.contains_key("$ref") {
                    schema.insert("type".to_owned(), Value::from("object"));
                }
                Value::Object(schema)
            }
            _ => json!({"type": "object"}),
        }
    }

    /// The JSON types that this argument may have, as its schema names them. None if the schema does not say.
    pub(crate) fn types(&self, argument: &str) -> Vec<&str> {
        let mut types = Vec::new();
        if let Some(schema) = self.parameters.get("properties") {
            collect_types(schema.get(argument), &mut types);
        }
        types
    }
}

fn collect_types<'a>(schema: Option<&'a Value>, types: &mut Vec<&'a str>) {
    let Some(schema) = schema else { return };
    match schema.get("type") {
        Some(Value::String(name)) => types.push(name),
        Some(Value::Array(names)) => types.extend(names.iter().filter_map(Value::as_str)),
        _ => {}
    }
    for key in ["anyOf", "oneOf"] {
        for one in schema
            .get(key)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            // One level is what generators of schemas write, for arguments that may be null.
            if let Some(Value::String(name)) = one.get("type") {
                types.push(name);
            }
        }
    }
}

/// All tools of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools(Vec<Tool>);

impl Tools {
    /// These tools.
    pub fn new(tools: Vec<Tool>) -> Self {
        Self(tools)
    }

    /// The tool of this name.
    pub fn find(&self, name: &str) -> Option<&Tool> {
        self.0.iter().find(|tool| tool.name == name)
    }

    /// All of them, in the request's order.
    pub fn as_slice(&self) -> &[Tool] {
        &self.0
    }
}
