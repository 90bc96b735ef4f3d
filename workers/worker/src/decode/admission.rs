//! A decode job is admitted: a place and blocks for it, then its KV, from this worker's own leases or by a pull.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::Subject;
use baton_engine::BlockTable;
use baton_protocol::{
    DecodeJob, DecodeReply, Failure, FailureCode, KvHandle, PROTOCOL_VERSION, PullReport, Refusal,
    SequenceSpec, Tier,
};
use baton_traces::{Kind, Span};
use tokio::time::Instant;

use super::peers::LinkInfo;
use super::pulls::Pull;
use super::{DecodeSide, Decoding, Phase, Pulling, release_of, tell_failure};
use crate::common::Common;
use crate::context::ContextSide;
use crate::engine_thread::HeldBlocks;
use crate::frames::Route;

impl DecodeSide {
    /// A job arrives: it is admitted with blocks for it, or refused at once and its handle stays leased. `context` is this
    /// worker's own other side: a handle of its own needs no pull.
    pub(crate) fn take(
        &mut self,
        common: &mut Common,
        context: Option<&mut ContextSide>,
        now: Instant,
        mut job: DecodeJob,
        reply: &Subject,
    ) -> Result<(), Refusal> {
        common.checks.handle(&mut job)?;
        let local = job.handle.worker == common.me.worker
            && job.handle.incarnation == common.me.incarnation;
        if local && job.handle.is_streamed() {
            // Its API server waits until its prompt is done: then there is something to take over.
            return Err(Refusal::Malformed {
                detail: "the handle is of a prompt that still runs on this very worker".to_owned(),
            });
        }
        let link = match local {
            true => None,
            false => Some(self.reachable(common, &job.handle)?),
        };
        let earlier: Vec<_> = self
            .decodes
            .iter()
            .filter(|(_, entry)| {
                entry.route.request == job.request && !matches!(entry.phase, Phase::Ending)
            })
            .map(|(key, entry)| (*key, entry.route.attempt))
            .collect();
        if earlier.iter().any(|(_, attempt)| *attempt == job.attempt) {
            // The answer to the first stands. A second one could overtake it.
            tracing::debug!(request = %job.request, attempt = job.attempt, "a decode job came twice");
            return Ok(());
        }
        if let Some((_, attempt)) = earlier.iter().find(|(_, attempt)| *attempt > job.attempt) {
            let detail = format!(
                "try {} of a request whose try {attempt} is here already",
                job.attempt
            );
            return Err(Refusal::Malformed { detail });
        }
        let blocks = self.reserve(common, now, &job, local)?;
        // A request has one live try.
        for (key, _) in earlier {
            self.end(common, key, None);
        }
        let admitted = DecodeReply::Admitted {
            v: PROTOCOL_VERSION,
            incarnation: common.me.incarnation,
        };
        if let Err(error) = common.outbox.send(reply.clone(), &admitted) {
            tracing::warn!(%error, "an admission was not sent: the job is dropped");
            return Ok(());
        }
        tracing::debug!(request = %job.request, attempt = job.attempt, from = %job.handle.worker, "decode admitted");
        match (blocks, link) {
            (Some(blocks), Some(link)) => {
                let blocks = HeldBlocks::new(blocks, common.engine.waker.clone());
                self.pull(common, now, job, blocks, link);
            }
            _ => self.adopt(common, context, now, job),
        }
        Ok(())
    }

    /// How the handle's worker is read from: it is connected.
    fn reachable(&self, common: &Common, handle: &KvHandle) -> Result<LinkInfo, Refusal> {
        let unreachable = |detail: String| Err(Refusal::Unreachable { detail });
        if common.mover.is_none() {
            return unreachable("this worker moves no KV: it was started without UCX".to_owned());
        }
        self.peers
            .ready(&handle.worker, handle.incarnation)
            .cloned()
            .or_else(unreachable)
    }

    /// A place in the batch, and blocks for the KV of a job's sequence and for its next token, unless those are meant for others that go
    /// before it. What this worker's prefix index has of the sequence is shared, and need not be pulled. `None` of a `local` one: a handle of
    /// this worker's own brings its own blocks.
    fn reserve(
        &mut self,
        common: &Common,
        now: Instant,
        job: &DecodeJob,
        local: bool,
    ) -> Result<Option<BlockTable>, Refusal> {
        let (request, service) = (job.request, job.sequence.service);
        let interactive = self.interactive();
        let has_batch = interactive < self.decodes.len();
        let before = self.line.before(request, service, has_batch, now);
        let has_place = match service.tier {
            // The engine has a batch sequence wait for it.
            Tier::Interactive => {
                let bound = common
                    .me
                    .capacity
                    .batch
                    .saturating_add(common.me.capacity.queue);
                interactive + before.jobs < common.me.capacity.batch as usize
                    && self.decodes.len() + before.jobs < bound as usize
            }
            Tier::Batch => self.decodes.len() + before.jobs < common.me.capacity.batch as usize,
        };
        let mut blocks = 0;
        if !local {
            let SequenceSpec {
                tokens, cache_salt, ..
            } = &job.sequence;
            blocks = common.checks.kv.blocks_for(tokens.0.len() + 1);
            let reserve =
                || (common.pool).reserve_reusing(&tokens.0, *cache_salt, blocks, before.blocks);
            if let Some(table) = has_place.then(reserve).flatten() {
                self.line.leave(request);
                return Ok(Some(table));
            }
        } else if has_place {
            self.line.leave(request);
            return Ok(None);
        }
        self.line.refused(request, service, blocks, now);
        let ages = self.decodes.values().map(|entry| now - entry.admitted);
        Err(Refusal::Busy {
            retry_after_ms: self.pace.decode_hint_ms(ages, before.jobs),
        })
    }

    /// The KV is in this worker's own arena: the lease's blocks are taken over, which releases it.
    fn adopt(
        &mut self,
        common: &mut Common,
        context: Option<&mut ContextSide>,
        now: Instant,
        job: DecodeJob,
    ) {
        let trace = begun(common, &job, now);
        let DecodeJob {
            request,
            attempt,
            api_server,
            budget_ms,
            sequence,
            handle,
            ..
        } = job;
        let index = sequence.output_tokens() + 1;
        let tier = sequence.service.tier;
        let route = Route {
            api_server,
            request,
            attempt,
        };
        let staged =
            context.and_then(|context| context.leases.release(now, handle.handle, handle.nonce));
        let blocks = staged.and_then(|mut staged| {
            staged.went_to(&common.me.worker);
            staged.blocks.take()
        });
        let (Some(blocks), Some(next)) = (blocks, handle.first_token) else {
            let failure = Failure::new(
                FailureCode::HandleInvalid,
                "the lease ended before it was taken over",
            );
            tell_failure(common, &route, index, failure);
            return;
        };
        let deadline = now + Duration::from_millis(budget_ms.into());
        let key = common.new_key(deadline);
        self.decodes.insert(
            key,
            Decoding {
                route,
                tier,
                admitted: now,
                deadline,
                index,
                phase: Phase::Running,
                trace,
            },
        );
        self.resume(
            common,
            key,
            sequence,
            (next, None),
            blocks,
            PullReport::default(),
        );
    }

    /// The KV is elsewhere: a task pulls it and has it released.
    fn pull(
        &mut self,
        common: &mut Common,
        now: Instant,
        job: DecodeJob,
        blocks: HeldBlocks,
        link: LinkInfo,
    ) {
        let Some(mover) = common.mover.clone() else {
            return;
        };
        let trace = begun(common, &job, now);
        let of_pull = trace.as_ref().and_then(|trace| {
            let mut pull = trace.child(Kind::Client, "kv.pull", now.into_std())?;
            pull.set("baton.worker", job.handle.worker.as_str());
            pull.set("baton.transport", &*link.transport);
            Some(pull)
        });
        let DecodeJob {
            request,
            attempt,
            api_server,
            budget_ms,
            sequence,
            handle,
            ..
        } = job;
        let deadline = now + Duration::from_millis(budget_ms.into());
        let key = common.new_key(deadline);
        let pull = Pull {
            key,
            mover,
            wire: common.wire.clone(),
            release_subject: common.cluster.release(&handle.worker),
            progress_subject: common.cluster.progress(&handle.worker),
            release: release_of(common, request, &handle),
            map: link.map,
            block_tokens: common.checks.kv.block_tokens,
            handle: handle.clone(),
            blocks: Arc::new(Mutex::new(blocks)),
            permit: self.pull_permits.permit(handle.incarnation),
            deadline,
            trace: of_pull,
        };
        let task = self.pulls.spawn(pull.run());
        // The first token of a prompt that still runs comes from here too, should its API server not have it by then.
        let index = sequence.output_tokens() + u32::from(!handle.is_streamed());
        let tier = sequence.service.tier;
        let phase = Phase::Pulling(Box::new(Pulling {
            sequence,
            handle,
            task,
        }));
        let route = Route {
            api_server,
            request,
            attempt,
        };
        self.decodes.insert(
            key,
            Decoding {
                route,
                tier,
                admitted: now,
                deadline,
                index,
                phase,
                trace,
            },
        );
    }
}

/// The span of a job that was admitted, where its trace is recorded.
fn begun(common: &Common, job: &DecodeJob, now: Instant) -> Option<Span> {
    let parent = job.trace.as_ref()?;
    let mut span = common
        .tracer
        .span(parent, Kind::Server, "decode", now.into_std())?;
    span.set("baton.request", job.request.to_string());
    span.set("baton.attempt", job.attempt);
    Some(span)
}
