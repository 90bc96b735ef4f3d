//! Small numbers for what is compared often: a member's slot, sets of slots, and numbers for values that few members differ in.

/// A member's place in dense tables. It is another member's after this one has left.
pub type Slot = usize;

/// A set of slots, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotSet {
    words: Vec<u64>,
}

impl SlotSet {
    /// Adds a slot.
    pub fn insert(&mut self, slot: Slot) {
        let word = slot / 64;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (slot % 64);
    }

    /// Removes a slot.
    pub fn remove(&mut self, slot: Slot) {
        if let Some(word) = self.words.get_mut(slot / 64) {
            *word &= !(1 << (slot % 64));
        }
    }

    /// Whether it holds this slot.
    pub fn contains(&self, slot: Slot) -> bool {
        let word = self.words.get(slot / 64).copied().unwrap_or(0);
        word >> (slot % 64) & 1 == 1
    }

    /// Whether the two have a slot in common.
    pub fn intersects(&self, other: &Self) -> bool {
        let mut pairs = self.words.iter().zip(&other.words);
        pairs.any(|(a, b)| a & b != 0)
    }

    /// The 32 slots from `32 * at` on, as bits.
    pub fn word(&self, at: usize) -> u32 {
        let word = self.words.get(at / 2).copied().unwrap_or(0);
        (word >> (32 * (at % 2))) as u32
    }

    /// Removes all that another set holds.
    pub fn remove_all(&mut self, other: &Self) {
        let pairs = self.words.iter_mut().zip(&other.words);
        pairs.for_each(|(word, other)| *word &= !other);
    }

    /// Writes the set as bits, as many as there is room for.
    pub fn write(&self, bits: &mut [u64]) {
        let pairs = bits.iter_mut().zip(&self.words);
        pairs.for_each(|(bits, word)| *bits = *word);
    }

    /// Removes all, and keeps the memory.
    pub fn clear(&mut self) {
        self.words.clear();
    }

    /// All slots, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Slot> {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(64 * at + bit)
            })
        })
    }
}

impl FromIterator<Slot> for SlotSet {
    fn from_iter<I: IntoIterator<Item = Slot>>(slots: I) -> Self {
        let mut set = Self::default();
        slots.into_iter().for_each(|slot| set.insert(slot));
        set
    }
}

/// Values by number, each with how many members have it. Members of one cluster have one or two between them, so it is searched
/// from the front.
#[derive(Clone, Debug)]
pub struct Table<T> {
    rows: Vec<(T, usize)>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { rows: Vec::new() }
    }
}

impl<T: PartialEq + Clone> Table<T> {
    /// The number of a value that some member has.
    pub fn find(&self, value: &T) -> Option<u32> {
        let found = |(row, count): &(T, usize)| *count > 0 && row == value;
        self.rows.iter().position(found).map(|at| at as u32)
    }

    /// One more member has this value: its number.
    pub fn take(&mut self, value: &T) -> u32 {
        if let Some(number) = self.find(value) {
            self.rows[number as usize].1 += 1;
            return number;
        }
        let row = (value.clone(), 1);
        match self.rows.iter().position(|(_, count)| *count == 0) {
            Some(at) => {
                self.rows[at] = row;
                at as u32
            }
            None => {
                self.rows.push(row);
                (self.rows.len() - 1) as u32
            }
        }
    }

    /// One member less has the value of this number.
    pub fn give(&mut self, number: u32) {
        self.rows[number as usize].1 -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_number_is_free_when_nobody_has_its_value() {
        let mut table = Table::default();
        assert_eq!(
            [table.take(&'a'), table.take(&'b'), table.take(&'a')],
            [0, 1, 0]
        );
        table.give(0);
        assert_eq!(table.find(&'a'), Some(0), "one has it still");
        table.give(0);
        assert_eq!(table.find(&'a'), None);
        assert_eq!(table.take(&'c'), 0);
        assert_eq!(table.find(&'c'), Some(0));
        assert_eq!(table.find(&'b'), Some(1));
    }

    proptest! {
        #[test]
        fn a_set_of_slots_is_a_set(
            changes in prop::collection::vec((0usize..300, any::<bool>()), 0..100),
            others in prop::collection::vec(0usize..300, 0..4),
        ) {
            let (mut set, mut plain) = (SlotSet::default(), BTreeSet::new());
            for (slot, is_in) in changes {
                match is_in {
                    true => {
                        set.insert(slot);
                        plain.insert(slot);
                    }
                    false => {
                        set.remove(slot);
                        plain.remove(&slot);
                    }
                }
                prop_assert_eq!(set.contains(slot), is_in);
            }
            prop_assert!(set.iter().eq(plain.iter().copied()));
            let of_words = (0..12).flat_map(|at| {
                let word = set.word(at);
                (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| 32 * at + bit)
            });
            prop_assert!(of_words.eq(plain.iter().copied()));
            let other: SlotSet = others.iter().copied().collect();
            prop_assert_eq!(set.intersects(&other), others.iter().any(|slot| plain.contains(slot)));
            set.clear();
            prop_assert_eq!(set.iter().count(), 0);
        }
    }
}
