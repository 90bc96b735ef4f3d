//! Who is there and what they are busy with: membership and router, kept in step. It stands under one lock, under which nothing
//! is rendered: whoever has to say more of the members than which one to choose takes a clone of them.

pub mod membership;
pub mod router;

use std::time::Duration;

use baton_protocol::{
    ApiBeat, Beat, Incarnation, KvHandle, ModelFingerprint, PeersReply, PrefixPage, PrefixReport,
    Service, Tier, WorkerId,
};
use tokio::time::Instant;

use crate::fleet::membership::{Member, Membership, Slot, Taken};
use crate::fleet::router::{AskAll, Constraints, FirstToken, Outstanding, Paged, Router, Source};
use crate::request::lifecycle::Target;

/// Tokens of a block where no worker says how many: what workers have if they are told nothing.
const BLOCK_TOKENS_DEFAULT: usize = 32;

/// The cluster as one API server sees and uses it.
#[derive(Default)]
pub struct Fleet {
    members: Membership,
    router: Router,
}

impl Fleet {
    /// Takes a worker's beat in.
    pub fn beat(&mut self, beat: Beat, now: Instant) -> Taken {
        let prefix_version = beat.prefix_version;
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
        if let Taken::Joined(slot) | Taken::Known(slot) | Taken::Restarted(slot, _) = &taken {
            self.router.told_prefixes(*slot, prefix_version);
            self.router.refresh(&self.members, *slot);
        }
        taken
    }

    /// Takes a report of a worker's prefixes in. It counts once [`Self::take_in_prefixes`] has done its work.
    pub fn prefixes(&mut self, report: PrefixReport) {
        if let Some(slot) = self.slot_of(&report.worker, report.incarnation) {
            self.router.reported.report(slot, report);
        }
    }

    /// Whether the worker is to be asked for all its prefixes now: see [`router::Reported::asks`].
    pub fn asks_prefixes(&mut self, worker: &WorkerId, now: Instant) -> Option<AskAll> {
        let slot = self.members.slot(worker)?;
        self.router.reported.asks(slot, now)
    }

    /// A page of a worker's prefixes, which begins with this block of its arena, came; or none came.
    pub fn prefix_page(&mut self, ask: AskAll, block: u32, page: Option<&PrefixPage>) -> Paged {
        let is_its = |page: &&PrefixPage| {
            let slot = self.slot_of(&page.worker, page.incarnation);
            slot == Some(ask.slot())
        };
        match page.filter(is_its) {
            Some(page) => self.router.reported.page(ask, block, page),
            None => {
                self.router.reported.gave_up(ask);
                Paged::Over
            }
        }
    }

    /// Works off some of what was told of prefixes. Whether there is more.
    pub fn take_in_prefixes(&mut self) -> bool {
        self.router.reported.take_in()
    }

    /// Clears away some of the prefixes of workers that left. Whether there is more.
    pub fn sweep_prefixes(&mut self) -> bool {
        self.router.reported.sweep()
    }

    /// Prefixes that are known, in blocks.
    pub fn known_prefixes(&self) -> usize {
        self.router.reported.len()
    }

    /// Whether of a worker's prefixes exactly these are known.
    ///
    /// # Errors
    /// What is not so, as a sentence.
    #[cfg(any(test, feature = "simulation"))]
    pub fn knows_prefixes(&self, worker: &WorkerId, all: &[u64]) -> Result<(), String> {
        let slot = self.members.slot(worker);
        let slot = slot.ok_or_else(|| "it is not there".to_owned())?;
        self.router.reported.holds_exactly(slot, all)
    }

    /// Tokens of a block of the workers with this model, of which prompts' chains are made.
    pub fn block_tokens(&self, model: &ModelFingerprint) -> usize {
        let model = self.members.model(model);
        let mut members = self.members.in_any_order();
        let member = members.find(|(_, member)| Some(member.facts.model) == model);
        member.map_or(BLOCK_TOKENS_DEFAULT, |(_, member)| {
            member.facts.block_tokens as usize
        })
    }

    fn slot_of(&self, worker: &WorkerId, incarnation: Incarnation) -> Option<Slot> {
        let slot = self.members.slot(worker)?;
        let member = self.members.at(slot)?;
        (member.beat.incarnation == incarnation).then_some(slot)
    }

    /// Whether this worker's peers are to be asked for: see [`Membership::asks`].
    pub fn asks(&mut self, worker: &WorkerId, now: Instant) -> bool {
        self.members.asks(worker, now)
    }

    /// Takes in all peers of a worker.
    pub fn peers(&mut self, reply: PeersReply) {
        let slot = self.members.slot(&reply.worker);
        self.members.peers(reply);
        if let Some(slot) = slot {
            self.router.refresh(&self.members, slot);
        }
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
    ) -> Option<(Target, Option<Source>)> {
        self.router
            .choose_context(&self.members, rules, prompt_tokens, chain)
    }

    /// See [`Router::first_token`].
    pub fn first_token(
        &self,
        worker: &WorkerId,
        tier: Tier,
        prompt_tokens: usize,
        chain: &[u64],
        source: Option<&Source>,
    ) -> Option<FirstToken> {
        let slot = self.members.slot(worker)?;
        self.router
            .first_token(&self.members, slot, tier, prompt_tokens, chain, source)
    }

    /// See [`Router::cached_tokens`].
    pub fn cached_tokens(&self, worker: &WorkerId, chain: &[u64]) -> usize {
        let slot = self.members.slot(worker);
        slot.map_or(0, |slot| {
            self.router.cached_tokens(&self.members, slot, chain)
        })
    }

    /// See [`Router::choose_decode`].
    pub fn choose_decode(
        &mut self,
        rules: Constraints<'_>,
        handle: &KvHandle,
        chain: &[u64],
    ) -> Option<Target> {
        self.router
            .choose_decode(&self.members, rules, handle, chain)
    }

    /// Whether this worker streams KV.
    pub fn streams(&self, worker: &WorkerId) -> bool {
        let member = self.members.worker(worker);
        member.is_some_and(|member| member.facts.streams)
    }

    /// Whether KV of this context worker's prompts may be read while they run: it streams, and so does another worker that reads it.
    pub fn may_stream(&self, context: &WorkerId) -> bool {
        let Some((own, context)) = self
            .members
            .slot(context)
            .and_then(|slot| Some((slot, self.members.at(slot)?)))
        else {
            return false;
        };
        let reads = |(slot, member): (Slot, &Member)| {
            slot != own && member.facts.streams && context.readers.contains(slot)
        };
        context.facts.streams && self.members.in_any_order().any(reads)
    }

    /// See [`Router::decode_wait`].
    pub fn decode_wait(
        &mut self,
        model: &ModelFingerprint,
        service: Service,
        now: Instant,
        tokens: (usize, usize),
    ) -> Duration {
        self.router
            .decode_wait(&self.members, model, service, now, tokens)
    }

    /// See [`Router::answered`].
    pub fn answered(&mut self, computed: usize, tokens: usize) {
        self.router.answered(computed, tokens);
    }

    /// See [`Router::lifetime_tokens`].
    pub fn lifetime_tokens(&self, prompt_tokens: usize, max_tokens: usize) -> usize {
        self.router.lifetime_tokens(prompt_tokens, max_tokens)
    }

    /// A job of ours begins on a worker.
    pub fn begin(&mut self, worker: &WorkerId, job: Outstanding) {
        let slot = self.members.slot(worker);
        self.router.begin(slot, worker, job);
        if let Some(slot) = slot {
            self.router.refresh(&self.members, slot);
        }
    }

    /// It ends.
    pub fn end(&mut self, worker: &WorkerId, job: Outstanding) {
        let slot = self.members.slot(worker);
        self.router.end(slot, worker, job);
        if let Some(slot) = slot {
            self.router.refresh(&self.members, slot);
        }
    }

    /// This worker has run this prompt.
    pub fn remember(&mut self, worker: &WorkerId, chain: &[u64]) {
        if let Some(slot) = self.members.slot(worker) {
            self.router.remember(slot, chain);
        }
    }

    /// This worker is about to run this prompt.
    pub fn expect(&mut self, worker: &WorkerId, chain: &[u64]) {
        if let Some(slot) = self.members.slot(worker) {
            self.router.expect(slot, chain);
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
