//! Who may get jobs at all: worked out when somebody comes, goes or changes, or has been silent for too long, not for each choice.

use baton_protocol::{ModelFingerprint, Role};
use tokio::time::Instant;

use crate::fleet::membership::{Member, Membership, SUSPECT_AFTER, SlotSet};

/// Sets of slots for one model, as of one state of the membership.
#[derive(Debug, Default)]
pub(super) struct Eligible {
    of: Option<Of>,
    /// Those that serve the model at all.
    pub(super) serving: SlotSet,
    /// Those that pull the beginnings of prompts which they are to run.
    pub(super) prefix_readers: SlotSet,
    /// Those that generate.
    pub(super) decoders: SlotSet,
    /// Those that run prompts whose KV one of `decoders` reads.
    pub(super) contexts: SlotSet,
    /// Those of both that say what their steps cost.
    pub(super) timed: SlotSet,
    /// Those of `decoders` whose KV is laid out as was asked for last.
    pub(super) of_geometry: SlotSet,
    geometry: Option<u32>,
}

/// What the sets are of.
#[derive(Clone, Copy, Debug)]
struct Of {
    epoch: u64,
    model: u32,
    /// They are right from then
    from: Instant,
    /// until somebody in them has been silent for too long; none where nobody is in them.
    until: Option<Instant>,
}

impl Eligible {
    /// Makes the sets those of this model and time. False if no member has the model.
    pub(super) fn bring_up(
        &mut self,
        members: &Membership,
        model: &ModelFingerprint,
        now: Instant,
    ) -> bool {
        let Some(model) = members.model(model) else {
            return false;
        };
        let holds = |of: &Of| {
            of.epoch == members.epoch()
                && of.model == model
                && of.from <= now
                && of.until.is_none_or(|until| now < until)
        };
        if !self.of.as_ref().is_some_and(holds) {
            self.work_out(members, model, now);
        }
        true
    }

    fn work_out(&mut self, members: &Membership, model: u32, now: Instant) {
        let sets = [
            &mut self.serving,
            &mut self.prefix_readers,
            &mut self.decoders,
            &mut self.contexts,
            &mut self.timed,
            &mut self.of_geometry,
        ];
        sets.into_iter().for_each(SlotSet::clear);
        self.geometry = None;
        let mut until: Option<Instant> = None;
        let serves = |member: &Member| {
            member.facts.takes_jobs
                && member.facts.model == model
                && member.silent(now) < SUSPECT_AFTER
        };
        let serving = || members.in_any_order().filter(|(_, member)| serves(member));
        for (slot, member) in serving() {
            let suspect = member.seen + SUSPECT_AFTER;
            until = Some(until.map_or(suspect, |until| until.min(suspect)));
            self.serving.insert(slot);
            if member.facts.role == Role::Both && member.facts.leases_prefixes {
                self.prefix_readers.insert(slot);
            }
            if member.facts.role.decodes() {
                self.decoders.insert(slot);
            }
            if member.facts.speed.is_some() {
                self.timed.insert(slot);
            }
        }
        for (slot, member) in serving() {
            if member.facts.role.prefills() && member.readers.intersects(&self.decoders) {
                self.contexts.insert(slot);
            }
        }
        self.of = Some(Of {
            epoch: members.epoch(),
            model,
            from: now,
            until,
        });
    }

    /// Makes `of_geometry` the decoders of this geometry.
    pub(super) fn choose_geometry(&mut self, members: &Membership, geometry: u32) {
        if self.geometry == Some(geometry) {
            return;
        }
        self.geometry = Some(geometry);
        self.of_geometry.clear();
        for slot in self.decoders.iter() {
            if members
                .at(slot)
                .is_some_and(|member| member.facts.kv == geometry)
            {
                self.of_geometry.insert(slot);
            }
        }
    }
}
