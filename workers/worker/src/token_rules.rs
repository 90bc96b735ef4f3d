//! Token rules as the engine sees them: `allowed_token_ids` and `bad_words`, by themselves or with a grammar.
//!
//! They need no tokenizer and no threads: a mask is that of the ids that may always come, less the last tokens of bad words whose
//! other tokens were chosen just now, and with a grammar also less what that does not allow.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use baton_engine::{Constraint, Mask, TokenMask};
use baton_protocol::{SequenceSpec, TokenRules};

/// What a sequence must follow, of its rules and of what its grammar became; none if it has neither. `next` is a token after those
/// of the sequence.
///
/// # Errors
/// Why it can never have a token, as a sentence.
pub(crate) fn ruled(
    spec: &SequenceSpec,
    next: Option<u32>,
    vocab: u32,
    grammar: Option<Box<dyn Constraint>>,
) -> Result<Option<Box<dyn Constraint>>, String> {
    let Some(rules) = &spec.generation.token_rules else {
        return Ok(grammar);
    };
    let mut ruled = Ruled::new(rules, vocab, grammar)?;
    let output = spec.tokens.0.iter().skip(spec.prompt_tokens as usize);
    output
        .copied()
        .chain(next)
        .for_each(|token| ruled.note(token));
    Ok(Some(Box::new(ruled)))
}

/// The rules of one sequence, at the place where it stands.
struct Ruled {
    grammar: Option<Box<dyn Constraint>>,
    /// What may come where no bad word of several tokens is begun.
    always: Arc<TokenMask>,
    /// Bad words of several tokens, by the last but one.
    words: BTreeMap<u32, Vec<Box<[u32]>>>,
    /// The last tokens of the output, as many as the longest of these words has before its last.
    recent: VecDeque<u32>,
    recent_max: usize,
    /// The mask of the next token, once it was asked for.
    mask: Option<Arc<TokenMask>>,
}

impl Ruled {
    fn new(
        rules: &TokenRules,
        vocab: u32,
        grammar: Option<Box<dyn Constraint>>,
    ) -> Result<Self, String> {
        let inside = |token: &u32| *token < vocab;
        let mut always = match &rules.allowed {
            Some(allowed) => TokenMask::of(vocab, allowed.0.iter().copied().filter(inside)),
            None => TokenMask::of(vocab, 0..vocab),
        };
        let mut words: BTreeMap<u32, Vec<Box<[u32]>>> = BTreeMap::new();
        let mut recent_max = 0;
        let mut banned = Vec::new();
        for word in &rules.bad_words {
            match &word.0[..] {
                [] => {}
                [only] => banned.push(*only),
                [.., before, _] => {
                    recent_max = recent_max.max(word.0.len() - 1);
                    words.entry(*before).or_default().push(word.0[..].into());
                }
            }
        }
        if !banned.is_empty() {
            always = less(always.words(), banned);
        }
        if is_empty(&always) {
            return Err("no token may ever come: those that are allowed are bad words".to_owned());
        }
        Ok(Self {
            grammar,
            always: Arc::new(always),
            words,
            recent: VecDeque::with_capacity(recent_max),
            recent_max,
            mask: None,
        })
    }

    /// Takes a token of the output.
    fn note(&mut self, token: u32) {
        self.mask = None;
        if self.recent_max > 0 {
            if self.recent.len() == self.recent_max {
                self.recent.pop_front();
            }
            self.recent.push_back(token);
        }
    }

    /// The tokens that would complete a bad word now.
    fn completions(&self) -> impl Iterator<Item = u32> {
        let words = self.recent.back().and_then(|last| self.words.get(last));
        words.into_iter().flatten().filter_map(|word| {
            let (last, before) = word.split_last()?;
            let is_begun = before.len() <= self.recent.len()
                && before
                    .iter()
                    .rev()
                    .eq(self.recent.iter().rev().take(before.len()));
            is_begun.then_some(*last)
        })
    }

    /// The mask of the next token, with that of the grammar.
    fn with(&self, grammar: Option<&TokenMask>) -> Arc<TokenMask> {
        let mut completions = self.completions().peekable();
        let Some(grammar) = grammar else {
            return match completions.peek() {
                None => Arc::clone(&self.always),
                Some(_) => Arc::new(less(self.always.words(), completions)),
            };
        };
        let of_grammar = grammar.words().iter().copied().chain(std::iter::repeat(0));
        let both = self.always.words().iter().zip(of_grammar);
        let both: Vec<u32> = both.map(|(one, other)| one & other).collect();
        Arc::new(less(&both, completions))
    }
}

impl Constraint for Ruled {
    fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.note(token);
        match &mut self.grammar {
            Some(grammar) => grammar.accept(token),
            None => Ok(false),
        }
    }

    fn mask(&mut self, deadline: Instant) -> Mask {
        if let Some(mask) = &self.mask {
            return Mask::Ready(Arc::clone(mask));
        }
        let grammar = match &mut self.grammar {
            None => None,
            Some(grammar) => match grammar.mask(deadline) {
                Mask::Ready(mask) => Some(mask),
                other => return other,
            },
        };
        let mask = self.with(grammar.as_deref());
        if is_empty(&mask) {
            let detail =
                "no token may come next: allowed_token_ids, bad_words and the grammar leave none";
            return Mask::Failed(detail.to_owned());
        }
        self.mask = Some(Arc::clone(&mask));
        Mask::Ready(mask)
    }
}

impl fmt::Debug for Ruled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ruled")
            .field("grammar", &self.grammar)
            .field("always", &self.always)
            .finish_non_exhaustive()
    }
}

/// A mask of these words without these ids.
fn less(words: &[u32], ids: impl IntoIterator<Item = u32>) -> TokenMask {
    let mut words: Box<[u32]> = words.into();
    for id in ids {
        if let Some(word) = words.get_mut(id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }
    TokenMask::new(words)
}

fn is_empty(mask: &TokenMask) -> bool {
    mask.words().iter().all(|word| *word == 0)
}

#[cfg(test)]
mod tests {
    use baton_protocol::{CacheSalt, Generation, PackedTokens};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// A grammar that allows these ids, each time, and is whole after so many tokens.
    #[derive(Debug)]
    struct Only(Arc<TokenMask>, usize);

    impl Constraint for Only {
        fn accept(&mut self, _: u32) -> Result<bool, String> {
            self.1 -= 1;
            Ok(self.1 == 0)
        }

        fn mask(&mut self, _: Instant) -> Mask {
            Mask::Ready(Arc::clone(&self.0))
        }
    }

    fn spec(rules: TokenRules, output: &[u32]) -> SequenceSpec {
        // The prompt ends with what begins many a word.
        let prompt = [1, 0, 1, 0];
        SequenceSpec {
            tokens: [&prompt, output].concat().into(),
            prompt_tokens: prompt.len() as u32,
            generation: Generation {
                max_tokens: 100,
                token_rules: Some(Arc::new(rules)),
                ..Generation::default()
            },
            cache_salt: CacheSalt::NONE,
            service: baton_protocol::Service::default(),
        }
    }

    fn rules(allowed: Option<Vec<u32>>, bad_words: &[Vec<u32>]) -> TokenRules {
        TokenRules {
            allowed: allowed.map(PackedTokens),
            bad_words: bad_words.iter().cloned().map(PackedTokens).collect(),
        }
    }

    fn only(vocab: u32, ids: &[u32]) -> Box<dyn Constraint> {
        Box::new(Only(
            Arc::new(TokenMask::of(vocab, ids.iter().copied())),
            1_000,
        ))
    }

    proptest! {
        /// At each place exactly those tokens may come that are allowed and with which the output does not end in a bad word. So no
        /// output holds one, and every output that holds none is possible. A sequence that begins again at any place, with or
        /// without its last token apart, stands where the other one does.
        #[test]
        fn a_mask_takes_what_it_must_and_no_more(
            vocab in 1u32..70,
            words in vec(vec(0u32..5, 1..5), 0..8),
            wide in vec(vec(0u32..70, 1..3), 0..8),
            allowed in proptest::option::of(vec(0u32..70, 1..40)),
            of_grammar in proptest::option::of(vec(0u32..70, 1..40)),
            picks in vec(any::<prop::sample::Index>(), 40),
        ) {
            let inside = |ids: Vec<u32>| -> Vec<u32> { ids.into_iter().map(|id| id % vocab).collect() };
            let words: Vec<Vec<u32>> = words.into_iter().chain(wide).map(inside).collect();
            let (allowed, of_grammar) = (allowed.map(inside), of_grammar.map(inside));
            let may = |output: &[u32], token: u32| {
                let with = [output, &[token]].concat();
                allowed.as_ref().is_none_or(|ids| ids.contains(&token))
                    && of_grammar.as_ref().is_none_or(|ids| ids.contains(&token))
                    && !words.iter().any(|word| with.ends_with(word))
            };
            let rules = rules(allowed.clone(), &words);
            let begun = |output: &[u32], next: Option<u32>| {
                let grammar = of_grammar.as_ref().map(|ids| only(vocab, ids));
                ruled(&spec(rules.clone(), output), next, vocab, grammar)
            };
            let Ok(constraint) = begun(&[], None) else {
                let single = |token: &u32| words.contains(&vec![*token]);
                prop_assert!((0..vocab).filter(|token| allowed.as_ref().is_none_or(|ids| ids.contains(token))).all(|token| single(&token)));
                return Ok(());
            };
            let mut constraint = constraint.expect("there are rules");
            let mut output = Vec::new();
            for pick in picks {
                let free: Vec<u32> = (0..vocab).filter(|token| may(&output, *token)).collect();
                let again = begun(&output, None).unwrap();
                let handed_over = output.split_last().map(|(last, before)| begun(before, Some(*last)).unwrap());
                let others = [again, handed_over.flatten()].into_iter().flatten();
                constraint = others.chain([constraint]).try_fold(None, |_, mut one| {
                    match one.mask(Instant::now()) {
                        Mask::Ready(mask) => {
                            for token in 0..vocab + 40 {
                                prop_assert_eq!(mask.allows(token), free.contains(&token), "{} after {:?}", token, &output);
                            }
                        }
                        Mask::Failed(_) => prop_assert!(free.is_empty()),
                        Mask::Late => prop_assert!(false, "nothing is waited for"),
                    }
                    Ok(Some(one))
                })?.expect("one at least");
                if free.is_empty() {
                    break;
                }
                let token = *pick.get(&free);
                prop_assert_eq!(constraint.accept(token), Ok(false));
                output.push(token);
                prop_assert!(!words.iter().any(|word| output.ends_with(word)));
            }
        }
    }

    #[test]
    fn a_grammar_that_is_whole_ends_the_output() {
        let rules = rules(Some(vec![3, 4]), &[]);
        let grammar = Only(Arc::new(TokenMask::of(9, [4, 5])), 2);
        let ruled = ruled(&spec(rules, &[]), None, 9, Some(Box::new(grammar)));
        let mut ruled = ruled.unwrap().expect("there are rules");
        assert_eq!(ruled.accept(4), Ok(false));
        assert_eq!(ruled.accept(4), Ok(true));
    }

    #[test]
    fn without_rules_a_sequence_follows_its_grammar_or_nothing() {
        let mut spec = spec(TokenRules::default(), &[]);
        spec.generation.token_rules = None;
        assert!(ruled(&spec, None, 9, None).unwrap().is_none());
        let followed = ruled(&spec, None, 9, Some(only(9, &[1]))).unwrap();
        assert!(format!("{followed:?}").contains("Only"));
    }
}
