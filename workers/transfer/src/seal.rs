//! A frame around bytes that only UCX understands.
//!
//! UCX trusts worker addresses and remote keys blindly: a truncated or altered one makes it read out of
//! bounds. They travel framed, so that damage ends in a sentence and not in a crash. This guards against
//! accidents, not against somebody on the bus who means harm.

use crate::TransferError;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A UCX worker address.
    Address,
    /// A packed remote key, for an arena that lies here in its owner's address space.
    Key {
        /// Address of its first byte.
        base: u64,
        /// Its length.
        bytes: u64,
    },
}

impl Kind {
    /// What stands before the bytes. A key's place is part of it: UCX would read from any other.
    fn head(self) -> Vec<u8> {
        match self {
            Self::Address => b"UCXa".to_vec(),
            Self::Key { base, bytes } => [
                b"UCXk".as_slice(),
                &base.to_le_bytes(),
                &bytes.to_le_bytes(),
            ]
            .concat(),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Address => "worker address",
            Self::Key { .. } => "remote key",
        }
    }
}

/// Head, bytes, checksum.
pub(crate) fn seal(kind: Kind, bytes: &[u8]) -> Vec<u8> {
    let mut framed = kind.head();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(&fnv1a(&framed).to_le_bytes());
    framed
}

/// The bytes, if they are whole.
pub(crate) fn unseal(kind: Kind, framed: &[u8]) -> Result<&[u8], TransferError> {
    let damaged = |what| {
        Err(TransferError::Descriptor(format!(
            "its {} {what}",
            kind.name()
        )))
    };
    let Some((body, checksum)) = framed.split_last_chunk::<8>() else {
        return damaged("is cut short");
    };
    if fnv1a(body) != u64::from_le_bytes(*checksum) {
        return damaged("does not match its checksum");
    }
    match body.strip_prefix(kind.head().as_slice()) {
        Some(bytes) if !bytes.is_empty() => Ok(bytes),
        _ => damaged("belongs to something else"),
    }
}

/// FNV-1a, 64 bits: <http://www.isthe.com/chongo/tech/comp/fnv/>.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whole_frames_open(bytes in prop::collection::vec(any::<u8>(), 1..300)) {
            let key = Kind::Key { base: 4096, bytes: 100 };
            let framed = seal(key, &bytes);
            prop_assert_eq!(unseal(key, &framed), Ok(&bytes[..]));
            let elsewhere = Kind::Key { base: 4096, bytes: 101 };
            prop_assert!(unseal(elsewhere, &framed).is_err());
            prop_assert!(unseal(Kind::Address, &framed).is_err());
        }

        #[test]
        fn damage_is_seen(bytes in prop::collection::vec(any::<u8>(), 1..300), at in any::<prop::sample::Index>(), flip in 1u8..) {
            let framed = seal(Kind::Address, &bytes);
            let cut = at.index(framed.len());
            prop_assert!(unseal(Kind::Address, &framed[..cut]).is_err());
            let mut altered = framed;
            altered[cut] ^= flip;
            prop_assert!(unseal(Kind::Address, &altered).is_err());
        }
    }
}
