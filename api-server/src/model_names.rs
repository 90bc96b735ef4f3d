//! The names of the one model that a server has.

use std::fmt;

use crate::error::ApiServerError;

/// Most names.
const NAMES_MAX: usize = 64;

/// Names under which clients ask for the model: one at least, each once. Answers have the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelNames(Vec<String>);

impl ModelNames {
    /// These names, or if there are none the model's own.
    ///
    /// # Errors
    /// [`ApiServerError::Model`] for an empty name, one that is given twice, or too many.
    pub fn new(names: Vec<String>, own: &str) -> Result<Self, ApiServerError> {
        let fault = |why: String| Err(ApiServerError::Model(format!("--model-name: {why}")));
        if names.len() > NAMES_MAX {
            return fault(format!("{} names; at most {NAMES_MAX}", names.len()));
        }
        for (i, name) in names.iter().enumerate() {
            if name.is_empty() {
                return fault("a name is empty".to_owned());
            }
            if names[..i].contains(name) {
                return fault(format!("{name:?} is given twice"));
            }
        }
        Ok(match names.is_empty() {
            true => Self(vec![own.to_owned()]),
            false => Self(names),
        })
    }

    /// The name that answers have.
    pub fn first(&self) -> &str {
        self.0.first().map_or("", String::as_str)
    }

    /// Whether the model has this name.
    pub fn serves(&self, name: &str) -> bool {
        self.0.iter().any(|own| own == name)
    }

    /// All of them, in the order in which they were given.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl fmt::Display for ModelNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{name:?}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(given: &[&str]) -> Result<ModelNames, String> {
        let given = given.iter().map(|name| (*name).to_owned()).collect();
        ModelNames::new(given, "own").map_err(|error| error.to_string())
    }

    #[test]
    fn the_models_own_name_is_for_where_none_is_given() {
        let own = names(&[]).unwrap();
        assert!(own.serves("own") && !own.serves("other"));
        let given = names(&["a", "org/b"]).unwrap();
        assert!(given.serves("a") && given.serves("org/b") && !given.serves("own"));
        assert_eq!(given.first(), "a");
        assert_eq!(given.to_string(), "\"a\", \"org/b\"");
    }

    #[test]
    fn names_that_are_none_are_refused() {
        assert!(names(&["a", ""]).unwrap_err().contains("empty"));
        assert!(names(&["a", "b", "a"]).unwrap_err().contains("twice"));
        let many: Vec<String> = (0..65).map(|i| i.to_string()).collect();
        assert!(ModelNames::new(many, "own").is_err());
    }
}
