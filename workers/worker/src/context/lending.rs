//! What is in the prefix index, leased to a worker that is to run a prompt which begins so; and prompts here whose beginnings are pulled from
//! others.
//!
//! Such a lease was opened by no prompt. It holds blocks that are indexed, and may be shared with anybody: they do not change
//! while they are held. Only who has the nonce can release it, and nobody renews it.

use std::time::Duration;

use baton_protocol::{
    ApiServerId, KvHandle, LeaseAsk, LeaseReply, PROTOCOL_VERSION, PrefixPull, PrefixPullFailure,
    Refusal, Release, RequestId,
};
use tokio::task;
use tokio::time::Instant;

use super::{ContextSide, Prefilling, nonce};
use crate::common::Common;
use crate::engine_thread::HeldBlocks;

impl ContextSide {
    /// Another worker asks for the KV of a prompt's beginning. What is here of it, by tokens and salt, is held until that worker
    /// releases it, or its time for that is over.
    pub(crate) fn lend(
        &mut self,
        common: &Common,
        now: Instant,
        ask: &LeaseAsk,
    ) -> Result<LeaseReply, Refusal> {
        let v = PROTOCOL_VERSION;
        if ask.incarnation != common.me.incarnation {
            let worker = &common.me.worker;
            let detail = format!("worker {worker} was restarted since: what it had is gone");
            return Err(Refusal::Unreachable { detail });
        }
        common.checks.model(&ask.model)?;
        if self.lent.len() >= common.me.capacity.queue as usize {
            return Err(self.busy());
        }
        let table = common.pool.share(&ask.tokens.0, ask.cache_salt);
        if table.is_empty() || !common.me.leases_prefixes {
            return Ok(LeaseReply::Absent { v });
        }
        let tokens = table.len() as u32 * common.checks.kv.block_tokens;
        let lease = Duration::from_millis(ask.lease_ms.into()).min(self.lease);
        let nonce = nonce().map_err(|failure| {
            tracing::warn!(%failure, "a prefix is not leased");
            self.busy()
        })?;
        let handle = KvHandle {
            // Both tables' handles are drawn from one, so none comes twice.
            handle: self.leases.draw(),
            nonce,
            runs: table.runs(),
            lease_ms: lease.as_millis() as u32,
            ..self.handle(common, tokens)
        };
        self.lent.grant_as(
            handle.handle,
            now,
            lease,
            ask.request,
            ask.api_server.clone(),
            nonce,
            HeldBlocks::new(table, common.engine.waker.clone()),
        );
        tracing::debug!(request = %ask.request, to = %ask.from, handle = %handle.handle, tokens, "a prefix is leased");
        let handle = Box::new(handle);
        Ok(LeaseReply::Leased { v, handle })
    }

    /// Whoever pulled it has it: valid only if its lease was alive all the time.
    pub(crate) fn release_lent(&mut self, common: &Common, release: &Release) -> bool {
        let is_ours = release.incarnation == common.me.incarnation;
        let now = Instant::now();
        is_ours
            && self
                .lent
                .release(now, release.handle, release.nonce)
                .is_some()
    }

    /// Its beginning was pulled, or not: the engine has it now.
    pub(crate) fn on_prefix_pulled(&mut self, common: &mut Common, key: u64, report: PrefixPull) {
        let Some(entry) = self.prefills.get_mut(&key) else {
            return;
        };
        let Some(held) = entry.held.take() else {
            return;
        };
        entry.prefix_pull = Some(report);
        let (command, _task) = *held;
        if !common.engine.send(command) {
            let refusal = self.busy();
            self.left(common, key, Some(refusal));
        }
    }

    /// A task that pulled a prompt's beginning ended without an outcome: the prompt runs all the same.
    pub(crate) fn on_prefix_pull_lost(&mut self, common: &mut Common, task: task::Id) {
        let is_its =
            |entry: &Prefilling| entry.held.as_ref().is_some_and(|held| held.1.id() == task);
        let lost = self.prefills.iter().find(|(_, entry)| is_its(entry));
        if let Some(key) = lost.map(|(key, _)| *key) {
            let report = PrefixPull {
                failure: Some(PrefixPullFailure::Failed),
                ..PrefixPull::default()
            };
            self.on_prefix_pulled(common, key, report);
        }
    }

    /// Ends the leases of a request, whether it ran here or only its beginning is here.
    pub(crate) fn end_leases_of(&mut self, request: RequestId) -> bool {
        // Both.
        self.leases.abort(request) | self.lent.abort(request)
    }

    /// Ends those of an API server that is gone.
    pub(crate) fn abandon_leases(&mut self, api_server: &ApiServerId) -> usize {
        self.leases.abandon(api_server) + self.lent.abandon(api_server)
    }

    /// Ends those whose time is over, and names their requests.
    pub(crate) fn expire_leases(&mut self, now: Instant) -> Vec<RequestId> {
        let mut expired = self.leases.expire(now);
        expired.extend(self.lent.expire(now));
        expired
    }

    /// Ends all.
    pub(crate) fn end_leases(&mut self) -> usize {
        self.leases.clear() + self.lent.clear()
    }

    /// When the next lease ends if nothing else happens.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let deadlines = [self.leases.next_deadline(), self.lent.next_deadline()];
        deadlines.into_iter().flatten().min()
    }
}
