//! Steps in flight: submitted and not collected. And blocks that cannot be given back before some of them are over.
//!
//! The executor runs steps in order, so a later step may use a block that an earlier one still writes. Others may not: a pull
//! or a lease knows nothing of that order. So blocks that lose their owner while a step in flight may touch them stay here
//! until it was collected.

use std::collections::VecDeque;
use std::ops::Range;

use std::time::{Duration, Instant};

use baton_protocol::StepShape;

use crate::BlockTable;
use crate::sequence::Sequence;

/// One step, as far as its output has to be given to sequences.
#[derive(Default)]
pub struct Flight {
    /// In the plan's order: first `decodes` generating sequences, oldest first, then prompts.
    pub rows: Vec<FlightRow>,
    pub decodes: usize,
    /// Drafts of all rows, one after the other.
    pub drafts: Vec<u32>,
    /// Its tokens are not chosen yet, for want of masks.
    pub is_unchosen: bool,
    /// What it costs time for.
    pub shape: StepShape,
    /// How long it takes, as far as that is known.
    pub expected: Duration,
    /// When the executor got it. `None` if masks held it up: then how long it took says nothing.
    pub submitted: Option<Instant>,
}

/// One sequence's part of it.
pub struct FlightRow {
    /// Whose. Not its key: after an abort that may come again before the step is over.
    pub arrival: u64,
    /// Tokens that it runs, drafts included.
    pub tokens: u32,
    /// Log-probabilities that it reports.
    pub targets: u32,
    /// Its drafts in [`Flight::drafts`].
    pub drafts: Range<u32>,
    /// A token is chosen after its last one and after each draft.
    pub samples: bool,
    /// The mask of that token comes later.
    pub masked_later: bool,
    /// The mask did not come: what is chosen means nothing.
    pub is_void: bool,
}

impl FlightRow {
    /// Tokens that are chosen for it.
    pub fn choices(&self) -> usize {
        match self.samples {
            true => self.drafts.len() + 1,
            false => 0,
        }
    }
}

/// All steps in flight, the oldest first.
#[derive(Default)]
pub struct Flights {
    steps: VecDeque<Flight>,
    leaving: Vec<Leaving>,
}

struct Leaving {
    blocks: BlockTable,
    /// Steps to be collected first.
    steps: usize,
}

impl Flights {
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    pub fn oldest(&self) -> Option<&Flight> {
        self.steps.front()
    }

    /// How long they take together, as far as that is known.
    pub fn expected(&self) -> Duration {
        self.steps.iter().map(|step| step.expected).sum()
    }

    /// The only step, if its tokens are to be chosen now.
    pub fn alone_unchosen(&mut self) -> Option<&mut Flight> {
        match self.steps.make_contiguous() {
            [only] if only.is_unchosen => Some(only),
            _ => None,
        }
    }

    /// Whether the tokens of a step are not chosen yet: it is the last one.
    pub fn are_unchosen(&self) -> bool {
        self.steps.back().is_some_and(|step| step.is_unchosen)
    }

    pub fn submitted(&mut self, step: Flight) {
        self.steps.push_back(step);
    }

    /// The oldest step is over, and with it the wait of those blocks that waited for it alone.
    pub fn collected(&mut self) -> Option<Flight> {
        let step = self.steps.pop_front()?;
        self.leaving.retain_mut(|leaving| {
            leaving.steps -= 1;
            leaving.steps > 0
        });
        Some(step)
    }

    /// Give back the blocks of a sequence that leaves: at once, or as soon as no step in flight may touch them.
    pub fn give_back_of(&mut self, sequence: &mut Sequence) {
        let blocks = sequence.blocks.take();
        if sequence.in_flight > 0 {
            self.give_back(blocks);
        }
    }

    /// Give back blocks that steps in flight may touch, as soon as none does.
    pub fn give_back(&mut self, blocks: BlockTable) {
        if !self.is_empty() && !blocks.is_empty() {
            self.leaving.push(Leaving {
                blocks,
                steps: self.steps.len(),
            });
        }
    }

    /// No step will be collected any more: the executor is out of service.
    pub fn abandon(&mut self) {
        self.steps.clear();
        self.leaving.clear();
    }

    /// Whether the books agree with what a sequence says of itself.
    pub fn check(&self, sequence: &Sequence) -> Result<(), String> {
        let rows = self.steps.iter().flat_map(|step| &step.rows);
        let own = rows.filter(|row| row.arrival == sequence.arrival);
        let (mut tokens, mut drafts) = (0, 0);
        for row in own {
            if drafts > 0 {
                return Err(format!(
                    "sequence {} has a row behind drafts in flight",
                    sequence.key
                ));
            }
            tokens += row.tokens as usize;
            drafts += row.drafts.len();
        }
        if (tokens, drafts) != (sequence.in_flight, sequence.drafted) {
            return Err(format!(
                "sequence {} counts {} tokens in flight, {} of them drafts; steps run {tokens} and {drafts}",
                sequence.key, sequence.in_flight, sequence.drafted
            ));
        }
        match self.leaving.iter().find(|l| l.steps > self.steps.len()) {
            Some(leaving) => Err(format!(
                "{:?} wait for {} steps of {}",
                leaving.blocks,
                leaving.steps,
                self.steps.len()
            )),
            None => Ok(()),
        }
    }
}
