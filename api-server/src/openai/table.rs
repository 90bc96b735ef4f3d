//! What Baton does with each field of a request body. One table for all doors, so that nothing that changes an answer is ignored: a
//! field is done, accepted because the answer is the same without it, or refused by its name.

mod messages;
mod responses;
mod rows;
mod types;
mod typo;

use serde_json::{Map, Value};

use super::fields::wrong_type;
use crate::error::ApiError;

pub use self::types::json_type;
pub use self::typo::nearest;

/// Every field that is known, in the order of the page.
pub fn fields() -> impl Iterator<Item = &'static Field> {
    [rows::FIELDS, responses::FIELDS, messages::FIELDS]
        .into_iter()
        .flatten()
}

/// Longest part of an unknown name that is quoted.
const NAME_CHARS_MAX: usize = 64;

/// A path that takes a JSON body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `/v1/chat/completions`.
    Chat = 1,
    /// `/v1/completions`.
    Text = 2,
    /// `/tokenize`.
    Tokenize = 4,
    /// `/detokenize`.
    Detokenize = 8,
    /// `/v1/responses`.
    Responses = 16,
    /// `/v1/messages`.
    Messages = 32,
    /// `/v1/messages/count_tokens`.
    CountTokens = 64,
}

impl Door {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Chat,
        Self::Text,
        Self::Tokenize,
        Self::Detokenize,
        Self::Responses,
        Self::Messages,
        Self::CountTokens,
    ];

    /// Its path.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Text => "/v1/completions",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
            Self::CountTokens => "/v1/messages/count_tokens",
        }
    }
}

/// A set of doors: the sum of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doors(pub u8);

impl Doors {
    /// Whether this door is one of them.
    pub const fn has(self, door: Door) -> bool {
        self.0 & door as u8 != 0
    }

    /// Their paths.
    pub fn paths(self) -> impl Iterator<Item = &'static str> {
        let doors = Door::ALL.into_iter();
        doors.filter(move |door| self.has(*door)).map(Door::path)
    }
}

/// What Baton does with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    /// What it says.
    It,
    /// Nothing: the answer is the same without it.
    Nothing,
    /// 400, unless the value is one of these, in JSON, that ask for nothing. `null` is as if it were absent.
    Refuses(&'static [&'static str]),
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name; that of a field within an object has a point.
    pub name: &'static str,
    /// Where it is known.
    pub doors: Doors,
    /// What happens.
    pub does: Does,
    /// What it means, why it does nothing, or what to do instead.
    pub about: &'static str,
}

const fn done(name: &'static str, doors: Doors, about: &'static str) -> Field {
    let does = Does::It;
    Field {
        name,
        doors,
        does,
        about,
    }
}

const fn accepted(name: &'static str, doors: Doors, about: &'static str) -> Field {
    let does = Does::Nothing;
    Field {
        name,
        doors,
        does,
        about,
    }
}

const fn refused(
    name: &'static str,
    doors: Doors,
    harmless: &'static [&'static str],
    about: &'static str,
) -> Field {
    let does = Does::Refuses(harmless);
    Field {
        name,
        doors,
        does,
        about,
    }
}

/// Refuses what this door does not know, or knows and does not do.
///
/// # Errors
/// 400 that names the first such field, and the one that was meant, if a known one is spelled nearly so.
pub fn check(door: Door, fields: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        match row(door, name) {
            Some(field) => field.check(name, value)?,
            None => return Err(unknown(door, "", name)),
        }
    }
    Ok(())
}

/// As [`check`], for the fields of an object within the body.
///
/// # Errors
/// As [`check`].
pub fn check_within(door: Door, parent: &str, fields: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let path = format!("{parent}.{name}");
        match row(door, &path) {
            Some(field) => field.check(&path, value)?,
            None => return Err(unknown(door, parent, name)),
        }
    }
    Ok(())
}

/// The known name that a message's field is nearly spelled like, if it is not known itself. Templates may read any other.
pub fn misspelled(name: &str, known: &[&'static str]) -> Option<&'static str> {
    match known.contains(&name) {
        true => None,
        false => nearest(name, known.iter().copied()),
    }
}

fn row(door: Door, name: &str) -> Option<&'static Field> {
    fields().find(|field| field.name == name && field.doors.has(door))
}

impl Field {
    fn check(&self, name: &str, value: &Value) -> Result<(), ApiError> {
        let Does::Refuses(harmless) = self.does else {
            return Ok(());
        };
        let same = |text: &&str| {
            let harmless: Value = serde_json::from_str(text).unwrap_or_default();
            match (harmless.as_f64(), value.as_f64()) {
                (Some(one), Some(other)) => one == other,
                _ => harmless == *value,
            }
        };
        match harmless.iter().any(same) {
            true => Ok(()),
            false => {
                let message = format!("{name} is not supported by this server: {}", self.about);
                Err(ApiError::param(name, message))
            }
        }
    }
}

fn unknown(door: Door, parent: &str, name: &str) -> ApiError {
    let short: String = name.chars().take(NAME_CHARS_MAX).collect();
    let path = match parent.is_empty() {
        true => short,
        false => format!("{parent}.{short}"),
    };
    if let Some(field) = fields().find(|field| field.name == path) {
        let same = fields().filter(|other| other.name == field.name);
        let others: Vec<_> = same.flat_map(|field| field.doors.paths()).collect();
        let message = format!(
            "{path} is a field of {}, not of {}",
            others.join(" and "),
            door.path()
        );
        return ApiError::param(path, message);
    }
    let known = fields().filter(|field| field.doors.has(door));
    let siblings = known.filter_map(|field| match parent.is_empty() {
        true => (!field.name.contains('.')).then_some(field.name),
        false => field.name.strip_prefix(parent)?.strip_prefix('.'),
    });
    let message = match nearest(name, siblings) {
        Some(meant) => format!("there is no field {path}: do you mean {meant}?"),
        None => format!(
            "there is no field {path} in requests to {}: leave it out. docs/api.md lists those that there are",
            door.path()
        ),
    };
    ApiError::param(path, message)
}

/// An object within the body, its fields checked.
///
/// # Errors
/// 400 if it is none, or as [`check`].
pub fn object<'a>(
    door: Door,
    name: &str,
    value: &'a Value,
) -> Result<&'a Map<String, Value>, ApiError> {
    match value {
        Value::Object(object) => {
            check_within(door, name, object)?;
            Ok(object)
        }
        other => Err(wrong_type(name, "an object", other)),
    }
}

#[cfg(test)]
mod tests;
