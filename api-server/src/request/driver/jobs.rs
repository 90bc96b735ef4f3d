//! Which worker a generation goes to next, and the job that it is sent.

use std::time::Duration;

use baton_protocol::deadlines::{CONTROL_TIMEOUT_MS, DECODE_WAIT_MAX_MS};
use baton_protocol::{DecodeJob, PROTOCOL_VERSION, PackedTokens, PrefillJob, SequenceSpec};
use tokio::time::Instant;

use super::placed::Placed;
use super::silence::Silence;
use super::{Driver, Sink};
use crate::fleet::router::{Constraints, Outstanding};
use crate::request::lifecycle::{Input, Phase, Target};

/// A prompt that would wait longer than this for a decode worker is not begun.
const DECODE_WAIT_MAX: Duration = Duration::from_millis(DECODE_WAIT_MAX_MS);

impl<S: Sink> Driver<S> {
    /// Whether the decode workers have more to do than they can take in time, and the client was promised nothing yet.
    pub(super) fn overbooked(&self) -> Option<Input> {
        if !self.lifecycle.output().is_empty() || self.job.generation.max_tokens == 1 {
            return None;
        }
        let model = &self.server.model.fingerprint;
        let (now, prompt_tokens) = (Instant::now(), self.job.prompt.len());
        let wait = self.server.fleet().decode_wait(model, now, prompt_tokens);
        let wait_max = DECODE_WAIT_MAX.min(self.remaining());
        (wait > wait_max).then(|| Input::Overbooked {
            wait,
            retry_after: wait - wait_max,
        })
    }

    /// Counts what is staged and waits for a decode worker.
    pub(super) fn staged(&self) -> Option<Placed> {
        let Phase::Staged { handle } = self.lifecycle.phase() else {
            return None;
        };
        let holder = Target {
            worker: handle.worker.clone(),
            incarnation: handle.incarnation,
        };
        let staged = Outstanding {
            staged: 1,
            ..Outstanding::default()
        };
        Some(Placed::new(&self.server, &holder, staged))
    }

    pub(super) fn choose_context(&self) -> Option<Target> {
        if !self.server.has_its_name() {
            return None;
        }
        let rules = self.constraints();
        let prompt_tokens = self.job.prompt.len() + self.lifecycle.output().len();
        self.server
            .fleet()
            .choose_context(rules, prompt_tokens, &self.job.chain)
    }

    pub(super) fn choose_decode(&self) -> Option<Target> {
        let handle = self.lifecycle.handle()?;
        let rules = self.constraints();
        self.server.fleet().choose_decode(rules, handle)
    }

    fn constraints(&self) -> Constraints<'_> {
        Constraints {
            model: &self.server.model.fingerprint,
            refused: self.lifecycle.refused(),
            failed: self.lifecycle.failed(),
            now: Instant::now(),
        }
    }

    pub(super) fn send_prefill(&mut self, context: Target) {
        let job = PrefillJob {
            v: PROTOCOL_VERSION,
            request: self.job.request,
            api_server: self.server.name.clone(),
            api_incarnation: Some(self.server.incarnation),
            budget_ms: self.budget_ms(),
            model: self.server.model.fingerprint.clone(),
            sequence: self.sequence(),
            prompt_logprobs: self
                .job
                .prompt_logprobs
                .filter(|_| self.lifecycle.output().is_empty()),
        };
        let tokens = job.sequence.tokens.0.len();
        let outstanding = Outstanding {
            prefills: 1,
            prefill_tokens: tokens,
            ..Outstanding::default()
        };
        self.placed = Some(Placed::new(&self.server, &context, outstanding));
        // A second more than the deadline, which ends the wait.
        let timeout = self.remaining() + Duration::from_secs(1);
        let bus = self.server.bus.clone();
        self.reply = Some(Box::pin(async move {
            Input::Prefill(bus.prefill(&context, &job, timeout).await)
        }));
    }

    pub(super) fn send_decode(&mut self, decode: Target, attempt: u32) {
        let Some(handle) = self.lifecycle.handle().cloned() else {
            return;
        };
        let job = DecodeJob {
            v: PROTOCOL_VERSION,
            request: self.job.request,
            api_server: self.server.name.clone(),
            api_incarnation: Some(self.server.incarnation),
            attempt,
            budget_ms: self.budget_ms(),
            sequence: self.sequence(),
            handle,
        };
        let outstanding = Outstanding {
            decodes: 1,
            ..Outstanding::default()
        };
        self.placed = Some(Placed::new(&self.server, &decode, outstanding));
        self.silence = Silence::new(Instant::now());
        let bus = self.server.bus.clone();
        let timeout = Duration::from_millis(CONTROL_TIMEOUT_MS);
        self.reply = Some(Box::pin(async move {
            Input::Decode(bus.decode(&decode, &job, timeout).await)
        }));
    }

    /// The sequence as the context worker gets it, or got it.
    fn sequence(&self) -> SequenceSpec {
        let output = self.lifecycle.prefilled_output();
        let mut tokens = Vec::with_capacity(self.job.prompt.len() + output.len());
        tokens.extend_from_slice(&self.job.prompt);
        tokens.extend_from_slice(output);
        SequenceSpec {
            tokens: PackedTokens(tokens),
            prompt_tokens: self.job.prompt.len() as u32,
            generation: self.job.generation.clone(),
            cache_salt: self.job.cache_salt,
            service: baton_protocol::Service::default(),
        }
    }

    pub(super) fn remaining(&self) -> Duration {
        self.job.deadline.saturating_duration_since(Instant::now())
    }

    fn budget_ms(&self) -> u32 {
        u32::try_from(self.remaining().as_millis()).unwrap_or(u32::MAX)
    }
}
