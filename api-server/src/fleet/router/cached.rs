//! How much of one prompt each worker has in its prefix index, as far as is known.

use crate::fleet::membership::Slot;

/// Blocks by slot. Its memory is kept for the next prompt.
#[derive(Debug, Default)]
pub(super) struct Cached {
    blocks: Vec<i32>,
}

impl Cached {
    /// Nobody has anything.
    pub(super) fn clear(&mut self) {
        self.blocks.fill(0);
    }

    /// The worker in this slot has at least so many blocks.
    #[inline]
    pub(super) fn raise(&mut self, slot: Slot, blocks: usize) {
        if slot >= self.blocks.len() {
            self.blocks.resize(slot + 1, 0);
        }
        self.blocks[slot] = self.blocks[slot].max(blocks.min(i32::MAX as usize) as i32);
    }

    /// Each worker has at least as many as here or there.
    pub(super) fn raise_all(&mut self, other: &Self) {
        if self.blocks.len() < other.blocks.len() {
            self.blocks.resize(other.blocks.len(), 0);
        }
        for (own, others) in self.blocks.iter_mut().zip(&other.blocks) {
            *own = (*own).max(*others);
        }
    }

    /// Blocks that the worker in this slot has.
    #[inline]
    pub(super) fn of(&self, slot: Slot) -> usize {
        self.blocks.get(slot).copied().unwrap_or(0) as usize
    }

    /// Blocks of each worker, by slot, as far as there are any.
    pub(super) fn all(&self) -> &[i32] {
        &self.blocks
    }
}
