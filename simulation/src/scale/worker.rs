//! A worker by event: prompts one after the other, and generations that all have their next token when a step ends.
//!
//! Between two events of a worker nothing changes but how far all of it is, so it goes on at a rate: a step's tokens of a prompt, and one token of each
//! generation, in the time that such a step costs.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use baton_protocol::{ITL_PART, Load, StepCost, StepShape};

use super::BLOCK_TOKENS;

/// Tokens before those of a prompt's chunk, where one has to be assumed.
const CONTEXT: u64 = 512;

/// One request, by its place in the list of all that are under way.
pub type Number = u32;

/// A prompt that waits or runs.
#[derive(Clone, Copy, Debug)]
struct Prompt {
    number: Number,
    left: f64,
}

/// What ended on a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Prompt(Number),
    Generation(Number),
}

/// What a worker has to do, for whoever looks at all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Prompts that wait or run.
    pub prompts: u32,
    /// Sequences that generate.
    pub generations: u32,
}

/// A worker that does both.
#[derive(Clone, Debug)]
pub struct Worker {
    cost: StepCost,
    /// Longest step beside sequences that generate.
    limit_us: f32,
    /// Most tokens of a step, and those of a step without sequences that generate.
    step_tokens: u64,
    alone_tokens: u64,
    prompts: VecDeque<Prompt>,
    /// By how many tokens each will have when it ends, counted from the worker's first.
    generations: BinaryHeap<Reverse<(u64, Number)>>,
    /// Tokens that one which generates from the beginning would have.
    clock: f64,
    /// Until when it is as far as it says, in seconds.
    now: f64,
    /// Tokens of KV of those that generate, when they came, less what the clock was then.
    kv_tokens: f64,
    /// KV on its way here, and from here.
    pub pulling: u32,
    pub leased: u32,
    /// When the link is free again in each direction, in seconds.
    pub reads_until: f64,
    pub sends_until: f64,
    /// Counts changes: an event that was foreseen before the last one does not come about.
    pub version: u32,
    rates: Rates,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    /// Tokens of the first prompt in a second.
    prompt: f64,
    /// Tokens of each generation in a second.
    token: f64,
}

impl Worker {
    /// One that has nothing to do, whose steps keep sequences to this time between tokens.
    pub fn new(cost: StepCost, itl_ms: u32, step_tokens: u32) -> Self {
        Self {
            limit_us: itl_ms as f32 * 1e3 * ITL_PART,
            step_tokens: step_tokens.into(),
            alone_tokens: cost.efficient_tokens(step_tokens.into()),
            cost,
            prompts: VecDeque::new(),
            generations: BinaryHeap::new(),
            clock: 0.0,
            now: 0.0,
            kv_tokens: 0.0,
            pulling: 0,
            leased: 0,
            reads_until: 0.0,
            sends_until: 0.0,
            version: 0,
            rates: Rates::default(),
        }
    }

    /// Goes on to this time. Whoever changes something does this first, and says then that it has changed ([`Self::settle`]).
    pub fn go_on(&mut self, now: f64) {
        let seconds = (now - self.now).max(0.0);
        self.now = now;
        self.clock += seconds * self.rates.token;
        if let Some(first) = self.prompts.front_mut() {
            first.left -= seconds * self.rates.prompt;
        }
    }

    /// Works out how fast it goes on from here.
    pub fn settle(&mut self) {
        self.version = self.version.wrapping_add(1);
        let rows = self.generations.len() as u64;
        let decoding = StepShape::decode(rows, self.kv_tokens().max(0.0) as u64);
        let tokens = match (rows, self.prompts.is_empty()) {
            (_, true) => 0,
            (0, false) => self.alone_tokens,
            (_, false) => {
                let (limit_us, most) = (self.limit_us, self.step_tokens);
                let fits = self
                    .cost
                    .prompt_tokens_within(limit_us, decoding, CONTEXT, most);
                fits.max(BLOCK_TOKENS.into())
            }
        };
        let step = decoding.and_prompt(tokens, CONTEXT);
        let seconds = f64::from(self.cost.step_us(step)).max(1.0) * 1e-6;
        self.rates = Rates {
            prompt: tokens as f64 / seconds,
            token: match rows {
                0 => 0.0,
                _ => 1.0 / seconds,
            },
        };
    }

    /// When something ends here, as it is now.
    pub fn next(&self) -> Option<f64> {
        let prompt = self
            .prompts
            .front()
            .map(|prompt| prompt.left.max(0.0) / self.rates.prompt);
        let last = self.generations.peek();
        let generation =
            last.map(|Reverse((end, _))| (*end as f64 - self.clock).max(0.0) / self.rates.token);
        let soonest = match (prompt, generation) {
            (Some(prompt), Some(generation)) => prompt.min(generation),
            (one, other) => one.or(other)?,
        };
        Some(self.now + soonest)
    }

    /// Takes away one thing that has ended by now, if there is one. `tokens_of`: tokens of a sequence's prompt, and how many it generates.
    pub fn ended(&mut self, tokens_of: impl Fn(Number) -> (u64, u64)) -> Option<Ended> {
        const NEARLY: f64 = 1e-6;
        if let Some(first) = self.prompts.front()
            && first.left <= NEARLY
        {
            let number = first.number;
            self.prompts.pop_front();
            return Some(Ended::Prompt(number));
        }
        if let Some(Reverse((end, number))) = self.generations.peek().copied()
            && end as f64 <= self.clock + NEARLY
        {
            self.generations.pop();
            let (prompt, output) = tokens_of(number);
            self.kv_tokens -= prompt as f64 - (end - output) as f64;
            if self.generations.is_empty() {
                (self.clock, self.kv_tokens) = (self.clock.fract(), 0.0);
            }
            return Some(Ended::Generation(number));
        }
        None
    }

    /// A prompt comes.
    pub fn run(&mut self, number: Number, tokens: usize) {
        self.prompts.push_back(Prompt {
            number,
            left: tokens as f64,
        });
    }

    /// A sequence begins to generate so many tokens behind its prompt.
    pub fn generate(&mut self, number: Number, prompt: u64, output: u64) {
        let begins = self.clock.ceil() as u64;
        self.kv_tokens += prompt as f64 - begins as f64;
        self.generations.push(Reverse((begins + output, number)));
    }

    fn kv_tokens(&self) -> f64 {
        self.kv_tokens + self.clock * self.generations.len() as f64
    }

    /// What it has to do.
    pub fn busy(&self) -> Busy {
        Busy {
            prompts: self.prompts.len() as u32,
            generations: self.generations.len() as u32,
        }
    }

    /// As its beat says.
    pub fn load(&self) -> Load {
        let decoding = self.generations.len() as u32;
        let left: f64 = self.prompts.iter().map(|prompt| prompt.left.max(0.0)).sum();
        let kv = self.kv_tokens().max(0.0);
        // One prompt runs, the others wait.
        let prompts = self.prompts.len() as u32;
        Load {
            waiting: prompts.saturating_sub(1),
            running: decoding + prompts.min(1),
            waiting_tokens: left as u32,
            decoding,
            decoding_tokens: kv.round() as u64,
            pulling: self.pulling,
            leased: self.leased,
            blocks_used: ((kv + left) / f64::from(BLOCK_TOKENS)) as u32,
            ..Load::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::CostPoint;

    use super::*;

    fn cost() -> StepCost {
        let point = |tokens, us| CostPoint { tokens, us };
        StepCost {
            layers: vec![
                point(1, 10_000.0),
                point(64, 10_000.0),
                point(1_064, 110_000.0),
            ],
            row_us: 0.0,
            kv_token_us: 0.0,
            pair_us: 0.0,
        }
    }

    #[test]
    fn alone_a_request_takes_what_its_steps_cost() {
        let mut worker = Worker::new(cost(), 25, 1_064);
        worker.run(7, 1_064);
        worker.settle();
        let done = worker.next().unwrap();
        assert!((done - 0.11).abs() < 0.02, "{done}");
        worker.go_on(done);
        assert_eq!(worker.ended(|_| (1_064, 0)), Some(Ended::Prompt(7)));
        worker.generate(7, 1_064, 10);
        worker.settle();
        assert_eq!(worker.load().decoding_tokens, 1_064);
        let over = worker.next().unwrap();
        assert!((over - done - 0.1).abs() < 1e-3, "{over}");
        worker.go_on(over);
        assert_eq!(worker.load().decoding_tokens, 1_074);
        assert_eq!(worker.ended(|_| (1_064, 10)), Some(Ended::Generation(7)));
        worker.settle();
        assert_eq!((worker.next(), worker.busy().generations), (None, 0));
    }

    #[test]
    fn beside_generations_a_prompt_has_what_their_time_leaves() {
        let mut worker = Worker::new(cost(), 25, 1_064);
        worker.generate(1, 100, 1_000);
        worker.run(2, 1_064);
        worker.settle();
        // Steps of 23.5 ms: some 198 tokens of the prompt each, one beside them.
        let done = worker.next().unwrap();
        assert!((done - 1_064.0 / 198.0 * 0.0235).abs() < 0.005, "{done}");
        worker.go_on(done);
        let clock = worker.clock;
        assert!((clock - done / 0.0235).abs() < 0.1, "{clock}");
    }
}
