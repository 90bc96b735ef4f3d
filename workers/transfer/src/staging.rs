//! Host memory beside an arena that peers cannot read in place.

use std::ops::Range;
use std::sync::Arc;

/// Bytes of a slot, and of what is asked for at once. Some of them in flight fill a link of 100 Gbit/s over a millisecond.
pub const STAGING_SLOT_BYTES: usize = 1 << 20;

/// Slots: half of them for what is sent, half for what comes.
pub const STAGING_SLOTS: usize = 64;

/// Host memory beside an arena, in [`STAGING_SLOTS`] slots of [`STAGING_SLOT_BYTES`], and copies between the two. Used by the
/// agent's thread alone.
///
/// Ranges are of bytes of the arena (of its whole allocation: probes go behind it), and not longer in all than a slot. They lie in
/// the slot one behind the other. A slot has one copy under way at most.
pub trait Staging {
    /// A slot's bytes. Nothing is under way in it.
    fn slot(&mut self, slot: usize) -> &mut [u8];

    /// Starts copying from the arena into a slot.
    ///
    /// # Errors
    /// What is wrong, as a sentence.
    fn fetch(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String>;

    /// Starts copying from a slot into the arena.
    ///
    /// # Errors
    /// What is wrong, as a sentence.
    fn store(&mut self, slot: usize, ranges: &[Range<u64>]) -> Result<(), String>;

    /// Whether the slot's copy has ended.
    ///
    /// # Errors
    /// What is wrong, as a sentence: then it is not known whether it ever will.
    fn is_done(&mut self, slot: usize) -> Result<bool, String>;
}

/// Makes a [`Staging`] on the agent's thread, when the first peer needs it.
pub type MakeStaging = Arc<dyn Fn() -> Result<Box<dyn Staging>, String> + Send + Sync>;
