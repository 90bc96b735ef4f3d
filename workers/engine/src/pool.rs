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
use baton_protocol::limits::{PREFIX_BLOCKS_MAX, PREFIX_PAGE_MAX};

use crate::evictable::EvictionList;
use crate::free_list::FreeList;
use crate::journal::{Journal, PrefixChanges};
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
    journal: Journal,
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
            journal: Journal::default(),
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

    /// Blocks for a sequence whose KV comes from elsewhere, `blocks` in all. The first [`BlockTable::indexed`] of them are shared with
    /// others and hold the KV of as many full blocks of `tokens` already, which sequences with this salt have in the index: only the
    /// others are to be filled. `keep_free` blocks stay available beyond those taken. `None` if there are not enough; then nothing is
    /// taken.
    pub fn reserve_reusing(
        &self,
        tokens: &[u32],
        salt: CacheSalt,
        blocks: usize,
        keep_free: usize,
    ) -> Option<BlockTable> {
        let reusable = blocks.min(tokens.len() / self.block_tokens());
        self.take_reusing(tokens, Some(salt), reusable, blocks, keep_free)
    }

    /// What the index has of `tokens` for sequences with this salt: the blocks of as many of them from the first on as are known, held like
    /// anybody's, so that they neither change nor go. None of them if the first block is not known.
    pub fn share(&self, tokens: &[u32], salt: CacheSalt) -> BlockTable {
        let mut ids = Vec::new();
        let mut state = self.state();
        state.find(tokens.chunks_exact(self.block_tokens()), salt, &mut ids);
        drop(state);
        let shared = ids.len();
        BlockTable::new(self.clone(), ids, shared)
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
        let reusable = tokens.len().saturating_sub(1) / block_tokens;
        let blocks = tokens.len().div_ceil(block_tokens);
        self.take_reusing(tokens, reuse, reusable, blocks, keep_free)
    }

    /// `blocks` blocks, of which up to the first `reusable` are shared.
    fn take_reusing(
        &self,
        tokens: &[u32],
        reuse: Option<CacheSalt>,
        reusable: usize,
        blocks: usize,
        keep_free: usize,
    ) -> Option<BlockTable> {
        let mut ids = Vec::with_capacity(blocks + 1);
        let mut state = self.state();
        if let Some(salt) = reuse {
            let chunks = tokens.chunks_exact(self.block_tokens());
            state.find(chunks.take(reusable), salt, &mut ids);
        }
        let shared = ids.len();
        let missing = blocks - shared;
        if state.available() < missing + keep_free || state.take(missing, &mut ids).is_none() {
            state.release(&ids);
            return None;
        }
        drop(state);
        Some(BlockTable::new(self.clone(), ids, shared))
    }

    /// From now on [`Self::take_prefix_changes`] tells what enters and leaves the prefix index. `bell` is rung at the first change after
    /// each taking, on whatever thread makes it: it must neither wait nor use the pool. Of blocks beyond [`PREFIX_BLOCKS_MAX`] nothing
    /// is told.
    pub fn on_prefix_change(&self, bell: impl Fn() + Send + 'static) {
        self.state().journal.listen(Box::new(bell));
    }

    /// What entered and left the prefix index since the last time.
    pub fn take_prefix_changes(&self) -> PrefixChanges {
        self.state().journal.take()
    }

    /// Links of the indexed blocks among some of the arena, from `first` on; and where the next of them begin, unless these are the
    /// last.
    pub fn prefix_page(&self, first: u32) -> (Vec<u64>, Option<u32>) {
        let end = self.shared.blocks.min(PREFIX_BLOCKS_MAX);
        let first = first.min(end);
        let next = end.min(first.saturating_add(PREFIX_PAGE_MAX as u32));
        let state = self.state();
        let links = (first..next).filter_map(|block| state.index.link(block));
        (links.collect(), (next < end).then_some(next))
    }

    /// Whether there are blocks that nothing is told of.
    pub fn tells_part(&self) -> bool {
        self.shared.blocks > PREFIX_BLOCKS_MAX
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
                Inserted::New => state.note(ids[i], true),
                Inserted::Exists(block) => {
                    state.hold(block);
                    given_up.push(std::mem::replace(&mut ids[i], block));
                }
                Inserted::Collision => return i,
            }
        }
        indexed.max(tokens.len() / block_tokens)
    }

    /// As [`Self::index`], up to the first block whose prefix another block holds.
    pub(crate) fn index_in_place(
        &self,
        ids: &[u32],
        indexed: usize,
        salt: CacheSalt,
        tokens: &[u32],
    ) -> usize {
        let mut state = self.state();
        let chunks = tokens.chunks_exact(self.block_tokens());
        for (i, chunk) in chunks.enumerate().skip(indexed) {
            let parent = match i.checked_sub(1) {
                None => Parent::Root(salt),
                Some(before) => Parent::Block(ids[before]),
            };
            match state.index.insert(ids[i], parent, chunk) {
                Inserted::New => state.note(ids[i], true),
                Inserted::Exists(_) | Inserted::Collision => return i,
            }
        }
        indexed.max(tokens.len() / self.block_tokens())
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

    /// Holds the blocks that the index has of a sequence with this salt whose tokens begin with these, a block's at a time.
    fn find<'a>(
        &mut self,
        chunks: impl Iterator<Item = &'a [u32]>,
        salt: CacheSalt,
        ids: &mut Vec<u32>,
    ) {
        let mut parent = Parent::Root(salt);
        for chunk in chunks {
            let Some(block) = self.index.find(parent, chunk) else {
                break;
            };
            self.hold(block);
            ids.push(block);
            parent = Parent::Block(block);
        }
    }

    fn evict_one(&mut self) -> bool {
        let Some(block) = self.cached.pop_front() else {
            return false;
        };
        self.unindex(block);
        self.free.insert(block);
        true
    }

    /// Nobody finds this block as a prefix any more.
    fn unindex(&mut self, block: u32) {
        self.note(block, false);
        self.index.remove(block);
    }

    /// An indexed block has just entered the index, or is about to leave it.
    fn note(&mut self, block: u32, is_in: bool) {
        if block < PREFIX_BLOCKS_MAX
            && let Some(link) = self.index.link(block)
        {
            self.journal.note(link, is_in);
        }
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
            self.unindex(block);
            self.free.insert(block);
        }
        for block in doomed.into_iter().rev() {
            self.unindex(block);
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
