//! The first measurement of what steps cost, before the first sequence comes.

use std::time::{Duration, Instant};

use baton_protocol::{CostPoint, StepCost};

use super::Engine;
use crate::cost::CostModel;
use crate::{BlockTable, ExecutorError, SampleRun, SampleState, SequenceStep, StepPlan};

/// The probe ends after about this long: a step that would take it past that is not run, and what it would have told is taken from
/// the steps before.
pub const PROBE_MAX: Duration = Duration::from_millis(400);

/// Times that a step is run. The first one may make what later ones find ready; the quickest counts.
const RUNS: usize = 3;

/// Up to so many tokens a step reads the weights and does little else: it takes about as long as one of a single token.
const FLAT: usize = 16;

/// Sequences of the steps that tell what rows and KV cost.
const ROWS: usize = 32;

/// Tokens that each of these has, in the longer of two such steps.
const CONTEXT: usize = 1024;

/// One sequence of a step.
struct Part<'a> {
    blocks: &'a BlockTable,
    start: usize,
    tokens: usize,
    samples: bool,
}

impl Engine {
    /// Measures what steps cost and sizes them by time from then on, unless that is known already. The arena's blocks must be
    /// free and no sequence in the engine; their content is garbage afterwards, which nobody reads. Takes about [`PROBE_MAX`]; of
    /// a device that is slower than that a step of one token alone.
    ///
    /// # Errors
    /// [`ExecutorError`] if the executor failed: it is out of service then.
    pub fn probe(&mut self) -> Result<(), ExecutorError> {
        if self.scheduler.cost.is_some() || self.has_work() {
            return Ok(());
        }
        let mut cost = None;
        self.in_service(|engine| {
            cost = engine.measure()?;
            Ok(())
        })?;
        self.scheduler.cost = cost.filter(|cost| cost.check().is_ok()).map(CostModel::new);
        Ok(())
    }

    fn measure(&mut self) -> Result<Option<StepCost>, ExecutorError> {
        let deadline = (self.clock)() + PROBE_MAX;
        let info = self.info();
        let step_tokens = self.scheduler.step_tokens;
        let longest = step_tokens.min(self.tokens_max);
        let rows = ROWS
            .min(self.scheduler.running_max)
            .min(info.step_sequences_max);
        let block_tokens = self.scheduler.pool.block_tokens();

        // Prompts of ascending length, until time is over.
        let Some(blocks) = self.pool().reserve(longest.div_ceil(block_tokens)) else {
            return Ok(None);
        };
        let part = |start, tokens, samples| Part {
            blocks: &blocks,
            start,
            tokens,
            samples,
        };
        let mut prompts: Vec<(usize, f32)> = Vec::new();
        for tokens in sizes(longest) {
            let expected = match prompts[..] {
                [.., known] => at_most(known, tokens),
                [] => 0.0,
            };
            match self.time(&[part(0, tokens, false)], expected, deadline)? {
                Some(us) => prompts.push((tokens, us)),
                None => break,
            }
        }
        let Some(&last) = prompts.last() else {
            return Ok(None);
        };
        // What there was no time for is guessed, and steps will tell.
        let unmeasured = sizes(longest).into_iter().filter(|tokens| *tokens > last.0);
        let guessed = unmeasured.map(|tokens| (tokens, at_most(last, tokens)));
        let guessed: Vec<(usize, f32)> = guessed.collect();

        // The longest of them that fits once more behind what it is long: the difference is attention.
        let mut pair_us = 0.0;
        let twice = prompts
            .iter()
            .rev()
            .find(|(tokens, _)| tokens * 2 <= longest);
        if let Some(&(tokens, first_us)) = twice
            && let Some(us) =
                self.time(&[part(longest - tokens, tokens, false)], first_us, deadline)?
        {
            pair_us = ((us - first_us) / (tokens * (longest - tokens)) as f32).max(0.0);
        }
        let own_pairs = |tokens: usize| (tokens * (tokens - 1) / 2) as f32 * pair_us;
        // The attention of a prompt among itself is no more than half of what it took.
        let layers = prompts
            .iter()
            .chain(&guessed)
            .map(|&(tokens, us)| CostPoint {
                tokens: tokens as u32,
                us: (us - own_pairs(tokens)).max(us / 2.0),
            });
        let mut cost = StepCost {
            layers: layers.collect(),
            row_us: 0.0,
            kv_token_us: 0.0,
            pair_us,
        };
        drop(blocks);

        // Generating sequences, with little and with much before them.
        let pool = self.pool();
        let context = (pool.stats().free * block_tokens / rows)
            .min(CONTEXT)
            .min(self.tokens_max);
        let each = context.div_ceil(block_tokens).max(1);
        let tables: Option<Vec<BlockTable>> = (0..rows).map(|_| pool.reserve(each)).collect();
        let Some(tables) = tables.filter(|_| context > 1) else {
            return Ok(Some(cost));
        };
        let step = |start: usize| -> Vec<Part<'_>> {
            let part = |blocks| Part {
                blocks,
                start,
                tokens: 1,
                samples: true,
            };
            tables.iter().map(part).collect()
        };
        let known = cost.layers_us(rows as u64);
        let Some(short) = self.time(&step(0), known, deadline)? else {
            return Ok(Some(cost));
        };
        cost.row_us = ((short - known) / rows as f32).max(0.0);
        if let Some(long) = self.time(&step(context - 1), short, deadline)? {
            cost.kv_token_us = ((long - short) / (rows * (context - 1)) as f32).max(0.0);
        }
        Ok(Some(cost))
    }

    /// Microseconds of this step, the quickest of some runs. `None` if it is expected to end after the deadline. A first step is
    /// run once at least.
    fn time(
        &mut self,
        parts: &[Part<'_>],
        expected_us: f32,
        deadline: Instant,
    ) -> Result<Option<f32>, ExecutorError> {
        let mut best: Option<f32> = None;
        for _ in 0..RUNS {
            let before = (self.clock)();
            let expected = Duration::from_secs_f32(best.unwrap_or(expected_us).max(0.0) * 1e-6);
            let fits = before + expected < deadline;
            if !fits && (best.is_some() || expected_us > 0.0) {
                break;
            }
            let plan = plan(parts);
            self.executor.forward(&plan)?;
            let us = (self.clock)()
                .saturating_duration_since(before)
                .as_secs_f32()
                * 1e6;
            best = Some(best.map_or(us, |best| best.min(us)));
        }
        Ok(best)
    }
}

/// What a step of so many tokens takes at most, about, where one of fewer tokens takes that long: as many times as long as it has times as many tokens.
/// A worker that takes itself for much slower than it is gets no work, and never learns better.
fn at_most((fewer, us): (usize, f32), tokens: usize) -> f32 {
    us * tokens.max(FLAT) as f32 / fewer.max(FLAT) as f32
}

/// Lengths of the prompts: each about twice the one before, the last one the longest.
fn sizes(longest: usize) -> Vec<usize> {
    let doubled = std::iter::successors(Some(1), |tokens| Some(tokens * 2));
    let some = doubled.filter(|tokens| *tokens == 1 || *tokens >= FLAT);
    let mut sizes: Vec<usize> = some.take_while(|tokens| *tokens < longest).collect();
    sizes.push(longest);
    sizes
}

fn plan(parts: &[Part<'_>]) -> StepPlan {
    let mut plan = StepPlan::default();
    for (key, part) in parts.iter().enumerate() {
        let (first_token, first_block) = (plan.tokens.len(), plan.blocks.len());
        plan.tokens.resize(first_token + part.tokens, 0);
        plan.blocks.extend_from_slice(part.blocks.ids());
        let end = part.start + part.tokens;
        plan.sequences.push(SequenceStep {
            key: key as u64,
            tokens: first_token..plan.tokens.len(),
            follows: None,
            start: part.start as u32,
            blocks: first_block..plan.blocks.len(),
            sample: part.samples.then(|| SampleRun {
                len: 1,
                position: end as u32,
                state: SampleState::default().into(),
                stop_ids_banned: 0,
                mask: None,
            }),
            targets: 0..0,
            target_top: 0,
        });
    }
    plan
}
