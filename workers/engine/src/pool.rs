//! The block pool: who holds which block of the arena.
//!
//! A block is in exactly one of these states:
//!
//! - free;
//! - held by one or more [`BlockTable`]s, and indexed as a reusable prefix or not;
//! - cached: indexed, held by nobody, evictable;
//! - quarantined: held by the one table of a broken transfer that may still write to it.
//!
//! A table that holds an indexed block holds the block's whole chain of parents, and gives its blocks
//! back last first. So among cached blocks a child has always waited longer than its parent: plain
//! least-recently-used order evicts leaves first, and every cached block can be evicted.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_protocol::CacheSalt;

use crate::evictable::EvictionList;
use crate::free_list::FreeList;
use crate::prefix::{Inserted, Parent, PrefixIndex};
use crate::table::BlockTable;

/// Handle to the blocks of one arena. Cheap to clone; blocks come back from any thread.
#[derive(Clone)]
pub struct BlockPool {
    shared: Arc<Shared>,
}

struct Shared {
    block_tokens: usize,
    blocks: u32,
    /// Held for microseconds at most, and never across a wait.
    state: Mutex<State>,
}

struct State {
    free: FreeList,
    cached: EvictionList,
    index: PrefixIndex,
    /// Tables that hold each block.
    holders: Vec<u32>,
    quarantined: Vec<bool>,
    quarantined_count: usize,
}

/// How many blocks are in which state; `total` is the sum of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Blocks of the arena.
    pub total: usize,
    /// Held by sequences, leases and pulls.
    pub used: usize,
    /// Hold a reusable prefix and nobody uses them; given out when nothing is free.
    pub cached: usize,
    /// Hold nothing.
    pub free: usize,
    /// Cannot be reused before a broken transfer has ended.
    pub quarantined: usize,
}

impl PoolStats {
    /// Blocks that [`BlockPool::reserve`] could hand out now.
    pub fn available(&self) -> usize {
        self.free + self.cached
    }
}

impl BlockPool {
    /// A pool over blocks `0 .. blocks` of `block_tokens` tokens each, all free.
    pub fn new(blocks: u32, block_tokens: u32) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        let state = State {
            free: FreeList::new(blocks),
            cached: EvictionList::new(blocks),
            index: PrefixIndex::new(blocks, block_tokens),
            holders: vec![0; blocks as usize],
            quarantined: vec![false; blocks as usize],
            quarantined_count: 0,
        };
        let shared = Shared {
            block_tokens: block_tokens as usize,
            blocks,
            state: Mutex::new(state),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Tokens of one block.
    pub fn block_tokens(&self) -> usize {
        self.shared.block_tokens
    }

    /// Take `blocks` blocks, neighbours where possible. Cached prefixes give way, least recently used
    /// first. `None` if there are not enough; then nothing is taken.
    pub fn reserve(&self, blocks: usize) -> Option<BlockTable> {
        let mut ids = Vec::with_capacity(blocks);
        self.state().take(blocks, &mut ids)?;
        Some(BlockTable::new(self.clone(), ids, 0))
    }

    /// Blocks for all of `tokens`, of which the first are shared if there is a salt to `reuse` KV of and their KV is known. At least the last
    /// token is left to compute, and never into a shared block. `keep_free` blocks stay available beyond those
    /// taken. `None` if there are not enough; then nothing is taken.
    pub(crate) fn admit(
        &self,
        tokens: &[u32],
        reuse: Option<CacheSalt>,
        keep_free: usize,
    ) -> Option<BlockTable> {
        let block_tokens = self.block_tokens();
        let total = tokens.len().div_ceil(block_tokens);
        let mut ids = Vec::with_capacity(total + 1);
        let mut state = self.state();
        if let Some(salt) = reuse {
            let reusable = tokens.len().saturating_sub(1) / block_tokens;
            let mut parent = Parent::Root(salt);
            for chunk in tokens.chunks_exact(block_tokens).take(reusable) {
                let Some(block) = state.index.find(parent, chunk) else {
                    break;
                };
                state.hold(block);
                ids.push(block);
                parent = Parent::Block(block);
            }
        }
        let shared = ids.len();
        let missing = total - shared;
        if state.available() < missing + keep_free || state.take(missing, &mut ids).is_none() {
            state.release(&ids);
            return None;
        }
        drop(state);
        Some(BlockTable::new(self.clone(), ids, shared))
    }

    /// How many blocks are in which state.
    pub fn stats(&self) -> PoolStats {
        self.state().stats()
    }

    /// Whether the pool's books agree with each other. Linear in the number of blocks: for idle moments and tests.
    ///
    /// # Errors
    /// The first disagreement, as a sentence. It is a defect of this crate.
    pub fn check(&self) -> Result<(), String> {
        self.state().check()
    }

    /// Index the full blocks of `tokens` that `ids[indexed..]` holds; the new number of indexed blocks. A block whose
    /// prefix is indexed already is exchanged for the one in the index, and goes to `given_up`, still held.
    pub(crate) fn index(
        &self,
        ids: &mut [u32],
        indexed: usize,
        salt: CacheSalt,
        tokens: &[u32],
        given_up: &mut Vec<u32>,
    ) -> usize {
        let mut state = self.state();
        let block_tokens = self.block_tokens();
        for (i, chunk) in tokens.chunks_exact(block_tokens).enumerate().skip(indexed) {
            let parent = match i.checked_sub(1) {
                None => Parent::Root(salt),
                Some(before) => Parent::Block(ids[before]),
            };
            match state.index.insert(ids[i], parent, chunk) {
                Inserted::New => {}
                Inserted::Exists(block) => {
                    state.hold(block);
                    given_up.push(std::mem::replace(&mut ids[i], block));
                }
                Inserted::Collision => return i,
            }
        }
        indexed.max(tokens.len() / block_tokens)
    }

    /// One more block for the table of `ids`.
    pub(crate) fn grow(&self, ids: &mut Vec<u32>) -> bool {
        let mut state = self.state();
        if state.free.len() == 0 && !state.evict_one() {
            return false;
        }
        let block = state
            .free
            .take_one(ids.last().copied())
            .expect("one is free");
        state.holders[block as usize] = 1;
        ids.push(block);
        true
    }

    pub(crate) fn release(&self, ids: &[u32]) {
        self.state().release(ids);
    }

    pub(crate) fn quarantine(&self, ids: &[u32]) {
        self.state().quarantine(ids);
    }

    /// The KV in these blocks of one table is not to be trusted: nobody finds it as a prefix any more, nor what goes on from it.
    /// Blocks that other tables hold too stay: whoever fails over them last forgets them.
    pub(crate) fn forget(&self, ids: &[u32]) {
        self.state().forget(ids);
    }

    /// Whether one table alone holds the block and no prefix can lead another to it: it may be written.
    pub(crate) fn is_private(&self, block: u32) -> bool {
        let state = self.state();
        state.holders[block as usize] == 1 && !state.index.contains(block)
    }

    /// Whether any table holds the block.
    #[cfg(test)]
    pub(crate) fn is_held(&self, block: u32) -> bool {
        self.state().holders[block as usize] > 0
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a failed assertion of this file; the books are checked by `check`.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "BlockPool({} blocks: {:?})",
            self.shared.blocks,
            self.stats()
        )
    }
}

// === impl State ===

impl State {
    fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    fn take(&mut self, blocks: usize, ids: &mut Vec<u32>) -> Option<()> {
        if self.available() < blocks {
            return None;
        }
        while self.free.len() < blocks {
            self.evict_one();
        }
        let first = ids.len();
        self.free.take(blocks, ids);
        for block in &ids[first..] {
            self.holders[*block as usize] = 1;
        }
        Some(())
    }

    fn evict_one(&mut self) -> bool {
        let Some(block) = self.cached.pop_front() else {
            return false;
        };
        self.index.remove(block);
        self.free.insert(block);
        true
    }

    /// One more table holds an indexed block.
    fn hold(&mut self, block: u32) {
        if self.holders[block as usize] == 0 {
            self.cached.remove(block);
        }
        self.holders[block as usize] += 1;
    }

    /// A table gives blocks back, the last first: see the top of this file.
    fn release(&mut self, ids: &[u32]) {
        for block in ids.iter().rev() {
            let holders = &mut self.holders[*block as usize];
            assert!(*holders > 0, "block {block} given back twice");
            *holders -= 1;
            if *holders > 0 {
                continue;
            }
            if std::mem::take(&mut self.quarantined[*block as usize]) {
                self.quarantined_count -= 1;
            }
            if self.index.contains(*block) {
                self.cached.push_back(*block);
            } else {
                self.free.insert(*block);
            }
        }
    }

    fn forget(&mut self, ids: &[u32]) {
        let own = |block: &u32| self.holders[*block as usize] == 1 && self.index.contains(*block);
        let mut doomed: Vec<u32> = ids.iter().copied().filter(own).collect();
        if doomed.is_empty() {
            return;
        }
        // Cached children stand before their parents.
        let cached: Vec<u32> = self.cached.iter().collect();
        let own = doomed.len();
        for block in cached.into_iter().rev() {
            if let Some(Parent::Block(parent)) = self.index.parent(block)
                && doomed.contains(&parent)
            {
                doomed.push(block);
            }
        }
        for block in doomed.drain(own..).rev() {
            self.cached.remove(block);
            self.index.remove(block);
            self.free.insert(block);
        }
        for block in doomed.into_iter().rev() {
            self.index.remove(block);
        }
    }

    /// Blocks that others hold too are not written by a transfer and do not count.
    fn quarantine(&mut self, ids: &[u32]) {
        for block in ids {
            let private = self.holders[*block as usize] == 1 && !self.index.contains(*block);
            if private && !std::mem::replace(&mut self.quarantined[*block as usize], true) {
                self.quarantined_count += 1;
            }
        }
    }

    fn stats(&self) -> PoolStats {
        let total = self.holders.len();
        let (cached, free) = (self.cached.len(), self.free.len());
        let quarantined = self.quarantined_count;
        PoolStats {
            total,
            used: total - cached - free - quarantined,
            cached,
            free,
            quarantined,
        }
    }

    fn check(&self) -> Result<(), String> {
        self.index.check()?;
        let (mut free, mut cached, mut quarantined) = (0, 0, 0);
        for block in 0..self.holders.len() as u32 {
            let holders = self.holders[block as usize];
            let indexed = self.index.contains(block);
            let is_free = self.free.contains(block);
            let is_cached = self.cached.contains(block);
            free += usize::from(is_free);
            cached += usize::from(is_cached);
            quarantined += usize::from(self.quarantined[block as usize]);
            if is_free != (holders == 0 && !indexed) || is_cached != (holders == 0 && indexed) {
                return Err(format!(
                    "block {block} has {holders} holders, indexed {indexed}, free {is_free}, cached {is_cached}"
                ));
            }
            if self.quarantined[block as usize] && (holders != 1 || indexed) {
                return Err(format!(
                    "block {block} is quarantined with {holders} holders"
                ));
            }
            if holders > 1 && !indexed {
                return Err(format!(
                    "block {block} has {holders} holders and is not indexed"
                ));
            }
            if let Some(Parent::Block(parent)) = self.index.parent(block)
                && self.holders[parent as usize] < holders
            {
                return Err(format!(
                    "block {block} has more holders than its parent {parent}"
                ));
            }
        }
        let counts = (self.free.len(), self.cached.len(), self.quarantined_count);
        if (free, cached, quarantined) != counts {
            return Err(format!(
                "counted {free} free, {cached} cached, {quarantined} quarantined; booked {counts:?}"
            ));
        }
        self.check_eviction_order()
    }

    fn check_eviction_order(&self) -> Result<(), String> {
        let mut gone = vec![false; self.holders.len()];
        for block in self.cached.iter() {
            if let Some(Parent::Block(parent)) = self.index.parent(block)
                && gone[parent as usize]
            {
                return Err(format!(
                    "block {parent} would be evicted before its child {block}"
                ));
            }
            gone[block as usize] = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
