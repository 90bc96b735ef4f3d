//! A drafter that knows the texts, and says as much of them as it is told to.

use std::sync::{Arc, Mutex};

use super::properties::alone;
use super::*;
use crate::sampling::mix;
use crate::{Drafter, random_bits};

/// How good its drafts are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Drafting {
    /// There is no drafter.
    Off,
    /// As many as it may give, all right.
    Right,
    /// Any number, two of three right; by this seed.
    Sometimes(u64),
    /// As many as it may give, the first one wrong and so all.
    Wrong,
}

/// Prompts with the outputs that they have alone.
#[derive(Clone, Default)]
pub struct Texts(Arc<Mutex<Book>>);

#[derive(Default)]
struct Book {
    is_read: bool,
    texts: Vec<Vec<u32>>,
    /// Of each question to the drafter: the tokens that it was told and its drafts.
    asked: Vec<(Vec<u32>, Vec<u32>)>,
}

impl Texts {
    /// The engine with a drafter that reads them.
    pub fn drafting(&self, engine: Engine, drafting: Drafting) -> Engine {
        if drafting == Drafting::Off {
            return engine;
        }
        engine.with_drafter(self.oracle(drafting))
    }

    /// A drafter that reads them.
    pub fn oracle(&self, drafting: Drafting) -> Box<dyn Drafter> {
        self.with(|book| book.is_read = true);
        Box::new(Oracle {
            texts: self.clone(),
            drafting,
        })
    }

    /// What comes of a prompt, if anybody reads it.
    pub fn learn(&self, spec: &SequenceSpec) {
        if self.with(|book| book.is_read) {
            self.add([spec.tokens.0.clone(), alone(spec)].concat());
        }
    }

    pub fn add(&self, text: Vec<u32>) {
        self.with(|book| book.texts.push(text));
    }

    pub fn asked(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        self.with(|book| book.asked.clone())
    }

    fn with<T>(&self, run: impl FnOnce(&mut Book) -> T) -> T {
        run(&mut self.0.lock().expect("no panic under the lock"))
    }
}

struct Oracle {
    texts: Texts,
    drafting: Drafting,
}

impl Drafter for Oracle {
    fn draft(&mut self, tokens: &[u32], most: usize, drafts: &mut Vec<u32>) {
        assert!(most > 0 && drafts.is_empty());
        let drafting = self.drafting;
        self.texts.with(|book| {
            let mut known = book.texts.iter();
            // Of equal prompts with other rules, one or the other.
            let text = known.rfind(|text| text.starts_with(tokens));
            let rest = text.map_or(&[][..], |text| &text[tokens.len()..]);
            match drafting {
                Drafting::Off => {}
                Drafting::Right => drafts.extend(rest.iter().take(most)),
                Drafting::Wrong => {
                    let rest = rest.iter().copied().chain(0..);
                    drafts.extend(rest.take(most).map(|token| (token + 1) % VOCAB));
                }
                Drafting::Sometimes(seed) => {
                    let last = tokens.last().map_or(0, |token| u64::from(*token));
                    let bits = |i| random_bits(mix(seed ^ last), i);
                    let count = bits(0) as usize % (most + 1);
                    let spoil = |(i, token): (u32, &u32)| match bits(i) % 3 {
                        0 => bits(i + 100) as u32 % VOCAB,
                        _ => *token,
                    };
                    drafts.extend((1..).zip(rest).take(count).map(spoil));
                }
            }
            book.asked.push((tokens.to_vec(), drafts.clone()));
        });
    }
}
