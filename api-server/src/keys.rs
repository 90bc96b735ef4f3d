//! API keys: who may ask, and how much at once.
//!
//! A server without keys serves everybody who reaches it. With keys every path wants one, but those that only say how
//! the server is ([`OPEN_PATHS`]). Keys are kept and compared as SHA-256 digests, all of them each time, so neither the
//! time of a comparison nor a dump of memory tells a key.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::bound::Bound;
use crate::error::{ApiError, ErrorKind};

/// What load balancers and Prometheus ask for, without a key. The page at `/` is open too, and so is what describes the API.
pub const OPEN_PATHS: [&str; 4] = ["/health", "/live", "/metrics", "/ping"];

/// Shorter keys can be guessed.
const KEY_BYTES_MIN: usize = 16;

/// More is a wrong file.
const KEYS_MAX: usize = 10_000;

/// The keys of a server.
#[derive(Debug, Default)]
pub struct ApiKeys {
    keys: Vec<Arc<Key>>,
}

/// One key, and what is under way for it.
pub struct Key {
    /// Its name in logs; `key-3` for the third without one.
    pub name: String,
    digest: [u8; 32],
    /// Its choices under way.
    pub in_flight: Bound,
}

impl ApiKeys {
    /// Reads keys, one a line: `KEY` or `NAME KEY`. Empty lines and those that begin with `#` are left out.
    ///
    /// # Errors
    /// A sentence that names the line, and never a key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys: Vec<Arc<Key>> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |what: &str| Err(format!("line {}: {what}", index + 1));
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, key) = match words[..] {
                [key] => (format!("key-{}", keys.len() + 1), key),
                [name, key] => (name.to_owned(), key),
                _ => return wrong("more than a name and a key"),
            };
            if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return wrong("a key is of printable ASCII characters");
            }
            if key.len() < KEY_BYTES_MIN {
                return wrong(
                    "a key of fewer than 16 characters can be guessed; `openssl rand -hex 24` makes a good one",
                );
            }
            let digest = Sha256::digest(key).into();
            if keys.iter().any(|k| k.name == name || k.digest == digest) {
                return wrong("this name or key stands further up too");
            }
            if keys.len() == KEYS_MAX {
                return wrong("more than 10,000 keys");
            }
            keys.push(Arc::new(Key {
                name,
                digest,
                in_flight: Bound::new(usize::MAX),
            }));
        }
        if keys.is_empty() {
            return Err(
                "there is no key in it; leave the setting out to serve without keys".to_owned(),
            );
        }
        Ok(Self { keys })
    }

    /// As [`Self::parse`], from a file.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
        text.and_then(|text| Self::parse(&text))
            .map_err(|error| format!("API keys in {}: {error}", path.display()))
    }

    /// The same with a bound on the generations under way for each key.
    #[must_use]
    pub fn with_in_flight_max(self, in_flight_max: Option<usize>) -> Self {
        let bounded = |key: Arc<Key>| {
            Arc::new(Key {
                name: key.name.clone(),
                digest: key.digest,
                in_flight: Bound::new(in_flight_max.unwrap_or(usize::MAX)),
            })
        };
        let keys = self.keys.into_iter().map(bounded).collect();
        Self { keys }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether everybody is served.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The key that an `Authorization` header or an `x-api-key` header gives; where there are both, either may be known.
    ///
    /// # Errors
    /// 401, with what is missing.
    pub fn check(
        &self,
        authorization: Option<&[u8]>,
        api_key: Option<&[u8]>,
    ) -> Result<Arc<Key>, ApiError> {
        let refused = |message: &str| Err(ApiError::new(ErrorKind::Unauthorized, message));
        let bearer = authorization.map(|header| match header.split_at_checked(7) {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => self.find(key),
            _ => refused("the Authorization header is not of the form: Bearer KEY"),
        });
        match (bearer, api_key) {
            (Some(Ok(key)), _) => Ok(key),
            (_, Some(key)) => self.find(key),
            (Some(refused), None) => refused,
            (None, None) => refused(
                "this server wants an API key: Authorization: Bearer KEY, or x-api-key: KEY",
            ),
        }
    }

    fn find(&self, key: &[u8]) -> Result<Arc<Key>, ApiError> {
        let digest: [u8; 32] = Sha256::digest(key.trim_ascii()).into();
        let mut found = u32::MAX;
        for (index, key) in self.keys.iter().enumerate() {
            let same: Choice = digest.ct_eq(&key.digest);
            found.conditional_assign(&(index as u32), same);
        }
        match self.keys.get(found as usize) {
            Some(key) => Ok(Arc::clone(key)),
            None => Err(ApiError::new(
                ErrorKind::Unauthorized,
                "this API key is not known here",
            )),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\n# people\nanna  sk-anna-0123456789\n  sk-nobody-0123456789  \n";

    #[test]
    fn a_key_is_found_whatever_stands_around_it() {
        let keys = ApiKeys::parse(TEXT).unwrap();
        assert_eq!(keys.len(), 2);
        let name = |header: &str| {
            keys.check(Some(header.as_bytes()), None)
                .map(|key| key.name.clone())
        };
        assert_eq!(name("Bearer sk-anna-0123456789").unwrap(), "anna");
        assert_eq!(name("bearer  sk-anna-0123456789 ").unwrap(), "anna");
        assert_eq!(name("Bearer sk-nobody-0123456789").unwrap(), "key-2");
        for wrong in [
            "Bearer sk-anna-012345678",
            "Bearer sk-anna-01234567890",
            "Bearer ",
            "Bearer",
            "Basic sk-anna-0123456789",
            "sk-anna-0123456789",
            "",
        ] {
            let error = name(wrong).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Unauthorized, "{wrong}");
        }
        assert!(keys.check(None, None).is_err());
        // Anthropic's header has the key alone.
        let (anna, nobody) = (b"sk-anna-0123456789", b"sk-bert-0123456789");
        let name = |bearer: Option<&[u8]>, key: &[u8]| {
            keys.check(bearer, Some(key)).map(|key| key.name.clone())
        };
        assert_eq!(name(None, anna).unwrap(), "anna");
        assert_eq!(name(Some(b"Bearer none"), anna).unwrap(), "anna");
        assert_eq!(
            name(Some(b"Bearer sk-anna-0123456789"), nobody).unwrap(),
            "anna"
        );
        assert!(name(None, nobody).is_err());
        assert!(name(None, b"Bearer sk-anna-0123456789").is_err());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_without_its_keys() {
        for (text, line) in [
            ("short", "line 1"),
            ("# only a comment\n", "no key"),
            ("a sk-0123456789abcdef x", "line 1"),
            ("a sk-0123456789abcdef\nb sk-0123456789abcdef", "line 2"),
            ("a sk-0123456789abcdef\na sk-0123456789abcdeg", "line 2"),
            ("a sk-0123456789abcdéf", "line 1"),
        ] {
            let error = ApiKeys::parse(text).unwrap_err();
            assert!(error.contains(line), "{error}");
            assert!(!error.contains("sk-"), "{error}");
        }
    }
}
