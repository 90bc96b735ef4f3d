//! The OS thread that owns the engine.
//!
//! Commands come in through a bounded channel and events go out through another; tokens go straight to
//! the [`TokenOutbox`]. With work it steps back to back, without it sleeps until a command comes. When a
//! step finds no free block it sleeps until blocks come back, and when the bus is slow, until there is
//! room for tokens, with no step in flight: commands (aborts above all) are carried out meanwhile. A sequence with a grammar
//! is held back until its constraint is made ([`crate::grammars`]).

mod handle;
mod held_back;
mod held_blocks;
#[cfg(feature = "simulation")]
mod task;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_engine::{
    Constraint, Engine, Event, ExecutorError, NewSequence, ResumedSequence, Sampled,
};
use baton_protocol::{
    ApiServerId, End, Failure, FailureCode, FrameItem, PackedTokens, PullReport, Refusal,
};
use baton_traces::Span;
use baton_watchdog::Pulse;
use crossbeam_channel::{Receiver, TryRecvError, after, never, select};
use tokio::sync::mpsc::{self, error::TrySendError};

use crate::frames::{Route, TokenOutbox};
use crate::grammars::{Grammars, News};
use crate::token_rules::ruled;

use held_back::HeldBack;

use handle::COST_STEPS;
pub(crate) use handle::{
    Begun, Command, EngineEvent, EngineHandle, EngineWaker, LoadGauge, Prefilled,
};
pub(crate) use held_blocks::HeldBlocks;
#[cfg(feature = "simulation")]
pub(crate) use task::EngineTask;
#[cfg(feature = "simulation")]
pub use task::StepTimes;

/// How long a step that found no block, or an outbox without room, is waited out when no wake-up comes.
const STALL_WAIT: Duration = Duration::from_millis(20);

struct EngineThread {
    /// `None` once the executor broke.
    engine: Option<Engine>,
    commands: Receiver<Command>,
    held: HeldBack,
    events: mpsc::Sender<EngineEvent>,
    tokens: Arc<TokenOutbox>,
    stalled: Arc<AtomicBool>,
    load: Arc<LoadGauge>,
    pulse: Pulse,
    decoding: BTreeMap<u64, Decoding>,
    /// Items of the step or command under way.
    items: Vec<(ApiServerId, FrameItem)>,
    /// Events of the step or command under way.
    unsaid: Vec<EngineEvent>,
    /// Pools were checked since the last work.
    checked: bool,
    /// Steps until it tells again what they cost.
    cost_due: u32,
}

struct Decoding {
    route: Route,
    /// Output index of the next token that the API server is told.
    index: u32,
    /// A token before those made here, which it may not have yet.
    first: Option<Sampled>,
    /// Reported with the first item.
    pulled: Option<PullReport>,
    /// Output index of the first token made here.
    from: u32,
    /// Where its trace is recorded.
    trace: Option<Box<Span>>,
}

/// What follows on what the thread did.
enum Turn {
    /// Go on: there may be more to do.
    On,
    /// Wait for a command, until then at most.
    Wait(Option<Duration>),
    /// It was told to end.
    End,
}

/// What a wait ended with.
enum Came {
    /// `None` if nobody can send one any more.
    Command(Option<Box<Command>>),
    News(Option<News>),
    Nothing,
}

/// Whether the thread goes on.
#[derive(Clone, Copy)]
enum Flow {
    On,
    End,
}

impl EngineThread {
    fn new(
        engine: Engine,
        commands: Receiver<Command>,
        events: mpsc::Sender<EngineEvent>,
        tokens: Arc<TokenOutbox>,
        stalled: Arc<AtomicBool>,
        load: Arc<LoadGauge>,
        pulse: Pulse,
    ) -> Self {
        Self {
            engine: Some(engine),
            commands,
            held: HeldBack::new(None),
            events,
            tokens,
            stalled,
            load,
            pulse,
            decoding: BTreeMap::new(),
            items: Vec::new(),
            unsaid: Vec::new(),
            checked: true,
            cost_due: COST_STEPS,
        }
    }

    /// With somebody to make constraints of grammars.
    fn with_grammars(mut self, grammars: Option<Grammars>) -> Self {
        self.held = HeldBack::new(grammars);
        self
    }

    fn run(mut self) {
        loop {
            self.pulse.beat();
            let flow = match self.turn() {
                Turn::On => Flow::On,
                Turn::Wait(at_most) => self.wait(at_most),
                Turn::End => Flow::End,
            };
            if let Flow::End = flow {
                return;
            }
        }
    }

    /// Carries out the commands that are there, and a step if there is one.
    fn turn(&mut self) -> Turn {
        self.turn_with(Engine::step)
    }

    /// The same with another part of a step, or all of it.
    fn turn_with(&mut self, step: fn(&mut Engine) -> Result<Vec<Event>, ExecutorError>) -> Turn {
        if let Flow::End = self.take_commands() {
            return Turn::End;
        }
        if !self.has_work() {
            self.check_pools();
            Turn::Wait(None)
        } else if !self.tokens.has_room() {
            // A step or two over the bound, once; or blocks of the aborted would be held as long as the bus is slow.
            self.advance(Engine::settle);
            self.stalled.store(true, Ordering::Release);
            Turn::Wait(Some(STALL_WAIT))
        } else if self.advance(step) {
            Turn::On
        } else {
            self.stalled.store(true, Ordering::Release);
            Turn::Wait(Some(STALL_WAIT))
        }
    }

    fn has_work(&self) -> bool {
        self.engine.as_ref().is_some_and(Engine::has_work)
    }

    /// Carries out all commands that are there, and those that waited for a constraint which is there.
    fn take_commands(&mut self) -> Flow {
        while let Ok(news) = self.held.news().try_recv() {
            self.hear(news);
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if let Flow::End = self.carry_out(command) {
                        return Flow::End;
                    }
                }
                Err(TryRecvError::Empty) => {
                    self.flush();
                    return Flow::On;
                }
                Err(TryRecvError::Disconnected) => return Flow::End,
            }
        }
    }

    /// Sleeps until a command comes, or until the time is over.
    fn wait(&mut self, at_most: Option<Duration>) -> Flow {
        self.pulse.rest();
        let over = at_most.map_or_else(never, after);
        let came = select! {
            recv(self.commands) -> command => Came::Command(command.ok().map(Box::new)),
            recv(self.held.news()) -> news => Came::News(news.ok()),
            recv(over) -> _ => Came::Nothing,
        };
        self.pulse.beat();
        match came {
            Came::Command(Some(command)) => self.carry_out(*command),
            Came::Command(None) => Flow::End,
            Came::News(news) => {
                news.into_iter().for_each(|news| self.hear(news));
                Flow::On
            }
            Came::Nothing => Flow::On,
        }
    }

    /// A sequence that was held back can begin, or cannot.
    fn hear(&mut self, news: News) {
        let News::Built { key, built } = news else {
            return; // a mask: the engine asks for it
        };
        let Some(command) = self.held.take(key) else {
            return; // aborted meanwhile
        };
        match built {
            Ok(constraint) => self.begin(command, Some(constraint)),
            Err(detail) => self.turn_away(command, detail),
        }
    }

    /// A sequence whose grammar cannot be followed here does not begin.
    fn turn_away(&mut self, command: Command, detail: String) {
        match command {
            Command::Decode { key, .. } => {
                let failure = Failure::new(FailureCode::NoToken, detail);
                self.end_decoding(key, End::Failed(failure.clone()));
                self.say(EngineEvent::Ended { key, failure });
            }
            Command::Prefill { key, .. } => self.say(EngineEvent::Left {
                key,
                refusal: Some(Refusal::Malformed { detail }),
            }),
            Command::Abort { .. } | Command::Wake | Command::Shutdown => {}
        }
    }

    fn carry_out(&mut self, mut command: Command) -> Flow {
        match command {
            Command::Prefill { .. } | Command::Decode { .. } => {
                self.expect_tokens(&mut command);
                match self.held.hold(command) {
                    None => {}
                    Some((command, None)) => self.begin(command, None),
                    Some((command, Some(detail))) => self.turn_away(command, detail),
                }
            }
            Command::Abort { key, failure } => {
                drop(self.held.take(key));
                if let Some(engine) = &mut self.engine {
                    engine.abort(key);
                }
                match failure {
                    Some(failure) => self.end_decoding(key, End::Failed(failure)),
                    None => drop(self.decoding.remove(&key)),
                }
                self.say(EngineEvent::Left { key, refusal: None });
            }
            Command::Wake => {}
            Command::Shutdown => {
                self.flush();
                return Flow::End;
            }
        }
        self.report_load();
        Flow::On
    }

    /// Notes where the tokens of a sequence go that generates.
    fn expect_tokens(&mut self, command: &mut Command) {
        if let Command::Decode {
            key,
            route,
            spec,
            first,
            pulled,
            trace,
            ..
        } = command
        {
            let decoding = Decoding {
                route: route.clone(),
                index: spec.output_tokens() + u32::from(first.is_none()),
                first: first.clone(),
                pulled: Some(*pulled),
                from: spec.output_tokens() + 1,
                trace: trace.take(),
            };
            self.decoding.insert(*key, decoding);
        }
    }

    /// Gives the engine a sequence; `grammar` is what its grammar became, if it has one.
    fn begin(&mut self, command: Command, grammar: Option<Box<dyn Constraint>>) {
        let vocab = self.engine.as_ref().map_or(0, |engine| engine.info().vocab);
        let ruled = match &command {
            Command::Prefill { spec, .. } => ruled(spec, None, vocab, grammar),
            Command::Decode { spec, next, .. } => ruled(spec, Some(*next), vocab, grammar),
            Command::Abort { .. } | Command::Wake | Command::Shutdown => return,
        };
        let constraint = match ruled {
            Ok(constraint) => constraint,
            Err(detail) => return self.turn_away(command, detail),
        };
        match command {
            Command::Prefill {
                key,
                spec,
                prompt_logprobs,
                stream,
            } => {
                let taken = match &mut self.engine {
                    Some(engine) => engine.submit(NewSequence {
                        key,
                        spec,
                        prompt_logprobs,
                        constraint,
                        stream,
                    }),
                    None => Err(Refusal::Draining),
                };
                if let Err(refusal) = taken {
                    self.say(EngineEvent::Left {
                        key,
                        refusal: Some(refusal),
                    });
                }
            }
            Command::Decode {
                key,
                route,
                spec,
                next,
                blocks,
                ..
            } => {
                tracing::debug!(request = %route.request, "its next step is the first here");
                let taken = match &mut self.engine {
                    Some(engine) => engine.resume(ResumedSequence {
                        key,
                        spec,
                        next,
                        blocks,
                        constraint,
                    }),
                    None => Err(Refusal::Draining),
                };
                if let Err(refusal) = taken {
                    // Its KV was released for it: another try must begin with the prompt.
                    let failure = Failure::new(FailureCode::Preempted, refusal.to_string());
                    self.end_decoding(key, End::Failed(failure));
                    self.say(EngineEvent::Left { key, refusal: None });
                }
            }
            Command::Abort { .. } | Command::Wake | Command::Shutdown => {}
        }
    }

    /// Has the engine run and sends on what it made. False if nothing could run.
    fn advance(
        &mut self,
        run: impl FnOnce(&mut Engine) -> Result<Vec<Event>, ExecutorError>,
    ) -> bool {
        self.checked = false;
        let Some(engine) = &mut self.engine else {
            return false;
        };
        // A panicking executor is a broken executor, and no reason to leave requests without an answer.
        let outcome = catch_unwind(AssertUnwindSafe(|| run(engine)));
        let events = match outcome {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => {
                self.fail(error.to_string());
                return true;
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                self.fail(format!(
                    "it panicked: {}",
                    text.unwrap_or("without a message")
                ));
                return true;
            }
        };
        let ran = !engine.is_stalled();
        for event in events {
            self.tell(event);
        }
        self.report_load();
        self.report_cost();
        self.flush();
        ran
    }

    fn tell(&mut self, event: Event) {
        match event {
            Event::Begun {
                key,
                runs,
                computed,
                cached_tokens,
                queue,
            } => {
                self.say(EngineEvent::Begun(Box::new(Begun {
                    key,
                    runs,
                    computed,
                    cached_tokens,
                    queue,
                })));
            }
            Event::Computed { key, computed } => {
                self.say(EngineEvent::Computed { key, computed });
            }
            Event::Prefilled {
                key,
                blocks,
                sampled,
                finish,
                cached_tokens,
                prompt_logprobs,
                queue,
                compute,
            } => {
                self.say(EngineEvent::Prefilled(Box::new(Prefilled {
                    key,
                    blocks,
                    sampled,
                    finish,
                    cached_tokens,
                    prompt_logprobs,
                    queue,
                    compute,
                    done: Instant::now(),
                })));
            }
            Event::Token {
                key,
                index,
                sampled,
                finish,
            } => {
                let Some(decoding) = self.decoding.get_mut(&key) else {
                    return;
                };
                let mut item = decoding.item();
                item.index = index;
                if let Some(first) = decoding.first.take() {
                    item.index = index - 1;
                    item.tokens.0.push(first.token);
                    item.logprobs.extend(first.logprobs);
                }
                item.tokens.0.push(sampled.token);
                item.logprobs.extend(sampled.logprobs);
                item.end = finish.map(End::Finished);
                decoding.index = index + 1;
                if let Some(trace) = decoding.trace.as_mut().filter(|_| index == decoding.from) {
                    trace.event("first token", Instant::now());
                }
                self.items.push((decoding.route.api_server.clone(), item));
                if finish.is_some() {
                    let trace = self.decoding.remove(&key).and_then(Decoding::ended);
                    if let Some(trace) = trace {
                        trace.end();
                    }
                    self.say(EngineEvent::Left { key, refusal: None });
                }
            }
            Event::Failed { key, detail } => {
                let failure = Failure::new(FailureCode::NoToken, detail);
                self.end_decoding(key, End::Failed(failure.clone()));
                self.say(EngineEvent::Ended { key, failure });
            }
            Event::Refused { key, detail } => {
                let failure = Failure::new(FailureCode::Executor, detail);
                self.end_decoding(key, End::Failed(failure.clone()));
                self.say(EngineEvent::Ended { key, failure });
            }
            Event::Preempted { key } => {
                let message = "no KV block was left for its next token";
                self.end_decoding(
                    key,
                    End::Failed(Failure::new(FailureCode::Preempted, message)),
                );
                self.say(EngineEvent::Left { key, refusal: None });
            }
        }
    }

    fn end_decoding(&mut self, key: u64, end: End) {
        if let Some(mut decoding) = self.decoding.remove(&key) {
            let item = FrameItem {
                end: Some(end.clone()),
                ..decoding.item()
            };
            self.items.push((decoding.route.api_server.clone(), item));
            if let (Some(mut trace), End::Failed(failure)) = (decoding.ended(), end) {
                trace.fail("generate", failure.to_string());
            }
        }
    }

    /// The executor is out of service, and what it left in the arena is unknown: everything ends.
    fn fail(&mut self, message: String) {
        tracing::error!(%message, "the executor broke: this worker serves no more");
        self.engine = None;
        self.held.clear();
        let keys: Vec<_> = self.decoding.keys().copied().collect();
        for key in keys {
            let failure = Failure::new(FailureCode::Executor, message.clone());
            self.end_decoding(key, End::Failed(failure));
        }
        self.report_load();
        self.say(EngineEvent::Failed { message });
        self.flush();
    }

    /// Whenever it has nothing to do, the pools must add up.
    fn check_pools(&mut self) {
        if std::mem::replace(&mut self.checked, true) {
            return;
        }
        if let Some(engine) = &self.engine
            && let Err(error) = engine.check()
        {
            tracing::error!(error, "blocks and sequences do not add up: a defect");
        }
    }

    fn report_load(&self) {
        let load = self.engine.as_ref().map(Engine::load).unwrap_or_default();
        let gauge = &self.load;
        for (number, now) in [
            (&gauge.waiting, load.waiting + self.held.len()),
            (&gauge.running, load.running),
            (&gauge.waiting_tokens, load.waiting_tokens),
            (&gauge.batch_tokens, load.batch_tokens),
            (&gauge.decoding, load.decoding),
        ] {
            number.store(now as u32, Ordering::Relaxed);
        }
        let tokens = load.decoding_tokens as u64;
        gauge.decoding_tokens.store(tokens, Ordering::Relaxed);
        if let Some(engine) = &self.engine {
            let refused = engine.plans_refused();
            gauge.plans_refused.store(refused, Ordering::Relaxed);
        }
    }

    /// Tells what steps cost, now and then.
    fn report_cost(&mut self) {
        self.cost_due = self.cost_due.saturating_sub(1);
        if let (0, Some(engine)) = (self.cost_due, &self.engine) {
            self.cost_due = COST_STEPS;
            self.load.set_cost(engine);
        }
    }

    /// Hands over what steps and commands made: tokens first, so whoever hears that a sequence left can rely
    /// on its last token being on its way.
    fn flush(&mut self) {
        self.tokens.push(std::mem::take(&mut self.items));
        for event in self.unsaid.drain(..) {
            if let Err(TrySendError::Full(event)) = self.events.try_send(event) {
                if let EngineEvent::Computed { .. } = event {
                    continue;
                }
                // The desk never waits for this thread, so this cannot wait for ever; without a desk nobody listens.
                let _ = self.events.blocking_send(event);
            }
        }
    }

    fn say(&mut self, event: EngineEvent) {
        self.unsaid.push(event);
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        // What is over is not stuck.
        self.pulse.rest();
    }
}

impl Decoding {
    /// What it made, for its span.
    fn ended(self) -> Option<Box<Span>> {
        let mut trace = self.trace?;
        let tokens = self.index.saturating_sub(self.from);
        trace.set("gen_ai.usage.output_tokens", tokens);
        Some(trace)
    }

    /// An item without tokens; the first one carries what the pull cost.
    fn item(&mut self) -> FrameItem {
        FrameItem {
            request: self.route.request,
            attempt: self.route.attempt,
            index: self.index,
            tokens: PackedTokens::default(),
            logprobs: Vec::new(),
            pulled: self.pulled.take(),
            end: None,
        }
    }
}

#[cfg(test)]
mod tests;
