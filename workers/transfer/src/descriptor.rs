//! A peer's descriptor: checked, and taken apart.
//!
//! Everything that can be checked without UCX is checked here, before the agent's thread sees it. What cannot be is the inside of
//! the address and of the remote keys: UCX trusts those blindly (docs/security.md).

use std::num::NonZeroU64;

use baton_protocol::{MemoryType, RankRegion, TransferDescriptor, UcxVersion};

use crate::TransferError;
use crate::seal::{Kind, unseal};

/// Longest worker address. A host with a dozen adapters has some 3 KiB.
const ADDRESS_BYTES_MAX: usize = 64 << 10;

/// Longest remote key. They have tens to hundreds of bytes.
const KEY_BYTES_MAX: usize = 16 << 10;

/// Most ranks of one worker.
const RANKS_MAX: usize = 256;

/// A peer that can be connected.
#[derive(Debug)]
pub(crate) struct PeerPlan {
    pub(crate) address: Vec<u8>,
    pub(crate) ranks: Vec<RankPlan>,
}

/// The arena of one of its ranks: not empty, and within the address space.
#[derive(Debug)]
pub(crate) struct RankPlan {
    /// None where the peer's UCX does not know the arena, which is GPU memory then.
    pub(crate) rkey: Option<Vec<u8>>,
    pub(crate) base: u64,
    pub(crate) bytes: NonZeroU64,
    pub(crate) memory: MemoryType,
}

impl PeerPlan {
    pub(crate) fn parse(
        descriptor: &TransferDescriptor,
        ours: UcxVersion,
    ) -> Result<Self, TransferError> {
        if !descriptor.ucx.compatible(ours) {
            return Err(TransferError::Version {
                theirs: descriptor.ucx,
                ours,
            });
        }
        let address = address(&descriptor.address.0)?;
        let ranks = match descriptor.ranks.len() {
            0 => return damaged("it names no arena".to_owned()),
            count if count > RANKS_MAX => {
                return damaged(format!("it names {count} arenas, {RANKS_MAX} at most"));
            }
            _ => descriptor.ranks.iter().map(RankPlan::parse),
        };
        let ranks = ranks.collect::<Result<Vec<_>, _>>()?;
        if ranks.len() > 1 && ranks.iter().any(|rank| rank.rkey.is_none()) {
            return damaged("one of several arenas has no remote key".to_owned());
        }
        Ok(Self { address, ranks })
    }

    /// A reader, which is only written to: nothing of its memory is named.
    pub(crate) fn reader(sealed: &[u8]) -> Result<Self, TransferError> {
        Ok(Self {
            address: address(sealed)?,
            ranks: Vec::new(),
        })
    }
}

impl RankPlan {
    fn parse(rank: &RankRegion) -> Result<Self, TransferError> {
        let RankRegion {
            ref rkey,
            base,
            bytes,
            memory,
        } = *rank;
        let Some(size) = NonZeroU64::new(bytes) else {
            return damaged("its arena has no bytes".to_owned());
        };
        if base == 0 || base.checked_add(bytes).is_none() {
            return damaged(format!(
                "its arena of {bytes} bytes at {base:#x} is outside of the address space"
            ));
        }
        let rkey = match rkey.0.as_slice() {
            [] if memory == MemoryType::Cuda => None,
            sealed => Some(opened(Kind::Key { base, bytes }, sealed, KEY_BYTES_MAX)?),
        };
        Ok(Self {
            rkey,
            base,
            bytes: size,
            memory,
        })
    }
}

fn address(sealed: &[u8]) -> Result<Vec<u8>, TransferError> {
    opened(Kind::Address, sealed, ADDRESS_BYTES_MAX)
}

fn opened(kind: Kind, sealed: &[u8], bytes_max: usize) -> Result<Vec<u8>, TransferError> {
    if sealed.len() > bytes_max {
        let length = sealed.len();
        return damaged(format!(
            "its {} has {length} bytes, {bytes_max} at most",
            kind.name()
        ));
    }
    Ok(unseal(kind, sealed)?.to_vec())
}

fn damaged<T>(detail: String) -> Result<T, TransferError> {
    Err(TransferError::Descriptor(detail))
}

#[cfg(test)]
mod tests {
    use baton_protocol::Base64Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::seal::seal;

    const OURS: UcxVersion = UcxVersion(1, 13, 1);

    /// As a peer makes it that means harm: every field is of its choice, and every seal is whole.
    fn sealed(base: u64, bytes: u64, memory: MemoryType, has_key: bool) -> TransferDescriptor {
        let rkey = match has_key {
            true => seal(Kind::Key { base, bytes }, b"key"),
            false => Vec::new(),
        };
        TransferDescriptor {
            ucx: OURS,
            address: Base64Bytes(seal(Kind::Address, b"address")),
            ranks: vec![RankRegion {
                rkey: Base64Bytes(rkey),
                base,
                bytes,
                memory,
            }],
        }
    }

    fn refusal(descriptor: &TransferDescriptor) -> String {
        match PeerPlan::parse(descriptor, OURS) {
            Err(TransferError::Descriptor(detail)) => detail,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_arena_without_bytes_or_outside_of_the_address_space_is_refused() {
        use MemoryType::{Cuda, Host};
        for (memory, has_key) in [(Host, true), (Cuda, true), (Cuda, false)] {
            let refused = |base, bytes| refusal(&sealed(base, bytes, memory, has_key));
            assert!(refused(4096, 0).contains("no bytes"));
            assert!(refused(0, 4096).contains("address space"));
            assert!(refused(u64::MAX, 2).contains("address space"));
            assert!(PeerPlan::parse(&sealed(4096, 1, memory, has_key), OURS).is_ok());
        }
        assert!(refusal(&sealed(4096, 1, Host, false)).contains("cut short"));
    }

    #[test]
    fn what_is_too_long_or_too_much_is_refused() {
        let good = sealed(4096, 8, MemoryType::Host, true);
        let long = vec![7; ADDRESS_BYTES_MAX];
        let mut address = good.clone();
        address.address = Base64Bytes(seal(Kind::Address, &long));
        assert!(refusal(&address).contains("at most"));
        assert!(PeerPlan::reader(&address.address.0).is_err());
        let mut key = good.clone();
        let place = Kind::Key {
            base: 4096,
            bytes: 8,
        };
        key.ranks[0].rkey = Base64Bytes(seal(place, &long));
        assert!(refusal(&key).contains("at most"));
        let mut ranks = good.clone();
        ranks.ranks = vec![ranks.ranks[0].clone(); RANKS_MAX + 1];
        assert!(refusal(&ranks).contains("257 arenas"));
        let mut mixed = good;
        let staged = sealed(4096, 8, MemoryType::Cuda, false);
        mixed.ranks.extend(staged.ranks);
        assert!(refusal(&mixed).contains("no remote key"));
    }

    proptest! {
        #[test]
        fn what_is_taken_can_be_read_from_end_to_end(base: u64, bytes: u64, gpu: bool, has_key: bool) {
            let memory = if gpu { MemoryType::Cuda } else { MemoryType::Host };
            if let Ok(plan) = PeerPlan::parse(&sealed(base, bytes, memory, has_key), OURS) {
                let rank = &plan.ranks[0];
                prop_assert!(rank.base.checked_add(rank.bytes.get()).is_some());
                prop_assert_eq!(rank.rkey.is_none(), gpu && !has_key);
            }
        }
    }
}
