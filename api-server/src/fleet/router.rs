//! Which worker gets a job: the context worker that will have run the prompt soonest, counting what its
//! prefix index probably holds, and the least-loaded decode worker that can reach the KV.
//!
//! Several API servers choose without knowing of each other's choices but by the workers' beats, up to a second old. What is
//! its own a router counts exactly. Of what the others had at the last beat it makes good its own part only, one of as many as
//! there are API servers: together they level the whole of it. Were each to level all of it, they would all run to where
//! the load was least a second ago, and back at the next beat; with three of them the swing doubles each time.
//!
//! Pure: membership and time come in, a choice goes out.

mod prefixes;
mod wait;

use std::collections::HashMap;

use baton_protocol::{KvHandle, ModelFingerprint, Role, WorkerId};
use tokio::time::Instant;

pub use self::prefixes::prefix_chain;

use self::prefixes::{PREFIX_BLOCK_TOKENS, Prefixes};
use crate::fleet::membership::{Member, Membership, SUSPECT_AFTER, Slot, SlotSet};
use crate::request::lifecycle::Target;

/// What one more job ahead costs, in prompt tokens: decides between workers with equal queues.
const JOB_COST_TOKENS: usize = 16;

/// What this API server has under way on one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outstanding {
    /// Prompts being run.
    pub prefills: usize,
    /// Tokens of these prompts.
    pub prefill_tokens: usize,
    /// Prompts that are done and wait for a decode worker.
    pub staged: usize,
    /// Generations under way.
    pub decodes: usize,
}

/// What the router remembers between choices.
#[derive(Debug, Default)]
pub struct Router {
    /// By slot.
    given: Vec<Given>,
    /// What is under way on workers that are no members.
    strays: HashMap<WorkerId, Outstanding>,
    prefixes: Prefixes,
    /// Choices so far of each kind: among equals each worker is chosen in turn.
    context_turn: usize,
    decode_turn: usize,
    scratch: Scratch,
}

/// What is ours on one member.
#[derive(Clone, Copy, Debug, Default)]
struct Given {
    now: Outstanding,
    /// When its last beat came.
    at_beat: Outstanding,
}

/// Memory of one choice, kept for the next.
#[derive(Debug, Default)]
struct Scratch {
    refused: SlotSet,
    failed: SlotSet,
    decoders: SlotSet,
    candidates: Vec<(Cost, Slot)>,
}

/// What a choice costs; the first that differs decides.
type Cost = (usize, usize, usize);

/// What a choice must respect.
#[derive(Clone, Copy, Debug)]
pub struct Constraints<'a> {
    /// The model.
    pub model: &'a ModelFingerprint,
    /// Not these.
    pub refused: &'a [WorkerId],
    /// These only if there is no other.
    pub failed: &'a [WorkerId],
    /// Now.
    pub now: Instant,
}

/// Tells who may get jobs for a model, by their facts alone.
#[derive(Clone, Copy)]
struct Serving {
    model: u32,
    /// Who was heard last at this time or before is suspect.
    suspect: Option<Instant>,
}

impl Serving {
    /// `None` if no member has this model.
    fn new(members: &Membership, model: &ModelFingerprint, now: Instant) -> Option<Self> {
        Some(Self {
            model: members.model(model)?,
            suspect: now.checked_sub(SUSPECT_AFTER),
        })
    }

    fn has(self, member: &Member) -> bool {
        let facts = &member.facts;
        facts.takes_jobs
            && facts.model == self.model
            && self.suspect.is_none_or(|suspect| member.seen > suspect)
    }
}

impl Scratch {
    fn begin(&mut self, members: &Membership, rules: &Constraints<'_>) {
        for (set, names) in [
            (&mut self.refused, rules.refused),
            (&mut self.failed, rules.failed),
        ] {
            set.clear();
            let slots = names.iter().filter_map(|name| members.slot(name));
            slots.for_each(|slot| set.insert(slot));
        }
        self.candidates.clear();
    }

    /// 1 for a worker that failed this request already.
    fn blame(&self, slot: Slot) -> usize {
        usize::from(self.failed.contains(slot))
    }

    /// The cheapest; among equals each in turn.
    fn best(&self, turn: usize) -> Option<Slot> {
        let from = turn % self.candidates.len().max(1);
        let (before, after) = self.candidates.split_at(from);
        let in_turn = after.iter().chain(before);
        in_turn.min_by_key(|(cost, _)| *cost).map(|(_, slot)| *slot)
    }
}

impl Router {
    /// The context worker for a prompt with this chain: of those whose KV some decode worker can
    /// reach, the one with the least left to compute before the prompt is done.
    pub fn choose_context(
        &mut self,
        members: &Membership,
        rules: Constraints<'_>,
        prompt_tokens: usize,
        chain: &[u64],
    ) -> Option<Target> {
        self.context_turn = self.context_turn.wrapping_add(1);
        let serving = Serving::new(members, rules.model, rules.now)?;
        let routers = members.api_server_count();
        let cached = self.prefixes.cached_blocks(chain);
        let scratch = &mut self.scratch;
        scratch.begin(members, &rules);
        scratch.decoders.clear();
        for (slot, member) in members.in_any_order() {
            if member.facts.role.decodes() && serving.has(member) {
                scratch.decoders.insert(slot);
            }
        }
        for (slot, member) in members.slots() {
            let may = member.facts.role.prefills()
                && serving.has(member)
                && !scratch.refused.contains(slot)
                && member.readers.intersects(&scratch.decoders);
            if !may {
                continue;
            }
            let have = cached.of(slot) * PREFIX_BLOCK_TOKENS;
            let Given { now: own, at_beat } = given(&self.given, slot);
            let load = &member.facts.load;
            // Others' share is what the beat says beyond what was ours when it came.
            let others_tokens =
                (load.waiting_tokens as usize).saturating_sub(at_beat.prefill_tokens);
            let others_jobs =
                (load.waiting as usize + load.running as usize).saturating_sub(at_beat.prefills);
            let tokens = prompt_tokens.saturating_sub(have)
                + own.prefill_tokens
                + own.prefills * JOB_COST_TOKENS
                + (others_tokens + others_jobs * JOB_COST_TOKENS) / routers;
            let cost = (scratch.blame(slot), 0, tokens);
            scratch.candidates.push((cost, slot));
        }
        let best = scratch.best(self.context_turn)?;
        members.at(best).map(Member::target)
    }

    /// The decode worker for this handle: its own context worker if that decodes too, else the
    /// least-loaded one that can read it.
    pub fn choose_decode(
        &mut self,
        members: &Membership,
        rules: Constraints<'_>,
        handle: &KvHandle,
    ) -> Option<Target> {
        self.decode_turn = self.decode_turn.wrapping_add(1);
        let serving = Serving::new(members, rules.model, rules.now)?;
        let kv = members.geometry(&handle.kv)?;
        let routers = members.api_server_count();
        let context = members
            .slot(&handle.worker)
            .and_then(|slot| Some((slot, members.at(slot)?)))
            .filter(|(_, member)| member.beat.incarnation == handle.incarnation);
        // Of one that has not beaten in this incarnation there is no set of readers: each is asked.
        let unheard = context.is_none().then(|| Target {
            worker: handle.worker.clone(),
            incarnation: handle.incarnation,
        });
        let reads = |slot: Slot, member: &Member| match (&context, &unheard) {
            (Some((_, context)), _) => context.readers.contains(slot),
            (None, Some(context)) => member.reaches(context),
            (None, None) => false,
        };
        let scratch = &mut self.scratch;
        scratch.begin(members, &rules);
        for (slot, member) in members.slots() {
            let facts = &member.facts;
            let may = facts.role.decodes()
                && facts.kv == kv
                && serving.has(member)
                && !scratch.refused.contains(slot)
                && reads(slot, member);
            if !may {
                continue;
            }
            let is_own = context.is_some_and(|(context, _)| context == slot);
            let foreign = !(is_own && facts.role == Role::Both);
            let Given { now: own, at_beat } = given(&self.given, slot);
            let load = &facts.load;
            let beaten = [load.waiting, load.running, load.pulling].map(|n| n as usize);
            let beaten: usize = beaten.iter().sum();
            let others = beaten.saturating_sub(at_beat.decodes);
            let jobs = own.decodes * 1024 + others * 1024 / routers;
            let share = jobs / (facts.capacity.batch.max(1) as usize);
            let cost = (scratch.blame(slot), usize::from(foreign), share);
            scratch.candidates.push((cost, slot));
        }
        let best = scratch.best(self.decode_turn)?;
        members.at(best).map(Member::target)
    }

    /// A worker joined: what is under way on one of this name is its own.
    pub fn joined(&mut self, slot: Slot, worker: &WorkerId) {
        if slot >= self.given.len() {
            self.given.resize(slot + 1, Given::default());
        }
        self.given[slot].now = self.strays.remove(worker).unwrap_or_default();
        self.beaten(slot);
    }

    /// A beat came: remember what was ours of the load it tells.
    pub fn beaten(&mut self, slot: Slot) {
        if let Some(given) = self.given.get_mut(slot) {
            given.at_beat = given.now;
        }
    }

    /// A worker was restarted: nothing that it had is there any more.
    pub fn restarted(&mut self, slot: Slot) {
        if let Some(given) = self.given.get_mut(slot) {
            given.at_beat = Outstanding::default();
        }
        self.prefixes.forget(slot);
    }

    /// A worker has left its slot.
    pub fn left(&mut self, slot: Slot, worker: &WorkerId) {
        self.prefixes.forget(slot);
        let Some(given) = self.given.get_mut(slot) else {
            return;
        };
        let left = std::mem::take(given).now;
        if left != Outstanding::default() {
            self.strays.insert(worker.clone(), left);
        }
    }

    /// A job of ours begins on a worker; `slot`: its own, if it is a member.
    pub fn begin(&mut self, slot: Option<Slot>, worker: &WorkerId, job: Outstanding) {
        let own = match slot.and_then(|slot| self.given.get_mut(slot)) {
            Some(given) => &mut given.now,
            None => self.strays.entry(worker.clone()).or_default(),
        };
        own.prefills += job.prefills;
        own.prefill_tokens += job.prefill_tokens;
        own.staged += job.staged;
        own.decodes += job.decodes;
    }

    /// It ends.
    pub fn end(&mut self, slot: Option<Slot>, worker: &WorkerId, job: Outstanding) {
        let own = match slot.and_then(|slot| self.given.get_mut(slot)) {
            Some(given) => &mut given.now,
            None => match self.strays.get_mut(worker) {
                Some(own) => own,
                None => return,
            },
        };
        own.prefills = own.prefills.saturating_sub(job.prefills);
        own.prefill_tokens = own.prefill_tokens.saturating_sub(job.prefill_tokens);
        own.staged = own.staged.saturating_sub(job.staged);
        own.decodes = own.decodes.saturating_sub(job.decodes);
        if slot.is_none() && *own == Outstanding::default() {
            self.strays.remove(worker);
        }
    }

    /// Whether nothing of ours is under way anywhere.
    #[cfg(any(test, feature = "simulation"))]
    pub fn is_idle(&self) -> bool {
        let is_idle = |given: &Given| given.now == Outstanding::default();
        self.strays.is_empty() && self.given.iter().all(is_idle)
    }

    /// The worker in this slot has run this prompt.
    pub fn remember(&mut self, slot: Slot, chain: &[u64]) {
        self.prefixes.insert(slot, chain);
    }
}

fn given(all: &[Given], slot: Slot) -> Given {
    all.get(slot).copied().unwrap_or_default()
}

#[cfg(test)]
mod plain;
#[cfg(test)]
mod tests;
