//! Which blocks are free, and how to hand them out as long runs.

use baton_protocol::BlockRun;

/// A bitmap of free blocks. Sequences that lie in few runs are moved in few large reads, so blocks are
/// handed out as neighbours where that is possible.
#[derive(Debug)]
pub struct FreeList {
    words: Vec<u64>,
    blocks: u32,
    count: usize,
    /// No word before this one has a free block.
    lowest_word: usize,
}

impl FreeList {
    /// All of `blocks` blocks are free.
    pub fn new(blocks: u32) -> Self {
        let mut words = vec![u64::MAX; (blocks as usize).div_ceil(64)];
        if !blocks.is_multiple_of(64)
            && let Some(last) = words.last_mut()
        {
            *last = (1 << (blocks % 64)) - 1;
        }
        Self {
            words,
            blocks,
            count: blocks as usize,
            lowest_word: 0,
        }
    }

    /// Number of free blocks.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether this block is free.
    pub fn contains(&self, block: u32) -> bool {
        self.words[block as usize / 64] >> (block % 64) & 1 == 1
    }

    /// Give a block back.
    pub fn insert(&mut self, block: u32) {
        assert!(!self.contains(block), "block {block} freed twice");
        let word = block as usize / 64;
        self.words[word] |= 1 << (block % 64);
        self.count += 1;
        self.lowest_word = self.lowest_word.min(word);
    }

    /// Take one block: the one after `neighbour` if it is free, else the lowest, which leaves the long runs
    /// whole.
    pub fn take_one(&mut self, neighbour: Option<u32>) -> Option<u32> {
        let next = neighbour.map(|block| block + 1);
        if let Some(next) = next
            && next < self.blocks
            && self.contains(next)
        {
            self.remove(next);
            return Some(next);
        }
        let offset = self.words[self.lowest_word..]
            .iter()
            .position(|word| *word != 0)?;
        self.lowest_word += offset;
        let block = self.lowest_word as u32 * 64 + self.words[self.lowest_word].trailing_zeros();
        self.remove(block);
        Some(block)
    }

    /// Take `count` blocks, appended to `taken`: the shortest run that holds them all, else the longest runs and
    /// the rest from the shortest that holds it. There must be enough.
    pub fn take(&mut self, count: usize, taken: &mut Vec<u32>) {
        assert!(
            count <= self.count,
            "{count} blocks wanted and {} free",
            self.count
        );
        if count == 0 {
            return;
        }
        let mut runs = self.runs();
        // Longest first; the shortest that is long enough is looked for from the end, so among equals the lowest is last.
        runs.sort_unstable_by_key(|run| std::cmp::Reverse((run.count, run.first)));
        let mut missing = count;
        let mut index = 0;
        while missing > 0 {
            // Of the runs from `index` on, the last that is long enough is the shortest such.
            let enough = runs[index..].partition_point(|run| run.count as usize >= missing);
            let run = if enough > 0 {
                runs[index + enough - 1]
            } else {
                runs[index]
            };
            let part = missing.min(run.count as usize);
            for block in run.first..run.first + part as u32 {
                self.remove(block);
                taken.push(block);
            }
            missing -= part;
            index += 1;
        }
    }

    /// All maximal runs of free blocks, lowest first.
    pub fn runs(&self) -> Vec<BlockRun> {
        let mut runs = Vec::new();
        let mut from = 0;
        while let Some(first) = self.next(from, true) {
            let end = self.next(first, false).unwrap_or(self.blocks);
            runs.push(BlockRun {
                first,
                count: end - first,
            });
            from = end;
        }
        runs
    }

    /// The lowest block from `from` on that is free, or not free.
    fn next(&self, from: u32, free: bool) -> Option<u32> {
        let mut word = from as usize / 64;
        let mut mask = u64::MAX << (from % 64);
        while word < self.words.len() {
            let bits = if free {
                self.words[word]
            } else {
                !self.words[word]
            } & mask;
            if bits != 0 {
                let block = word as u32 * 64 + bits.trailing_zeros();
                return (block < self.blocks).then_some(block);
            }
            mask = u64::MAX;
            word += 1;
        }
        None
    }

    fn remove(&mut self, block: u32) {
        self.words[block as usize / 64] &= !(1 << (block % 64));
        self.count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list_with(free: &[u32], blocks: u32) -> FreeList {
        let mut list = FreeList::new(blocks);
        list.take(blocks as usize, &mut Vec::new());
        for block in free {
            list.insert(*block);
        }
        list
    }

    fn take(list: &mut FreeList, count: usize) -> Vec<u32> {
        let mut taken = Vec::new();
        list.take(count, &mut taken);
        taken
    }

    #[test]
    fn prefers_the_shortest_run_that_is_long_enough() {
        let mut list = list_with(&[0, 1, 2, 10, 11, 63, 64, 65, 66, 70], 130);
        assert_eq!(take(&mut list, 2), [10, 11]);
        assert_eq!(take(&mut list, 3), [0, 1, 2]);
        assert_eq!(take(&mut list, 5), [63, 64, 65, 66, 70]);
        assert_eq!(list.len(), 0);
        assert_eq!(list.take_one(None), None);
    }

    #[test]
    fn splits_over_the_longest_runs() {
        let mut list = list_with(&[0, 2, 3, 5, 6, 7, 9], 10);
        assert_eq!(take(&mut list, 4), [5, 6, 7, 0]);
    }

    #[test]
    fn one_block_goes_beside_its_neighbour() {
        let mut list = list_with(&[1, 4, 5], 6);
        assert_eq!(list.take_one(Some(3)), Some(4));
        assert_eq!(list.take_one(Some(2)), Some(1));
        assert_eq!(list.take_one(Some(5)), Some(5));
    }

    #[test]
    fn runs_end_with_the_arena() {
        for blocks in [1, 63, 64, 65, 128] {
            let list = FreeList::new(blocks);
            assert_eq!(
                list.runs(),
                [BlockRun {
                    first: 0,
                    count: blocks
                }]
            );
        }
        assert!(FreeList::new(0).runs().is_empty());
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn a_second_free_is_noticed() {
        FreeList::new(4).insert(2);
    }
}
