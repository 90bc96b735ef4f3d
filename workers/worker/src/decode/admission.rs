//! A decode job is admitted: a place and blocks for it, then its KV, from this worker's own leases or by a pull.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Subject;
use baton_engine::BlockTable;
use baton_protocol::{
    DecodeJob, DecodeReply, Failure, FailureCode, KvHandle, PROTOCOL_VERSION, PullReport, Refusal,
    RequestId,
};
use baton_transfer::BlockMap;
use tokio::time::Instant;

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
        let map = match local {
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
        // Blocks for what is there and for the next token. A handle of this worker's own brings its own.
        let blocks = match local {
            true => 0,
            false => {
                let tokens = job.sequence.tokens.0.len() + 1;
                common.checks.kv.blocks_for(tokens)
            }
        };
        let blocks = self.reserve(common, now, job.request, blocks)?;
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
        match (blocks, map) {
            (Some(blocks), Some(map)) => {
                let blocks = HeldBlocks::new(blocks, common.engine.waker.clone());
                self.pull(common, now, job, blocks, map);
            }
            _ => self.adopt(common, context, now, job),
        }
        Ok(())
    }

    /// How the handle's worker is read from: it is connected.
    fn reachable(&self, common: &Common, handle: &KvHandle) -> Result<Arc<BlockMap>, Refusal> {
        let unreachable = |detail: String| Err(Refusal::Unreachable { detail });
        if common.mover.is_none() {
            return unreachable("this worker moves no KV: it was started without UCX".to_owned());
        }
        self.peers
            .ready(&handle.worker, handle.incarnation)
            .or_else(unreachable)
    }

    /// A place in the batch and blocks for a request's KV, unless those are meant for others that wait longer. `None` if
    /// it wants no blocks.
    fn reserve(
        &mut self,
        common: &Common,
        now: Instant,
        request: RequestId,
        blocks: usize,
    ) -> Result<Option<BlockTable>, Refusal> {
        let before = self.line.before(request, now);
        let has_place = self.decodes.len() + before.jobs < common.me.capacity.batch as usize;
        if has_place && blocks == 0 {
            self.line.leave(request);
            return Ok(None);
        }
        let fits = has_place && common.pool.stats().available() >= before.blocks + blocks;
        if let Some(table) = fits.then(|| common.pool.reserve(blocks)).flatten() {
            self.line.leave(request);
            return Ok(Some(table));
        }
        self.line.refused(request, blocks, now);
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
        let route = Route {
            api_server,
            request,
            attempt,
        };
        let blocks =
            context.and_then(|context| context.leases.release(now, handle.handle, handle.nonce));
        let Some(blocks) = blocks.and_then(|mut held| held.take()) else {
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
                admitted: now,
                deadline,
                index,
                phase: Phase::Running,
            },
        );
        self.resume(
            common,
            key,
            sequence,
            handle.first_token,
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
        map: Arc<BlockMap>,
    ) {
        let Some(mover) = common.mover.clone() else {
            return;
        };
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
            release: release_of(common, request, &handle),
            map,
            block_tokens: common.checks.kv.block_tokens,
            handle: handle.clone(),
            blocks,
            permit: self.pull_permits.permit(handle.incarnation),
            deadline,
        };
        let task = self.pulls.spawn(pull.run());
        let index = sequence.output_tokens() + 1;
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
                admitted: now,
                deadline,
                index,
                phase,
            },
        );
    }
}
