//! What happened in a run: a hash of all of it, and, if wanted, sentences.

use std::fmt;

use tokio::time::Instant;

use crate::dice::mix;

/// The record of one run.
#[derive(Debug)]
pub struct Trace {
    begun: Instant,
    hash: u64,
    events: u64,
    /// `None`: nobody will read them.
    lines: Option<Vec<String>>,
}

impl Trace {
    /// Begins now. Sentences are kept if `told`.
    pub fn new(told: bool) -> Self {
        Self {
            begun: Instant::now(),
            hash: 0,
            events: 0,
            lines: told.then(Vec::new),
        }
    }

    /// Something happened: numbers that tell what, and a sentence for people.
    pub fn note(&mut self, numbers: [u64; 4], sentence: fmt::Arguments<'_>) {
        let micros = self.begun.elapsed().as_micros() as u64;
        self.events += 1;
        for number in [micros].into_iter().chain(numbers) {
            self.hash = mix(self.hash ^ number).rotate_left(5);
        }
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{:>10.3} ms  {sentence}", micros as f64 / 1e3));
        }
    }

    /// Equal for runs in which the same happened at the same times.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How much happened.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The sentences.
    pub fn take_lines(&mut self) -> Vec<String> {
        self.lines.take().unwrap_or_default()
    }
}
