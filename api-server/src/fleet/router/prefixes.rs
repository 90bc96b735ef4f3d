//! Which workers probably have the KV of which prefixes, because they were sent prompts that begin so: all that is known of workers
//! that do not report what they have, and of the others what they are about to report.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU32;

use super::cached::Cached;
use crate::fleet::membership::{Slot, WORKERS_MAX};

/// Links that are remembered; the least recently used go first.
const PREFIXES_MAX: usize = 1 << 16;

/// Workers remembered for one prefix.
const HOLDERS_MAX: usize = 4;

/// Approximate map from prefixes to the workers that ran them. Bounded: it forgets the least recently used.
///
/// The links of one prompt lie side by side in memory, the last one first. A look-up hashes the first link and walks from
/// there, which memory is fast at; it hashes again only where another prompt's links go on. By hash alone a prompt of 64
/// links is 64 cache misses.
#[derive(Debug)]
pub(super) struct Prefixes {
    entries: Vec<Entry>,
    /// Where in `entries` each link is.
    index: HashMap<u64, u32>,
    /// Entries that hold no link. First in, first out: links of one prompt are forgotten one after the other, so that the next
    /// prompt's links lie side by side in their places.
    free: VecDeque<u32>,
    /// Links in order of use; an item whose stamp is not the link's current one is void.
    order: VecDeque<(u64, u64)>,
    clock: u64,
    /// By slot: which life of a worker it has. What was noted in this one and in the one before is believed. A worker that leaves or
    /// is restarted begins two lives; one that reports what it has begins one with each beat.
    lives: Vec<u32>,
    links_max: usize,
}

/// One link. Without memory of its own elsewhere.
#[derive(Debug, Default)]
struct Entry {
    link: u64,
    /// When it was used last; 0 if it holds no link.
    stamp: u64,
    holders: Holders,
}

/// Latest first.
#[derive(Debug, Default)]
struct Holders([Option<Holder>; HOLDERS_MAX]);

impl Default for Prefixes {
    fn default() -> Self {
        Self::new(PREFIXES_MAX)
    }
}

impl Holders {
    fn all(&self) -> impl Iterator<Item = Holder> {
        self.0.iter().copied().flatten()
    }

    /// Puts this one first, and keeps of the others those that are to be kept, as far as there is room.
    fn put(&mut self, newest: Holder, keeps: impl Fn(Holder) -> bool) {
        let before = std::mem::take(&mut self.0);
        let others = before.into_iter().flatten();
        let others = others.filter(|other| other.slot() != newest.slot() && keeps(*other));
        let all = std::iter::once(newest).chain(others);
        for (place, holder) in self.0.iter_mut().zip(all) {
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

impl Prefixes {
    fn new(links_max: usize) -> Self {
        Self {
            entries: Vec::new(),
            index: HashMap::new(),
            free: VecDeque::new(),
            order: VecDeque::new(),
            clock: 0,
            lives: Vec::new(),
            links_max,
        }
    }

    /// Notes how many blocks of the prompt with this chain each worker has. Only an unbroken chain from the start is of use, so only
    /// those that have the first link count.
    pub(super) fn cached(&self, chain: &[u64], cached: &mut Cached) {
        let mut found: Vec<(Slot, usize)> = Vec::new();
        let mut likely = None;
        for (i, link) in chain.iter().enumerate() {
            let Some(at) = self.find(*link, likely) else {
                break;
            };
            likely = at.checked_sub(1);
            let holders = &self.entries[at].holders;
            let live = || holders.all().filter(|holder| is_live(&self.lives, *holder));
            if i == 0 {
                found = live().map(|holder| (holder.slot(), 1)).collect();
                continue;
            }
            let mut grows = false;
            for (slot, blocks) in &mut found {
                if *blocks == i && live().any(|holder| holder.slot() == *slot) {
                    (*blocks, grows) = (i + 1, true);
                }
            }
            if !grows {
                break;
            }
        }
        for (slot, blocks) in found {
            cached.raise(slot, blocks);
        }
    }

    /// How many blocks of the prompt with this chain one worker has.
    pub(super) fn blocks_of(&self, slot: Slot, chain: &[u64]) -> usize {
        let mut likely = None;
        let has = |link: &&u64| {
            let Some(at) = self.find(**link, likely) else {
                return false;
            };
            likely = at.checked_sub(1);
            let mut holders = self.entries[at].holders.all();
            holders.any(|holder| holder.slot() == slot && is_live(&self.lives, holder))
        };
        chain.iter().take_while(has).count()
    }

    /// The worker in this slot has run this prompt.
    pub(super) fn insert(&mut self, slot: Slot, chain: &[u64]) {
        let newest = self.holder(slot);
        // The first links are used last: a chain is forgotten from its end.
        let mut likely = None;
        for link in chain.iter().take(self.links_max).rev() {
            self.clock += 1;
            let at = match self.find(*link, likely) {
                Some(at) => at,
                None => self.add(*link),
            };
            likely = Some(at + 1);
            let entry = &mut self.entries[at];
            let lives = &self.lives;
            entry.holders.put(newest, |holder| is_live(lives, holder));
            entry.stamp = self.clock;
            self.order.push_back((*link, self.clock));
        }
        while self.index.len() > self.links_max || self.order.len() > 2 * self.links_max {
            let Some((link, stamp)) = self.order.pop_front() else {
                break;
            };
            if let Some(at) = self.find(link, None)
                && self.entries[at].stamp == stamp
            {
                self.index.remove(&link);
                self.entries[at] = Entry::default();
                self.free.push_back(at as u32);
            }
        }
    }

    /// Where a link is. `likely`: where it is if it lies beside its neighbour.
    fn find(&self, link: u64, likely: Option<usize>) -> Option<usize> {
        let is_there = |at: &usize| {
            let entry = self.entries.get(*at);
            entry.is_some_and(|entry| entry.link == link && entry.stamp > 0)
        };
        let place = || self.index.get(&link).map(|at| *at as usize);
        likely.filter(is_there).or_else(place)
    }

    /// An entry for a link that has none; who calls stamps it.
    fn add(&mut self, link: u64) -> usize {
        let at = self.free.pop_front().map_or_else(
            || {
                self.entries.push(Entry::default());
                self.entries.len() - 1
            },
            |at| at as usize,
        );
        self.entries[at].link = link;
        self.index.insert(link, at as u32);
        at
    }

    /// What the worker in this slot ran is gone.
    pub(super) fn forget(&mut self, slot: Slot) {
        self.begin_lives(slot, 2);
    }

    /// The worker in this slot has said by now what it has of all that was noted before the last time: that counts no more.
    pub(super) fn age(&mut self, slot: Slot) {
        self.begin_lives(slot, 1);
    }

    fn begin_lives(&mut self, slot: Slot, lives: u32) {
        if slot >= self.lives.len() {
            self.lives.resize(slot + 1, 0);
        }
        self.lives[slot] = self.lives[slot].wrapping_add(lives);
    }

    fn holder(&self, slot: Slot) -> Holder {
        Holder::new(slot, life(&self.lives, slot))
    }
}

fn is_live(lives: &[u32], holder: Holder) -> bool {
    let (slot, life) = (holder.slot(), life(lives, holder.slot()));
    Holder::new(slot, life) == holder || Holder::new(slot, life.wrapping_sub(1)) == holder
}

fn life(lives: &[u32], slot: Slot) -> u32 {
    lives.get(slot).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(prefixes: &Prefixes, slot: Slot, chain: &[u64]) -> usize {
        let mut cached = Cached::default();
        prefixes.cached(chain, &mut cached);
        assert_eq!(prefixes.blocks_of(slot, chain), cached.of(slot));
        cached.of(slot)
    }

    /// The same map by the plainest rule, without places in memory. Like the real one it keeps a void item for each earlier use.
    #[derive(Default)]
    struct Plain {
        links: HashMap<u64, (VecDeque<(Slot, u32)>, u64)>,
        order: VecDeque<(u64, u64)>,
        clock: u64,
        lives: [u32; SLOTS],
    }

    const SLOTS: usize = 6;
    const LINKS_MAX: usize = 12;

    impl Plain {
        fn insert(&mut self, slot: Slot, chain: &[u64]) {
            let lives = &self.lives;
            for link in chain.iter().take(LINKS_MAX).rev() {
                self.clock += 1;
                let (holders, stamp) = self.links.entry(*link).or_default();
                holders.retain(|(other, life)| *other != slot && lives[*other] - *life < 2);
                holders.push_front((slot, lives[slot]));
                holders.truncate(HOLDERS_MAX);
                *stamp = self.clock;
                self.order.push_back((*link, self.clock));
            }
            while self.links.len() > LINKS_MAX || self.order.len() > 2 * LINKS_MAX {
                let (link, stamp) = self.order.pop_front().unwrap();
                if self.links.get(&link).is_some_and(|known| known.1 == stamp) {
                    self.links.remove(&link);
                }
            }
        }

        fn cached_blocks(&self, slot: Slot, chain: &[u64]) -> usize {
            let has = |link: &&u64| {
                let holders = self.links.get(link).map(|known| &known.0);
                let is_its =
                    |(other, life): &(Slot, u32)| *other == slot && self.lives[slot] - life < 2;
                holders.is_some_and(|holders| holders.iter().any(is_its))
            };
            chain.iter().take_while(has).count()
        }
    }

    proptest! {
        #[test]
        fn where_links_lie_changes_no_answer(
            acts in prop::collection::vec(
                (0..SLOTS, prop::collection::vec(0u64..3, 0..8), 0u8..9),
                0..60,
            ),
        ) {
            let (mut prefixes, mut plain) = (Prefixes::new(LINKS_MAX), Plain::default());
            for (slot, digits, act) in acts {
                // Chains that share beginnings; no two ways lead to one link.
                let chain: Vec<u64> = digits.iter().scan(1, |link, digit| {
                    *link = 3 * *link + digit;
                    Some(*link)
                }).collect();
                if act == 0 {
                    prefixes.forget(slot);
                    plain.lives[slot] += 2;
                } else if act == 8 {
                    prefixes.age(slot);
                    plain.lives[slot] += 1;
                } else if act < 5 {
                    prefixes.insert(slot, &chain);
                    plain.insert(slot, &chain);
                }
                for slot in 0..SLOTS {
                    prop_assert_eq!(blocks(&prefixes, slot, &chain), plain.cached_blocks(slot, &chain));
                }
                prop_assert_eq!(prefixes.index.len(), plain.links.len());
                prop_assert_eq!(prefixes.entries.len(), prefixes.index.len() + prefixes.free.len());
                prop_assert!(prefixes.entries.len() <= 2 * LINKS_MAX);
            }
        }
    }

    #[test]
    fn links_of_one_prompt_lie_side_by_side_also_in_the_places_of_others() {
        let mut prefixes = Prefixes::new(64);
        for prompt in 0..100 {
            let chain: Vec<u64> = (16 * prompt..16 * (prompt + 1)).collect();
            prefixes.insert(0, &chain);
            let places = chain.iter().map(|link| prefixes.index[link]);
            let steps = places.clone().zip(places.skip(1));
            let apart = steps.filter(|(one, next)| *one != next + 1).count();
            assert_eq!(apart, 0, "prompt {prompt}");
        }
        assert_eq!(prefixes.entries.len(), 64 + 16);
    }

    #[test]
    fn the_map_is_bounded() {
        let mut prefixes = Prefixes::default();
        for i in 0..(PREFIXES_MAX as u64 * 2) {
            prefixes.insert(0, &[i]);
        }
        assert!(prefixes.index.len() <= PREFIXES_MAX);
        assert!(prefixes.order.len() <= 2 * PREFIXES_MAX);
        assert_eq!(blocks(&prefixes, 0, &[0]), 0);
    }

    #[test]
    fn who_came_into_a_slot_has_nothing_of_who_left_it() {
        let mut prefixes = Prefixes::default();
        prefixes.insert(3, &[1, 2]);
        assert_eq!(blocks(&prefixes, 3, &[1, 2, 9]), 2);
        prefixes.forget(3);
        assert_eq!(blocks(&prefixes, 3, &[1, 2, 9]), 0);
        prefixes.insert(3, &[1]);
        assert_eq!(blocks(&prefixes, 3, &[1, 2, 9]), 1);
        // Those that are gone leave room for others.
        for slot in 4..8 {
            prefixes.insert(slot, &[5]);
            prefixes.forget(slot);
        }
        for slot in [1, 2, 3, 9] {
            prefixes.insert(slot, &[5]);
        }
        assert_eq!(
            [1, 2, 3, 9].map(|slot| blocks(&prefixes, slot, &[5])),
            [1; 4]
        );
    }

    #[test]
    fn what_a_worker_would_have_reported_by_now_is_not_guessed_any_more() {
        let mut prefixes = Prefixes::default();
        prefixes.insert(3, &[1, 2]);
        prefixes.age(3);
        prefixes.insert(3, &[5]);
        assert_eq!(
            blocks(&prefixes, 3, &[1, 2]),
            2,
            "the report may be under way"
        );
        prefixes.age(3);
        assert_eq!(blocks(&prefixes, 3, &[1, 2]), 0);
        assert_eq!(blocks(&prefixes, 3, &[5]), 1);
    }
}
