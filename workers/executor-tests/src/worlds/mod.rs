//! Worlds: random requests in an [`Engine`](baton_engine::Engine) of their own, on the executor that is tested. No plan is made by hand,
//! so what the engine asks of executors is what they are tested with: chunks of prompts beside sequences that generate, shared prefixes, steps ahead, masks that
//! come later, drafts, classes, preemption, penalties, log-probabilities, stops, leases and retries.
//!
//! Every sequence gets what it gets alone ([`alone`]), whatever happens beside it. A world is a function of its seed.

mod alone;
mod drafts;
mod job;
mod lent;
mod rule;
mod world;

use std::sync::{Arc, Mutex};

use baton_engine::{ExecutorInfo, StepPlan};
use baton_model::UniformSpec;

use crate::{Build, Builder, Tiny, tiny_families};
use alone::{Alone, Text};
use lent::Lent;

pub use alone::Alike;

/// Logits per position: no round number, and several for a thread of a kernel.
const VOCAB: usize = 301;
const BLOCK_TOKENS: u32 = 8;
/// Blocks of the executor; a world has at most these.
const BLOCKS: usize = 40;
/// Of tokens on a device whose logits depend on the company, one in so many may differ from what comes alone. One in 97 does on an H100.
const DIFFER_ONE_IN: usize = 50;

/// What the engines of some worlds asked for, so that a test can say that it was all there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Steps that were submitted.
    pub steps: usize,
    /// Rows that choose no token: a prompt's chunk that is not its last.
    pub chunks: usize,
    /// Rows that follow a step in flight.
    pub ahead: usize,
    /// Steps whose masks came later and that had prompts in them.
    pub late_beside_prompts: usize,
    /// Steps whose masks came later and that had none.
    pub late: usize,
    /// Those with targets in them.
    pub late_beside_targets: usize,
    /// Rows whose mask did not come in time.
    pub void: usize,
    /// Runs of several tokens.
    pub runs: usize,
    /// Rows with penalties that follow a step in flight.
    pub penalties_ahead: usize,
    /// Prompts that shared blocks.
    pub shared: usize,
    /// Sequences that gave up their blocks.
    pub preempted: usize,
    /// Sequences that were aborted and submitted again.
    pub retried: usize,
    /// Prompts that were streamed while they ran.
    pub streamed: usize,
    /// Tokens that were chosen.
    pub tokens: usize,
    /// Those that differ from what comes alone, by no more than rounding explains.
    pub differ: usize,
}

impl Seen {
    fn note(&mut self, plan: &StepPlan) {
        self.steps += 1;
        let prompts = plan
            .sequences
            .iter()
            .any(|s| s.sample.as_ref().is_none_or(|run| run.len < s.tokens.len()));
        match (plan.chooses_later, prompts) {
            (true, true) => self.late_beside_prompts += 1,
            (true, false) => self.late += 1,
            (false, _) => {}
        }
        self.late_beside_targets += usize::from(plan.chooses_later && !plan.targets.is_empty());
        for step in &plan.sequences {
            let run = step.sample.as_ref();
            self.chunks += usize::from(run.is_none());
            self.ahead += usize::from(step.follows.is_some());
            self.runs += usize::from(run.is_some_and(|run| run.len > 1));
            let penalised = run.is_some_and(|run| run.state.has_penalty());
            self.penalties_ahead += usize::from(penalised && step.follows.is_some());
        }
    }

    /// # Panics
    /// If something did not come up that this executor can do.
    fn check(&self, info: &ExecutorInfo) {
        let mut all = vec![
            ("chunks", self.chunks),
            ("shared", self.shared),
            ("preempted", self.preempted),
            ("retried", self.retried),
            ("streamed", self.streamed),
        ];
        if info.steps_in_flight > 1 {
            all.extend([
                ("ahead", self.ahead),
                ("late_beside_prompts", self.late_beside_prompts),
                ("late_beside_targets", self.late_beside_targets),
                ("late", self.late),
                ("void", self.void),
                ("penalties_ahead", self.penalties_ahead),
            ]);
        }
        if info.run_max > 1 {
            all.push(("runs", self.runs));
        }
        for (what, count) in all {
            assert!(count > 0, "no world had {what}: {self:?}");
        }
    }
}

/// Runs so many worlds, with as many steps in flight as given, or as the executor says.
///
/// # Panics
/// If a sequence gets anything else than alone, if a plan is refused, if blocks are lost, or if something did not come up at all that
/// the executor can do.
pub fn worlds(
    build: Builder<'_>,
    worlds: u64,
    steps_in_flight: Option<usize>,
    alike: Alike,
) -> Seen {
    let seen = Arc::new(Mutex::new(Seen::default()));
    // Each has a third of the seeds: Llama 3 with grouped heads, Mistral with a window that cuts inside and across blocks, Qwen3.
    let infos = [(0, 1), (1, 3), (2, 5)].map(|(third, family)| {
        let spec = UniformSpec {
            vocab: VOCAB,
            ..tiny_families().remove(family)
        };
        let tiny = Tiny::new(spec, 12);
        let executor = build(Build {
            spec: &tiny.spec,
            weights: &tiny,
            block_tokens: BLOCK_TOKENS,
            blocks: BLOCKS,
        });
        let mut info = executor.info().clone();
        info.steps_in_flight = steps_in_flight.unwrap_or(info.steps_in_flight);
        let lent = Lent {
            info,
            executor: Arc::new(Mutex::new(executor)),
            seen: Arc::clone(&seen),
        };
        for seed in (0..worlds).filter(|seed| seed % 3 == third) {
            world::run(&lent, seed, alike);
        }
        lent.info
    });
    let seen = *seen.lock().expect("a failed test has ended");
    println!("{worlds} worlds: {seen:?}");
    seen.check(&infos[0]);
    assert!(
        seen.differ * DIFFER_ONE_IN <= seen.tokens,
        "{} of {} tokens differ from what comes alone",
        seen.differ,
        seen.tokens
    );
    seen
}
