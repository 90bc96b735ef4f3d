//! Random numbers that a seed decides.

use std::ops::Range;

/// A stream of random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x6261_746f_6e00_0002))
    }

    /// Another stream, which what is drawn from this one later does not change.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self(mix(self.next()))
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number of this range, which is not empty.
    pub fn range(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True in so many cases of a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.range(0..1000) < per_mille
    }

    /// One of these, of which there is at least one.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.range(0..of.len() as u64) as usize]
    }

    /// Puts them in any order.
    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, self.range(0..last as u64 + 1) as usize);
        }
    }
}

/// Spreads every bit over all.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
