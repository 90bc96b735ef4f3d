//! Which workers hold which links: what all workers' prefix indexes have, turned round.
//!
//! Most links have few holders (a conversation is on one context worker and one decode worker), and those stand beside the link; a
//! shared system prompt may be on all, and has a set. Links lie in many small tables, so that none takes long to grow or to go
//! through: everything here happens under the lock of the fleet.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::fleet::membership::{SlotSet, WORKERS_MAX};

/// Most links of all workers together. They take 17 bytes each in tables that are 44% full at least, some 150 MB in all.
pub(super) const LINKS_MAX: usize = 1 << 22;

/// Most links that have a set of holders, of 1 KiB at most.
const SETS_MAX: usize = 1 << 16;

/// Tables. One has 4,096 links where all have [`LINKS_MAX`].
pub(super) const SHARDS: usize = 1 << 10;

/// As which a worker stands here. One that comes anew, or is told of anew, gets another number.
pub(super) type Number = u16;

/// Numbers: each worker may be told of anew while what was told before is being cleared away.
pub(super) const NUMBERS: usize = 2 * WORKERS_MAX;

/// Probes of one look-up. Each is a cache miss or two; what is not decided by then counts as not held.
const PROBES_MAX: usize = 96;

/// Links by holder and holders by link.
#[derive(Debug)]
pub(super) struct Links {
    shards: Vec<HashMap<u64, Held, Seeded>>,
    links: usize,
    links_max: usize,
    sets: Vec<SlotSet>,
    free_sets: Vec<u32>,
    /// Numbers that nobody has and nothing here mentions; those above `numbers_end` were never given.
    free_numbers: BTreeSet<Number>,
    numbers_end: usize,
    /// Numbers that nobody has any more, and how many shards may still mention them.
    retired: Vec<(Number, usize)>,
    sweep_next: usize,
}

/// The holders of one link: up to four numbers, or which set has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held([u16; 4]);

const NOBODY: u16 = u16::MAX;
/// In the first place: the next two are the number of a set.
const SET: u16 = u16::MAX - 1;

const _: () = assert!(NUMBERS < SET as usize);

/// Scratch of look-ups.
#[derive(Debug, Default)]
pub(super) struct Probing {
    /// Sets of holders, of as many words each, one for each range.
    words: Vec<u64>,
    /// The set's holders have the first `0` links; whether they have more than `1 - 1` is known: they have not.
    ranges: Vec<(usize, usize)>,
    held: Vec<u64>,
}

impl Default for Links {
    fn default() -> Self {
        Self::new(LINKS_MAX)
    }
}

impl Links {
    pub(super) fn new(links_max: usize) -> Self {
        let seed = Seeded(RandomState::new().hash_one(0));
        Self {
            shards: (0..SHARDS).map(|_| HashMap::with_hasher(seed)).collect(),
            links: 0,
            links_max,
            sets: Vec::new(),
            free_sets: Vec::new(),
            free_numbers: BTreeSet::new(),
            numbers_end: 0,
            retired: Vec::new(),
            sweep_next: 0,
        }
    }

    /// Links of all workers.
    pub(super) fn len(&self) -> usize {
        self.links
    }

    /// A number for a worker, the lowest that is free; none while too many are being cleared away.
    pub(super) fn number(&mut self) -> Option<Number> {
        if let Some(number) = self.free_numbers.pop_first() {
            return Some(number);
        }
        if self.numbers_end == NUMBERS {
            return None;
        }
        self.numbers_end += 1;
        Some((self.numbers_end - 1) as Number)
    }

    /// Nobody has this number any more: what it holds is cleared away by and by.
    pub(super) fn retire(&mut self, number: Number) {
        self.retired.push((number, SHARDS));
    }

    /// Clears one table of what retired numbers hold. False if there is nothing to clear away.
    pub(super) fn sweep(&mut self) -> bool {
        if self.retired.is_empty() {
            return false;
        }
        let mut gone = SlotSet::default();
        for (number, _) in &self.retired {
            gone.insert((*number).into());
        }
        let Self {
            shards,
            sets,
            free_sets,
            sweep_next,
            ..
        } = self;
        let shard = &mut shards[*sweep_next];
        *sweep_next = (*sweep_next + 1) % SHARDS;
        let before = shard.len();
        shard.retain(|_, held| {
            held.remove_all(&gone, sets, free_sets);
            !held.is_empty()
        });
        self.links -= before - shard.len();
        if shard.capacity() > 4 * shard.len().max(8) {
            shard.shrink_to_fit();
        }
        let free = &mut self.free_numbers;
        self.retired.retain_mut(|(number, left)| {
            *left -= 1;
            *left > 0 || !free.insert(*number)
        });
        true
    }

    /// A worker holds a link. False if it did already, or if there is no room for it.
    pub(super) fn insert(&mut self, link: u64, number: Number) -> bool {
        let shard = &mut self.shards[shard_of(link)];
        match shard.get_mut(&link) {
            Some(held) => held.insert(number, &mut self.sets, &mut self.free_sets),
            None if self.links >= self.links_max => false,
            None => {
                shard.insert(link, Held([number, NOBODY, NOBODY, NOBODY]));
                self.links += 1;
                true
            }
        }
    }

    /// A worker holds a link no more. False if it did not.
    pub(super) fn remove(&mut self, link: u64, number: Number) -> bool {
        let shard = &mut self.shards[shard_of(link)];
        let Some(held) = shard.get_mut(&link) else {
            return false;
        };
        let was_there = held.remove(number, &mut self.sets, &mut self.free_sets);
        if held.is_empty() {
            shard.remove(&link);
            self.links -= 1;
        }
        was_there
    }

    /// Whether a worker holds a link.
    pub(super) fn holds(&self, link: u64, number: Number) -> bool {
        let held = self.shards[shard_of(link)].get(&link);
        held.is_some_and(|held| held.contains(number, &self.sets))
    }

    /// Tells of each worker that holds the first link how many links of the chain it holds, `found(number, links)`.
    ///
    /// A worker that holds a link holds all before it: its index drops a prefix's last block first. So of those that hold the first
    /// link half the chain is looked at, of those that hold that too the half beyond, and so on: a few probes for each number of links
    /// that some worker has, however long the chain is.
    pub(super) fn depths(
        &self,
        chain: &[u64],
        probing: &mut Probing,
        mut found: impl FnMut(Number, usize),
    ) {
        let width = self.numbers_end.div_ceil(64);
        let Probing {
            words,
            ranges,
            held,
        } = probing;
        held.clear();
        held.resize(width, 0);
        words.clear();
        ranges.clear();
        if chain.is_empty() || !self.bits(chain[0], held) {
            return;
        }
        words.extend_from_slice(held);
        ranges.push((1, chain.len() + 1));
        let mut probes = 1;
        while let Some((has, has_not)) = ranges.pop() {
            let begin = words.len() - width;
            if has + 1 == has_not || probes == PROBES_MAX {
                for (at, word) in words[begin..].iter().enumerate() {
                    let mut left = *word;
                    while left != 0 {
                        let bit = left.trailing_zeros() as usize;
                        left &= left - 1;
                        found((64 * at + bit) as Number, has);
                    }
                }
                words.truncate(begin);
                continue;
            }
            probes += 1;
            let middle = has.midpoint(has_not);
            self.bits(chain[middle - 1], held);
            let (mut some_have, mut some_have_not) = (0, 0);
            for (word, held) in words[begin..].iter_mut().zip(held.iter_mut()) {
                *held &= *word;
                *word &= !*held;
                some_have |= *held;
                some_have_not |= *word;
            }
            match some_have_not {
                0 => words.truncate(begin),
                _ => ranges.push((has, middle)),
            }
            // Those that have more are looked at first: they are worth more.
            if some_have != 0 {
                words.extend_from_slice(held);
                ranges.push((middle, has_not));
            }
        }
    }

    /// Sets the bits of a link's holders and no others; false if it has none.
    fn bits(&self, link: u64, bits: &mut [u64]) -> bool {
        bits.fill(0);
        let Some(held) = self.shards[shard_of(link)].get(&link) else {
            return false;
        };
        match held.set() {
            Some(set) => self.sets[set].write(bits),
            None => {
                for number in held.few() {
                    bits[usize::from(number) / 64] |= 1 << (number % 64);
                }
            }
        }
        true
    }
}

impl Held {
    fn is_empty(&self) -> bool {
        self.0[0] == NOBODY
    }

    fn set(&self) -> Option<usize> {
        let [first, low, high, _] = self.0;
        (first == SET).then(|| usize::from(high) << 16 | usize::from(low))
    }

    fn few(&self) -> impl Iterator<Item = Number> {
        let few = self.0.into_iter();
        few.take_while(|number| *number != NOBODY)
    }

    fn contains(&self, number: Number, sets: &[SlotSet]) -> bool {
        match self.set() {
            Some(set) => sets[set].contains(number.into()),
            None => self.few().any(|other| other == number),
        }
    }

    fn insert(&mut self, number: Number, sets: &mut Vec<SlotSet>, free: &mut Vec<u32>) -> bool {
        if let Some(set) = self.set() {
            let is_new = !sets[set].contains(number.into());
            sets[set].insert(number.into());
            return is_new;
        }
        if self.few().any(|other| other == number) {
            return false;
        }
        if let Some(place) = self.0.iter_mut().find(|place| **place == NOBODY) {
            *place = number;
            return true;
        }
        let all = self.few().chain([number]).map(usize::from).collect();
        let set = match free.pop() {
            Some(set) => {
                sets[set as usize] = all;
                set
            }
            None if sets.len() < SETS_MAX => {
                sets.push(all);
                (sets.len() - 1) as u32
            }
            None => return false,
        };
        self.0 = [SET, set as u16, (set >> 16) as u16, 0];
        true
    }

    fn remove(&mut self, number: Number, sets: &mut [SlotSet], free: &mut Vec<u32>) -> bool {
        let was_there = match self.set() {
            Some(set) => sets[set].contains(number.into()),
            None => self.few().any(|other| other == number),
        };
        if was_there {
            let mut one = SlotSet::default();
            one.insert(number.into());
            self.remove_all(&one, sets, free);
        }
        was_there
    }

    /// Removes these, as far as they are there; a set of which few are left is given back.
    fn remove_all(&mut self, gone: &SlotSet, sets: &mut [SlotSet], free: &mut Vec<u32>) {
        let mut left = [NOBODY; 4];
        let keep = |number: &Number| !gone.contains(usize::from(*number));
        if let Some(set) = self.set() {
            sets[set].remove_all(gone);
            let mut numbers = sets[set].iter();
            let few = left.iter_mut().zip(&mut numbers);
            few.for_each(|(place, number)| *place = number as Number);
            if numbers.next().is_some() {
                return;
            }
            drop(numbers);
            sets[set].clear();
            free.push(set as u32);
        } else {
            let few = left.iter_mut().zip(self.few().filter(keep));
            few.for_each(|(place, number)| *place = number);
        }
        self.0 = left;
    }
}

/// Everybody can compute links, so where they lie in a table is decided by a number of this process: nobody can fill one place.
#[derive(Clone, Copy, Debug)]
struct Seeded(u64);

impl BuildHasher for Seeded {
    type Hasher = SeededHasher;

    fn build_hasher(&self) -> SeededHasher {
        SeededHasher(self.0)
    }
}

struct SeededHasher(u64);

impl Hasher for SeededHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64")
    }

    fn write_u64(&mut self, link: u64) {
        let x = link ^ self.0;
        let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        self.0 = x ^ (x >> 32);
    }
}

fn shard_of(link: u64) -> usize {
    (link >> (64 - SHARDS.ilog2())) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn depths(links: &Links, chain: &[u64]) -> BTreeMap<Number, usize> {
        let mut all = BTreeMap::new();
        links.depths(chain, &mut Probing::default(), |number, depth| {
            assert_eq!(all.insert(number, depth), None, "{number} is told twice");
        });
        all
    }

    #[derive(Clone, Debug)]
    enum Act {
        /// Whose, and how many links of which chain.
        Hold(u16, usize, u64),
        /// The same: it drops what is beyond.
        Drop(u16, usize, u64),
        Retire(u16),
        Sweep(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        let prefix = || (0..9u16, 0..40usize, 0..3u64);
        prop_oneof![
            6 => prefix().prop_map(|(who, links, chain)| Act::Hold(who, links, chain)),
            3 => prefix().prop_map(|(who, links, chain)| Act::Drop(who, links, chain)),
            1 => (0..9u16).prop_map(Act::Retire),
            2 => (1..SHARDS).prop_map(Act::Sweep),
        ]
    }

    /// Chains that share their first ten links.
    fn link(chain: u64, at: usize) -> u64 {
        let chain = if at < 10 { 0 } else { chain };
        (chain * 100 + at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    proptest! {
        /// Against a plain set of pairs: who holds how much of each chain, whoever comes, goes and is cleared away meanwhile.
        #[test]
        fn agrees_with_a_plain_set(acts in prop::collection::vec(act(), 1..120)) {
            let mut links = Links::default();
            let mut plain: BTreeSet<(u16, u64, usize)> = BTreeSet::new();
            let mut numbers = BTreeMap::new();
            for act in acts {
                let mut number = |links: &mut Links, who| {
                    *numbers.entry(who).or_insert_with(|| links.number().unwrap())
                };
                match act {
                    Act::Hold(who, count, chain) => {
                        let number = number(&mut links, who);
                        for at in 0..count {
                            let key = (who, if at < 10 { 0 } else { chain }, at);
                            prop_assert_eq!(links.insert(link(chain, at), number), plain.insert(key));
                        }
                    }
                    Act::Drop(who, count, chain) => {
                        let number = number(&mut links, who);
                        // What is shared goes last.
                        let chains = if count < 10 { 0..3 } else { chain..chain + 1 };
                        for chain in chains {
                            for at in (count..40).rev() {
                                let key = (who, if at < 10 { 0 } else { chain }, at);
                                prop_assert_eq!(links.remove(link(chain, at), number), plain.remove(&key));
                            }
                        }
                    }
                    Act::Retire(who) => {
                        if let Some(number) = numbers.remove(&who) {
                            links.retire(number);
                            plain.retain(|(other, ..)| *other != who);
                        }
                    }
                    Act::Sweep(shards) => (0..shards).for_each(|_| { links.sweep(); }),
                }
                for chain in 0..3 {
                    let all: Vec<u64> = (0..40).map(|at| link(chain, at)).collect();
                    let mut depths = depths(&links, &all);
                    for (who, number) in &numbers {
                        let has = |at: &usize| plain.contains(&(*who, if *at < 10 { 0 } else { chain }, *at));
                        let depth = (0..40).take_while(has).count();
                        prop_assert_eq!(depths.remove(number).unwrap_or(0), depth);
                    }
                    // Others are those that are being cleared away.
                    prop_assert!(depths.keys().all(|number| links.retired.iter().any(|(gone, _)| gone == number)));
                }
            }
            while links.sweep() {}
            let distinct: BTreeSet<_> = plain.iter().map(|(_, chain, at)| (chain, at)).collect();
            prop_assert_eq!(links.len(), distinct.len());
            let in_use: BTreeSet<_> = numbers.values().collect();
            prop_assert_eq!(links.free_numbers.len() + in_use.len(), links.numbers_end);
            for number in numbers.into_values() {
                links.retire(number);
            }
            while links.sweep() {}
            prop_assert_eq!(links.len(), 0);
            prop_assert_eq!(links.free_sets.len(), links.sets.len());
            prop_assert_eq!(links.free_numbers.len(), links.numbers_end);
        }
    }

    #[test]
    fn a_link_that_all_hold_is_found_with_each_and_beyond_the_bound_nothing_is_kept() {
        let mut links = Links::new(100);
        let numbers: Vec<Number> = (0..500).map(|_| links.number().unwrap()).collect();
        let chain: Vec<u64> = (0..100).map(|at| link(1, at)).collect();
        for number in &numbers {
            let has = 50 + usize::from(*number % 3);
            assert!(chain[..has].iter().all(|link| links.insert(*link, *number)));
        }
        let depths = depths(&links, &chain);
        assert!(
            numbers
                .iter()
                .all(|number| depths[number] == 50 + usize::from(*number % 3))
        );
        assert!((0..48).all(|at| links.insert(link(9, 10 + at), 0)));
        assert!(!links.insert(link(9, 99), 0), "there is no room");
        assert_eq!(links.len(), 100);
        assert!(links.remove(chain[51], 2) && !links.remove(chain[51], 2));
    }

    #[test]
    fn numbers_come_to_an_end_and_back() {
        let mut links = Links::default();
        for number in 0..NUMBERS {
            assert_eq!(links.number(), Some(number as Number));
        }
        assert_eq!(links.number(), None);
        links.retire(7);
        assert_eq!(links.number(), None, "it may be mentioned yet");
        while links.sweep() {}
        assert_eq!(links.number(), Some(7));
    }
}
