//! Slots beside an arena in host memory.

use std::ops::Range;

use crate::staging::{STAGING_SLOT_BYTES, STAGING_SLOTS, Staging};

/// Copies are made at once.
pub(crate) struct HostStaging {
    base: *mut u8,
    bytes: u64,
    slots: Vec<u8>,
}

impl HostStaging {
    /// # Safety
    /// There are `bytes` bytes at `base` as long as this lives, and nobody else looks at those of a range while it is copied.
    pub(crate) unsafe fn new(base: *mut u8, bytes: u64) -> Self {
        Self {
            base,
            bytes,
            slots: vec![0; STAGING_SLOTS * STAGING_SLOT_BYTES],
        }
    }

    /// Each range with its place in the slot.
    fn pieces<'a>(
        &self,
        ranges: &'a [Range<u64>],
    ) -> Result<impl Iterator<Item = (*mut u8, Range<usize>)> + use<'a>, String> {
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        if total > STAGING_SLOT_BYTES as u64 || ranges.iter().any(|range| range.end > self.bytes) {
            return Err("ranges reach outside the arena or the slot".into());
        }
        let (base, mut at) = (self.base, 0);
        Ok(ranges.iter().map(move |range| {
            let begin = at;
            at += (range.end - range.start) as usize;
            (base.wrapping_add(range.start as usize), begin..at)
        }))
    }
}

impl Staging for HostStaging {
    fn slot(&mut self, slot: usize) -> &mut [u8] {
        &mut self.slots[slot * STAGING_SLOT_BYTES..][..STAGING_SLOT_BYTES]
    }

    fn fetch(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        for (from, place) in self.pieces(ranges)? {
            let to = &mut self.slot(slot)[place];
            // SAFETY: within the arena, as `pieces` checked; slots are memory of their own.
            unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from, to.len()) };
        }
        Ok(())
    }

    fn store(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String> {
        for (to, place) in self.pieces(ranges)? {
            let from = &self.slot(slot)[place];
            // SAFETY: as above.
            unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        }
        Ok(())
    }

    fn is_done(&mut self, _slot: usize) -> Result<bool, String> {
        Ok(true)
    }
}
