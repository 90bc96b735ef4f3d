//! Which traces that begin here are recorded.

use baton_protocol::TraceId;

/// The bits of a trace id that are taken for random: as W3C Trace Context, level 2, has it.
const RANDOM_BITS: u32 = 56;

/// A part of all traces, chosen by their ids: every process that knows the part chooses the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Ids whose random bits are below it are left out.
    threshold: u64,
}

impl Sampler {
    /// This part of all, from 0 to 1.
    ///
    /// # Errors
    /// If it is no such number.
    pub fn new(part: f64) -> Result<Self, String> {
        if !(0.0..=1.0).contains(&part) {
            return Err(format!(
                "{part} is no part of all traces: give a number from 0 to 1"
            ));
        }
        let all = (1_u64 << RANDOM_BITS) as f64;
        Ok(Self {
            threshold: ((1.0 - part) * all) as u64,
        })
    }

    /// Whether this trace is recorded.
    pub fn takes(self, trace: TraceId) -> bool {
        let random = trace.0 as u64 & ((1 << RANDOM_BITS) - 1);
        random >= self.threshold
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_a_number_from_0_to_1() {
        for part in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(Sampler::new(part).is_err(), "{part}");
        }
    }

    #[test]
    fn as_many_are_taken_as_it_says() {
        for part in [0.0, 0.1, 0.5, 0.9, 1.0] {
            let sampler = Sampler::new(part).unwrap();
            let takes =
                |n: u64| sampler.takes(TraceId(u128::from(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
            let taken = (1..=10_000).filter(|n| takes(*n)).count() as f64;
            assert!((taken / 10_000.0 - part).abs() < 0.02, "{part}: {taken}");
        }
    }

    proptest! {
        /// A larger part takes all that a smaller one takes; 1 takes all and 0 none.
        #[test]
        fn parts_are_nested(trace: u128, a in 0.0..=1.0, b in 0.0..=1.0) {
            let takes = |part: f64| Sampler::new(part).unwrap().takes(TraceId(trace));
            let (small, large) = if a < b { (a, b) } else { (b, a) };
            prop_assert!(!takes(small) || takes(large));
            prop_assert!(takes(1.0) && !takes(0.0));
        }
    }
}
