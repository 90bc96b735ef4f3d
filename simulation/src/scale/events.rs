//! A run: what happens next, and what API servers and workers do then.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant as Clock};

use baton_api_server::fuzzing::{Constraints, FirstToken, Fleet, Outstanding};
use baton_protocol::deadlines::{BEAT_INTERVAL_MS, DECODE_WAIT_MAX_MS};
use baton_protocol::{Service, Tier, WorkerId};
use tokio::time::Instant;

use super::cluster::Cluster;
use super::report::{Choices, Report, Watch};
use super::worker::{Ended, Number, Worker};
use super::{Arrival, Defect, Load, Scale};
use crate::dice::Dice;

/// Nanoseconds from the beginning.
type Time = u64;

const SECOND: Time = 1_000_000_000;
const BEAT: Time = BEAT_INTERVAL_MS * 1_000_000;

/// A request waits for a place on a decode worker no longer than this part of the time of its tokens, as with the API server's driver.
const ITL_WAIT_DIVISOR: u64 = 20;

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// All workers are looked at.
    Look,
    /// A worker beats.
    Beat(u32),
    /// Something ends on a worker, if nothing has changed there since this version.
    Ends(u32, u32),
    /// KV has come to a worker.
    Pulled(Number),
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Under {
    arrived: Time,
    first: Time,
    api_server: u32,
    context: u32,
    decode: u32,
    prompt_tokens: u32,
    output_tokens: u32,
    max_tokens: u32,
    /// What is counted of it on the worker where it is.
    job: Outstanding,
    /// How long the choices of its first half took.
    chosen_in: Duration,
}

/// A run under way.
pub struct Run<'a> {
    scale: &'a Scale,
    cluster: Cluster,
    dice: Dice,
    begun: Instant,
    fleets: Vec<Fleet>,
    workers: Vec<Worker>,
    under: Vec<Under>,
    /// Places of `under` that nobody has.
    free: Vec<Number>,
    events: BinaryHeap<Reverse<(Time, u64, Event)>>,
    /// Events so far: of those at the same time the first comes first.
    order: u64,
    watch: Watch,
    report: Report,
    choices: Choices,
}

impl<'a> Run<'a> {
    pub fn new(scale: &'a Scale, load: &Load, dice: Dice) -> Self {
        let (cluster, begun) = (Cluster::new(scale), Instant::now());
        let worker = Worker::new(scale.cost.clone(), scale.itl_ms, scale.step_tokens);
        Self {
            fleets: cluster.fleets(scale, begun),
            cluster,
            scale,
            dice,
            begun,
            workers: vec![worker; scale.workers],
            under: Vec::new(),
            free: Vec::new(),
            events: BinaryHeap::new(),
            order: 0,
            watch: Watch::new(scale.workers),
            report: Report::new(scale.workers, load),
            choices: Choices::default(),
        }
    }

    pub fn go(mut self, arrivals: impl Iterator<Item = Arrival>) -> (Report, Choices) {
        let mut arrivals = arrivals.peekable();
        for worker in 0..self.workers.len() {
            let at = self.dice.range(0..BEAT);
            self.later(at, Event::Beat(worker as u32));
        }
        self.later(SECOND, Event::Look);
        loop {
            let next = self.events.peek().map(|Reverse((at, ..))| *at);
            let comes_first =
                |arrival: &Arrival| next.is_none_or(|next| nanoseconds(arrival.at) <= next);
            if let Some(arrival) = arrivals.next_if(comes_first) {
                self.arrives(nanoseconds(arrival.at), arrival);
                continue;
            }
            let is_over = arrivals.peek().is_none() && self.under.len() == self.free.len();
            match self.events.pop() {
                Some(Reverse((at, _, event))) if !is_over => self.happens(at, event),
                _ => return (self.report, self.choices),
            }
        }
    }

    fn later(&mut self, at: Time, event: Event) {
        self.order += 1;
        self.events.push(Reverse((at, self.order, event)));
    }

    fn instant(&self, at: Time) -> Instant {
        self.begun + Duration::from_nanos(at)
    }

    fn happens(&mut self, at: Time, event: Event) {
        match event {
            Event::Look => {
                let busy = self.workers.iter().map(Worker::busy);
                self.report.seconds.push(self.watch.look(busy));
                self.later(at + SECOND, Event::Look);
            }
            Event::Beat(worker) => self.beats(at, worker as usize),
            Event::Ends(worker, version) => {
                if self.workers[worker as usize].version == version {
                    self.ends(at, worker as usize);
                }
            }
            Event::Pulled(number) => self.pulled(at, number),
        }
    }

    fn beats(&mut self, at: Time, worker: usize) {
        self.workers[worker].go_on(seconds(at));
        let now = self.instant(at);
        let beat = &mut self.cluster.beats[worker];
        beat.load = self.workers[worker].load();
        for fleet in &mut self.fleets {
            fleet.beat(beat.clone(), now);
        }
        self.later(at + BEAT, Event::Beat(worker as u32));
    }

    /// Does what a driver does with a request that comes: it is refused where it cannot be served in time, or its prompt is placed.
    fn arrives(&mut self, at: Time, arrival: Arrival) {
        self.report.requests += 1;
        let api_server = self.dice.range(0..self.fleets.len() as u64) as usize;
        let (now, service) = (self.instant(at), self.service());
        let tokens = arrival.prompt_tokens as usize;
        let max_tokens = arrival.max_tokens as usize;
        let model = &self.cluster.model;
        let fleet = &mut self.fleets[api_server];

        let begun = Clock::now();
        let wait = fleet.decode_wait(model, service, now, (tokens, max_tokens));
        let waited = begun.elapsed();
        self.choices.wait.note(waited);
        let wait_max = u64::from(self.scale.itl_ms) * (max_tokens as u64 - 1) / ITL_WAIT_DIVISOR;
        if wait > Duration::from_millis(wait_max.min(DECODE_WAIT_MAX_MS)) {
            self.report.refused += 1;
            return;
        }
        let rules = Constraints {
            model,
            refused: &[],
            failed: &[],
            service,
            max_tokens,
            now,
        };
        let begun = Clock::now();
        let chosen = fleet.choose_context(rules, tokens, &[]);
        let placed = begun.elapsed();
        let chosen = chosen.map(|(target, _)| target);
        let first = chosen.as_ref().and_then(|target| {
            fleet.first_token(&target.worker, Tier::Interactive, tokens, &[], None)
        });
        let chosen_in = waited + begun.elapsed();
        self.choices.context.note(placed);
        let promised = Duration::from_millis(self.scale.ttft_ms.into());
        let is_late = |first: FirstToken| first.expected > promised.max(first.alone * 3 / 2);
        let Some(target) = chosen.filter(|_| !first.is_some_and(is_late)) else {
            self.report.refused += 1;
            return;
        };
        let context = self.cluster.number(&target);
        let job = Outstanding {
            prefills: 1,
            prefill_tokens: tokens,
            ..Outstanding::default()
        };
        self.begin(api_server, context, job);
        self.report.prompt_tokens[context] += tokens as u64;
        let number = self.take_in(Under {
            arrived: at,
            first: 0,
            api_server: api_server as u32,
            context: context as u32,
            decode: 0,
            prompt_tokens: arrival.prompt_tokens,
            output_tokens: arrival.output_tokens,
            max_tokens: arrival.max_tokens,
            job,
            chosen_in,
        });
        self.workers[context].go_on(seconds(at));
        self.workers[context].run(number, tokens);
        self.settle(context);
    }

    fn service(&self) -> Service {
        Service {
            itl_ms: Some(self.scale.itl_ms),
            ..Service::default()
        }
    }

    fn take_in(&mut self, under: Under) -> Number {
        match self.free.pop() {
            Some(number) => {
                self.under[number as usize] = under;
                number
            }
            None => {
                self.under.push(under);
                (self.under.len() - 1) as Number
            }
        }
    }

    /// An API server counts this job on a worker.
    fn begin(&mut self, api_server: usize, worker: usize, job: Outstanding) {
        if let Some((fleet, name)) = self.counting(api_server, worker) {
            fleet.begin(name, job);
        }
    }

    /// It counts it no more.
    fn end(&mut self, api_server: usize, worker: usize, job: Outstanding) {
        if let Some((fleet, name)) = self.counting(api_server, worker) {
            fleet.end(name, job);
        }
    }

    fn counting(&mut self, api_server: usize, worker: usize) -> Option<(&mut Fleet, &WorkerId)> {
        let counts = self.scale.defect != Some(Defect::CountsNothing);
        counts.then(|| (&mut self.fleets[api_server], &self.cluster.names[worker]))
    }

    /// Something has changed on a worker: when something ends there from now on.
    fn settle(&mut self, worker: usize) {
        let of = &mut self.workers[worker];
        of.settle();
        let version = of.version;
        if let Some(next) = of.next() {
            let at = (next * SECOND as f64).ceil() as Time + 1;
            self.later(at, Event::Ends(worker as u32, version));
        }
    }

    fn ends(&mut self, at: Time, worker: usize) {
        self.workers[worker].go_on(seconds(at));
        let under = &self.under;
        let tokens_of = |number: Number| {
            let of = &under[number as usize];
            (u64::from(of.prompt_tokens), u64::from(of.output_tokens) - 1)
        };
        let mut ended = Vec::new();
        while let Some(one) = self.workers[worker].ended(tokens_of) {
            ended.push(one);
        }
        for one in ended {
            match one {
                Ended::Prompt(number) => self.prompt_ends(at, number),
                Ended::Generation(number) => self.generation_ends(at, number),
            }
        }
        self.settle(worker);
    }

    /// A prompt has its first token: its generation is placed.
    fn prompt_ends(&mut self, at: Time, number: Number) {
        let mut under = self.under[number as usize];
        under.first = at;
        let (api_server, context) = (under.api_server as usize, under.context as usize);
        self.end(api_server, context, under.job);
        let (tokens, max_tokens) = (under.prompt_tokens as usize, under.max_tokens as usize);
        let rules = Constraints {
            model: &self.cluster.model,
            refused: &[],
            failed: &[],
            service: self.service(),
            max_tokens,
            now: self.instant(at),
        };
        let handle = &mut self.cluster.handle;
        handle.worker.clone_from(&self.cluster.names[context]);
        handle.valid_tokens = under.prompt_tokens;
        let fleet = &mut self.fleets[api_server];
        let begun = Clock::now();
        let chosen = fleet.choose_decode(rules, handle, &[]);
        let took = begun.elapsed();
        self.choices.decode.note(took);
        self.choices.request.note(under.chosen_in + took);

        // All serve and read from all, so there is always one.
        let decode = chosen.map_or(context, |target| self.cluster.number(&target));
        let moves = decode != context;
        under.decode = decode as u32;
        under.job = Outstanding {
            decodes: 1,
            decode_tokens: self.fleets[api_server].lifetime_tokens(tokens, max_tokens),
            pulls: usize::from(moves),
            pull_tokens: if moves { tokens } else { 0 },
            ..Outstanding::default()
        };
        self.begin(api_server, decode, under.job);
        self.under[number as usize] = under;
        if !moves {
            return self.generates(at, number);
        }
        self.report.moved += 1;
        let bytes = tokens as f64 * f64::from(self.scale.kv_token_bytes);
        let takes = bytes / (f64::from(self.scale.link) * 1e9);
        // Both links take it, when both are free.
        let free = self.workers[context].sends_until;
        let free = free.max(self.workers[decode].reads_until);
        let there = free.max(seconds(at)) + takes;
        self.workers[context].sends_until = there;
        self.workers[context].leased += 1;
        self.workers[decode].reads_until = there;
        self.workers[decode].pulling += 1;
        self.later(nanoseconds(there), Event::Pulled(number));
    }

    /// All KV is there.
    fn pulled(&mut self, at: Time, number: Number) {
        let under = self.under[number as usize];
        self.workers[under.context as usize].leased -= 1;
        self.workers[under.decode as usize].pulling -= 1;
        let pull = Outstanding {
            pulls: under.job.pulls,
            pull_tokens: under.job.pull_tokens,
            ..Outstanding::default()
        };
        self.end(under.api_server as usize, under.decode as usize, pull);
        let job = &mut self.under[number as usize].job;
        (job.pulls, job.pull_tokens) = (0, 0);
        self.generates(at, number);
    }

    fn generates(&mut self, at: Time, number: Number) {
        let Under {
            decode,
            prompt_tokens,
            output_tokens,
            ..
        } = self.under[number as usize];
        let worker = decode as usize;
        self.workers[worker].go_on(seconds(at));
        let output = u64::from(output_tokens) - 1;
        self.workers[worker].generate(number, prompt_tokens.into(), output);
        self.settle(worker);
    }

    fn generation_ends(&mut self, at: Time, number: Number) {
        let under = self.under[number as usize];
        let api_server = under.api_server as usize;
        self.end(api_server, under.decode as usize, under.job);
        let [prompt, output] = [under.prompt_tokens, under.output_tokens].map(|n| n as usize);
        self.fleets[api_server].answered(prompt, output);
        self.report.output_tokens[under.decode as usize] += u64::from(under.output_tokens);
        self.free.push(number);
        let ttft = under.first - under.arrived;
        let itl = (at - under.first) / u64::from(under.output_tokens - 1);
        let late = [(ttft, self.scale.ttft_ms), (itl, self.scale.itl_ms)];
        let late = late.map(|(took, promised_ms)| took > u64::from(promised_ms) * 1_000_000);
        self.report.met += u64::from(late == [false, false]);
        for (sum, late) in self.report.late.iter_mut().zip(late) {
            *sum += u64::from(late);
        }
    }
}

fn seconds(at: Time) -> f64 {
    at as f64 / SECOND as f64
}

fn nanoseconds(at: f64) -> Time {
    (at * SECOND as f64).ceil() as Time
}
