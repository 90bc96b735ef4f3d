//! What a step made: the tokens it chose, and what it was asked to report.

use std::{iter, option, vec};

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

/// The tokens chosen for one sequence in one step, in the order of their positions. One token takes no memory elsewhere.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampledRun {
    first: Option<Sampled>,
    rest: Vec<Sampled>,
}

impl SampledRun {
    /// How many.
    pub fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.rest.len()
    }

    /// Whether none was chosen.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The first.
    pub fn first(&self) -> Option<&Sampled> {
        self.first.as_ref()
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = &Sampled> {
        self.first.iter().chain(&self.rest)
    }

    /// In order, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sampled> {
        self.first.iter_mut().chain(&mut self.rest)
    }
}

impl Extend<Sampled> for SampledRun {
    fn extend<I: IntoIterator<Item = Sampled>>(&mut self, run: I) {
        let mut run = run.into_iter();
        if self.first.is_none() {
            self.first = run.next();
        }
        self.rest.extend(run);
    }
}

impl FromIterator<Sampled> for SampledRun {
    fn from_iter<I: IntoIterator<Item = Sampled>>(run: I) -> Self {
        let mut made = Self::default();
        made.extend(run);
        made
    }
}

impl From<Option<Sampled>> for SampledRun {
    fn from(first: Option<Sampled>) -> Self {
        Self {
            first,
            rest: Vec::new(),
        }
    }
}

impl IntoIterator for SampledRun {
    type Item = Sampled;
    type IntoIter = iter::Chain<option::IntoIter<Sampled>, vec::IntoIter<Sampled>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.rest)
    }
}
