//! Staged KV that waits for its release.
//!
//! A lease is alive from the moment its handle is made until the first of release, abort and deadline. Its API server may
//! renew it as long as it is alive, which moves the deadline.
//! What makes a pull safe is that this table, and nothing else, says whether a lease was alive without a
//! break: a handle id is never used twice, and a lease that ended never comes back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use baton_protocol::{ApiServerId, HandleId, Nonce, RequestId};
use tokio::time::Instant;

/// Leases and what they hold. Dropping a lease gives its blocks back.
pub(crate) struct LeaseTable<B> {
    leases: BTreeMap<HandleId, Lease<B>>,
    by_request: HashMap<RequestId, HandleId>,
    deadlines: BTreeSet<(Instant, HandleId)>,
    next_handle: u64,
}

struct Lease<B> {
    request: RequestId,
    api_server: ApiServerId,
    nonce: Nonce,
    deadline: Instant,
    blocks: B,
}

impl<B> LeaseTable<B> {
    pub(crate) fn new() -> Self {
        Self {
            leases: BTreeMap::new(),
            by_request: HashMap::new(),
            deadlines: BTreeSet::new(),
            next_handle: 1,
        }
    }

    /// The handle of a lease that [`Self::grant_as`] is to begin.
    pub(crate) fn draw(&mut self) -> HandleId {
        let handle = HandleId(self.next_handle);
        self.next_handle += 1;
        handle
    }

    /// What a lease holds that is alive, if the nonce is its own.
    pub(crate) fn get(&self, now: Instant, handle: HandleId, nonce: Nonce) -> Option<&B> {
        let lease = self.leases.get(&handle)?;
        (lease.nonce == nonce && now < lease.deadline).then_some(&lease.blocks)
    }

    /// Begins a lease. A lease that the same request still had ends: a request has one live try.
    pub(crate) fn grant(
        &mut self,
        now: Instant,
        ttl: Duration,
        request: RequestId,
        api_server: ApiServerId,
        nonce: Nonce,
        blocks: B,
    ) -> HandleId {
        let handle = self.draw();
        self.grant_as(handle, now, ttl, request, api_server, nonce, blocks);
        handle
    }

    /// As [`Self::grant`], under a handle that was drawn for it and has no lease yet.
    #[expect(clippy::too_many_arguments, reason = "a lease has so many parts")]
    pub(crate) fn grant_as(
        &mut self,
        handle: HandleId,
        now: Instant,
        ttl: Duration,
        request: RequestId,
        api_server: ApiServerId,
        nonce: Nonce,
        blocks: B,
    ) {
        self.abort(request);
        let deadline = now + ttl;
        self.leases.insert(
            handle,
            Lease {
                request,
                api_server,
                nonce,
                deadline,
                blocks,
            },
        );
        self.by_request.insert(request, handle);
        self.deadlines.insert((deadline, handle));
    }

    /// Ends a lease by release and hands out what it held, if it was alive until `now` and the nonce is
    /// its own. A wrong nonce leaves the lease as it is: a stranger cannot end it.
    pub(crate) fn release(&mut self, now: Instant, handle: HandleId, nonce: Nonce) -> Option<B> {
        let lease = self.leases.get(&handle)?;
        if lease.nonce != nonce {
            return None;
        }
        let alive = now < lease.deadline;
        let lease = self.remove(handle)?;
        alive.then_some(lease.blocks)
    }

    /// Moves a lease's deadline to `ttl` from now, if it is alive and the nonce is its own. A lease that ended never comes
    /// back.
    pub(crate) fn renew(
        &mut self,
        now: Instant,
        ttl: Duration,
        handle: HandleId,
        nonce: Nonce,
    ) -> bool {
        let Some(lease) = self.leases.get_mut(&handle) else {
            return false;
        };
        if lease.nonce != nonce || now >= lease.deadline {
            return false;
        }
        self.deadlines.remove(&(lease.deadline, handle));
        lease.deadline = now + ttl;
        self.deadlines.insert((lease.deadline, handle));
        true
    }

    /// Ends the lease of an aborted request.
    pub(crate) fn abort(&mut self, request: RequestId) -> bool {
        let handle = self.by_request.get(&request).copied();
        handle.and_then(|handle| self.remove(handle)).is_some()
    }

    /// Ends the leases whose time is over and names their requests.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<RequestId> {
        let mut expired = Vec::new();
        while let Some(&(deadline, handle)) = self.deadlines.first() {
            if now < deadline {
                break;
            }
            expired.extend(self.remove(handle).map(|lease| lease.request));
        }
        expired
    }

    /// Ends the leases of an API server that is gone.
    pub(crate) fn abandon(&mut self, api_server: &ApiServerId) -> usize {
        let of_it = |lease: &&Lease<B>| lease.api_server == *api_server;
        let requests: Vec<_> = self
            .leases
            .values()
            .filter(of_it)
            .map(|lease| lease.request)
            .collect();
        requests
            .iter()
            .filter(|request| self.abort(**request))
            .count()
    }

    /// Ends all leases.
    pub(crate) fn clear(&mut self) -> usize {
        self.by_request.clear();
        self.deadlines.clear();
        std::mem::take(&mut self.leases).len()
    }

    /// When the next lease ends if nothing else happens.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    fn remove(&mut self, handle: HandleId) -> Option<Lease<B>> {
        let lease = self.leases.remove(&handle)?;
        self.by_request.remove(&lease.request);
        self.deadlines.remove(&(lease.deadline, handle));
        Some(lease)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const TTL: Duration = Duration::from_millis(100);

    fn api() -> ApiServerId {
        ApiServerId::new("api").unwrap()
    }

    fn grant(table: &mut LeaseTable<&'static str>, now: Instant) -> HandleId {
        table.grant(now, TTL, RequestId(1), api(), Nonce(9), "blocks")
    }

    #[test]
    fn release_is_valid_once() {
        let (mut table, now) = (LeaseTable::new(), Instant::now());
        let handle = grant(&mut table, now);
        assert_eq!(table.release(now, handle, Nonce(8)), None, "a wrong nonce");
        assert_eq!(
            table.release(now, HandleId(77), Nonce(9)),
            None,
            "a foreign handle"
        );
        assert_eq!(table.release(now, handle, Nonce(9)), Some("blocks"));
        assert_eq!(
            table.release(now, handle, Nonce(9)),
            None,
            "a second release"
        );
        assert_eq!(table.len(), 0);
        assert_eq!(table.next_deadline(), None);
    }

    #[test]
    fn release_after_the_deadline_is_invalid_even_before_the_timer_ran() {
        let (mut table, now) = (LeaseTable::new(), Instant::now());
        let handle = grant(&mut table, now);
        assert_eq!(table.next_deadline(), Some(now + TTL));
        assert_eq!(table.release(now + TTL, handle, Nonce(9)), None);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_renewed_lease_lives_on_and_one_that_ended_does_not_come_back() {
        let (mut table, now) = (LeaseTable::new(), Instant::now());
        let handle = grant(&mut table, now);
        let later = now + TTL / 2;
        assert!(!table.renew(later, TTL, handle, Nonce(8)), "a wrong nonce");
        assert!(table.renew(later, TTL, handle, Nonce(9)));
        assert_eq!(table.next_deadline(), Some(later + TTL));
        assert_eq!(table.expire(now + TTL), []);
        let over = later + TTL;
        assert!(!table.renew(over, TTL, handle, Nonce(9)), "it is over");
        assert_eq!(table.release(over, handle, Nonce(9)), None);
        let handle = grant(&mut table, now);
        assert!(table.release(now, handle, Nonce(9)).is_some());
        assert!(!table.renew(now, TTL, handle, Nonce(9)), "it was released");
        assert_eq!(table.next_deadline(), None);
    }

    #[test]
    fn a_new_lease_of_a_request_ends_its_old_one() {
        let (mut table, now) = (LeaseTable::new(), Instant::now());
        let old = grant(&mut table, now);
        let new = grant(&mut table, now);
        assert_eq!(table.release(now, old, Nonce(9)), None);
        assert_eq!(table.release(now, new, Nonce(9)), Some("blocks"));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Grant(u8),
        Release(u8, bool),
        Renew(u8, bool),
        Abort(u8),
        Abandon(u8),
        Wait(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..6u8).prop_map(Step::Grant),
            (0..12u8, any::<bool>()).prop_map(|(nth, right)| Step::Release(nth, right)),
            (0..12u8, any::<bool>()).prop_map(|(nth, right)| Step::Renew(nth, right)),
            (0..6u8).prop_map(Step::Abort),
            (0..2u8).prop_map(Step::Abandon),
            (0..60u8).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Against a plain list: a release or a renewal is valid exactly when nothing ended the lease before, blocks
        /// are held exactly by live leases, and nothing is left behind in the indices.
        #[test]
        fn agrees_with_a_plain_list(steps in prop::collection::vec(step(), 1..80)) {
            let api = |request: u8| ApiServerId::new(format!("api{}", request % 2)).unwrap();
            let blocks = Arc::new(());
            let mut table = LeaseTable::new();
            let mut now = Instant::now();
            // (handle, request, nonce, deadline, alive)
            let mut plain: Vec<(HandleId, u8, Nonce, Instant, bool)> = Vec::new();
            for (i, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Grant(request) => {
                        for lease in plain.iter_mut().filter(|lease| lease.1 == request) {
                            lease.4 = false;
                        }
                        let nonce = Nonce(i as u128 + 1);
                        let request_id = RequestId(request.into());
                        let handle = table.grant(now, TTL, request_id, api(request), nonce, blocks.clone());
                        prop_assert!(plain.iter().all(|lease| lease.0 != handle), "a handle id came twice");
                        plain.push((handle, request, nonce, now + TTL, true));
                    }
                    Step::Release(nth, right) => {
                        let Some(lease) = plain.get_mut(usize::from(nth)) else { continue };
                        let nonce = if right { lease.2 } else { Nonce(0) };
                        let valid = table.release(now, lease.0, nonce).is_some();
                        prop_assert_eq!(valid, right && lease.4 && now < lease.3);
                        if right {
                            lease.4 = false;
                        }
                    }
                    Step::Renew(nth, right) => {
                        let Some(lease) = plain.get_mut(usize::from(nth)) else { continue };
                        let nonce = if right { lease.2 } else { Nonce(0) };
                        let valid = table.renew(now, TTL, lease.0, nonce);
                        prop_assert_eq!(valid, right && lease.4 && now < lease.3);
                        if valid {
                            lease.3 = now + TTL;
                        }
                    }
                    Step::Abort(request) => {
                        table.abort(RequestId(request.into()));
                        for lease in plain.iter_mut().filter(|lease| lease.1 == request) {
                            lease.4 = false;
                        }
                    }
                    Step::Abandon(which) => {
                        table.abandon(&api(which));
                        for lease in plain.iter_mut().filter(|lease| lease.1 % 2 == which) {
                            lease.4 = false;
                        }
                    }
                    Step::Wait(ms) => {
                        now += Duration::from_millis(ms.into());
                        table.expire(now);
                        for lease in plain.iter_mut().filter(|lease| lease.3 <= now) {
                            lease.4 = false;
                        }
                    }
                }
                let alive = plain.iter().filter(|lease| lease.4).count();
                prop_assert_eq!(table.len(), alive);
                prop_assert_eq!(Arc::strong_count(&blocks), alive + 1);
                let next = plain.iter().filter(|lease| lease.4).map(|lease| lease.3).min();
                prop_assert_eq!(table.next_deadline(), next);
                prop_assert_eq!(table.by_request.len(), alive);
            }
        }
    }
}
