//! Messages to bytes and back, with size and version checked in one place.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::limits::{BEAT_BYTES_MAX, MESSAGE_BYTES_MAX, PREFIXES_BYTES_MAX, SMALL_BYTES_MAX};
use crate::{
    Abort, ApiBeat, Beat, DecodeJob, DecodeReply, Drain, Draining, Hello, LeaseAsk, LeaseReply,
    PROTOCOL_VERSION, PeersReply, PrefillJob, PrefillReply, PrefixPage, PrefixReport, PrefixesAsk,
    Progress, ProgressReply, ProtocolError, Release, Released, Renew, Renewed, TokenFrame,
    WorkerDescriptor,
};

/// A message that may travel on the bus.
pub trait Versioned: Serialize + DeserializeOwned {
    /// Its name in errors.
    const NAME: &'static str;

    /// Its largest size in bytes. What is larger is refused unread.
    const BYTES_MAX: usize;

    /// What else is wrong with one that can be read, as a sentence: it holds more than a receiver keeps.
    ///
    /// # Errors
    /// That sentence.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

macro_rules! versioned {
    ($bytes_max:expr; $($message:ident),* $(,)?) => {
        $(impl Versioned for $message {
            const NAME: &'static str = stringify!($message);
            const BYTES_MAX: usize = $bytes_max;
        })*
    };
}

versioned!(
    MESSAGE_BYTES_MAX;
    DecodeJob,
    DecodeReply,
    LeaseAsk,
    LeaseReply,
    PrefillJob,
    PrefillReply,
    TokenFrame,
    WorkerDescriptor,
);

versioned!(
    SMALL_BYTES_MAX;
    Abort,
    ApiBeat,
    Drain,
    Draining,
    Hello,
    PrefixesAsk,
    Progress,
    ProgressReply,
    Release,
    Released,
    Renew,
    Renewed,
);

impl Versioned for Beat {
    const NAME: &'static str = "Beat";
    const BYTES_MAX: usize = BEAT_BYTES_MAX;

    fn check(&self) -> Result<(), String> {
        Self::check(self)
    }
}

impl Versioned for PeersReply {
    const NAME: &'static str = "PeersReply";
    const BYTES_MAX: usize = MESSAGE_BYTES_MAX;

    fn check(&self) -> Result<(), String> {
        Self::check(self)
    }
}

impl Versioned for PrefixReport {
    const NAME: &'static str = "PrefixReport";
    const BYTES_MAX: usize = PREFIXES_BYTES_MAX;

    fn check(&self) -> Result<(), String> {
        Self::check(self)
    }
}

impl Versioned for PrefixPage {
    const NAME: &'static str = "PrefixPage";
    const BYTES_MAX: usize = PREFIXES_BYTES_MAX;

    fn check(&self) -> Result<(), String> {
        Self::check(self)
    }
}

/// The bytes of a message.
///
/// # Errors
/// [`ProtocolError::TooLarge`] over the bound; [`ProtocolError::Json`] for numbers JSON cannot hold.
pub fn encode<M: Versioned>(message: &M) -> Result<Vec<u8>, ProtocolError> {
    let bytes = serde_json::to_vec(message).map_err(|error| ProtocolError::Json {
        what: M::NAME,
        detail: error.to_string(),
    })?;
    check_size::<M>(bytes.len())?;
    Ok(bytes)
}

/// The message in these bytes.
///
/// # Errors
/// [`ProtocolError::TooLarge`], [`ProtocolError::Version`] for another protocol version, and
/// [`ProtocolError::Json`] for anything that is not this message.
pub fn decode<M: Versioned>(bytes: &[u8]) -> Result<M, ProtocolError> {
    check_size::<M>(bytes.len())?;
    let message = read::<M>(bytes)?;
    message.check().map_err(|detail| ProtocolError::Json {
        what: M::NAME,
        detail,
    })?;
    Ok(message)
}

fn read<M: Versioned>(bytes: &[u8]) -> Result<M, ProtocolError> {
    let json = |error: serde_json::Error| ProtocolError::Json {
        what: M::NAME,
        detail: short(error.to_string()),
    };
    match serde_json::from_slice::<M>(bytes) {
        // Another version may parse by luck: its own number decides, not the shape. Where it does not
        // stand first (replies begin with their outcome) it is looked for in a second, shallow scan.
        Ok(message) if version_stands_first(bytes) => Ok(message),
        outcome => {
            let Header { v } = serde_json::from_slice(bytes).map_err(json)?;
            if v != PROTOCOL_VERSION {
                return Err(ProtocolError::Version {
                    theirs: v,
                    ours: PROTOCOL_VERSION,
                });
            }
            outcome.map_err(json)
        }
    }
}

#[derive(Deserialize)]
struct Header {
    v: u16,
}

fn version_stands_first(bytes: &[u8]) -> bool {
    const PREFIX: &str = "{\"v\":2,";
    const { assert!(PROTOCOL_VERSION == 2) };
    bytes.starts_with(PREFIX.as_bytes())
}

/// What a parser quotes of a message may be as long as the message, and goes into logs and refusals: its beginning and its
/// end, which says where, will do.
fn short(detail: String) -> String {
    const HALF_CHARS: usize = 100;
    let count = detail.chars().count();
    if count <= 2 * HALF_CHARS {
        return detail;
    }
    let begin: String = detail.chars().take(HALF_CHARS).collect();
    let end: String = detail.chars().skip(count - HALF_CHARS).collect();
    format!("{begin} … {end}")
}

/// The text, or as much of its beginning as fits into so many bytes with a mark that it goes on.
pub fn cut(text: impl Into<String>, bytes_max: usize) -> String {
    const MARK: &str = " …";
    let mut text = text.into();
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max.saturating_sub(MARK.len())));
        text.push_str(MARK);
    }
    text
}

fn check_size<M: Versioned>(bytes: usize) -> Result<(), ProtocolError> {
    let (what, bytes_max) = (M::NAME, M::BYTES_MAX);
    if bytes > bytes_max {
        return Err(ProtocolError::TooLarge {
            what,
            bytes,
            bytes_max,
        });
    }
    Ok(())
}
