//! What is the matter with the cluster, in sentences for people. Work for a clone of the membership: some of it looks at every
//! pair of workers.

use baton_protocol::limits::SEQUENCE_TOKENS_MIN;
use baton_protocol::{ModelFingerprint, PeerState, Role, WorkerState};
use tokio::time::Instant;

use super::{Member, Membership, Slot, SlotSet};

/// Most complaints that are made at once.
const COMPLAINTS_MAX: usize = 16;

impl Membership {
    /// Why requests for this model cannot be served now; empty if they can.
    pub fn faults(&self, model: &ModelFingerprint, now: Instant) -> Vec<String> {
        let contexts: Vec<_> = self.serving(model, now, Role::prefills).collect();
        let decoders: SlotSet = self
            .serving(model, now, Role::decodes)
            .map(|(slot, _)| slot)
            .collect();
        let mut faults = Vec::new();
        if contexts.is_empty() {
            faults.push(self.nobody("context", Role::prefills, now));
        }
        if decoders.iter().next().is_none() {
            faults.push(self.nobody("decode", Role::decodes, now));
        }
        let is_read = |(_, context): &(_, &Member)| context.readers.intersects(&decoders);
        if faults.is_empty() && !contexts.iter().any(is_read) {
            faults.push("no decode worker can read KV from a context worker".to_owned());
        }
        faults
    }

    /// That the workers' KV holds no sequence worth serving, if so.
    pub fn too_small(&self, model: &ModelFingerprint, now: Instant) -> Option<String> {
        let (held, longest) = self.longest_sequence(model, now)?;
        (held < SEQUENCE_TOKENS_MIN.min(longest)).then(|| {
            format!(
                "the workers' KV holds sequences of {held} tokens at most: give them more (--kv-mib)"
            )
        })
    }

    /// Tokens of the longest sequence for which a context and a decode worker that reaches it both have KV, and of the model's
    /// longest; none if there is no such pair.
    pub fn longest_sequence(&self, model: &ModelFingerprint, now: Instant) -> Option<(u32, u32)> {
        let mut holds = vec![0; self.slots_end()];
        for (slot, decoder) in self.serving(model, now, Role::decodes) {
            holds[slot] = decoder.holds();
        }
        let decoders: SlotSet = self
            .serving(model, now, Role::decodes)
            .map(|(slot, _)| slot)
            .collect();
        self.serving(model, now, Role::prefills)
            .filter_map(|(_, context)| {
                let readers = context.readers.iter();
                let held = readers
                    .filter(|reader| decoders.contains(*reader))
                    .map(|reader| holds[reader])
                    .max()?;
                let longest = context.beat.model.tokens_max;
                Some((context.holds().min(held).min(longest), longest))
            })
            .max()
    }

    /// Workers of this role that may get jobs for this model.
    fn serving<'a>(
        &'a self,
        model: &'a ModelFingerprint,
        now: Instant,
        has: fn(Role) -> bool,
    ) -> impl Iterator<Item = (Slot, &'a Member)> {
        self.slots()
            .filter(move |(_, member)| has(member.beat.role) && member.serves(model, now))
    }

    /// Links for KV of this model that are broken, each with its last error. Requests go round them.
    pub fn broken_links(&self, model: &ModelFingerprint, now: Instant) -> Vec<String> {
        let mut broken: Vec<String> = self
            .workers()
            .filter(|m| m.serves(model, now))
            .flat_map(|m| m.peers.iter().map(move |peer| (m, peer)))
            .filter(|(_, peer)| peer.state != PeerState::Ready)
            .filter_map(|(m, peer)| {
                // one that is being connected for the first time has no error yet
                let error = peer.error.as_deref()?;
                let (reader, owner) = (&m.beat.worker, &peer.worker);
                Some(format!("{reader} cannot read KV from {owner}: {error}"))
            })
            .collect();
        broken.sort_unstable();
        broken
    }

    /// What is the matter with workers, also where another one stands in.
    pub fn complaints(&self, now: Instant) -> Vec<String> {
        let complaints = self
            .workers()
            .filter(|m| m.beat.state != WorkerState::Draining)
            .filter_map(|member| member.complaint(now));
        complaints.take(COMPLAINTS_MAX).collect()
    }

    /// That no worker of this role serves, and why not those that there are.
    fn nobody(&self, role: &str, has: fn(Role) -> bool, now: Instant) -> String {
        let members = self.workers().filter(|m| has(m.beat.role));
        let mut why: Vec<_> = members.filter_map(|m| m.complaint(now)).collect();
        why.sort_unstable();
        why.truncate(COMPLAINTS_MAX);
        match why.is_empty() {
            true => format!("no {role} worker serves the model"),
            false => format!("no {role} worker serves the model: {}", why.join("; ")),
        }
    }
}
