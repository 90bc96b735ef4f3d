//! Which workers probably have the KV of which prefixes.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::num::NonZeroU32;

use baton_protocol::CacheSalt;

use crate::fleet::membership::{Slot, WORKERS_MAX};

/// Tokens of one link of a prompt's hash chain.
pub const PREFIX_BLOCK_TOKENS: usize = 32;

/// Links that are remembered; the least recently used go first.
const PREFIXES_MAX: usize = 1 << 16;

/// Workers remembered for one prefix.
const HOLDERS_MAX: usize = 4;

/// Hash of every full block of a prompt together with all before it, and with whose KV it may use.
pub fn prefix_chain(CacheSalt(salt): CacheSalt, prompt: &[u32]) -> Vec<u64> {
    let state = same_hasher();
    let mut link = salt as u64 ^ (salt >> 64) as u64;
    prompt
        .chunks_exact(PREFIX_BLOCK_TOKENS)
        .map(|block| {
            let mut hasher = state.build_hasher();
            hasher.write_u64(link);
            block.iter().for_each(|token| hasher.write_u32(*token));
            link = hasher.finish();
            link
        })
        .collect()
}

/// A hasher that is the same for the life of the process.
fn same_hasher() -> std::hash::BuildHasherDefault<std::collections::hash_map::DefaultHasher> {
    std::hash::BuildHasherDefault::default()
}

/// Approximate map from prefixes to the workers that ran them. Bounded: it forgets the least recently used.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    holders: HashMap<u64, Holders>,
    /// Links in order of use; an entry whose stamp is not the link's current one is void.
    order: VecDeque<(u64, u64)>,
    clock: u64,
    /// By slot: how many workers had it and lost their KV, by leaving or by a restart. What an earlier one ran is void.
    lives: Vec<u32>,
}

/// Latest first. Without a place of its own in memory: looking up a long prompt is as fast as memory is.
#[derive(Debug, Default)]
struct Holders {
    workers: [Option<Holder>; HOLDERS_MAX],
    stamp: u64,
}

impl Holders {
    fn all(&self) -> impl Iterator<Item = Holder> {
        self.workers.iter().copied().flatten()
    }

    /// Puts this one first, and keeps of the others those that are to be kept, as far as there is room.
    fn put(&mut self, newest: Holder, keeps: impl Fn(Holder) -> bool) {
        let before = std::mem::take(&mut self.workers);
        let others = before.into_iter().flatten();
        let others = others.filter(|other| *other != newest && keeps(*other));
        let all = std::iter::once(newest).chain(others);
        for (place, holder) in self.workers.iter_mut().zip(all) {
            *place = Some(holder);
        }
    }
}

/// One life of a worker, in one word: most of what a long prompt's look-up costs is memory that is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder(NonZeroU32);

/// Bits of a holder that are its slot; the others are its life, which begins again at 0 after a million.
const SLOT_BITS: u32 = WORKERS_MAX.ilog2();

const _: () = assert!(WORKERS_MAX.is_power_of_two());

impl Holder {
    fn new(slot: Slot, life: u32) -> Self {
        let lives_max = (u32::MAX >> SLOT_BITS) - 1;
        let word = (life % lives_max) << SLOT_BITS | slot as u32;
        Self(NonZeroU32::MIN.saturating_add(word))
    }

    fn slot(self) -> Slot {
        (self.0.get() - 1) as Slot % WORKERS_MAX
    }
}

/// How many blocks of one prompt each of a few workers has; the others have none.
#[derive(Debug, Default)]
pub(super) struct Cached {
    blocks: Vec<(Slot, usize)>,
}

impl Cached {
    /// Blocks that the worker in this slot has.
    pub(super) fn of(&self, slot: Slot) -> usize {
        let found = self.blocks.iter().find(|(holder, _)| *holder == slot);
        found.map_or(0, |(_, blocks)| *blocks)
    }
}

impl Prefixes {
    /// Only an unbroken chain from the start is of use, so only those that have the first link count.
    pub(super) fn cached_blocks(&self, chain: &[u64]) -> Cached {
        let mut cached = Cached::default();
        for (i, link) in chain.iter().enumerate() {
            let Some(holders) = self.holders.get(link) else {
                break;
            };
            if i == 0 {
                let live = holders.all().filter(|holder| self.is_live(*holder));
                cached.blocks = live.map(|holder| (holder.slot(), 1)).collect();
                continue;
            }
            let mut grows = false;
            for (slot, blocks) in &mut cached.blocks {
                let holder = self.holder(*slot);
                if *blocks == i && holders.workers.contains(&Some(holder)) {
                    (*blocks, grows) = (i + 1, true);
                }
            }
            if !grows {
                break;
            }
        }
        cached
    }

    /// The worker in this slot has run this prompt.
    pub(super) fn insert(&mut self, slot: Slot, chain: &[u64]) {
        let newest = self.holder(slot);
        let lives = &self.lives;
        let is_live =
            |holder: Holder| Holder::new(holder.slot(), life(lives, holder.slot())) == holder;
        // The first links are used last: a chain is forgotten from its end.
        for link in chain.iter().take(PREFIXES_MAX).rev() {
            self.clock += 1;
            let holders = self.holders.entry(*link).or_default();
            holders.put(newest, is_live);
            holders.stamp = self.clock;
            self.order.push_back((*link, self.clock));
        }
        while self.holders.len() > PREFIXES_MAX || self.order.len() > 2 * PREFIXES_MAX {
            let Some((link, stamp)) = self.order.pop_front() else {
                break;
            };
            let holders = self.holders.get(&link);
            if holders.is_some_and(|holders| holders.stamp == stamp) {
                self.holders.remove(&link);
            }
        }
    }

    /// What the worker in this slot ran is gone.
    pub(super) fn forget(&mut self, slot: Slot) {
        if slot >= self.lives.len() {
            self.lives.resize(slot + 1, 0);
        }
        self.lives[slot] = self.lives[slot].wrapping_add(1);
    }

    fn is_live(&self, holder: Holder) -> bool {
        self.holder(holder.slot()) == holder
    }

    fn holder(&self, slot: Slot) -> Holder {
        Holder::new(slot, life(&self.lives, slot))
    }
}

fn life(lives: &[u32], slot: Slot) -> u32 {
    lives.get(slot).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_bounded() {
        let mut prefixes = Prefixes::default();
        for i in 0..(PREFIXES_MAX as u64 * 2) {
            prefixes.insert(0, &[i]);
        }
        assert!(prefixes.holders.len() <= PREFIXES_MAX);
        assert!(prefixes.order.len() <= 2 * PREFIXES_MAX);
        assert_eq!(prefixes.cached_blocks(&[0]).of(0), 0);
    }

    #[test]
    fn who_came_into_a_slot_has_nothing_of_who_left_it() {
        let mut prefixes = Prefixes::default();
        prefixes.insert(3, &[1, 2]);
        assert_eq!(prefixes.cached_blocks(&[1, 2, 9]).of(3), 2);
        prefixes.forget(3);
        assert_eq!(prefixes.cached_blocks(&[1, 2, 9]).of(3), 0);
        prefixes.insert(3, &[1]);
        assert_eq!(prefixes.cached_blocks(&[1, 2, 9]).of(3), 1);
        // Those that are gone leave room for others.
        for slot in 4..8 {
            prefixes.insert(slot, &[5]);
            prefixes.forget(slot);
        }
        for slot in [1, 2, 3, 9] {
            prefixes.insert(slot, &[5]);
        }
        let cached = prefixes.cached_blocks(&[5]);
        assert_eq!([1, 2, 3, 9].map(|slot| cached.of(slot)), [1; 4]);
    }
}
