//! Which workers probably have the KV of which prefixes.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};

use baton_protocol::CacheSalt;

use crate::membership::Slot;

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

#[derive(Debug, Default)]
struct Holders {
    workers: Vec<Holder>,
    stamp: u64,
}

/// One life of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    slot: u32,
    life: u32,
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
            let live = |slot: Slot| {
                let holder = self.holder(slot);
                holders.workers.contains(&holder)
            };
            if i == 0 {
                let slots = holders.workers.iter().map(|holder| holder.slot as Slot);
                cached.blocks = slots
                    .filter(|slot| live(*slot))
                    .map(|slot| (slot, 1))
                    .collect();
                continue;
            }
            let mut grows = false;
            for (slot, blocks) in &mut cached.blocks {
                if *blocks == i && live(*slot) {
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
        let is_live = |holder: &Holder| life(lives, holder.slot as Slot) == holder.life;
        // The first links are used last: a chain is forgotten from its end.
        for link in chain.iter().take(PREFIXES_MAX).rev() {
            self.clock += 1;
            let holders = self.holders.entry(*link).or_default();
            holders
                .workers
                .retain(|known| *known != newest && is_live(known));
            holders.workers.insert(0, newest);
            holders.workers.truncate(HOLDERS_MAX);
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

    fn holder(&self, slot: Slot) -> Holder {
        Holder {
            slot: slot as u32,
            life: life(&self.lives, slot),
        }
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
