//! What readers and peers say to each other on the staged transport.
//!
//! A message is a head of [`HEAD_BYTES`] (kind, flag, two numbers, little-endian) and a body.

use std::ops::Range;

/// Identifier of UCX's active messages that carry these.
pub(super) const AM_ID: u32 = 0xBA;

/// Length of a head.
pub(super) const HEAD_BYTES: usize = 24;

pub(super) type Head = [u8; HEAD_BYTES];

/// A message's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Reader to peer: this is who I am. Body: the reader's address, sealed.
    Hello { reader: u64 },
    /// Peer to reader: ask away, or do not.
    Welcome { reader: u64, willing: bool },
    /// Reader to peer: send me these within this time. Body: [`ranges`].
    Ask {
        reader: u64,
        chunk: u64,
        budget_ms: u32,
    },
    /// Peer to reader: bytes of a chunk from `at` on. Body: the bytes.
    Data { chunk: u64, at: u32 },
    /// Peer to reader: a chunk will not come.
    Refused { chunk: u64 },
}

impl Message {
    pub(super) fn head(self) -> Head {
        let (kind, small, a, b): (u8, u32, u64, u64) = match self {
            Self::Hello { reader } => (1, 0, reader, 0),
            Self::Welcome { reader, willing } => (2, willing.into(), reader, 0),
            Self::Ask {
                reader,
                chunk,
                budget_ms,
            } => (3, budget_ms, reader, chunk),
            Self::Data { chunk, at } => (4, at, 0, chunk),
            Self::Refused { chunk } => (5, 0, 0, chunk),
        };
        let mut head = [0; HEAD_BYTES];
        head[0] = kind;
        head[4..8].copy_from_slice(&small.to_le_bytes());
        head[8..16].copy_from_slice(&a.to_le_bytes());
        head[16..24].copy_from_slice(&b.to_le_bytes());
        head
    }

    /// `None` if it is none of ours.
    pub(super) fn parse(head: &[u8]) -> Option<Self> {
        let head: &Head = head.try_into().ok()?;
        let small = u32::from_le_bytes(head[4..8].try_into().ok()?);
        let a = u64::from_le_bytes(head[8..16].try_into().ok()?);
        let b = u64::from_le_bytes(head[16..24].try_into().ok()?);
        Some(match head[0] {
            1 => Self::Hello { reader: a },
            2 => Self::Welcome {
                reader: a,
                willing: small == 1,
            },
            3 => Self::Ask {
                reader: a,
                chunk: b,
                budget_ms: small,
            },
            4 => Self::Data {
                chunk: b,
                at: small,
            },
            5 => Self::Refused { chunk: b },
            _ => return None,
        })
    }
}

/// The body of an `Ask`: first byte and length of each range.
pub(super) fn ranges_body(ranges: &[Range<u64>]) -> Vec<u8> {
    let pairs = ranges
        .iter()
        .map(|range| [range.start, range.end - range.start]);
    pairs.flatten().flat_map(u64::to_le_bytes).collect()
}

/// Ranges from the body of an `Ask`, if they are sound: within `bytes`, at most `count_max`, at least one, none empty.
pub(super) fn ranges(body: &[u8], bytes: u64, count_max: usize) -> Option<Vec<Range<u64>>> {
    let (pairs, rest) = body.as_chunks::<16>();
    if !rest.is_empty() || pairs.is_empty() || pairs.len() > count_max {
        return None;
    }
    pairs
        .iter()
        .map(|pair| {
            let (first, length) = pair.split_at(8);
            let start = u64::from_le_bytes(first.try_into().ok()?);
            let length = u64::from_le_bytes(length.try_into().ok()?);
            let end = start.checked_add(length)?;
            (length > 0 && end <= bytes).then_some(start..end)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_as_they_went() {
        for message in [
            Message::Hello { reader: u64::MAX },
            Message::Welcome {
                reader: 7,
                willing: true,
            },
            Message::Welcome {
                reader: 7,
                willing: false,
            },
            Message::Ask {
                reader: 1,
                chunk: 2,
                budget_ms: 3,
            },
            Message::Data { chunk: 5, at: 6 },
            Message::Refused { chunk: 9 },
        ] {
            assert_eq!(Message::parse(&message.head()), Some(message));
        }
        assert_eq!(Message::parse(&[0; HEAD_BYTES]), None);
        assert_eq!(Message::parse(&[1; HEAD_BYTES - 1]), None);
    }

    #[test]
    fn unsound_ranges_are_refused() {
        let (first, second) = (0..10, 20..21);
        let sound = [first, second];
        assert_eq!(ranges(&ranges_body(&sound), 21, 2), Some(sound.to_vec()));
        assert_eq!(ranges(&ranges_body(&sound), 20, 2), None);
        assert_eq!(ranges(&ranges_body(&sound), 21, 1), None);
        assert_eq!(ranges(&ranges_body(&sound)[1..], 21, 2), None);
        assert_eq!(ranges(&[], 21, 2), None);
        let beyond = [u64::MAX.to_le_bytes(), 2u64.to_le_bytes()].concat();
        assert_eq!(ranges(&beyond, u64::MAX, 2), None);
        let empty = [[0; 8], [0; 8]].concat();
        assert_eq!(ranges(&empty, 21, 2), None);
    }
}
