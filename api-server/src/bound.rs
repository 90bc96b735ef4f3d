//! A number of something that may not pass a bound, counted by many threads.

use std::sync::atomic::{AtomicUsize, Ordering};

/// How much of something there may be, and how much there is: choices under way, or bytes held.
#[derive(Debug)]
pub struct Bound {
    most: usize,
    taken: AtomicUsize,
}

impl Bound {
    /// Nothing is taken.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            taken: AtomicUsize::new(0),
        }
    }

    /// How much there may be.
    pub fn most(&self) -> usize {
        self.most
    }

    /// How much is taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Acquire)
    }

    /// Takes so much, if that is within the bound.
    pub fn take(&self, amount: usize) -> bool {
        let more = |now: usize| now.checked_add(amount).filter(|sum| *sum <= self.most);
        self.taken
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .is_ok()
    }

    /// Gives back what was taken.
    pub fn give(&self, amount: usize) {
        self.taken.fetch_sub(amount, Ordering::AcqRel);
    }
}
