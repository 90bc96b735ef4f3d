//! The prefix index: which full blocks hold the KV of which tokens after which prefix.
//!
//! A block's key is its parent and its own tokens; a first block's parent is the salt of its sequence. The parent is itself in
//! the index as long as the child is, so by induction a match is a match of salt and prefix. Tokens and parent are
//! compared exactly: the 64-bit hash only finds the candidate, and two prompts whose hashes collide can never see
//! each other's KV. Of two blocks with one hash only the first is indexed.
//!
//! Beside that hash, which differs in each process, a block has a link, which everybody computes alike: by it others learn what is
//! here. Nothing here depends on it.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};

use baton_protocol::{CacheSalt, prefix_link, prefix_root};

use crate::sampling::mix;

/// What a block's tokens come after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// Nothing: it is the first block of sequences with this salt.
    Root(CacheSalt),
    /// This block.
    Block(u32),
}

/// Index over the blocks of one arena. Knows nothing of who uses them.
#[derive(Debug)]
pub struct PrefixIndex {
    block_tokens: usize,
    /// Chosen at start, so that nobody can prepare prompts whose hashes collide.
    seed: u64,
    by_hash: HashMap<u64, u32, BuildHasherDefault<Identity>>,
    /// For each block of the arena: its entry, if it is indexed.
    entries: Vec<Option<Entry>>,
    /// Tokens of all indexed blocks, at `block * block_tokens`.
    tokens: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u64,
    parent: Parent,
    link: u64,
}

/// Outcome of [`PrefixIndex::insert`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The block is indexed now.
    New,
    /// This block already stands for the same prefix.
    Exists(u32),
    /// The hash is taken by another prefix; the block stays private.
    Collision,
}

impl PrefixIndex {
    pub fn new(blocks: u32, block_tokens: u32) -> Self {
        let (blocks, block_tokens) = (blocks as usize, block_tokens as usize);
        Self {
            block_tokens,
            seed: RandomState::new().hash_one(0),
            by_hash: HashMap::default(),
            entries: vec![None; blocks],
            tokens: vec![0; blocks * block_tokens],
        }
    }

    /// Whether this block is indexed.
    pub fn contains(&self, block: u32) -> bool {
        self.entries[block as usize].is_some()
    }

    /// The block's parent, if it is indexed.
    pub fn parent(&self, block: u32) -> Option<Parent> {
        self.entries[block as usize].map(|entry| entry.parent)
    }

    /// The block's link ([`baton_protocol::prefix_chain`]), if it is indexed.
    pub fn link(&self, block: u32) -> Option<u64> {
        self.entries[block as usize].map(|entry| entry.link)
    }

    /// The block that holds the KV of `tokens` (one block of them) after the prefix that ends in `parent`.
    pub fn find(&self, parent: Parent, tokens: &[u32]) -> Option<u32> {
        let block = *self.by_hash.get(&self.hash(parent, tokens))?;
        self.is(block, parent, tokens).then_some(block)
    }

    /// Index a block whose KV is complete.
    pub fn insert(&mut self, block: u32, parent: Parent, tokens: &[u32]) -> Inserted {
        assert!(!self.contains(block), "block {block} is indexed twice");
        assert!(
            self.has(parent),
            "parent {parent:?} of {block} is not indexed"
        );
        let hash = self.hash(parent, tokens);
        if let Some(other) = self.by_hash.get(&hash).copied() {
            return match self.is(other, parent, tokens) {
                true => Inserted::Exists(other),
                false => Inserted::Collision,
            };
        }
        self.by_hash.insert(hash, block);
        let before = match parent {
            Parent::Root(salt) => prefix_root(salt, self.block_tokens),
            Parent::Block(block) => self.link(block).unwrap_or_default(),
        };
        let link = prefix_link(before, tokens);
        self.entries[block as usize] = Some(Entry { hash, parent, link });
        let first = block as usize * self.block_tokens;
        self.tokens[first..first + self.block_tokens].copy_from_slice(tokens);
        Inserted::New
    }

    /// Forget a block. Its children must be gone already.
    pub fn remove(&mut self, block: u32) {
        let entry = self.entries[block as usize]
            .take()
            .expect("only indexed blocks are evicted");
        self.by_hash.remove(&entry.hash);
    }

    fn has(&self, parent: Parent) -> bool {
        match parent {
            Parent::Root(_) => true,
            Parent::Block(block) => self.contains(block),
        }
    }

    fn is(&self, block: u32, parent: Parent, tokens: &[u32]) -> bool {
        let first = block as usize * self.block_tokens;
        self.parent(block) == Some(parent)
            && self.tokens[first..first + self.block_tokens] == *tokens
    }

    fn hash(&self, parent: Parent, tokens: &[u32]) -> u64 {
        debug_assert_eq!(tokens.len(), self.block_tokens);
        let (pairs, last) = tokens.as_chunks::<2>();
        let mut hash = match parent {
            Parent::Block(block) => mix(self.seed ^ u64::from(block)),
            Parent::Root(CacheSalt(salt)) => {
                // No block has this number.
                let root = mix(self.seed ^ u64::MAX);
                mix(mix(root ^ salt as u64) ^ (salt >> 64) as u64)
            }
        };
        for [a, b] in pairs {
            hash = mix(hash ^ (u64::from(*a) << 32 | u64::from(*b)));
        }
        last.iter()
            .fold(hash, |hash, token| mix(hash ^ u64::from(*token)))
    }

    /// Whether entries and hash table tell the same story, and parents are there.
    pub fn check(&self) -> Result<(), String> {
        let mut indexed = 0;
        for (block, entry) in self.entries.iter().enumerate() {
            let Some(Entry { hash, parent, .. }) = *entry else {
                continue;
            };
            indexed += 1;
            if self.by_hash.get(&hash) != Some(&(block as u32)) {
                return Err(format!("indexed block {block} is not under its hash"));
            }
            if !self.has(parent) {
                return Err(format!(
                    "indexed block {block} has lost its parent {parent:?}"
                ));
            }
        }
        match indexed == self.by_hash.len() {
            true => Ok(()),
            false => Err(format!(
                "{indexed} indexed blocks and {} hashes",
                self.by_hash.len()
            )),
        }
    }
}

/// The keys are hashes already.
#[derive(Debug, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64")
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Parent = Parent::Root(CacheSalt::NONE);

    #[test]
    fn tells_prefixes_apart() {
        let mut index = PrefixIndex::new(8, 2);
        assert_eq!(index.insert(5, ROOT, &[1, 2]), Inserted::New);
        assert_eq!(index.insert(3, Parent::Block(5), &[1, 2]), Inserted::New);
        assert_eq!(index.find(ROOT, &[1, 2]), Some(5));
        assert_eq!(index.find(Parent::Block(5), &[1, 2]), Some(3));
        assert_eq!(index.find(Parent::Block(3), &[1, 2]), None);
        assert_eq!(index.find(ROOT, &[2, 1]), None);
        assert_eq!(index.insert(4, ROOT, &[1, 2]), Inserted::Exists(5));
        index.check().expect("sound");
        index.remove(3);
        assert_eq!(index.find(Parent::Block(5), &[1, 2]), None);
        index.check().expect("sound");
    }

    #[test]
    fn links_are_those_of_the_contract() {
        let mut index = PrefixIndex::new(8, 2);
        let salt = CacheSalt(7);
        index.insert(5, Parent::Root(salt), &[1, 2]);
        index.insert(3, Parent::Block(5), &[3, 4]);
        let chain = baton_protocol::prefix_chain(salt, 2, &[1, 2, 3, 4, 5]);
        assert_eq!(
            [5, 3].map(|block| index.link(block)),
            [Some(chain[0]), Some(chain[1])]
        );
        index.remove(3);
        assert_eq!(index.link(3), None);
    }

    #[test]
    fn a_colliding_hash_is_no_match() {
        let mut index = PrefixIndex::new(8, 2);
        index.insert(5, ROOT, &[1, 2]);
        // Put block 5 under the hash of another prompt, as a collision would.
        let hash = index.hash(ROOT, &[9, 9]);
        index.by_hash.insert(hash, 5);
        assert_eq!(index.find(ROOT, &[9, 9]), None);
        assert_eq!(index.insert(6, ROOT, &[9, 9]), Inserted::Collision);
        assert!(!index.contains(6));
        // The same tokens after another prefix.
        let hash = index.hash(Parent::Block(5), &[1, 2]);
        index.by_hash.insert(hash, 5);
        assert_eq!(index.find(Parent::Block(5), &[1, 2]), None);
        assert_eq!(
            index.insert(6, Parent::Block(5), &[1, 2]),
            Inserted::Collision
        );
    }

    #[test]
    fn a_salt_sets_equal_tokens_apart() {
        let mut index = PrefixIndex::new(8, 2);
        // Each half of a salt counts.
        let salts = [0, 1, 1 << 64, u128::MAX].map(|salt| Parent::Root(CacheSalt(salt)));
        for (block, salt) in salts.into_iter().enumerate() {
            assert_eq!(index.find(salt, &[1, 2]), None);
            assert_eq!(index.insert(block as u32, salt, &[1, 2]), Inserted::New);
        }
        for (block, salt) in salts.into_iter().enumerate() {
            assert_eq!(index.find(salt, &[1, 2]), Some(block as u32));
        }
        // A hash that collides finds the block of another salt, and it is no match.
        let hash = index.hash(Parent::Root(CacheSalt(7)), &[1, 2]);
        index.by_hash.insert(hash, 0);
        assert_eq!(index.find(Parent::Root(CacheSalt(7)), &[1, 2]), None);
    }
}
