//! Clients: what they ask, what they must hear, and what they heard.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use baton_api_server::{ApiError, ErrorKind, Sink};
use baton_engine::{
    Engine, EngineConfig, Event, FakeConfig, FakeExecutor, NewSequence, ResumedSequence,
};
use baton_protocol::{
    CacheSalt, FinishReason, Generation, PackedTokens, Sampling, SequenceSpec, TokenLogprobs,
};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::dice::Dice;
use crate::faults::classes::Asked;

/// Token ids are below this.
pub const VOCAB: u32 = 500;

/// One request of one client.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The rules.
    pub generation: Generation,
    /// Time it may take.
    pub budget: Duration,
    /// The client leaves after this.
    pub leaves_after: Option<Duration>,
    /// A stop string ends the text with this many tokens.
    pub stop_after: Option<usize>,
    /// It reads this many tokens and then pauses, again and again.
    pub reads: Option<(usize, Duration)>,
    /// How it asks to be served, where anything is promised.
    pub asked: Option<Asked>,
}

impl Ask {
    /// Any request whose prompt has at most so many tokens.
    pub fn draw(dice: &mut Dice, prompt_max: u64, output_max: u64) -> Self {
        // Families of prompts that begin alike.
        let family = dice.range(0..4) as u32;
        let shared = dice.range(0..prompt_max) as u32 / 2;
        let own = dice.range(1..prompt_max / 2 + 1) as u32;
        let salt = dice.range(0..1 << 20) as u32;
        let prompt = (0..shared)
            .map(|i| (family * 97 + i * 31) % VOCAB)
            .chain((0..own).map(|i| (salt + i * i) % VOCAB))
            .collect();
        let stops = dice.pick(&[0, 0, 10, 60]);
        let first = dice.range(0..u64::from(VOCAB)) as u32;
        let millis = |dice: &mut Dice, max: u64| Duration::from_millis(dice.range(1..max));
        Self {
            prompt,
            generation: Generation {
                sampling: Sampling {
                    temperature: dice.pick(&[0.0, 0.7]),
                    seed: dice.range(0..5),
                    // It changes no token here, and how far ahead steps are planned.
                    presence_penalty: dice.pick(&[0.0, 0.0, 0.5]),
                    logprobs: dice.pick(&[None, None, Some(1)]),
                    ..Sampling::default()
                },
                stop_token_ids: (0..stops).map(|i| (first + i) % VOCAB).collect(),
                min_tokens: dice.pick(&[0, 0, 3]),
                max_tokens: dice.range(1..output_max) as u32,
                grammar: None,
                token_rules: None,
            },
            budget: Duration::from_millis(dice.pick(&[1_500, 8_000, 20_000, 60_000])),
            leaves_after: dice.chance(120).then(|| millis(dice, 3_000)),
            stop_after: dice.chance(100).then(|| dice.range(1..output_max) as usize),
            reads: dice
                .chance(80)
                .then(|| (dice.range(1..8) as usize, millis(dice, 1_500))),
            asked: None,
        }
    }

    /// One of two tenants asks: the one whose numbers are drawn low has no salt.
    pub fn cache_salt(&self) -> CacheSalt {
        CacheSalt(u128::from(self.generation.sampling.seed / 3))
    }

    /// The text it has alone, on an engine with room for everything, and how that ends.
    pub fn expected(&self, block_tokens: u32, tokens_max: u32) -> (Vec<u32>, FinishReason) {
        let spec = SequenceSpec {
            tokens: PackedTokens(self.prompt.clone()),
            prompt_tokens: self.prompt.len() as u32,
            generation: self.generation.clone(),
            cache_salt: self.cache_salt(),
            service: baton_protocol::Service::default(),
        };
        let (mut tokens, mut finish) = alone(spec, block_tokens, tokens_max);
        if let Some(stop) = self.stop_after.filter(|stop| *stop <= tokens.len()) {
            tokens.truncate(stop);
            finish = FinishReason::Stop;
        }
        (tokens, finish)
    }
}

fn alone(spec: SequenceSpec, block_tokens: u32, tokens_max: u32) -> (Vec<u32>, FinishReason) {
    let mut fake = FakeConfig {
        blocks: tokens_max,
        vocab: VOCAB,
        tokens_max,
        ..FakeConfig::default()
    };
    fake.kv.block_tokens = block_tokens;
    let config = EngineConfig {
        step_tokens_max: 4096,
        sequences_max: 1,
        queue_max: 1,
        prefix_cache: false,
    };
    let mut engine = Engine::new(Box::new(FakeExecutor::new(fake)), config);
    let prompt = NewSequence {
        key: 0,
        spec: spec.clone(),
        prompt_logprobs: None,
        constraint: None,
        stream: false,
    };
    engine.submit(prompt).expect("it fits");
    let mut output = Vec::new();
    loop {
        for event in engine.step().expect("the fake does not break") {
            let finished = match event {
                Event::Prefilled {
                    blocks,
                    sampled,
                    finish,
                    ..
                } => {
                    output.push(sampled.token);
                    if finish.is_none() {
                        let resumed = ResumedSequence {
                            key: 0,
                            spec: spec.clone(),
                            next: sampled.token,
                            blocks,
                            constraint: None,
                        };
                        engine.resume(resumed).expect("it fits");
                    }
                    finish
                }
                Event::Token {
                    sampled, finish, ..
                } => {
                    output.push(sampled.token);
                    finish
                }
                Event::Failed { .. } | Event::Refused { .. } | Event::Preempted { .. } => {
                    unreachable!("it is alone")
                }
                Event::Begun { .. } | Event::Computed { .. } => None,
            };
            if let Some(finish) = finished {
                return (output, finish);
            }
        }
    }
}

/// What a client heard.
#[derive(Debug, Default)]
pub struct Heard {
    /// Tokens.
    pub tokens: usize,
    /// How it ended, and when.
    pub end: Option<(Instant, Result<FinishReason, ErrorKind>)>,
    /// What must not be, in words.
    pub wrong: Option<String>,
    prompts: u32,
}

/// A client's ear: what it heard is compared at once with what it must hear.
pub struct Ear {
    ask: Ask,
    expected: Vec<u32>,
    finish: FinishReason,
    heard: Rc<RefCell<Heard>>,
    full: Rc<Full>,
}

/// Whether the client has left its stream full.
#[derive(Default)]
struct Full {
    is: Cell<bool>,
    room: Notify,
}

impl Ear {
    /// For this request. What it hears is told in the second.
    pub fn new(ask: Ask, block_tokens: u32, tokens_max: u32) -> (Self, Rc<RefCell<Heard>>) {
        let (expected, finish) = ask.expected(block_tokens, tokens_max);
        let heard = Rc::<RefCell<Heard>>::default();
        let ear = Self {
            ask,
            expected,
            finish,
            heard: Rc::clone(&heard),
            full: Rc::default(),
        };
        (ear, heard)
    }

    fn wrong(&self, what: String) {
        self.heard.borrow_mut().wrong.get_or_insert(what);
    }
}

impl Sink for Ear {
    fn prompt(&mut self, cached_tokens: u32, _: Option<Vec<TokenLogprobs>>) {
        self.heard.borrow_mut().prompts += 1;
        if self.heard.borrow().prompts > 1 {
            self.wrong("the prompt was reported twice".to_owned());
        }
        if cached_tokens as usize >= self.ask.prompt.len() {
            self.wrong(format!("{cached_tokens} tokens of the prompt were cached"));
        }
    }

    fn tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, _: bool) -> bool {
        let before = self.heard.borrow().tokens;
        let wanted = self.ask.generation.sampling.logprobs.is_some();
        if logprobs.len() != if wanted { tokens.len() } else { 0 } {
            let (have, of) = (logprobs.len(), tokens.len());
            self.wrong(format!("{have} log-probabilities of {of} tokens"));
        }
        for (i, token) in (before..).zip(tokens) {
            // What comes in one piece with the end of a stop string is not shown.
            if self.ask.stop_after == Some(i) {
                break;
            }
            match self.expected.get(i) {
                Some(expected) if expected == token => {}
                other => self.wrong(format!("token {i} is {token}, expected {other:?}")),
            }
            self.heard.borrow_mut().tokens += 1;
        }
        if let Some((count, pause)) = self.ask.reads
            && (before + tokens.len()) / count > before / count
        {
            self.full.is.set(true);
            let full = Rc::clone(&self.full);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(pause).await;
                full.is.set(false);
                full.room.notify_waiters();
            });
        }
        let heard = self.heard.borrow().tokens;
        self.ask.stop_after.is_some_and(|stop| heard >= stop)
    }

    fn flush(&mut self) {}

    fn has_room(&self) -> bool {
        !self.full.is.get()
    }

    async fn room(&self) {
        while self.full.is.get() {
            self.full.room.notified().await;
        }
    }

    fn end(&mut self, end: Result<FinishReason, ApiError>) {
        let twice = self.heard.borrow().end.is_some();
        if twice {
            self.wrong("it ended twice".to_owned());
        }
        if let Ok(finish) = &end {
            let (heard, all) = (self.heard.borrow().tokens, self.expected.len());
            if heard != all || *finish != self.finish {
                let right = self.finish;
                self.wrong(format!(
                    "it ended with {finish:?} after {heard} tokens; right is {right:?} after {all}"
                ));
            }
        }
        let end = end.map_err(|error| error.kind);
        self.heard.borrow_mut().end = Some((Instant::now(), end));
    }
}
