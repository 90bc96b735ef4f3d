//! What entered and left the prefix index, for whoever tells others of it.

use std::fmt;

/// Changes that wait to be taken. Beyond it they are given up and said to be lost: 1 MiB, an arena of 65,536 blocks filled anew.
const CHANGES_MAX: usize = 1 << 16;

/// What entered and left the prefix index since the last time, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixChanges {
    /// A block's link ([`baton_protocol::prefix_chain`]), and whether it is in the index now.
    pub changes: Vec<(u64, bool)>,
    /// There were too many: others before these are lost.
    pub lost: bool,
}

/// Keeps changes once somebody listens.
#[derive(Default)]
pub struct Journal {
    /// Rung at the first change after each taking. It must not wait, nor use the pool.
    bell: Option<Box<dyn Fn() + Send>>,
    kept: PrefixChanges,
}

impl Journal {
    pub fn listen(&mut self, bell: Box<dyn Fn() + Send>) {
        self.bell = Some(bell);
    }

    /// A block with this link entered the index, or left it.
    pub fn note(&mut self, link: u64, is_in: bool) {
        let Some(bell) = &self.bell else { return };
        let PrefixChanges { changes, lost } = &mut self.kept;
        if changes.is_empty() && !*lost {
            bell();
        }
        if changes.len() == CHANGES_MAX {
            changes.clear();
            *lost = true;
        }
        changes.push((link, is_in));
    }

    pub fn take(&mut self) -> PrefixChanges {
        std::mem::take(&mut self.kept)
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Journal({} changes)", self.kept.changes.len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[test]
    fn the_bell_rings_once_until_changes_are_taken_and_a_loss_is_said() {
        let rung = Arc::new(AtomicUsize::new(0));
        let bell = Arc::clone(&rung);
        let mut journal = Journal::default();
        journal.note(1, true);
        assert_eq!(journal.take(), PrefixChanges::default(), "nobody listens");
        journal.listen(Box::new(move || {
            bell.fetch_add(1, Relaxed);
        }));
        journal.note(2, true);
        journal.note(2, false);
        assert_eq!(rung.load(Relaxed), 1);
        let changes = vec![(2, true), (2, false)];
        let lost = false;
        assert_eq!(journal.take(), PrefixChanges { changes, lost });
        for link in 0..CHANGES_MAX as u64 + 3 {
            journal.note(link, true);
        }
        assert_eq!(rung.load(Relaxed), 2);
        let PrefixChanges { changes, lost } = journal.take();
        assert!(lost);
        assert_eq!(changes.last(), Some(&(CHANGES_MAX as u64 + 2, true)));
        assert!(changes.len() <= CHANGES_MAX);
        assert!(!journal.take().lost);
    }
}
