//! What a step made: the tokens it chose, and what it was asked to report.

use std::{iter, mem, option, slice, vec};

use baton_protocol::TokenLogprobs;

/// What a step made, sequence by sequence in the plan's order.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// For each sequence of the plan.
    pub sequences: Vec<SequenceOutput>,
}

/// What a step made for one sequence.
#[derive(Clone, Debug, Default)]
pub struct SequenceOutput {
    /// The chosen tokens: as many as [`SampleRun::len`](crate::SampleRun::len), or after a `failure` those before it.
    pub sampled: SampledRun,
    /// Why no further token could be chosen, or none reported, as a sentence: no logit is a finite number. It ends this
    /// sequence and no other, unless a draft before that place is rejected.
    pub failure: Option<String>,
    /// One for each target.
    pub target_logprobs: Vec<TokenLogprobs>,
    /// Logits of the sampled positions before any sampling rule, one position after the other, if the plan wants them.
    pub logits: Vec<f32>,
}

impl SequenceOutput {
    /// The output of a row without a finite logit.
    pub fn without_token() -> Self {
        let failure = "the model gave no finite logit for the next token: its weights, its KV or its arithmetic are broken \
                       for this text";
        Self {
            failure: Some(failure.to_owned()),
            ..Self::default()
        }
    }

    /// Takes in what the sequence's next row says: rows come in the order of their positions. What is chosen after a failure
    /// does not count.
    pub fn extend(&mut self, row: Self) {
        self.target_logprobs.extend(row.target_logprobs);
        self.logits.extend(row.logits);
        if self.failure.is_none() {
            self.sampled.extend(row.sampled);
            self.failure = row.failure;
        }
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// The tokens chosen for one sequence in one step, in the order of their positions. One token, which is nearly always what there
/// is, takes no memory elsewhere.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampledRun(Run);

#[derive(Clone, Debug, Default, PartialEq)]
enum Run {
    #[default]
    None,
    One(Sampled),
    /// At least two.
    Many(Vec<Sampled>),
}

impl SampledRun {
    /// How many.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether none was chosen.
    pub fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    /// The first.
    pub fn first(&self) -> Option<&Sampled> {
        self.as_slice().first()
    }

    /// In order.
    pub fn as_slice(&self) -> &[Sampled] {
        match &self.0 {
            Run::None => &[],
            Run::One(sampled) => slice::from_ref(sampled),
            Run::Many(run) => run,
        }
    }

    /// In order, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [Sampled] {
        match &mut self.0 {
            Run::None => &mut [],
            Run::One(sampled) => slice::from_mut(sampled),
            Run::Many(run) => run,
        }
    }

    /// The first, and those after it.
    pub fn split_first(self) -> (Option<Sampled>, vec::IntoIter<Sampled>) {
        match self.0 {
            Run::None => (None, Vec::new().into_iter()),
            Run::One(sampled) => (Some(sampled), Vec::new().into_iter()),
            Run::Many(run) => {
                let mut run = run.into_iter();
                (run.next(), run)
            }
        }
    }

    /// One more, behind the others.
    pub fn push(&mut self, sampled: Sampled) {
        self.0 = match mem::take(&mut self.0) {
            Run::None => Run::One(sampled),
            Run::One(first) => Run::Many(vec![first, sampled]),
            Run::Many(mut run) => {
                run.push(sampled);
                Run::Many(run)
            }
        };
    }
}

impl Extend<Sampled> for SampledRun {
    fn extend<I: IntoIterator<Item = Sampled>>(&mut self, run: I) {
        run.into_iter().for_each(|sampled| self.push(sampled));
    }
}

impl From<Option<Sampled>> for SampledRun {
    fn from(sampled: Option<Sampled>) -> Self {
        Self(sampled.map_or(Run::None, Run::One))
    }
}

impl IntoIterator for SampledRun {
    type Item = Sampled;
    type IntoIter = iter::Chain<option::IntoIter<Sampled>, vec::IntoIter<Sampled>>;

    fn into_iter(self) -> Self::IntoIter {
        let (first, rest) = self.split_first();
        first.into_iter().chain(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_keeps_its_order_and_costs_what_one_token_does() {
        let sampled = |token| Sampled {
            token,
            logprobs: None,
        };
        let mut run = SampledRun::default();
        for count in 0..5 {
            let tokens: Vec<u32> = run.as_slice().iter().map(|s| s.token).collect();
            assert_eq!(tokens, Vec::from_iter(0..count));
            let owned: Vec<Sampled> = run.clone().into_iter().collect();
            assert_eq!(owned, run.as_slice());
            assert_eq!((run.len(), run.is_empty()), (count as usize, count == 0));
            run.push(sampled(count));
        }
        assert_eq!(
            SampledRun::from(Some(sampled(3))).first(),
            Some(&sampled(3))
        );
        assert_eq!(size_of::<SampledRun>(), size_of::<Option<Sampled>>());
    }
}
