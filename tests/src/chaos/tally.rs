//! What came of it, in numbers.

use std::collections::BTreeMap;
use std::fmt;

use super::firsts::Firsts;
use super::verdict::Failure;

/// Counts over one seed or many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests answered, every bit right.
    pub answered: usize,
    /// Errors that faults account for.
    pub errors: BTreeMap<Failure, usize>,
    /// Clients that left, as they were to.
    pub left: usize,
    /// Wrong texts, wrong errors, hangs, and a cluster that does not serve as it should.
    pub wrong: usize,
    /// Pools, processes and requests that hold what nobody needs any more.
    pub leaked: usize,
    /// Streams with a hole.
    pub gaps: usize,
    /// How long first tokens took.
    pub firsts: Firsts,
}

impl Tally {
    /// Whether nothing is amiss.
    pub fn clean(&self) -> bool {
        self.wrong == 0 && self.leaked == 0 && self.gaps == 0 && self.answered > 0
    }

    /// Adds another one.
    pub fn add(&mut self, other: &Self) {
        self.answered += other.answered;
        self.left += other.left;
        self.wrong += other.wrong;
        self.leaked += other.leaked;
        self.gaps += other.gaps;
        self.firsts.add(&other.firsts);
        for (failure, count) in &other.errors {
            *self.errors.entry(*failure).or_default() += count;
        }
    }

    /// The errors by kind, and who left.
    pub fn kinds(&self) -> String {
        let mut kinds = vec![format!("left={}", self.left)];
        kinds.extend(
            self.errors
                .iter()
                .map(|(failure, count)| format!("{}={count}", failure.label())),
        );
        kinds.join(" ")
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errors: usize = self.errors.values().sum();
        write!(
            f,
            "answered={} errors={errors} wrong={} leaked={} gaps={}",
            self.answered, self.wrong, self.leaked, self.gaps
        )
    }
}
