//! Which worker a generation goes to next, and the job that it is sent.

use std::time::Duration;

use baton_protocol::deadlines::{CONTROL_TIMEOUT_MS, DECODE_WAIT_MAX_MS};
use baton_protocol::{
    DecodeJob, KvHandle, PROTOCOL_VERSION, PackedTokens, PrefillJob, Progress, SequenceSpec,
    Service, Tier,
};
use tokio::time::Instant;

use super::placed::Placed;
use super::silence::Silence;
use super::{Driver, Job, Sink};
use crate::bus::PromptReports;
use crate::fleet::router::{Constraints, Outstanding};
use crate::request::lifecycle::{Input, Overbooked, Phase, Target, holder};
use crate::service::{Class, Overload};

/// A prompt that would wait longer than this for a decode worker is not begun.
const DECODE_WAIT_MAX: Duration = Duration::from_millis(DECODE_WAIT_MAX_MS);

/// Part of the time of its tokens that a request with a promised time between them may wait for a place.
const ITL_WAIT_DIVISOR: u32 = 20;

impl<S: Sink> Driver<S> {
    /// Whether the decode workers have more to do than they can take in time, and the client was promised nothing yet. One that may be
    /// served as batch is, if there is a place for it as that.
    pub(super) fn overbooked(&mut self) -> Option<Input> {
        if !self.lifecycle.output().is_empty() || self.job.generation.max_tokens == 1 {
            return None;
        }
        let overbooked = self.overbooked_as(self.job.class)?;
        if !self.may_be_batch() {
            return Some(overbooked);
        }
        let batch = Class {
            tier: Tier::Batch,
            ..self.job.class
        };
        if self.overbooked_as(batch).is_some() {
            return Some(overbooked);
        }
        self.becomes_batch();
        None
    }

    /// Whether a place on a decode worker would come too late for a request of this class.
    fn overbooked_as(&self, class: Class) -> Option<Input> {
        let model = &self.server.model.fingerprint;
        let max_tokens = self.job.generation.max_tokens as usize;
        let tokens = (self.job.prompt.len(), max_tokens);
        let service = class.service(self.job.level);
        let mut fleet = self.server.fleet();
        let wait = fleet.decode_wait(model, service, Instant::now(), tokens);
        drop(fleet);
        let mut wait_max = DECODE_WAIT_MAX.min(self.remaining());
        if let Some(itl_ms) = service.itl_ms {
            // A part of all the time that its tokens may take. Workers take it at once and are beyond their places for so long.
            let tokens = self.job.generation.max_tokens - 1;
            let all = Duration::from_millis(u64::from(itl_ms) * u64::from(tokens));
            wait_max = wait_max.min(all / ITL_WAIT_DIVISOR);
        }
        (wait > wait_max).then(|| Input::Overbooked {
            why: Overbooked::Decode,
            wait,
            retry_after: wait - wait_max,
        })
    }

    /// A context worker for the prompt; or none of them will have its first token in time, and it was promised that.
    pub(super) fn context_chosen(&mut self) -> Input {
        let chosen = self.choose_context();
        let Some(late) = chosen.as_ref().and_then(|target| self.late(target)) else {
            return Input::Chosen(chosen);
        };
        if self.may_be_batch() {
            self.becomes_batch();
            return Input::Chosen(self.choose_context());
        }
        late
    }

    /// Whether it is served as batch rather than refused where it cannot be served in time.
    fn may_be_batch(&self) -> bool {
        let class = self.job.class;
        let overload = self.server.promises.overload;
        overload == Overload::Batch && !class.never_batch && class.tier == Tier::Interactive
    }

    fn becomes_batch(&mut self) {
        self.job.class.tier = Tier::Batch;
        let labels = &[Tier::Interactive.label(), "batched"];
        let metrics = &self.server.metrics;
        metrics.service_level_total.with_label_values(labels).inc();
    }

    /// What is to be told of a request that just came, if its first token would come later than promised from its best worker because of
    /// what is there before it.
    fn late(&self, target: &Target) -> Option<Input> {
        let Job {
            class,
            level,
            arrived,
            ..
        } = &self.job;
        let promised = level.ttft().filter(|_| class.tier == Tier::Interactive)?;
        if !self.lifecycle.is_new() {
            return None;
        }
        let fleet = self.server.fleet();
        let tokens = self.job.prompt.len();
        let first = fleet.first_token(
            &target.worker,
            class.tier,
            tokens,
            &self.job.chain,
            self.source.as_ref(),
        )?;
        drop(fleet);
        // One that would be late on an idle worker too is not refused for that.
        let promised = promised.max(first.alone * 3 / 2);
        let expected = arrived.elapsed() + first.expected;
        (expected > promised).then(|| Input::Overbooked {
            why: Overbooked::Prompt,
            wait: expected,
            retry_after: expected - promised,
        })
    }

    /// As workers are told of it.
    pub(super) fn service(&self) -> Service {
        self.job.class.service(self.job.level)
    }

    /// Counts what is staged and waits for a decode worker.
    pub(super) fn staged(&mut self) -> Option<Placed> {
        let Phase::Staged { handle } = self.lifecycle.phase() else {
            return None;
        };
        let holder = holder(handle);
        if handle.is_streamed() {
            self.count_running(&holder, 1);
            return None;
        }
        let staged = Outstanding {
            staged: 1,
            batch_prompts: self.if_batch(1),
            ..Outstanding::default()
        };
        Some(Placed::new(&self.server, &holder, staged))
    }

    /// Counts a prompt that runs and is streamed: its tokens on its context worker, and as one of those (`prefills`) that will want a
    /// place on a decode worker.
    fn count_running(&mut self, context: &Target, prefills: usize) {
        let tokens = self.job.prompt.len() + self.lifecycle.prefilled_output().len();
        let running = self.prompt_outstanding(prefills, tokens);
        self.running = Some(Placed::new(&self.server, context, running));
    }

    /// So many prompts on a context worker, of so many tokens together.
    fn prompt_outstanding(&self, prefills: usize, prefill_tokens: usize) -> Outstanding {
        Outstanding {
            prefills,
            prefill_tokens,
            batch_tokens: self.if_batch(prefill_tokens),
            batch_prompts: self.if_batch(prefills),
            ..Outstanding::default()
        }
    }

    /// This of a batch request, and nothing of others.
    fn if_batch(&self, count: usize) -> usize {
        match self.job.class.tier {
            Tier::Interactive => 0,
            Tier::Batch => count,
        }
    }

    /// Counts the KV that a decode worker reads from another, until its first token.
    fn count_pull(&mut self, handle: &KvHandle, decode: &Target) {
        if handle.worker == decode.worker {
            return;
        }
        let chain = &self.job.chain;
        let cached = self.server.fleet().cached_tokens(&decode.worker, chain);
        let pull = Outstanding {
            pulls: 1,
            pull_tokens: (handle.valid_tokens as usize).saturating_sub(cached),
            ..Outstanding::default()
        };
        self.pull = Some(Placed::new(&self.server, decode, pull));
    }

    /// Whether a prompt that runs is to be done before this decode worker can have it: it is the one that runs it, or of an earlier
    /// release.
    pub(super) fn must_wait_for_prompt(&self, decode: Option<&Target>) -> bool {
        let (Some(handle), Some(decode)) = (self.lifecycle.handle(), decode) else {
            return false;
        };
        handle.is_streamed()
            && (decode.worker == handle.worker || !self.server.fleet().streams(&decode.worker))
    }

    /// Asks how far a prompt is, where only its end is news.
    pub(super) fn await_prompt(&mut self) {
        let Some(handle) = self.lifecycle.handle() else {
            return;
        };
        let progress = Progress {
            v: PROTOCOL_VERSION,
            request: self.job.request,
            incarnation: handle.incarnation,
            handle: handle.handle,
            nonce: handle.nonce,
            have_tokens: handle.valid_tokens,
        };
        let (bus, context) = (self.server.bus.clone(), holder(handle));
        let timeout = Duration::from_millis(CONTROL_TIMEOUT_MS);
        self.prompt = Some(Box::pin(async move {
            Input::Progress(bus.progress(&context, &progress, timeout).await)
        }));
    }

    pub(super) fn choose_context(&mut self) -> Option<Target> {
        self.source = None;
        if !self.server.has_its_name() {
            return None;
        }
        let rules = self.constraints();
        let prompt_tokens = self.job.prompt.len() + self.lifecycle.output().len();
        let mut fleet = self.server.fleet();
        let chosen = fleet.choose_context(rules, prompt_tokens, &self.job.chain);
        drop(fleet);
        let (target, source) = chosen?;
        self.source = source;
        Some(target)
    }

    pub(super) fn choose_decode(&self) -> Option<Target> {
        let handle = self.lifecycle.handle()?;
        let rules = self.constraints();
        let mut fleet = self.server.fleet();
        fleet.choose_decode(rules, handle, &self.job.chain)
    }

    fn constraints(&self) -> Constraints<'_> {
        Constraints {
            model: &self.server.model.fingerprint,
            refused: self.lifecycle.refused(),
            failed: self.lifecycle.failed(),
            service: self.service(),
            max_tokens: self.job.generation.max_tokens as usize,
            now: Instant::now(),
        }
    }

    pub(super) fn send_prefill(&mut self, context: Target) {
        let output = self.lifecycle.output().len();
        // A decode worker is wanted for a second token.
        let is_last = output + 1 >= self.job.generation.max_tokens as usize;
        let stream = !is_last && self.server.fleet().may_stream(&context.worker);
        let sequence = self.sequence();
        let tokens = sequence.tokens.0.len();
        let trace = self.trace.as_mut();
        let trace = trace.and_then(|trace| trace.sends_prefill(&context, tokens));
        let job = PrefillJob {
            v: PROTOCOL_VERSION,
            request: self.job.request,
            api_server: self.server.name.clone(),
            api_incarnation: Some(self.server.incarnation),
            budget_ms: self.budget_ms(),
            model: self.server.model.fingerprint.clone(),
            sequence,
            prompt_logprobs: self.job.prompt_logprobs.filter(|_| output == 0),
            stream,
            source: self.source.take().map(|source| source.prefix),
            trace,
        };
        let outstanding = self.prompt_outstanding(1, tokens);
        self.placed = Some(Placed::new(&self.server, &context, outstanding));
        let chain = &self.job.chain;
        self.server.fleet().expect(&context.worker, chain);
        // A second more than the deadline, which ends the wait.
        let timeout = self.remaining() + Duration::from_secs(1);
        let bus = self.server.bus.clone();
        // What was reported of an earlier try says nothing of this one.
        self.prompt_reports = PromptReports::default();
        let reports = self.prompt_reports.clone();
        self.reply = Some(Box::pin(async move {
            Input::Prefill(bus.prefill(&context, &job, timeout, &reports).await)
        }));
    }

    pub(super) fn send_decode(&mut self, decode: Target, attempt: u32) {
        let Some(handle) = self.lifecycle.handle().cloned() else {
            return;
        };
        let trace = self.trace.as_mut();
        let trace = trace.and_then(|trace| trace.sends_decode(&decode, attempt));
        let job = DecodeJob {
            v: PROTOCOL_VERSION,
            request: self.job.request,
            api_server: self.server.name.clone(),
            api_incarnation: Some(self.server.incarnation),
            attempt,
            budget_ms: self.budget_ms(),
            sequence: self.sequence(),
            handle,
            trace,
        };
        if job.handle.is_streamed() {
            self.count_running(&holder(&job.handle), 0);
        }
        let tokens = self.job.prompt.len();
        let max_tokens = self.job.generation.max_tokens as usize;
        let outstanding = Outstanding {
            decodes: 1,
            decode_tokens: self.server.fleet().lifetime_tokens(tokens, max_tokens),
            batch_decodes: self.if_batch(1),
            ..Outstanding::default()
        };
        self.placed = Some(Placed::new(&self.server, &decode, outstanding));
        self.count_pull(&job.handle, &decode);
        let chain = &self.job.chain;
        self.server.fleet().expect(&decode.worker, chain);
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
            service: self.service(),
        }
    }

    pub(super) fn remaining(&self) -> Duration {
        self.job.deadline.saturating_duration_since(Instant::now())
    }

    fn budget_ms(&self) -> u32 {
        u32::try_from(self.remaining().as_millis()).unwrap_or(u32::MAX)
    }
}
