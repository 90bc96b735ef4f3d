//! Outputs that must follow rules: what masks change, and what they may not.

use std::sync::Arc;

use proptest::prelude::*;

use super::properties::{alone, watched};
use super::*;
use crate::random_bits;
use crate::{Mask, TokenMask};

/// A made-up grammar: of the ids, one in `one_in` may come, and which depends on the token before and on where it stands.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    one_in: u32,
    /// Output tokens after which it is whole.
    whole_at: usize,
    /// Decides how often a mask is asked for before it is there; 0 has all of them at once.
    late: u64,
    /// Output tokens after which no mask can be made.
    fails_at: usize,
    /// How often it was asked for by then before it says so.
    fails_after: u64,
}

const RULE: Rule = Rule {
    one_in: 7,
    whole_at: usize::MAX,
    late: 0,
    fails_at: usize::MAX,
    fails_after: 0,
};

impl Rule {
    pub fn after(self, output: &[u32]) -> Box<dyn Constraint> {
        let mut ruled = Ruled {
            rule: self,
            index: 0,
            before: 0,
            asked: 0,
        };
        for token in output {
            assert!(
                !ruled.accept(*token).expect("the output follows it"),
                "it is whole"
            );
        }
        Box::new(ruled)
    }

    /// Whether the i-th token of an output may be this one.
    fn allows(self, index: usize, before: u32, token: u32) -> bool {
        (token + before + index as u32).is_multiple_of(self.one_in)
    }
}

#[derive(Debug)]
struct Ruled {
    rule: Rule,
    index: usize,
    before: u32,
    asked: u64,
}

impl Constraint for Ruled {
    fn accept(&mut self, token: u32) -> Result<bool, String> {
        assert!(
            self.rule.allows(self.index, self.before, token),
            "{token} at {}",
            self.index
        );
        self.index += 1;
        self.before = token;
        self.asked = 0;
        Ok(self.index == self.rule.whole_at)
    }

    fn mask(&mut self, _deadline: Instant) -> Mask {
        self.asked += 1;
        if self.index == self.rule.fails_at {
            return match self.asked > self.rule.fails_after {
                true => Mask::Failed("the rule has no more masks".to_owned()),
                false => Mask::Late,
            };
        }
        let late = match self.rule.late {
            0 => 0,
            seed => random_bits(seed, self.index as u32) % 4,
        };
        if self.asked <= late {
            return Mask::Late;
        }
        let allowed = (0..VOCAB).filter(|token| self.rule.allows(self.index, self.before, *token));
        Mask::Ready(Arc::new(TokenMask::of(VOCAB, allowed)))
    }
}

/// The output of one sequence under a rule, in an engine of its own, every mask there at once.
fn ruled(spec: &SequenceSpec, rule: Rule) -> (Vec<u32>, FinishReason) {
    let mut driver = Driver::default();
    driver.rules.insert(1, Rule { late: 0, ..rule });
    let mut engine = sampler(ROOMY);
    driver.submit(&mut engine, 1, spec.clone());
    driver.run(&mut engine, 1000);
    assert_empty(&engine);
    (driver.outputs[&1].clone(), driver.finished[&1])
}

#[test]
fn a_constraint_chooses_among_the_tokens_and_ends_the_text_when_it_is_whole() {
    let spec = spec(&prompt(1, 10), 20);
    let (output, finish) = ruled(&spec, RULE);
    assert_ne!(output, alone(&spec), "it changes what is chosen");
    assert_eq!((output.len(), finish), (20, FinishReason::Length));
    for whole_at in [1, 2, 7, 20] {
        let (shorter, finish) = ruled(&spec, Rule { whole_at, ..RULE });
        assert_eq!(finish, FinishReason::Whole, "{whole_at}");
        assert_eq!(shorter, output[..whole_at]);
    }
    // Everything allowed is as good as no rule.
    let (free, _) = ruled(&spec, Rule { one_in: 1, ..RULE });
    assert_eq!(free, alone(&spec));
}

#[test]
fn a_constraint_that_fails_ends_its_sequence_and_no_other() {
    for fails_at in [0, 1, 5] {
        let mut engine = sampler(Setup::default());
        let rule = Rule { fails_at, ..RULE };
        let (ruled, free) = (spec(&prompt(1, 10), 20), spec(&prompt(2, 10), 20));
        submit_with(&mut engine, 2, free.clone(), None).expect("taken");
        submit_with(&mut engine, 1, ruled.clone(), Some(rule.after(&[]))).expect("taken");
        let mut outputs = HashMap::from([(1, Vec::new()), (2, Vec::new())]);
        let mut failed = Vec::new();
        while engine.has_work() {
            for event in engine.step().expect("runs") {
                match event {
                    Event::Prefilled {
                        key,
                        sampled,
                        blocks,
                        ..
                    } => {
                        let output = outputs.get_mut(&key).expect("known");
                        output.push(sampled.token);
                        let resumed = ResumedSequence {
                            key,
                            spec: if key == 1 {
                                ruled.clone()
                            } else {
                                free.clone()
                            },
                            next: sampled.token,
                            blocks,
                            constraint: (key == 1).then(|| rule.after(output)),
                        };
                        engine.resume(resumed).expect("taken");
                    }
                    Event::Token { key, sampled, .. } => {
                        outputs.get_mut(&key).expect("known").push(sampled.token);
                    }
                    Event::Failed { key, detail } => {
                        assert!(detail.contains("no more masks"), "{detail}");
                        failed.push(key);
                    }
                    Event::Refused { .. } | Event::Preempted { .. } => panic!("there is room"),
                    Event::Begun { .. } | Event::Computed { .. } => {}
                }
            }
            engine.check().expect("sound");
        }
        assert_eq!(failed, [1]);
        assert_eq!(outputs[&1].len(), fails_at);
        assert_eq!(outputs[&2], alone(&free));
        assert_empty(&engine);
    }
}

/// Others that run ahead without a break do not keep the failure to themselves.
#[test]
fn a_constraint_that_fails_is_told_while_others_run_ahead() {
    let (mut engine, _) = watched(Setup {
        steps_in_flight: 2,
        ..Setup::default()
    });
    // Its second mask is late, and never comes.
    let rule = Rule {
        fails_after: 2,
        fails_at: 1,
        ..RULE
    };
    let specs = [spec(&prompt(1, 10), 200), spec(&prompt(2, 10), 200)];
    submit_with(&mut engine, 1, specs[0].clone(), Some(rule.after(&[]))).expect("taken");
    submit_with(&mut engine, 2, specs[1].clone(), None).expect("taken");
    let mut free = 0;
    loop {
        for event in engine.step().expect("runs") {
            match event {
                Event::Prefilled {
                    key,
                    sampled,
                    blocks,
                    ..
                } => {
                    let resumed = ResumedSequence {
                        key,
                        spec: specs[key as usize - 1].clone(),
                        next: sampled.token,
                        blocks,
                        constraint: (key == 1).then(|| rule.after(&[sampled.token])),
                    };
                    engine.resume(resumed).expect("taken");
                }
                Event::Token { key, .. } => free += usize::from(key == 2),
                Event::Failed { key, .. } => {
                    assert_eq!(key, 1);
                    return;
                }
                Event::Refused { .. } | Event::Preempted { .. } => panic!("there is room"),
                Event::Begun { .. } | Event::Computed { .. } => {}
            }
        }
        assert!(
            free < 20,
            "the other one made {free} tokens before it was told"
        );
    }
}

/// With every mask there as soon as its token is known the device never waits for the host: all steps but those that have nothing to
/// follow are submitted before the last is collected.
#[test]
fn a_constrained_sequence_runs_ahead_and_its_tokens_are_chosen_when_masks_come() {
    for steps_in_flight in [2, 3] {
        let (mut engine, mut driver) = watched(Setup {
            steps_in_flight,
            ..Setup::default()
        });
        let specs = [spec(&prompt(1, 10), 30), spec(&prompt(2, 10), 30)];
        driver.rules.insert(1, RULE);
        for (key, spec) in (1..).zip(&specs) {
            driver.submit(&mut engine, key, spec.clone());
        }
        driver.run(&mut engine, 100);
        assert_eq!(driver.outputs[&1], ruled(&specs[0], RULE).0);
        assert_eq!(driver.outputs[&2], alone(&specs[1]));
        let steps = driver.watch.runs().len();
        let ahead = driver.watch.chosen_later();
        assert!(ahead >= 25, "{ahead} of {steps} steps ran ahead");
        assert!(steps <= 34, "{steps} steps for 30 tokens: rows are void");
        assert_empty(&engine);
    }
}

#[test]
fn a_sequence_whose_mask_is_late_sits_out_and_the_others_go_on() {
    let (mut engine, mut driver) = watched(Setup {
        steps_in_flight: 2,
        ..Setup::default()
    });
    // Every mask is late by some askings.
    let late = (1..)
        .find(|seed| (1..9).all(|i| random_bits(*seed, i) % 4 > 1))
        .expect("there is one");
    driver.rules.insert(1, Rule { late, ..RULE });
    let specs = [spec(&prompt(1, 10), 8), spec(&prompt(2, 10), 20)];
    for (key, spec) in (1..).zip(&specs) {
        driver.submit(&mut engine, key, spec.clone());
    }
    driver.run(&mut engine, 100);
    assert_eq!(driver.outputs[&1], ruled(&specs[0], RULE).0);
    assert_eq!(driver.outputs[&2], alone(&specs[1]));
    let steps = driver.watch.runs();
    let free = steps.iter().filter(|step| step.iter().any(|s| s.0 == 2));
    let both = free
        .clone()
        .filter(|step| step.iter().any(|s| s.0 == 1))
        .count();
    assert!(free.count() > both + 3, "it never sat out");
    assert_empty(&engine);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is late, runs ahead, is drafted for others or preempted: each output is the one that its rule and its prompt give.
    #[test]
    fn outputs_are_those_of_their_rules(
        late in any::<u64>(),
        blocks in 24u32..64,
        steps_in_flight in 1usize..4,
        step_tokens in 8usize..40,
        drafts in any::<u64>(),
        rules in prop::collection::vec((0u32..6, 1usize..30, 1usize..40), 1..7),
    ) {
        let setup = Setup {
            blocks,
            step_tokens,
            steps_in_flight,
            run_max: 4,
            drafting: Drafting::Sometimes(drafts),
            ..Setup::default()
        };
        let (mut engine, mut driver) = watched(setup);
        let mut expected = HashMap::new();
        for (key, (one_in, whole_at, prompt_tokens)) in (1u64..).zip(rules) {
            let spec = spec(&prompt(key as u32 % 3, prompt_tokens), 20);
            // 0 is no rule at all.
            let output = match one_in {
                0 => alone(&spec),
                _ => {
                    let rule = Rule { one_in, whole_at, late: late.max(1) ^ key, ..RULE };
                    driver.rules.insert(key, rule);
                    ruled(&spec, rule).0
                }
            };
            driver.submit(&mut engine, key, spec);
            expected.insert(key, output);
        }
        driver.run(&mut engine, 5000);
        prop_assert_eq!(&driver.outputs, &expected);
        assert_empty(&engine);
    }
}
