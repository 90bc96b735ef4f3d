//! Names and numbers that identify workers, requests and staged KV.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::ProtocolError;

/// Longest name of a worker, an API server or a cluster, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// A name becomes one token of a NATS subject, so it may hold only what cannot split or match one.
pub(crate) fn check_name(what: &'static str, name: &str) -> Result<(), ProtocolError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
        return Err(ProtocolError::Name {
            what,
            name: name.chars().take(NAME_BYTES_MAX).collect(),
        });
    }
    Ok(())
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Parses a name: 1 to 64 of `A-Z a-z 0-9 - _`.
            ///
            /// # Errors
            /// [`ProtocolError::Name`] for any other text.
            pub fn new(name: impl Into<String>) -> Result<Self, ProtocolError> {
                let name = name.into();
                check_name($what, &name)?;
                Ok(Self(name))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(de::Error::custom)
            }
        }
    };
}

name_id!(
    /// A worker's name, unique in its cluster at any one time.
    WorkerId,
    "worker"
);
name_id!(
    /// An API server's name, unique in its cluster at any one time.
    ApiServerId,
    "API server"
);

/// What these hexadecimal digits say, 32 of them at most. Every token comes with an id, and the standard library goes digit by digit
/// through numbers of 128 bits.
fn hex(digits: &[u8]) -> Option<u128> {
    let half = |digits: &[u8]| {
        digits.iter().try_fold(0, |value: u64, digit| {
            let digit = char::from(*digit).to_digit(16)?;
            Some(value << 4 | u64::from(digit))
        })
    };
    let (high, low) = digits.split_at(digits.len().saturating_sub(16));
    Some(u128::from(half(high)?) << 64 | u128::from(half(low)?))
}

macro_rules! hex_id {
    ($(#[$attribute:meta])* $name:ident, $inner:ty, $digits:literal) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{:0", $digits, "x}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ProtocolError;

            fn from_str(text: &str) -> Result<Self, ProtocolError> {
                const DIGITS: usize = size_of::<$inner>() * 2;
                let digits: Option<&[u8; DIGITS]> = text.as_bytes().try_into().ok();
                let value = digits.and_then(|digits| hex(digits));
                match value.and_then(|value| value.try_into().ok()) {
                    Some(value) => Ok(Self(value)),
                    None => Err(ProtocolError::Hex {
                        what: stringify!($name),
                        digits: DIGITS,
                        text: text.chars().take(40).collect(),
                    }),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        write!(f, concat!($digits, " hexadecimal digits"))
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }
    };
}

hex_id!(
    /// One generation (one choice of one HTTP request), drawn at random by the API server. It stays
    /// the same when the request is retried elsewhere.
    RequestId,
    u128,
    "32"
);
hex_id!(
    /// Which life of a worker this is, drawn at random when the process starts. A restarted worker
    /// keeps its name and changes this, so nothing of the old life is taken for the new.
    Incarnation,
    u64,
    "16"
);
hex_id!(
    /// One staged KV cache on one incarnation of a context worker.
    HandleId,
    u64,
    "16"
);
hex_id!(
    /// One trace of W3C Trace Context; 0 is none.
    TraceId,
    u128,
    "32"
);
hex_id!(
    /// One span of a trace; 0 is none.
    SpanId,
    u64,
    "16"
);
hex_id!(
    /// Proof that a release comes from somebody who was given the handle.
    Nonce,
    u128,
    "32"
);

hex_id!(
    /// Whose KV may be shared: sequences with different salts never use each other's KV, also where their tokens are the same. A
    /// tenant has one, or whatever else sets prompts of equal tokens apart. 0, [`CacheSalt::NONE`], is shared by all that have none.
    #[derive(Default)]
    CacheSalt,
    u128,
    "32"
);

impl CacheSalt {
    /// Shared with everybody who has no salt.
    pub const NONE: Self = Self(0);

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}

/// SHA-256 over everything that decides a model's output: configuration, tokenizer and weights.
/// `model-prep` writes it into the manifest. 64 lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct ModelFingerprint(String);

impl ModelFingerprint {
    /// Parses 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`ProtocolError::Hex`] for any other text.
    pub fn new(text: impl Into<String>) -> Result<Self, ProtocolError> {
        let text = text.into();
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            let text = text.chars().take(80).collect();
            return Err(ProtocolError::Hex {
                what: "ModelFingerprint",
                digits: 64,
                text,
            });
        }
        Ok(Self(text.to_ascii_lowercase()))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ModelFingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_all_digits_is_no_id() {
        let digits = RequestId(u128::MAX).to_string();
        for (at, wrong) in [
            (0, "+"),
            (15, "g"),
            (16, "-"),
            (31, " "),
            (30, "é"),
            (0, ""),
            (31, "00"),
        ] {
            let mut text = digits.clone();
            text.replace_range(at..(at + wrong.len()).clamp(at + 1, 32), wrong);
            assert!(text.parse::<RequestId>().is_err(), "{text}");
        }
    }
}
