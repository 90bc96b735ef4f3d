//! A sequence's blocks, held as long as the value lives.

use std::fmt;

use baton_protocol::{BlockRun, CacheSalt};

use crate::BlockPool;

/// The blocks of one sequence in order of their tokens: block `i` holds positions
/// `i * block_tokens .. (i + 1) * block_tokens`. Dropping it gives them back; those in the prefix index stay
/// cached until somebody needs the room.
pub struct BlockTable {
    pool: BlockPool,
    ids: Vec<u32>,
    /// The first so many blocks are in the prefix index: others may share them, nobody may write them.
    indexed: usize,
}

impl BlockTable {
    pub(crate) fn new(pool: BlockPool, ids: Vec<u32>, indexed: usize) -> Self {
        Self { pool, ids, indexed }
    }

    /// Arena indices of the blocks.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The blocks as runs of neighbours, in order of their tokens.
    pub fn runs(&self) -> Vec<BlockRun> {
        let mut runs: Vec<BlockRun> = Vec::new();
        for block in &self.ids {
            match runs.last_mut() {
                Some(run) if run.first + run.count == *block => run.count += 1,
                _ => runs.push(BlockRun {
                    first: *block,
                    count: 1,
                }),
            }
        }
        runs
    }

    /// Count these blocks as quarantined until the table is dropped: a broken transfer may still write to
    /// them.
    pub fn quarantine(&mut self) {
        self.pool.quarantine(&self.ids);
    }

    /// Leading blocks that are in the prefix index: their KV is in place, and others may share them.
    pub fn indexed(&self) -> usize {
        self.indexed
    }

    /// Tokens the blocks can hold.
    pub(crate) fn capacity(&self) -> usize {
        self.ids.len() * self.pool.block_tokens()
    }

    /// Add one block; `false` if none is left.
    #[must_use]
    pub(crate) fn grow(&mut self) -> bool {
        self.pool.grow(&mut self.ids)
    }

    /// Give back all but the first `blocks` blocks: what lies in the others is of nobody's use, and no step in flight
    /// touches them.
    pub(crate) fn truncate(&mut self, blocks: usize) {
        debug_assert!(
            blocks >= self.indexed,
            "what is indexed was computed and stays"
        );
        if blocks < self.ids.len() {
            self.pool.release(&self.ids[blocks..]);
            self.ids.truncate(blocks);
        }
    }

    /// The KV of all of `tokens`, counted from the start of the sequence with this salt, is in place: index their full
    /// blocks, which may exchange blocks for equal ones that others share. Those given up for them come back: a step in
    /// flight may still read them.
    pub(crate) fn index(&mut self, salt: CacheSalt, tokens: &[u32]) -> BlockTable {
        let mut given_up = Vec::new();
        if tokens.len() / self.pool.block_tokens() > self.indexed {
            self.indexed =
                self.pool
                    .index(&mut self.ids, self.indexed, salt, tokens, &mut given_up);
        }
        Self::new(self.pool.clone(), given_up, 0)
    }

    /// The KV of all of `tokens` was brought here from elsewhere, for whoever comes with this salt: their full blocks stay in the prefix
    /// index until somebody needs the room.
    pub fn keep(mut self, salt: CacheSalt, tokens: &[u32]) {
        // No step has run them.
        drop(self.index(salt, tokens));
    }

    /// As [`Self::index`], and no block is exchanged, because somebody beside the engine reads these: where an equal one is indexed
    /// already, those from there on stay out of the index.
    pub(crate) fn index_in_place(&mut self, salt: CacheSalt, tokens: &[u32]) {
        if tokens.len() / self.pool.block_tokens() > self.indexed {
            self.indexed = self
                .pool
                .index_in_place(&self.ids, self.indexed, salt, tokens);
        }
    }

    /// What they hold is not to be trusted: it is no prefix for anybody. All that is left to do then is to give them back.
    pub(crate) fn forget(&self) {
        self.pool.forget(&self.ids);
    }

    /// The blocks, of which this one holds none any more.
    pub(crate) fn take(&mut self) -> BlockTable {
        let rest = Self::new(self.pool.clone(), Vec::new(), 0);
        std::mem::replace(self, rest)
    }

    /// Whether this table belongs to that pool.
    pub(crate) fn is_of(&self, pool: &BlockPool) -> bool {
        self.pool.is_same(pool)
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            self.pool.release(&self.ids);
        }
    }
}

impl fmt::Debug for BlockTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockTable({:?}, {} indexed)", self.ids, self.indexed)
    }
}
