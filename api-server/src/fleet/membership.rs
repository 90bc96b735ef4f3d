//! Who is in the cluster: soft state, made of the last beat of each worker.
//!
//! Who can read whose KV is worked out when a beat comes, not when a worker is chosen: each member has the set of those that
//! can read it. A clone of the whole is cheap, because beats are shared: whoever renders or examines it at length takes one.

mod health;
mod member;
mod peers;
mod slots;
mod speed;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use baton_protocol::deadlines::{BEAT_INTERVAL_MS, GONE_AFTER_MS, SUSPECT_AFTER_MS};
use baton_protocol::{
    ApiBeat, ApiServerId, Beat, KvGeometry, ModelFingerprint, PeersReply, Role, WorkerId,
};
use tokio::time::Instant;

pub use self::member::{Facts, Member};
pub use self::slots::{Slot, SlotSet};
pub use self::speed::{Speed, limit_us};

use self::peers::HeardPeers;
use self::slots::Table;
use crate::request::lifecycle::Target;

/// Who is silent for this long gets nothing new.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(SUSPECT_AFTER_MS);
/// Who is silent for this long is gone.
pub const GONE_AFTER: Duration = Duration::from_millis(GONE_AFTER_MS);

/// Most workers that are remembered; beats of others are ignored.
pub const WORKERS_MAX: usize = 4096;

/// Most bytes that beats and peers of all workers take together. A peer takes some 150: 1,000 workers that do both and know each other
/// take 150 MB. Beats of workers that find no room are ignored as those of too many workers are.
pub const BEATS_BYTES_MAX: usize = 192 << 20;

/// A worker's peers are asked for this seldom: an answer comes within this time, or not at all.
pub const ASK_INTERVAL: Duration = Duration::from_millis(BEAT_INTERVAL_MS);

/// All workers and API servers heard of lately.
#[derive(Clone, Debug, Default)]
pub struct Membership {
    names: Arc<HashMap<WorkerId, Slot>>,
    /// Slots in the order of their members' names.
    order: Arc<Vec<Slot>>,
    /// By slot; those in between that are free are listed.
    members: Vec<Option<Member>>,
    free: Vec<Slot>,
    models: Table<ModelFingerprint>,
    geometries: Table<KvGeometry>,
    /// Bytes of the workers' beats.
    bytes: usize,
    /// Counts changes of who may get which jobs, but for silence.
    epoch: u64,
    api_servers: BTreeMap<ApiServerId, (ApiBeat, Instant)>,
}

/// What became of a beat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Of a worker that was not known.
    Joined(Slot),
    /// Of one that was.
    Known(Slot),
    /// Of one whose former life is over.
    Restarted(Slot, Target),
    /// Of a life that is over: it changes nothing.
    Late,
    /// There is no room for it: it changes nothing.
    NoRoom,
}

impl Membership {
    /// Takes a beat in.
    pub fn beat(&mut self, mut beat: Beat, now: Instant) -> Taken {
        let slot = self.names.get(&beat.worker).copied();
        let known = slot.and_then(|slot| self.members[slot].as_ref());
        if known.is_some_and(|known| known.former == Some(beat.incarnation)) {
            return Taken::Late;
        }
        let same_life = known.filter(|known| known.beat.incarnation == beat.incarnation);
        let heard = HeardPeers::of(&mut beat, same_life);
        let beat_bytes = beat.bytes() + heard.bytes;
        let bytes = self.bytes + beat_bytes - known.map_or(0, |known| known.bytes);
        if bytes > BEATS_BYTES_MAX || (known.is_none() && self.names.len() >= WORKERS_MAX) {
            return Taken::NoRoom;
        }
        self.bytes = bytes;
        let old = slot.and_then(|slot| self.members[slot].take());
        let (model, kv) = self.number(&beat, old.as_ref());
        let member = Member {
            facts: Facts {
                link_token_us: heard.link_token_us(&beat.kv, old.as_ref()),
                ..Facts::new(&beat, model, kv)
            },
            seen: now,
            readers: old
                .as_ref()
                .map(|old| Arc::clone(&old.readers))
                .unwrap_or_default(),
            former: old.as_ref().and_then(|old| old.former),
            bytes: beat_bytes,
            peers: heard.peers,
            peers_bytes: heard.bytes,
            version: heard.version,
            is_behind: heard.is_behind,
            asked: old.as_ref().and_then(|old| old.asked),
            beat: Arc::new(beat),
        };
        let stays = |old: &Member| old.silent(now) < SUSPECT_AFTER && old.facts.stay(&member.facts);
        if !old.as_ref().is_some_and(stays) {
            self.epoch += 1;
        }
        match (slot, old) {
            (Some(slot), Some(old)) => self.replace(slot, old, member),
            _ => Taken::Joined(self.join(member)),
        }
    }

    /// Numbers of its model and its geometry.
    fn number(&mut self, beat: &Beat, old: Option<&Member>) -> (u32, u32) {
        // Taken before the old ones are given: a value that stays keeps its number.
        let model = self.models.take(&beat.model.fingerprint);
        let kv = self.geometries.take(&beat.kv);
        if let Some(old) = old {
            self.models.give(old.facts.model);
            self.geometries.give(old.facts.kv);
        }
        (model, kv)
    }

    fn join(&mut self, member: Member) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.members.push(None);
            self.members.len() - 1
        });
        let at = self.order_of(&member.beat.worker);
        Arc::make_mut(&mut self.order).insert(at, slot);
        Arc::make_mut(&mut self.names).insert(member.beat.worker.clone(), slot);
        self.members[slot] = Some(member);
        self.find_readers(slot);
        self.reads(slot);
        slot
    }

    fn replace(&mut self, slot: Slot, old: Member, mut member: Member) -> Taken {
        let lost = (old.beat.incarnation != member.beat.incarnation).then(|| old.target());
        let same_reads = old.reads_the_same(&member);
        if let Some(lost) = &lost {
            member.former = Some(lost.incarnation);
        }
        self.members[slot] = Some(member);
        if lost.is_some() {
            self.find_readers(slot);
        }
        if !same_reads {
            self.reads(slot);
        }
        match lost {
            Some(lost) => Taken::Restarted(slot, lost),
            None => Taken::Known(slot),
        }
    }

    /// Whether this worker's peers are to be asked for now: a change of them was missed, and nobody asked just now.
    pub fn asks(&mut self, worker: &WorkerId, now: Instant) -> bool {
        let member = self
            .names
            .get(worker)
            .and_then(|slot| self.members[*slot].as_mut());
        let Some(member) = member.filter(|member| member.is_behind) else {
            return false;
        };
        let is_due = |asked| now.saturating_duration_since(asked) >= ASK_INTERVAL;
        let asks = member.asked.is_none_or(is_due);
        if asks {
            member.asked = Some(now);
        }
        asks
    }

    /// Takes in all peers of a worker. An answer that beats have overtaken, or of another life, changes nothing.
    pub fn peers(&mut self, reply: PeersReply) {
        let Some(slot) = self.slot(&reply.worker) else {
            return;
        };
        let Some(old) = self.members[slot].as_ref() else {
            return;
        };
        let is_late = old.version.is_some_and(|version| version > reply.version);
        if old.beat.incarnation != reply.incarnation || is_late {
            return;
        }
        let heard = HeardPeers::all(reply.peers, Some(reply.version));
        let bytes = old.bytes - old.peers_bytes + heard.bytes;
        if self.bytes - old.bytes + bytes > BEATS_BYTES_MAX {
            return;
        }
        self.bytes = self.bytes - old.bytes + bytes;
        let facts = Facts {
            link_token_us: heard.link_token_us(&old.beat.kv, None),
            ..old.facts
        };
        let member = Member {
            facts,
            peers: heard.peers,
            peers_bytes: heard.bytes,
            version: heard.version,
            is_behind: false,
            bytes,
            ..old.clone()
        };
        let same_reads = old.reads_the_same(&member);
        self.members[slot] = Some(member);
        if !same_reads {
            self.reads(slot);
        }
    }

    /// Works out who can read this member's KV.
    fn find_readers(&mut self, slot: Slot) {
        let Some(target) = self.members[slot].as_ref().map(Member::target) else {
            return;
        };
        let reads = |member: &Option<Member>| member.as_ref().is_some_and(|m| m.reaches(&target));
        let all = self.members.iter().enumerate();
        let readers = all.filter(|(_, member)| reads(member)).map(|(at, _)| at);
        let readers = Arc::new(readers.collect());
        self.epoch += 1;
        if let Some(member) = self.members[slot].as_mut() {
            member.readers = readers;
        }
    }

    /// Works out whose KV this member can read; nobody's if it has left.
    fn reads(&mut self, slot: Slot) {
        self.epoch += 1;
        for member in self.members.iter_mut().flatten() {
            if member.readers.contains(slot) {
                Arc::make_mut(&mut member.readers).remove(slot);
            }
        }
        let Some(reader) = self.members[slot].clone() else {
            return;
        };
        let own = (reader.beat.role == Role::Both).then_some(slot);
        let ready = reader.ready().filter_map(|peer| {
            let context = *self.names.get(&peer.worker)?;
            let beat = &self.members[context].as_ref()?.beat;
            (beat.incarnation == peer.incarnation).then_some(context)
        });
        let contexts: Vec<Slot> = ready.chain(own).collect();
        for context in contexts {
            if let Some(member) = self.members[context].as_mut() {
                Arc::make_mut(&mut member.readers).insert(slot);
            }
        }
    }

    /// Takes an API server's beat in. One that stands by gives no jobs, and is another's namesake.
    pub fn api_beat(&mut self, beat: ApiBeat, now: Instant) {
        if beat.stands_by() {
            return;
        }
        if self.api_servers.len() < WORKERS_MAX || self.api_servers.contains_key(&beat.api_server) {
            self.api_servers
                .insert(beat.api_server.clone(), (beat, now));
        }
    }

    /// The bus was away: a worker gets no job before it is heard again. It may not be connected yet, and a job for it would
    /// be lost.
    pub fn suspect_all(&mut self, now: Instant) {
        self.epoch += 1;
        if let Some(then) = now.checked_sub(SUSPECT_AFTER) {
            self.members
                .iter_mut()
                .flatten()
                .for_each(|member| member.seen = member.seen.min(then));
        }
    }

    /// Forgets who was silent for too long, and returns the workers among them, with the slots that they had.
    pub fn sweep(&mut self, now: Instant) -> Vec<(Slot, Target)> {
        let gone = |seen: Instant| now.saturating_duration_since(seen) >= GONE_AFTER;
        self.api_servers.retain(|_, (_, seen)| !gone(*seen));
        let lost: Vec<(Slot, Target)> = self
            .slots()
            .filter(|(_, member)| gone(member.seen))
            .map(|(slot, member)| (slot, member.target()))
            .collect();
        for (slot, target) in &lost {
            self.leave(*slot, &target.worker);
        }
        lost
    }

    fn leave(&mut self, slot: Slot, worker: &WorkerId) {
        let at = self.order_of(worker);
        let Some(member) = self.members[slot].take() else {
            return;
        };
        self.reads(slot);
        Arc::make_mut(&mut self.order).remove(at);
        Arc::make_mut(&mut self.names).remove(worker);
        self.models.give(member.facts.model);
        self.geometries.give(member.facts.kv);
        self.bytes -= member.bytes;
        self.free.push(slot);
    }

    /// Where in the order a worker of this name stands, or would.
    fn order_of(&self, worker: &WorkerId) -> usize {
        let is_before = |slot: &Slot| {
            let member = self.members[*slot].as_ref();
            member.is_some_and(|member| member.beat.worker < *worker)
        };
        self.order.partition_point(is_before)
    }

    /// The slot of the worker of this name.
    pub fn slot(&self, worker: &WorkerId) -> Option<Slot> {
        self.names.get(worker).copied()
    }

    /// The member in this slot.
    pub fn at(&self, slot: Slot) -> Option<&Member> {
        self.members.get(slot)?.as_ref()
    }

    /// The worker of this name.
    pub fn worker(&self, worker: &WorkerId) -> Option<&Member> {
        self.at(self.slot(worker)?)
    }

    /// All workers by name, with their slots.
    pub fn slots(&self) -> impl Iterator<Item = (Slot, &Member)> {
        let at = |slot: &Slot| Some((*slot, self.members[*slot].as_ref()?));
        self.order.iter().filter_map(at)
    }

    /// All workers with their slots, as they stand in memory: the fastest way round.
    pub fn in_any_order(&self) -> impl Iterator<Item = (Slot, &Member)> {
        let all = self.members.iter().enumerate();
        all.filter_map(|(slot, member)| Some((slot, member.as_ref()?)))
    }

    /// Another number each time that somebody may get other jobs than before, or other KV, for any reason but his silence.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// More than the largest slot.
    pub fn slots_end(&self) -> usize {
        self.members.len()
    }

    /// All workers by name.
    pub fn workers(&self) -> impl Iterator<Item = &Member> {
        self.slots().map(|(_, member)| member)
    }

    /// All API servers by name.
    pub fn api_servers(&self) -> impl Iterator<Item = &ApiBeat> {
        self.api_servers.values().map(|(beat, _)| beat)
    }

    /// How many API servers give jobs to the workers: this one, and others that were heard lately.
    pub fn api_server_count(&self) -> usize {
        self.api_servers.len().max(1)
    }

    /// The number that members of this model have in their facts; none if there are none.
    pub fn model(&self, fingerprint: &ModelFingerprint) -> Option<u32> {
        self.models.find(fingerprint)
    }

    /// The number that members of this KV geometry have in their facts; none if there are none.
    pub fn geometry(&self, kv: &KvGeometry) -> Option<u32> {
        self.geometries.find(kv)
    }
}

#[cfg(test)]
pub(crate) mod tests;
