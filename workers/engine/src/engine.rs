//! The engine as its owner sees it: submit, resume, abort, step.

use std::fmt;
use std::time::{Duration, Instant};

use baton_protocol::{Refusal, SequenceSpec, StepCost};

use crate::cost::CostModel;
use crate::draft::{Drafter, Drafts};
use crate::flight::Flights;
use crate::pace::Pace;
use crate::scheduler::Scheduler;
use crate::sequence::{Constrained, Sequence, Streamed};
use crate::{
    BlockPool, BlockTable, EngineConfig, EngineLoad, Event, Executor, ExecutorError, ExecutorInfo,
    Fault, NewSequence, ResumedSequence,
};

mod collect;
mod probe;
mod refused;

pub use probe::PROBE_MAX;

/// Told to those whom a full queue turned away: some steps later things look different.
const RETRY_AFTER_MS: u32 = 200;

/// Schedules sequences on one executor. One OS thread owns it; see [`Engine::step`].
pub struct Engine {
    // Dropped first: what it still runs writes into blocks of the others.
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    flights: Flights,
    /// Longest sequence: the model's bound, or the arena's if that is smaller.
    tokens_max: usize,
    queue_max: usize,
    arrivals: u64,
    clock: fn() -> Instant,
    /// When steps were collected, as far as it says how long the next one keeps the device busy.
    pace: Pace,
    stalled: bool,
    /// Steps that the executor has refused.
    plans_refused: u32,
    failed: Option<ExecutorError>,
}

impl Engine {
    /// An engine with nothing to do. All blocks of the executor's arena are free.
    pub fn new(executor: Box<dyn Executor>, config: EngineConfig) -> Self {
        let info = executor.info();
        let step_tokens = config.step_tokens_max.min(info.step_tokens_max).max(1);
        let running_max = config
            .sequences_max
            .min(info.step_sequences_max)
            .clamp(1, step_tokens);
        let pool = BlockPool::new(info.blocks, info.kv.block_tokens);
        // A sequence that outgrew the whole arena would be preempted for ever.
        let arena_tokens = info.blocks as usize * info.kv.block_tokens as usize;
        let tokens_max = arena_tokens.min(info.tokens_max as usize);
        let prefix_cache = config.prefix_cache;
        Self {
            tokens_max,
            scheduler: Scheduler::new(pool, running_max, step_tokens, tokens_max, prefix_cache),
            flights: Flights::default(),
            executor,
            queue_max: config.queue_max,
            arrivals: 0,
            clock: Instant::now,
            pace: Pace::default(),
            stalled: false,
            plans_refused: 0,
            failed: None,
        }
    }

    /// With guesses of what comes next, so that a step may give several tokens of a sequence: as many as the executor checks at
    /// once ([`ExecutorInfo::run_max`]). Which tokens come is the same with any drafter and without.
    #[must_use]
    pub fn with_drafter(mut self, drafter: Box<dyn Drafter>) -> Self {
        let info = self.info();
        let drafts = Drafts::new(drafter, info.run_max, info.vocab, self.tokens_max);
        self.scheduler.drafts = drafts;
        self
    }

    /// Steps with generating sequences in them take prompt tokens only as far as the time between tokens stays within this, or
    /// within what a sequence was promised if that is less, once it is known what steps cost.
    #[must_use]
    pub fn with_itl(mut self, itl: Option<Duration>) -> Self {
        self.scheduler.itl = itl;
        self
    }

    /// Knows what steps cost, and needs no [probe](Self::probe). `cost` has been [checked](StepCost::check).
    #[must_use]
    pub fn with_cost(mut self, cost: StepCost) -> Self {
        self.scheduler.cost = Some(CostModel::new(cost));
        self
    }

    /// With another clock for the times that it reports, and by which it learns what steps cost.
    #[must_use]
    pub fn with_clock(mut self, clock: fn() -> Instant) -> Self {
        self.clock = clock;
        self
    }

    /// What the executor is and can bear.
    pub fn info(&self) -> &ExecutorInfo {
        self.executor.info()
    }

    /// The blocks of its arena.
    pub fn pool(&self) -> BlockPool {
        self.scheduler.pool.clone()
    }

    /// Longest sequence, prompt and output, in tokens: the model's bound, or what the arena holds if that is less.
    pub fn tokens_max(&self) -> usize {
        self.tokens_max
    }

    /// Queue a prompt. It ends with [`Event::Prefilled`], or with [`Engine::abort`].
    ///
    /// # Errors
    /// [`Refusal::Busy`] when the queue is full, [`Refusal::TooLong`] when it can never fit, [`Refusal::Malformed`]
    /// when the specification makes no sense, [`Refusal::Draining`] after the executor failed.
    pub fn submit(&mut self, new: NewSequence) -> Result<(), Refusal> {
        self.check_spec(new.key, &new.spec)?;
        if new.spec.tokens.0.len() >= self.tokens_max {
            return Err(self.too_long());
        }
        if self.scheduler.waiting.len() >= self.queue_max {
            return Err(Refusal::Busy {
                retry_after_ms: RETRY_AFTER_MS,
            });
        }
        let blocks = BlockTable::new(self.pool(), Vec::new(), 0);
        let mut sequence = Sequence::new(new.key, self.arrivals, new.spec, blocks, (self.clock)());
        sequence.prompt.logprobs_top = new.prompt_logprobs;
        sequence.constrained = Constrained::by(new.constraint);
        sequence.prompt.stream = new.stream.then_some(Streamed::No);
        self.arrivals += 1;
        self.scheduler.queue(sequence);
        Ok(())
    }

    /// Go on generating after the KV of `spec.tokens` and the token `next`. Tokens come as [`Event::Token`], the first
    /// with output index `spec.output_tokens() + 1`.
    ///
    /// # Errors
    /// As [`Engine::submit`]. The blocks are given back then.
    pub fn resume(&mut self, resumed: ResumedSequence) -> Result<(), Refusal> {
        let ResumedSequence {
            key,
            spec,
            next,
            blocks,
            constraint,
        } = resumed;
        self.check_spec(key, &spec)?;
        let malformed = |detail: &str| {
            Err(Refusal::Malformed {
                detail: detail.to_owned(),
            })
        };
        let tokens = spec.tokens.0.len();
        if next >= self.info().vocab {
            return malformed("the next token is not in the vocabulary");
        }
        if spec.output_tokens() + 1 >= spec.generation.max_tokens {
            return malformed(
                "the next token is the last of max_tokens: nothing is left to generate",
            );
        }
        if tokens + 1 >= self.tokens_max {
            return Err(self.too_long());
        }
        if !blocks.is_of(&self.scheduler.pool) || blocks.capacity() < tokens {
            return malformed("the blocks do not hold the sequence's tokens");
        }
        let scheduler = &mut self.scheduler;
        if scheduler.parked.len() + scheduler.decoding.len()
            >= scheduler.running_max + self.queue_max
        {
            return Err(Refusal::Busy {
                retry_after_ms: RETRY_AFTER_MS,
            });
        }
        let mut sequence = Sequence::new(key, self.arrivals, spec, blocks, (self.clock)());
        sequence.computed = tokens;
        if scheduler.prefix_cache {
            // Of KV that was pulled, blocks that are here already give way to those in the index. No step has run them.
            drop(sequence.blocks.index(sequence.cache_salt, &sequence.tokens));
        }
        sequence.push(next);
        sequence.resumed = sequence.tokens.len();
        sequence.constrained = Constrained::by(constraint);
        self.arrivals += 1;
        scheduler.park(sequence);
        Ok(())
    }

    /// Take a sequence out, in whatever phase it is, and give its blocks back: at once, or when the steps in flight that
    /// may touch them are collected. `false` if it is not here.
    pub fn abort(&mut self, key: u64) -> bool {
        let Some(mut sequence) = self.scheduler.remove(key) else {
            return false;
        };
        self.flights.give_back_of(&mut sequence);
        true
    }

    /// Whether any sequence is in the engine, or a step in flight.
    pub fn has_work(&self) -> bool {
        !self.flights.is_empty() || self.scheduler.sequences().next().is_some()
    }

    /// Whether the last step found nothing it could run although there is work: prompts wait for blocks that
    /// leases, pulls or tables outside the engine hold. The owner should wait a little, or for one of them to be
    /// dropped, before the next step.
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// How busy it is.
    pub fn load(&self) -> EngineLoad {
        let scheduler = &self.scheduler;
        let (mut waiting_tokens, mut batch_tokens) = (0, 0);
        for sequence in scheduler.waiting.iter().chain(&scheduler.prefilling) {
            waiting_tokens += sequence.remaining();
            if sequence.is_batch() {
                batch_tokens += sequence.remaining();
            }
        }
        let decoding = scheduler.decoding.iter().chain(&scheduler.parked);
        EngineLoad {
            waiting: scheduler.waiting.len() + scheduler.parked.len(),
            running: scheduler.prefilling.len() + scheduler.decoding.len(),
            waiting_tokens,
            batch_tokens,
            decoding: scheduler.decoding.len() + scheduler.parked.len(),
            decoding_tokens: decoding.map(|s| s.tokens.len()).sum(),
        }
    }

    /// Steps that the executor has refused since the start: each is a defect of it or of the engine.
    pub fn plans_refused(&self) -> u32 {
        self.plans_refused
    }

    /// What its steps cost, as far as that is known.
    pub fn cost(&self) -> Option<&StepCost> {
        self.scheduler.cost.as_ref().map(CostModel::cost)
    }

    /// How far the times of nine in ten of the last steps were off what was predicted at most, as a part of them.
    pub fn cost_error(&self) -> Option<f32> {
        self.scheduler.cost.as_ref().and_then(CostModel::error_p90)
    }

    /// Submit what can run, as far ahead as the executor bears, and collect the oldest step. The events may be none: a
    /// chunk in the middle of a prompt has nothing to tell, and neither has a step that found nothing to run
    /// ([`Engine::is_stalled`]).
    ///
    /// # Errors
    /// [`ExecutorError`] if the executor failed. It is out of service then, and every later step fails alike: the owner
    /// reports all its sequences as failed and drops the engine.
    pub fn step(&mut self) -> Result<Vec<Event>, ExecutorError> {
        let mut events = Vec::with_capacity(self.scheduler.decoding.len() + 1);
        self.in_service(|engine| {
            engine.submit_steps(&mut events)?;
            engine.collect_step(&mut events)
        })?;
        Ok(events)
    }

    /// The first half of [`Engine::step`]: submit what can run. For an owner that waits in another way than in
    /// [`Executor::collect`] until the oldest step has ended, and then calls [`Engine::collect`].
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn submit_ahead(&mut self) -> Result<Vec<Event>, ExecutorError> {
        let mut events = Vec::new();
        self.in_service(|engine| engine.submit_steps(&mut events))?;
        Ok(events)
    }

    /// The second half of [`Engine::step`]: collect the oldest step.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn collect(&mut self) -> Result<Vec<Event>, ExecutorError> {
        let mut events = Vec::with_capacity(self.scheduler.decoding.len() + 1);
        self.in_service(|engine| engine.collect_step(&mut events))?;
        Ok(events)
    }

    /// Collect all steps in flight and submit none: for an owner that has no use for more events now, and wants the
    /// blocks of aborted sequences back all the same.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn settle(&mut self) -> Result<Vec<Event>, ExecutorError> {
        let mut events = Vec::new();
        self.in_service(|engine| {
            while !engine.flights.is_empty() {
                engine.collect_step(&mut events)?;
            }
            Ok(())
        })?;
        Ok(events)
    }

    /// Does something with the executor, unless it has failed; if it fails now, that is remembered.
    fn in_service(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<(), ExecutorError>,
    ) -> Result<(), ExecutorError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        run(self).inspect_err(|error| {
            self.flights.abandon();
            self.failed = Some(error.clone());
        })
    }

    /// Submit what can run, as far ahead as the executor bears.
    fn submit_steps(&mut self, events: &mut Vec<Event>) -> Result<(), ExecutorError> {
        let depth = self.info().steps_in_flight.max(1);
        self.choose()?;
        while self.flights.len() < depth && self.submit_step(events)? {}
        self.stalled = self.flights.is_empty() && self.has_work();
        Ok(())
    }

    /// Have the tokens of the step in flight chosen, if it waits for masks and no other is before it.
    fn choose(&mut self) -> Result<(), ExecutorError> {
        if let Some(flight) = self.flights.alone_unchosen() {
            let deadline = self.pace.busy_until((self.clock)());
            let masks = self.scheduler.masks(&mut flight.rows, deadline);
            self.executor.choose(&masks)?;
            flight.is_unchosen = false;
        }
        Ok(())
    }

    /// Plan the next step and submit it; `false` if there is none, or if it has to wait for those in flight. One that is refused is over with
    /// its sequences, and the next may be planned.
    fn submit_step(&mut self, events: &mut Vec<Event>) -> Result<bool, ExecutorError> {
        if self.flights.are_unchosen() {
            return Ok(false);
        }
        let rows = match self.flights.is_empty() {
            true => self.scheduler.plan((self.clock)(), events),
            false => {
                let now = (self.clock)();
                let starts = self.pace.ends(now, self.flights.expected());
                self.scheduler.plan_ahead(now, starts)
            }
        };
        if rows == 0 {
            return Ok(false);
        }
        let submitted = (self.clock)();
        let taken = self.executor.submit(&self.scheduler.plan);
        self.scheduler.plan.id.0 += 1;
        match taken {
            Ok(()) => {}
            Err(error) if error.fault == Fault::Refused => {
                self.end_refused(&error, events);
                return Ok(true);
            }
            Err(error) => return Err(error),
        }
        // The plan's hold on sampling states ends here, the executor's when the step is collected.
        self.scheduler.plan.sequences.clear();
        let mut flight = std::mem::take(&mut self.scheduler.flight);
        flight.submitted = (!flight.is_unchosen).then_some(submitted);
        self.flights.submitted(flight);
        Ok(true)
    }

    /// Whether blocks and sequences agree with each other. Linear in the arena's blocks: for idle moments and tests.
    ///
    /// # Errors
    /// The first disagreement, as a sentence. It is a defect of this crate.
    pub fn check(&self) -> Result<(), String> {
        let pool = &self.scheduler.pool;
        pool.check()?;
        let mut keys: Vec<u64> = self.scheduler.sequences().map(|s| s.key).collect();
        keys.sort_unstable();
        if let Some(twice) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("sequence {} is in the engine twice", twice[0]));
        }
        let arrivals = |running: &[Sequence]| running.is_sorted_by_key(|s| s.arrival);
        if !arrivals(&self.scheduler.decoding) || !arrivals(&self.scheduler.prefilling) {
            return Err("running sequences are not in order of arrival".to_owned());
        }
        for sequence in self.scheduler.sequences() {
            self.flights.check(sequence)?;
            let Sequence {
                key,
                computed,
                blocks,
                ..
            } = sequence;
            if blocks.capacity() < *computed || *computed > sequence.tokens.len() {
                return Err(format!(
                    "sequence {key} has {computed} tokens computed in {blocks:?}"
                ));
            }
            let next = computed / pool.block_tokens();
            if let Some(shared) = blocks
                .ids()
                .iter()
                .skip(next)
                .find(|block| !pool.is_private(**block))
            {
                return Err(format!(
                    "sequence {key} would write block {shared}, which is shared"
                ));
            }
        }
        Ok(())
    }

    /// What must hold of any specification before it comes in.
    fn check_spec(&self, key: u64, spec: &SequenceSpec) -> Result<(), Refusal> {
        if self.failed.is_some() {
            return Err(Refusal::Draining);
        }
        spec.check()?;
        let vocab = self.info().vocab;
        if let Some(token) = spec.tokens.0.iter().find(|token| **token >= vocab) {
            return Err(Refusal::Malformed {
                detail: format!("token id {token} is not in the vocabulary of {vocab}"),
            });
        }
        if self
            .scheduler
            .sequences()
            .any(|sequence| sequence.key == key)
        {
            return Err(Refusal::Malformed {
                detail: format!("sequence {key} is in the engine already"),
            });
        }
        Ok(())
    }

    fn too_long(&self) -> Refusal {
        Refusal::TooLong {
            tokens_max: self.tokens_max as u32,
        }
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Engine({}, {:?}, {:?})",
            self.info().device,
            self.load(),
            self.scheduler.pool
        )
    }
}

#[cfg(test)]
mod tests;
