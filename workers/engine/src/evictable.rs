//! Blocks that only the prefix index keeps, in the order in which they will go.

const NONE: u32 = u32::MAX;

/// A doubly linked list through arrays: constant time for every operation and no allocation after the
/// start. Front is what nobody has used for the longest time.
#[derive(Debug)]
pub struct EvictionList {
    links: Vec<Link>,
    front: u32,
    back: u32,
    count: usize,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
    present: bool,
}

impl EvictionList {
    /// Empty, for blocks `0 .. blocks`.
    pub fn new(blocks: u32) -> Self {
        let link = Link {
            before: NONE,
            after: NONE,
            present: false,
        };
        Self {
            links: vec![link; blocks as usize],
            front: NONE,
            back: NONE,
            count: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn contains(&self, block: u32) -> bool {
        self.links[block as usize].present
    }

    /// Add a block that was used until now.
    pub fn push_back(&mut self, block: u32) {
        assert!(
            !self.contains(block),
            "block {block} is in the eviction list twice"
        );
        self.links[block as usize] = Link {
            before: self.back,
            after: NONE,
            present: true,
        };
        match self.back {
            NONE => self.front = block,
            back => self.links[back as usize].after = block,
        }
        self.back = block;
        self.count += 1;
    }

    /// The block to evict next.
    pub fn pop_front(&mut self) -> Option<u32> {
        let block = self.front;
        if block == NONE {
            return None;
        }
        self.remove(block);
        Some(block)
    }

    /// Somebody uses this block again.
    pub fn remove(&mut self, block: u32) {
        let Link {
            before,
            after,
            present,
        } = self.links[block as usize];
        assert!(present, "block {block} is not in the eviction list");
        match before {
            NONE => self.front = after,
            before => self.links[before as usize].after = after,
        }
        match after {
            NONE => self.back = before,
            after => self.links[after as usize].before = before,
        }
        self.links[block as usize].present = false;
        self.count -= 1;
    }

    /// From the next to go to the last.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let mut block = self.front;
        std::iter::from_fn(move || {
            let here = block;
            (here != NONE).then(|| {
                block = self.links[here as usize].after;
                here
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_through_removals() {
        let mut list = EvictionList::new(8);
        for block in [3, 1, 4, 5, 2] {
            list.push_back(block);
        }
        list.remove(4);
        list.remove(3);
        list.remove(2);
        list.push_back(3);
        assert_eq!(list.iter().collect::<Vec<_>>(), [1, 5, 3]);
        assert_eq!(list.pop_front(), Some(1));
        assert_eq!(list.len(), 2);
        list.remove(5);
        list.remove(3);
        assert_eq!(list.pop_front(), None);
        assert_eq!(list.len(), 0);
    }
}
