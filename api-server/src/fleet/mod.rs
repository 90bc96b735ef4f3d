//! Who is there and what they are busy with: membership and router, kept in step. It stands under one lock, under which nothing
//! is rendered: whoever has to say more of the members than which one to choose takes a clone of them.

pub mod membership;
pub mod router;

use std::time::Duration;

use baton_protocol::{ApiBeat, Beat, KvHandle, ModelFingerprint, PeersReply, WorkerId};
use tokio::time::Instant;

use crate::fleet::membership::{Membership, Taken};
use crate::fleet::router::{Constraints, Outstanding, Router};
use crate::request::lifecycle::Target;

/// The cluster as one API server sees and uses it.
#[derive(Default)]
pub struct Fleet {
    members: Membership,
    router: Router,
}

impl Fleet {
    /// Takes a worker's beat in.
    pub fn beat(&mut self, beat: Beat, now: Instant) -> Taken {
        let taken = self.members.beat(beat, now);
        match &taken {
            Taken::Joined(slot) => {
                if let Some(member) = self.members.at(*slot) {
                    self.router.joined(*slot, &member.beat.worker);
                }
            }
            Taken::Known(slot) => self.router.beaten(*slot),
            Taken::Restarted(slot, _) => self.router.restarted(*slot),
            Taken::Late | Taken::NoRoom => {}
        }
        taken
    }

    /// Whether this worker's peers are to be asked for: see [`Membership::asks`].
    pub fn asks(&mut self, worker: &WorkerId, now: Instant) -> bool {
        self.members.asks(worker, now)
    }

    /// Takes in all peers of a worker.
    pub fn peers(&mut self, reply: PeersReply) {
        self.members.peers(reply);
    }

    /// Takes an API server's beat in.
    pub fn api_beat(&mut self, beat: ApiBeat, now: Instant) {
        self.members.api_beat(beat, now);
    }

    /// The bus was away: no worker gets a job before it is heard again.
    pub fn suspect_all(&mut self, now: Instant) {
        self.members.suspect_all(now);
    }

    /// Forgets who was silent for too long, and names the workers among them.
    pub fn sweep(&mut self, now: Instant) -> Vec<Target> {
        let lost = self.members.sweep(now);
        for (slot, target) in &lost {
            self.router.left(*slot, &target.worker);
        }
        lost.into_iter().map(|(_, target)| target).collect()
    }

    /// The members. A clone shares their beats.
    pub fn members(&self) -> &Membership {
        &self.members
    }

    /// See [`Router::choose_context`].
    pub fn choose_context(
        &mut self,
        rules: Constraints<'_>,
        prompt_tokens: usize,
        chain: &[u64],
    ) -> Option<Target> {
        self.router
            .choose_context(&self.members, rules, prompt_tokens, chain)
    }

    /// See [`Router::choose_decode`].
    pub fn choose_decode(&mut self, rules: Constraints<'_>, handle: &KvHandle) -> Option<Target> {
        self.router.choose_decode(&self.members, rules, handle)
    }

    /// See [`Router::decode_wait`].
    pub fn decode_wait(
        &self,
        model: &ModelFingerprint,
        now: Instant,
        prompt_tokens: usize,
    ) -> Duration {
        self.router
            .decode_wait(&self.members, model, now, prompt_tokens)
    }

    /// A job of ours begins on a worker.
    pub fn begin(&mut self, worker: &WorkerId, job: Outstanding) {
        self.router.begin(self.members.slot(worker), worker, job);
    }

    /// It ends.
    pub fn end(&mut self, worker: &WorkerId, job: Outstanding) {
        self.router.end(self.members.slot(worker), worker, job);
    }

    /// This worker has run this prompt.
    pub fn remember(&mut self, worker: &WorkerId, chain: &[u64]) {
        if let Some(slot) = self.members.slot(worker) {
            self.router.remember(slot, chain);
        }
    }

    /// Whether nothing of ours is under way anywhere.
    #[cfg(any(test, feature = "simulation"))]
    pub fn is_idle(&self) -> bool {
        self.router.is_idle()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use baton_protocol::Role;

    use super::*;
    use crate::fleet::membership::tests::beat;
    use crate::fleet::membership::{GONE_AFTER, WORKERS_MAX};

    #[test]
    fn of_workers_beyond_the_bound_nothing_is_kept() {
        let mut fleet = Fleet::default();
        let now = Instant::now();
        for number in 0..WORKERS_MAX + 100 {
            let taken = fleet.beat(beat(&format!("w{number}"), Role::Context, &[]), now);
            let is_in = matches!(taken, Taken::Joined(_));
            assert_eq!(is_in, number < WORKERS_MAX, "{taken:?}");
        }
        assert_eq!(fleet.members.workers().count(), WORKERS_MAX);
        assert_eq!(fleet.sweep(now + GONE_AFTER).len(), WORKERS_MAX);
        assert_eq!(fleet.members.workers().count(), 0);
        // Their slots are had again.
        let taken = fleet.beat(beat("w", Role::Context, &[]), now);
        assert!(
            matches!(taken, Taken::Joined(slot) if slot < WORKERS_MAX),
            "{taken:?}"
        );
    }

    #[test]
    fn what_is_under_way_on_a_worker_outlasts_its_absence() {
        let (mut fleet, mut now) = (Fleet::default(), Instant::now());
        let worker = WorkerId::new("c").unwrap();
        let job = Outstanding {
            prefills: 1,
            prefill_tokens: 7,
            ..Outstanding::default()
        };
        fleet.begin(&worker, job);
        fleet.beat(beat("c", Role::Context, &[]), now);
        fleet.begin(&worker, job);
        now += GONE_AFTER;
        assert_eq!(fleet.sweep(now).len(), 1);
        fleet.end(&worker, job);
        assert!(!fleet.is_idle());
        fleet.beat(beat("c", Role::Context, &[]), now);
        assert!(!fleet.is_idle());
        fleet.end(&worker, job);
        assert!(fleet.is_idle());
    }

    /// What renders the members for a long time holds nobody up, and sees them as they were.
    #[test]
    fn a_clone_of_the_members_stays_as_it_was() {
        let (mut fleet, now) = (Fleet::default(), Instant::now());
        fleet.beat(beat("c", Role::Context, &[]), now);
        fleet.beat(beat("d", Role::Decode, &["c"]), now);
        let seen = fleet.members().clone();
        fleet.beat(beat("d", Role::Decode, &[]), now);
        fleet.beat(beat("e", Role::Decode, &["c"]), now);
        let model = crate::fleet::membership::tests::fingerprint();
        assert!(seen.faults(&model, now).is_empty());
        assert_eq!(seen.workers().count(), 2);
        let d = WorkerId::new("d").unwrap();
        assert_eq!(seen.worker(&d).unwrap().peers.len(), 1);
        assert_eq!(fleet.members().worker(&d).unwrap().peers.len(), 0);
        assert!(Arc::ptr_eq(
            &seen.worker(&WorkerId::new("c").unwrap()).unwrap().beat,
            &fleet
                .members()
                .worker(&WorkerId::new("c").unwrap())
                .unwrap()
                .beat,
        ));
    }
}
