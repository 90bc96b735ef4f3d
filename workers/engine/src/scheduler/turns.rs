//! Batch sequences that generate: they wait for interactive ones, which take their places and their time in a step, and one of them at
//! a time has its turn.
//!
//! - Where the batch is full, one gives its place to an interactive sequence or prompt. It keeps its KV, and waits as one that was resumed.
//! - Where a step would take longer than the interactive ones in it were promised, batch sequences sit it out, the last first.
//! - One that has had no step for [`BATCH_TURN`] has the turn, if no other has it: it goes first, sits out nothing and keeps its place
//!   until it ends. So each ends some day.
//!
//! A place is given away when no step in flight has its sequence: until then it sits out.

use std::time::{Duration, Instant};

use baton_protocol::{ITL_PART, StepShape, Tier};

use super::{BATCH_TURN, Scheduler};
use crate::sequence::Sequence;

impl Scheduler {
    /// Gives the turn to a batch sequence that has waited for long.
    pub(super) fn give_turn(&mut self, now: Instant) {
        for sequence in self.parked.iter_mut().filter(|s| s.is_batch()) {
            sequence.passed_over.get_or_insert(now);
        }
        let is_due = |s: &&Sequence| {
            s.passed_over
                .is_some_and(|since| now.saturating_duration_since(since) >= BATCH_TURN)
        };
        let all = || self.parked.iter().chain(&self.decoding);
        if let Some(turn) = self.turn
            && all().any(|s| s.arrival == turn)
        {
            return;
        }
        let first = all().filter(is_due).min_by_key(|s| s.place());
        self.turn = first.map(|s| s.arrival);
    }

    /// The resumed sequence that goes first: its place among them.
    pub(super) fn next_parked(&self) -> Option<usize> {
        let has_turn = |s: &Sequence| Some(s.arrival) == self.turn;
        let turn = self.parked.iter().position(has_turn);
        turn.or_else(|| (!self.parked.is_empty()).then_some(0))
    }

    /// Whether batch sequences made room for interactive ones that wait for a place in a full batch. Those that cannot yet sit out.
    pub(super) fn make_places(&mut self, now: Instant) -> bool {
        for sequence in &mut self.decoding {
            sequence.sits_out = false;
        }
        let running = self.prefilling.len() + self.decoding.len();
        if running < self.running_max || !self.decoding.iter().any(Sequence::is_batch) {
            return false;
        }
        let resumed = self.parked.iter().filter(|s| !s.is_batch()).count();
        let wanted = resumed + usize::from(self.prompt_wants_place(now));
        let mut made = false;
        // The last first: what it has done is the least.
        let mut order: Vec<usize> = (0..self.decoding.len())
            .filter(|at| self.decoding[*at].is_batch())
            .filter(|at| Some(self.decoding[*at].arrival) != self.turn)
            .collect();
        order.sort_unstable_by_key(|at| std::cmp::Reverse(self.decoding[*at].place()));
        order.truncate(wanted);
        // From behind, so that those before it keep their places.
        order.sort_unstable_by_key(|at| std::cmp::Reverse(*at));
        for at in order {
            match self.decoding[at].in_flight {
                0 => {
                    let paused = self.decoding.remove(at);
                    self.park(paused);
                    made = true;
                }
                _ => self.decoding[at].sits_out = true,
            }
        }
        made
    }

    /// Whether an interactive prompt waits for nothing but a place.
    fn prompt_wants_place(&self, now: Instant) -> bool {
        let next = self.next_prompt(now).filter(|at| !self.may_share(*at));
        let Some(prompt) = next.map(|at| &self.waiting[at]) else {
            return false;
        };
        let stats = self.pool.stats();
        let needs = prompt.tokens.len().div_ceil(self.pool.block_tokens());
        !prompt.is_batch() && needs + self.decoding.len() <= stats.free + stats.cached
    }

    /// Has batch sequences sit out a step that would be longer than the interactive ones in it were promised.
    pub(super) fn keep_to_time(&mut self, now: Instant) {
        let Some(model) = &self.cost else {
            return;
        };
        let promised = |s: &Sequence| {
            let own = s.service.itl_ms.map(|ms| Duration::from_millis(ms.into()));
            own.or(self.itl).filter(|_| !s.is_batch())
        };
        let Some(limit) = self.decoding.iter().filter_map(promised).min() else {
            return;
        };
        let limit = limit.mul_f32(ITL_PART);
        let mut shape = StepShape::default();
        let mut batch = Vec::new();
        for (at, sequence) in self.decoding.iter().enumerate() {
            match sequence.is_batch() && Some(sequence.arrival) != self.turn {
                true => batch.push((sequence.place(), at)),
                false => shape = with_row(shape, sequence),
            }
        }
        batch.sort_unstable();
        for (_, at) in batch {
            let sequence = &mut self.decoding[at];
            let with = with_row(shape, sequence);
            match model.cost().step_time(with) <= limit {
                true => shape = with,
                false => sequence.sits_out = true,
            }
        }
        for sequence in self.decoding.iter_mut().filter(|s| s.sits_out) {
            sequence.passed_over.get_or_insert(now);
        }
    }
}

/// A step that runs one more token of this sequence.
fn with_row(mut shape: StepShape, sequence: &Sequence) -> StepShape {
    shape.tokens += 1;
    shape.rows += 1;
    shape.kv_tokens += (sequence.computed + sequence.in_flight) as u64;
    shape
}

impl Sequence {
    /// Whether it belongs to a batch request.
    pub fn is_batch(&self) -> bool {
        self.service.tier == Tier::Batch
    }
}
