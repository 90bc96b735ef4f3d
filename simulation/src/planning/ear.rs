//! A client that notes when it hears something.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use baton_api_server::{ApiError, ErrorKind, Sink};
use baton_protocol::{FinishReason, TokenLogprobs};
use tokio::time::Instant;

/// What came of one request. Times are from its arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// When its first token came.
    pub first: Option<Duration>,
    /// When its last token came.
    pub last: Option<Duration>,
    /// How many came.
    pub tokens: u32,
    /// How it ended.
    pub ended: Option<Ended>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With all its tokens.
    Whole,
    /// It was refused: 503 and a Retry-After.
    Refused,
    /// It failed, and why in one word.
    Failed(&'static str),
}

impl Answer {
    /// Mean time between its tokens; none of one token alone.
    pub fn itl(&self) -> Option<Duration> {
        let (first, last) = (self.first?, self.last?);
        match self.tokens {
            0 | 1 => None,
            tokens => Some((last - first) / (tokens - 1)),
        }
    }

    /// Whether it got all its tokens within these times.
    pub fn is_within(&self, ttft: Option<Duration>, itl: Option<Duration>) -> bool {
        let keeps = |most: Option<Duration>, took: Option<Duration>| {
            most.is_none_or(|most| took.unwrap_or_default() <= most)
        };
        self.ended == Some(Ended::Whole) && keeps(ttft, self.first) && keeps(itl, self.itl())
    }
}

/// It reads at once whatever comes.
pub struct Ear {
    begun: Instant,
    answer: Rc<RefCell<Answer>>,
}

impl Ear {
    /// Of a request that arrives now.
    pub fn new(answer: Rc<RefCell<Answer>>) -> Self {
        let begun = Instant::now();
        Self { begun, answer }
    }
}

impl Sink for Ear {
    fn prompt(&mut self, _: u32, _: Option<Vec<TokenLogprobs>>) {}

    fn tokens(&mut self, tokens: &[u32], _: Vec<TokenLogprobs>, _: bool) -> bool {
        let now = self.begun.elapsed();
        let mut answer = self.answer.borrow_mut();
        answer.first.get_or_insert(now);
        answer.last = Some(now);
        answer.tokens += tokens.len() as u32;
        false
    }

    fn flush(&mut self) {}

    fn has_room(&self) -> bool {
        true
    }

    async fn room(&self) {}

    fn end(&mut self, end: Result<FinishReason, ApiError>) {
        let ended = match end {
            Ok(_) => Ended::Whole,
            Err(error) if error.kind == ErrorKind::Busy => Ended::Refused,
            Err(error) => Ended::Failed(error.kind.row().label),
        };
        self.answer.borrow_mut().ended = Some(ended);
    }
}
