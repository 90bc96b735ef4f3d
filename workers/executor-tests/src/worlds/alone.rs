//! What a sequence gets that has the executor to itself: one step for its prompt, one for each token after it.

use std::cmp::Ordering;

use baton_engine::{Executor, SampleRequest, Sampled, SequenceStep, StepPlan, sample};
use baton_protocol::TokenLogprobs;

use super::job::{End, Job};

/// How near what a sequence gets must be to what it gets alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alike {
    /// The same bits.
    Exactly,
    /// Logits differ by this at most: each token is one that logits so near would give.
    Within(f32),
}

/// A sequence's text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Text {
    pub sampled: Vec<Sampled>,
    pub end: Option<End>,
    pub prompt_logprobs: Vec<TokenLogprobs>,
}

impl Text {
    pub fn tokens(&self) -> Vec<u32> {
        self.sampled.iter().map(|sampled| sampled.token).collect()
    }
}

/// The executor, with no other sequence in it and no step in flight.
pub struct Alone<'a> {
    pub executor: &'a mut dyn Executor,
    /// Longest sequence.
    pub tokens_max: usize,
}

impl Alone<'_> {
    /// The text of one sequence.
    pub fn text(&mut self, job: &Job) -> Text {
        let mut text = Text::default();
        while text.end.is_none() {
            let output = text.tokens();
            let (sampled, logprobs, _) = self.choose(job, &output, false);
            text.prompt_logprobs.extend(logprobs);
            match sampled {
                None => text.end = Some(End::Failed),
                Some(sampled) => {
                    text.sampled.push(sampled);
                    text.end = job.end(&text.tokens(), self.tokens_max);
                }
            }
        }
        text
    }

    /// How many tokens of a text differ from those that the sequence would get alone after what comes before them.
    ///
    /// # Panics
    /// If one differs by more than `bound` of the logits explains.
    pub fn differences(&mut self, job: &Job, found: &Text, bound: f32, at: &str) -> usize {
        let tokens = found.tokens();
        let mut differ = 0;
        for (i, sampled) in found.sampled.iter().enumerate() {
            let (_, expected, mut logits) = self.choose(job, &tokens[..i], true);
            if i == 0 {
                let counts = [&found.prompt_logprobs, &expected].map(Vec::len);
                assert_eq!(counts[0], counts[1], "{at}: of its prompt");
                for (found, expected) in found.prompt_logprobs.iter().zip(expected) {
                    let error = (found.logprob - expected.logprob).abs();
                    assert!(error <= 2.0 * bound, "{at}: {found:?}, alone {expected:?}");
                }
            }
            let request = job.request(&tokens[..i]);
            let near = |bound| near(&logits, &request, sampled.token, bound);
            let Some(nearest) = near(bound) else {
                let further = [2.0, 4.0, 8.0, 16.0].map(|times| times * bound);
                let needed = further.into_iter().find(|bound| near(*bound).is_some());
                panic!(
                    "{at}: token {i} is {sampled:?}; alone it is {:?}, and logits would have to be off by {needed:?}: {request:?}, {logits:?}",
                    sample(&mut logits.clone(), &request)
                );
            };
            let logprobs = [&nearest, sampled].map(|s| s.logprobs.as_ref());
            if let [Some(expected), Some(found)] = logprobs {
                let error = (found.logprob - expected.logprob).abs();
                assert!(
                    error <= 4.0 * bound && found.top.len() == expected.top.len(),
                    "{at}: token {i} is {found:?}, near is {expected:?}"
                );
            }
            let alone = sample(&mut logits, &request);
            differ += usize::from(alone.is_none_or(|alone| alone.token != sampled.token));
        }
        if found.end == Some(End::Failed) {
            let (alone, _, _) = self.choose(job, &tokens, false);
            assert_eq!(alone, None, "{at}: it failed after {} tokens", tokens.len());
        }
        differ
    }

    /// The token after this output, the prompt's log-probabilities with the first, and the logits if wanted. Its KV is that of the calls before.
    fn choose(
        &mut self,
        job: &Job,
        output: &[u32],
        want_logits: bool,
    ) -> (Option<Sampled>, Vec<TokenLogprobs>, Vec<f32>) {
        let (start, tokens) = match output.last() {
            None => (0, job.prompt.clone()),
            Some(last) => (job.prompt.len() + output.len() - 1, vec![*last]),
        };
        let targets = match (output, job.prompt_logprobs) {
            ([], Some(_)) => job.prompt[1..].to_vec(),
            _ => Vec::new(),
        };
        let blocks = self.executor.info().kv.blocks_for(start + tokens.len());
        let plan = StepPlan {
            sequences: vec![SequenceStep {
                key: 1,
                tokens: 0..tokens.len(),
                follows: None,
                start: start as u32,
                blocks: 0..blocks,
                sample: Some(job.request(output).into()),
                targets: 0..targets.len(),
                target_top: job.prompt_logprobs.unwrap_or(0),
            }],
            tokens,
            blocks: (0..blocks as u32).collect(),
            targets,
            want_logits,
            ..StepPlan::default()
        };
        let made = self.executor.forward(&plan).expect("a step of one");
        let made = made.sequences.into_iter().next().expect("one sequence");
        (
            made.sampled.first().cloned(),
            made.target_logprobs,
            made.logits,
        )
    }
}

/// What the rules make of logits within `bound` of these that give this token. Logits are moved as a draw needs it: the token's up, and
/// those of the ids before it and after it up or down, since draws go by sums in order of ids. By little and by more, for what is kept of the
/// distribution changes with each.
fn near(logits: &[f32], request: &SampleRequest, token: u32, bound: f32) -> Option<Sampled> {
    let small = (5..12).map(|halvings| 0.5_f32.powi(halvings));
    let scales: Vec<f32> = small.chain((0..=16).map(|i| i as f32 / 16.0)).collect();
    let groups = || [-1.0, 0.0, 1.0].into_iter();
    let moves = groups().flat_map(|before| groups().map(move |after| (before, after)));
    let moved = moves.flat_map(|(before, after)| {
        scales.iter().map(move |scale| {
            let by = bound * scale;
            let shift = |(id, logit): (usize, &f32)| match id.cmp(&(token as usize)) {
                Ordering::Less => logit + by * before,
                Ordering::Equal => logit + by,
                Ordering::Greater => logit + by * after,
            };
            logits.iter().enumerate().map(shift).collect::<Vec<f32>>()
        })
    });
    let mut sampled = moved.filter_map(|mut logits| sample(&mut logits, request));
    sampled.find(|sampled| sampled.token == token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Random;

    /// Or [`Alike::Within`] would let anything pass.
    #[test]
    fn only_logits_that_are_near_explain_a_token() {
        let mut random = Random(4);
        let stems = [vec![1, 2, 3]];
        let (mut far, mut tokens) = (0, 0);
        for _ in 0..40 {
            let logits: Vec<f32> = (0..301).map(|_| random.number() as f32 * 3.0).collect();
            let job = Job::draw(&mut random, 301, &stems);
            let request = job.request(&[]);
            let Some(right) = sample(&mut logits.clone(), &request) else {
                continue;
            };
            assert_eq!(near(&logits, &request, right.token, 0.0), Some(right));
            let explained = |token: &u32| near(&logits, &request, *token, 0.05).is_some();
            let near = (0..301).filter(explained).count();
            assert!(near < 60, "{near} tokens are near: {request:?}");
            far += 301 - near;
            tokens += 301;
        }
        assert!(far * 10 > tokens * 9, "{far} of {tokens}");
    }
}
