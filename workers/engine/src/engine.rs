//! The engine as its owner sees it: submit, resume, abort, step.

use std::fmt;
use std::time::Instant;

use baton_protocol::{Refusal, SequenceSpec};

use crate::flight::{FlightRow, Flights};
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
use crate::{
    BlockPool, BlockTable, EngineConfig, EngineLoad, Event, Executor, ExecutorError, ExecutorInfo,
    NewSequence, ResumedSequence, Sampled, SequenceOutput, StepOutput,
};

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
    stalled: bool,
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
            stalled: false,
            failed: None,
        }
    }

    /// With another clock for the times that it reports. They decide nothing here.
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
        self.arrivals += 1;
        self.scheduler.waiting.push_back(sequence);
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
        sequence.push(next);
        self.arrivals += 1;
        scheduler.parked.push_back(sequence);
        Ok(())
    }

    /// Take a sequence out, in whatever phase it is, and give its blocks back: at once, or when the steps in flight that
    /// may touch them are collected. `false` if it is not here.
    pub fn abort(&mut self, key: u64) -> bool {
        let Some(sequence) = self.scheduler.remove(key) else {
            return false;
        };
        if sequence.in_flight > 0 {
            self.flights.give_back(sequence.blocks);
        }
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
        let unfinished = scheduler.waiting.iter().chain(&scheduler.prefilling);
        EngineLoad {
            waiting: scheduler.waiting.len() + scheduler.parked.len(),
            running: scheduler.prefilling.len() + scheduler.decoding.len(),
            waiting_tokens: unfinished.map(Sequence::remaining).sum(),
        }
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
            let depth = engine.info().steps_in_flight.max(1);
            while engine.flights.len() < depth && engine.submit_step(&mut events)? {}
            engine.stalled = engine.flights.is_empty() && engine.has_work();
            engine.collect_step(&mut events)
        })?;
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

    /// Plan the next step and submit it; `false` if there is none, or if it has to wait for those in flight.
    fn submit_step(&mut self, events: &mut Vec<Event>) -> Result<bool, ExecutorError> {
        let rows = match self.flights.is_empty() {
            true => self.scheduler.plan((self.clock)(), events),
            false => self.scheduler.plan_ahead(),
        };
        if rows == 0 {
            return Ok(false);
        }
        self.executor.submit(&self.scheduler.plan)?;
        // The plan's hold on sampling states ends here, the executor's when the step is collected.
        self.scheduler.plan.sequences.clear();
        let flight = std::mem::take(&mut self.scheduler.flight);
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

    /// The executor's half of the contract: a row for each sequence, and in it what was asked for.
    fn check_output(&self, rows: &[FlightRow], output: &StepOutput) -> Result<(), ExecutorError> {
        let vocab = self.info().vocab;
        let fits = |(row, output): (&FlightRow, &SequenceOutput)| {
            let token_fits = match &output.sampled {
                Some(sampled) => row.samples && sampled.token < vocab,
                None => !row.samples,
            };
            output.failure.is_some() || token_fits && output.target_logprobs.len() == row.targets
        };
        if rows.len() == output.sequences.len() && rows.iter().zip(&output.sequences).all(fits) {
            return Ok(());
        }
        Err(ExecutorError {
            message: format!(
                "{} returned an output that does not fit its plan of {} sequences; this is a defect of the executor",
                self.info().device,
                rows.len()
            ),
        })
    }

    /// Collect the oldest step in flight, if there is one.
    fn collect_step(&mut self, events: &mut Vec<Event>) -> Result<(), ExecutorError> {
        let Some(oldest) = self.flights.oldest() else {
            return Ok(());
        };
        let output = self.executor.collect()?;
        self.check_output(&oldest.rows, &output)?;
        let Some(flight) = self.flights.collected() else {
            return Ok(());
        };
        let mut decodes: Vec<_> = flight.rows.into_iter().zip(output.sequences).collect();
        let prompts = decodes.split_off(flight.decodes);
        self.collect_decodes(decodes, events);
        self.collect_prefills(prompts, events);
        Ok(())
    }

    /// Rows and sequences are both in order of arrival. Rows of those that have left since are thrown away.
    fn collect_decodes(&mut self, rows: Vec<(FlightRow, SequenceOutput)>, events: &mut Vec<Event>) {
        let Scheduler {
            decoding,
            pool,
            prefix_cache,
            ..
        } = &mut self.scheduler;
        let block_tokens = pool.block_tokens();
        let mut rows = rows.into_iter().peekable();
        decoding.retain_mut(|sequence| {
            while rows
                .next_if(|(row, _)| row.arrival < sequence.arrival)
                .is_some()
            {}
            let row = rows.next_if(|(row, _)| row.arrival == sequence.arrival);
            let Some((_, output)) = row else {
                return true;
            };
            sequence.in_flight -= 1;
            let Some(sampled) = output.sampled.filter(|_| output.failure.is_none()) else {
                sequence.blocks.forget();
                self.flights.give_back(sequence.blocks.take());
                events.push(failed(sequence.key, output.failure));
                return false;
            };
            sequence.computed += 1;
            // Only on top of what is indexed already: pulled KV stays out of the index of a worker that runs no prompts.
            let full = sequence.computed / block_tokens;
            if *prefix_cache
                && sequence.computed % block_tokens == 0
                && sequence.blocks.indexed() + 1 == full
            {
                let known = &sequence.tokens[..sequence.computed];
                let given_up = sequence.blocks.index(sequence.cache_salt, known);
                self.flights.give_back(given_up);
            }
            let finish = sequence.finish_with(sampled.token, self.tokens_max);
            let index = sequence.output_tokens() as u32;
            sequence.push(sampled.token);
            events.push(Event::Token {
                key: sequence.key,
                index,
                sampled,
                finish,
            });
            if finish.is_some() && sequence.in_flight > 0 {
                self.flights.give_back(sequence.blocks.take());
            }
            finish.is_none()
        });
    }

    fn collect_prefills(
        &mut self,
        rows: Vec<(FlightRow, SequenceOutput)>,
        events: &mut Vec<Event>,
    ) {
        let Scheduler {
            prefilling,
            prefix_cache,
            ..
        } = &mut self.scheduler;
        let mut done: Vec<(usize, Result<Sampled, String>)> = Vec::new();
        for (row, output) in rows {
            let Some(at) = prefilling.iter().position(|s| s.arrival == row.arrival) else {
                continue;
            };
            let sequence = &mut prefilling[at];
            sequence.computed += row.tokens;
            sequence.in_flight -= row.tokens;
            if let Some(detail) = output.failure {
                done.push((at, Err(detail)));
                continue;
            }
            sequence.prompt.logprobs.extend(output.target_logprobs);
            if *prefix_cache {
                // A step that may be in flight already has no row of this sequence.
                let known = &sequence.tokens[..sequence.computed];
                drop(sequence.blocks.index(sequence.cache_salt, known));
            }
            done.extend(output.sampled.map(|sampled| (at, Ok(sampled))));
        }
        done.sort_unstable_by_key(|(at, _)| *at);
        for (removed, (at, end)) in done.into_iter().enumerate() {
            let sequence = prefilling.remove(at - removed);
            events.push(match end {
                Ok(sampled) => prefilled(sequence, sampled, self.tokens_max, (self.clock)()),
                Err(detail) => {
                    sequence.blocks.forget();
                    failed(sequence.key, Some(detail))
                }
            });
        }
    }
}

fn failed(key: u64, detail: Option<String>) -> Event {
    let detail = detail.unwrap_or_else(|| "no token was chosen".to_owned());
    Event::Failed { key, detail }
}

fn prefilled(sequence: Sequence, sampled: Sampled, tokens_max: usize, now: Instant) -> Event {
    let finish = sequence.finish_with(sampled.token, tokens_max);
    let Sequence {
        key,
        blocks,
        prompt,
        ..
    } = sequence;
    let started = prompt.started.unwrap_or(prompt.submitted);
    Event::Prefilled {
        key,
        blocks,
        sampled,
        finish,
        cached_tokens: prompt.cached_tokens as u32,
        prompt_logprobs: prompt.logprobs_top.map(|_| prompt.logprobs),
        queue: started.saturating_duration_since(prompt.submitted),
        compute: now.saturating_duration_since(started),
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
