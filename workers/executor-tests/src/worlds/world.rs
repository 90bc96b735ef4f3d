//! One world: requests are submitted to an engine, preempted, retried, leased and resumed, until all have ended.

use baton_engine::{BlockTable, Engine, EngineConfig, Event, ResumedSequence, Sampled};

use super::drafts::Guesses;
use super::job::{End, Job};
use super::{Alike, Alone, Lent, Text};
use crate::Random;

/// Steps after which a world hangs.
const STEPS_MAX: usize = 20_000;

/// A request on its way.
struct Underway {
    job: Job,
    /// What it gets alone.
    alone: Text,
    /// What it got so far.
    found: Text,
    phase: Phase,
}

enum Phase {
    /// It is not submitted yet.
    Away,
    /// It is in the engine.
    Inside,
    /// Its KV is leased until this step.
    Leased(BlockTable, usize),
    Over,
}

/// Runs the world of this seed on the executor that is lent, and compares each text with what the sequence gets alone.
pub fn run(lent: &Lent, seed: u64, alike: Alike) {
    let mut random = Random(seed + 1);
    let mut world = World::of(lent, &mut random, format!("world {seed}"));
    world.run(&mut random);
    let World {
        underway,
        tokens_max,
        ..
    } = world;
    for (key, one) in underway.iter().enumerate() {
        let at = format!("world {seed}, sequence {key}");
        lent.seen().tokens += one.found.sampled.len();
        match alike {
            Alike::Exactly => assert_eq!(one.found, one.alone, "{at}: {:?}", one.job),
            Alike::Within(bound) => {
                if one.found.end != Some(End::Failed) {
                    let end = one.job.end(&one.found.tokens(), tokens_max);
                    assert_eq!(one.found.end, end, "{at}: {:?}", one.found);
                }
                let differ = with_alone(lent, tokens_max, |alone| {
                    alone.differences(&one.job, &one.found, bound, &at)
                });
                lent.seen().differ += differ;
            }
        }
    }
}

/// The executor without an engine.
fn with_alone<T>(lent: &Lent, tokens_max: usize, work: impl FnOnce(&mut Alone<'_>) -> T) -> T {
    work(&mut Alone {
        executor: &mut **lent.executor(),
        tokens_max,
    })
}

struct World<'a> {
    lent: &'a Lent,
    name: String,
    engine: Engine,
    /// Longest sequence.
    tokens_max: usize,
    /// By key.
    underway: Vec<Underway>,
    step: usize,
}

impl<'a> World<'a> {
    fn of(lent: &'a Lent, random: &mut Random, name: String) -> Self {
        let mut info = lent.info.clone();
        info.blocks = 12 + random.below(lent.info.blocks as usize - 11) as u32;
        let vocab = info.vocab;
        let config = EngineConfig {
            step_tokens_max: [9, 16, 40, 200][random.below(4)],
            sequences_max: [2, 4, 8][random.below(3)],
            queue_max: 100,
            prefix_cache: random.below(4) > 0,
        };
        let executor = Lent {
            info,
            ..lent.clone()
        };
        let mut engine = Engine::new(Box::new(executor), config);
        let tokens_max = engine.tokens_max();
        let stems = [0, 0].map(|_| random.tokens(40, vocab as usize));
        let underway = (0..1 + random.below(8)).map(|_| {
            let job = Job::draw(random, vocab, &stems);
            Underway {
                alone: with_alone(lent, tokens_max, |alone| alone.text(&job)),
                job,
                found: Text::default(),
                phase: Phase::Away,
            }
        });
        let underway: Vec<Underway> = underway.collect();
        if random.below(3) > 0 {
            let text = |one: &Underway| (one.job.prompt.clone(), one.alone.tokens());
            engine = engine.with_drafter(Box::new(Guesses {
                texts: underway.iter().map(text).collect(),
                vocab,
                drafts: 0,
            }));
        }
        Self {
            lent,
            name,
            engine,
            tokens_max,
            underway,
            step: 0,
        }
    }

    fn run(&mut self, random: &mut Random) {
        let is_over = |one: &Underway| matches!(one.phase, Phase::Over);
        while self.engine.has_work() || !self.underway.iter().all(is_over) {
            self.step += 1;
            assert!(
                self.step < STEPS_MAX,
                "{} hangs: {:?}",
                self.name,
                self.engine
            );
            for key in 0..self.underway.len() {
                self.act(key);
            }
            let events = match random.below(6) {
                0 => self.engine.submit_ahead(),
                1 => self.engine.collect(),
                2 => self.engine.settle(),
                _ => self.engine.step(),
            };
            let events = events.unwrap_or_else(|error| panic!("{}: {error}", self.name));
            events.into_iter().for_each(|event| self.handle(event));
            let checked = self.engine.check();
            checked.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        }
        let stats = self.engine.pool().stats();
        assert_eq!(
            (stats.used, stats.available()),
            (0, stats.total),
            "{}",
            self.name
        );
        assert_eq!(self.engine.plans_refused(), 0, "{}", self.name);
    }

    /// Submits, resumes or retries a request before a step, if it is time for that.
    fn act(&mut self, key: usize) {
        let one = &mut self.underway[key];
        let output = one.found.sampled.len();
        match &one.phase {
            Phase::Away if one.job.arrives <= self.step => self.begin(key),
            Phase::Leased(_, until) if *until <= self.step => self.resume(key),
            Phase::Inside if one.job.retry_at.take_if(|at| *at <= output).is_some() => {
                self.lent.seen().retried += 1;
                assert!(
                    self.engine.abort(key as u64),
                    "{}: {key} is there",
                    self.name
                );
                self.begin(key);
            }
            _ => {}
        }
    }

    /// As a prompt, with the output so far.
    fn begin(&mut self, key: usize) {
        let one = &mut self.underway[key];
        one.phase = Phase::Inside;
        let new = one.job.new_sequence(key as u64, &one.found.tokens());
        let taken = self.engine.submit(new);
        taken.unwrap_or_else(|refusal| panic!("{}: {key} is refused: {refusal}", self.name));
    }

    /// With KV that is in place.
    fn resume(&mut self, key: usize) {
        let one = &mut self.underway[key];
        let Phase::Leased(blocks, _) = std::mem::replace(&mut one.phase, Phase::Inside) else {
            return;
        };
        let output = one.found.tokens();
        let (next, before) = output.split_last().expect("its prompt has chosen one");
        let resumed = ResumedSequence {
            key: key as u64,
            spec: one.job.spec(before),
            next: *next,
            blocks,
            constraint: one.job.rule.map(|rule| rule.after(&output)),
        };
        let taken = self.engine.resume(resumed);
        taken.unwrap_or_else(|refusal| panic!("{}: {key} is refused: {refusal}", self.name));
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Begun { .. } => self.lent.seen().streamed += 1,
            Event::Computed { .. } => {}
            Event::Prefilled {
                key,
                blocks,
                sampled,
                finish,
                cached_tokens,
                prompt_logprobs,
                ..
            } => {
                self.lent.seen().shared += usize::from(cached_tokens > 0);
                let until = self.step + self.underway[key as usize].job.leased;
                let one = self.receive(key, sampled, finish.map(End::Finished));
                one.found
                    .prompt_logprobs
                    .extend(prompt_logprobs.unwrap_or_default());
                if finish.is_none() {
                    one.phase = Phase::Leased(blocks, until);
                }
            }
            Event::Token {
                key,
                index,
                sampled,
                finish,
            } => {
                let one = self.receive(key, sampled, finish.map(End::Finished));
                assert_eq!(one.found.sampled.len(), index as usize + 1, "{key}: a gap");
            }
            Event::Failed { key, .. } => {
                let one = &mut self.underway[key as usize];
                one.found.end = Some(End::Failed);
                one.phase = Phase::Over;
            }
            Event::Refused { key, detail } => {
                panic!("{}: a step of {key} is refused: {detail}", self.name)
            }
            Event::Preempted { key } => {
                self.lent.seen().preempted += 1;
                self.begin(key as usize);
            }
        }
    }

    /// Adds a token to a request's text, which may end with it.
    fn receive(&mut self, key: u64, sampled: Sampled, end: Option<End>) -> &mut Underway {
        let one = &mut self.underway[key as usize];
        assert!(matches!(one.phase, Phase::Inside), "{}: {key}", self.name);
        one.found.sampled.push(sampled);
        if end.is_some() {
            one.found.end = end;
            one.phase = Phase::Over;
        }
        one
    }
}
