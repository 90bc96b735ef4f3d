//! Compact forms of token ids and raw bytes inside JSON.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Token ids, in JSON one base64 string of little-endian `u32`: 5.3 characters a token, and nothing
/// to parse digit by digit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedTokens(pub Vec<u32>);

impl Serialize for PackedTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self
            .0
            .iter()
            .flat_map(|token| token.to_le_bytes())
            .collect();
        serializer.serialize_str(&STANDARD.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for PackedTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = PackedTokens;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a base64 string")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PackedTokens, E> {
                // An engine step makes a token or a few: their bytes need no allocation.
                let mut few = [0; FEW_BYTES];
                if text.len() <= FEW_BYTES / 3 * 4 {
                    let bytes = STANDARD.decode_slice(text, &mut few).map_err(E::custom)?;
                    return words(&few[..bytes]);
                }
                words(&STANDARD.decode(text).map_err(E::custom)?)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// Bytes of a few tokens.
const FEW_BYTES: usize = 48;

fn words<E: de::Error>(bytes: &[u8]) -> Result<PackedTokens, E> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(E::custom(
            "packed tokens are not a whole number of 32-bit words",
        ));
    }
    let tokens = words.iter().map(|word| u32::from_le_bytes(*word));
    Ok(PackedTokens(tokens.collect()))
}

impl From<Vec<u32>> for PackedTokens {
    fn from(tokens: Vec<u32>) -> Self {
        Self(tokens)
    }
}

/// Links of blocks ([`crate::prefix_chain`]), in JSON one base64 string of little-endian `u64`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedLinks(pub Vec<u64>);

impl Serialize for PackedLinks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|link| link.to_le_bytes()).collect();
        serializer.serialize_str(&STANDARD.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for PackedLinks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Base64Bytes(bytes) = Base64Bytes::deserialize(deserializer)?;
        match bytes.as_chunks::<8>() {
            (links, []) => Ok(Self(
                links.iter().map(|link| u64::from_le_bytes(*link)).collect(),
            )),
            _ => Err(de::Error::custom(
                "packed links are not a whole number of 64-bit words",
            )),
        }
    }
}

/// Raw bytes, in JSON a base64 string.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base64Bytes(pub Vec<u8>);

impl Serialize for Base64Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Base64Bytes;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a base64 string")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Base64Bytes, E> {
                STANDARD.decode(text).map(Base64Bytes).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}
