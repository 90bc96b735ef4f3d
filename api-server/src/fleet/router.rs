//! Which worker gets a job: the context worker that will have run the prompt soonest, counting what its
//! prefix index holds, and a decode worker that can reach the KV.
//!
//! Where all workers tell what their steps cost, both are chosen by time ([`by_time`]); else by tokens and jobs.
//!
//! Several API servers choose without knowing of each other's choices but by the workers' beats, up to a second old. What is
//! its own a router counts exactly. Of what the others had at the last beat it makes good its own part only, one of as many as
//! there are API servers: together they level the whole of it. Were each to level all of it, they would all run to where
//! the load was least a second ago, and back at the next beat; with three of them the swing doubles each time.
//!
//! Pure: membership and time come in, a choice goes out.

mod by_time;
mod cached;
mod columns;
mod eligible;
mod prefixes;
mod reported;
mod source;
mod wait;

use std::collections::HashMap;
use std::time::Duration;

use baton_protocol::{KvHandle, ModelFingerprint, Role, Service, Tier, WorkerId};
use tokio::time::Instant;

pub use self::reported::{AskAll, Paged, Reported};
pub use self::source::Source;

use self::by_time::Arrives;
use self::cached::Cached;
use self::columns::{BLAME, Columns, Keys, LANES, Lane};
use self::eligible::Eligible;
use self::prefixes::Prefixes;
use self::source::Pulls;
use self::wait::Room;
use crate::fleet::membership::{Member, Membership, Slot, SlotSet, limit_us};
use crate::request::lifecycle::Target;

/// What one more job ahead costs, in prompt tokens: decides between workers with equal queues.
const JOB_COST_TOKENS: usize = 16;

/// What a decode worker that has all of a prompt may have more to do than others, in 1,024ths of its batch: an eighth, as by time
/// ([`by_time::Generates`]). So much is it worth that KV is not moved.
const CACHED_SHARE: usize = 128;

/// Tokens of an answer, before the first one has ended. Rather too many: what a cluster takes at its start it has for as long as answers last.
const OUTPUT_GUESS: f32 = 512.0;

/// Part of an answer in the mean length of answers.
const OUTPUT_PART: f32 = 1.0 / 64.0;

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
    /// Tokens that these are expected to have in the mean of their time ([`Router::lifetime_tokens`]).
    pub decode_tokens: usize,
    /// Tokens of the prompts that belong to batch requests.
    pub batch_tokens: usize,
    /// Prompts of batch requests among those that run or are done.
    pub batch_prompts: usize,
    /// Generations of batch requests.
    pub batch_decodes: usize,
    /// Generations whose KV is under way from another worker.
    pub pulls: usize,
    /// Tokens of that KV.
    pub pull_tokens: usize,
}

/// What the router remembers between choices.
#[derive(Debug, Default)]
pub struct Router {
    /// By slot.
    given: Vec<Given>,
    /// What is under way on workers that are no members.
    strays: HashMap<WorkerId, Outstanding>,
    /// What workers were sent.
    prefixes: Prefixes,
    /// What workers say that they have.
    pub reported: Reported,
    /// Who may get jobs.
    eligible: Eligible,
    /// What choices by time read of all workers. They are those of so many API servers:
    columns: Columns,
    routers: usize,
    /// What waits for places depend on, by slot.
    rooms: Vec<Room>,
    /// Choices so far of each kind: among equals each worker is chosen in turn.
    context_turn: usize,
    decode_turn: usize,
    /// Part of the workers that could run the last prompt which had others to run.
    prompts_wait: f32,
    /// Tokens of the answers that have ended, in the mean of the last ones; `None` before the first.
    output_tokens: Option<f32>,
    /// Tokens of their prompts that had to be computed, likewise.
    prompt_tokens: Option<f32>,
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
    /// Who reads the KV of a worker that is not known.
    readers: SlotSet,
    keys: Keys,
    /// Where somebody does not say what its steps cost.
    candidates: Vec<(Cost, Slot)>,
    cached: Cached,
    /// What workers said of it, without what is guessed.
    told: Cached,
}

/// What a choice costs by tokens and jobs; the first that differs decides.
type Cost = (usize, usize, usize);

/// How long a prompt's first token takes on some worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstToken {
    /// If the worker had nothing else to do.
    pub alone: Duration,
    /// With all that is there before it.
    pub expected: Duration,
}

/// What a choice must respect.
#[derive(Clone, Copy, Debug)]
pub struct Constraints<'a> {
    /// The model.
    pub model: &'a ModelFingerprint,
    /// Not these.
    pub refused: &'a [WorkerId],
    /// These only if there is no other.
    pub failed: &'a [WorkerId],
    /// What the request was promised.
    pub service: Service,
    /// Most tokens of its answer.
    pub max_tokens: usize,
    /// Now.
    pub now: Instant,
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

    /// Tokens of the prompt that was looked up that this worker has the KV of.
    fn cached_tokens(&self, slot: Slot, member: &Member) -> usize {
        self.cached.of(slot) * member.facts.block_tokens as usize
    }

    /// 1 for a worker that failed this request already.
    fn blame(&self, slot: Slot) -> usize {
        usize::from(self.failed.contains(slot))
    }

    /// The best by its key; among equals each in turn.
    fn best_by_time(&mut self, turn: usize) -> Option<Slot> {
        for slot in self.failed.iter() {
            if let Some(key) = self.keys.of(slot) {
                *key |= BLAME;
            }
        }
        self.keys.best(turn)
    }

    /// The cheapest; among equals each in turn.
    fn cheapest(&self, turn: usize) -> Option<Slot> {
        let least = self.candidates.iter().map(|(cost, _)| *cost).min()?;
        let equals = || self.candidates.iter().filter(|(cost, _)| *cost == least);
        let mut in_turn = equals().skip(turn % equals().count());
        in_turn.next().map(|(_, slot)| *slot)
    }
}

/// Those of the slots from `32 * at` on that a choice asks.
type Asked<'a> = &'a dyn Fn(usize) -> u32;

/// Their slots, ascending.
fn slots_of(asked: Asked<'_>, rows: usize) -> impl Iterator<Item = Slot> {
    let of_row = move |at: usize| {
        let word = asked(at);
        (0..LANES)
            .filter(move |bit| word >> bit & 1 == 1)
            .map(move |bit| at * LANES + bit)
    };
    (0..rows).flat_map(of_row)
}

impl Router {
    /// The context worker for a prompt with this chain: of those whose KV some decode worker can
    /// reach, the one with the least left to compute before the prompt is done, in time if all tell what it takes. With it the worker that
    /// the prompt's beginning is to be pulled from, if that is quicker than to compute it, or to wait for who has it.
    pub fn choose_context(
        &mut self,
        members: &Membership,
        rules: Constraints<'_>,
        prompt_tokens: usize,
        chain: &[u64],
    ) -> Option<(Target, Option<Source>)> {
        self.context_turn = self.context_turn.wrapping_add(1);
        if !self.eligible.bring_up(members, rules.model, rules.now) {
            return None;
        }
        self.look_up(chain);
        self.count_routers(members);
        let Self {
            scratch, eligible, ..
        } = self;
        scratch.begin(members, &rules);
        let rows = members.slots_end().div_ceil(LANES);
        let Scratch { refused, keys, .. } = scratch;
        let asked = |at: usize| eligible.contexts.word(at) & !refused.word(at);
        let timed = |at: usize| asked(at) & eligible.timed.word(at);
        let tier = match rules.service.tier {
            Tier::Interactive => 0,
            Tier::Batch => 1,
        };
        let busy = self.columns.prompt_keys(
            keys,
            timed,
            scratch.cached.all(),
            (tier, prompt_tokens as f32),
        );
        let of = |set: Asked<'_>| (0..rows).map(|at| set(at).count_ones()).sum::<u32>();
        self.prompts_wait = busy as f32 / of(&timed).max(1) as f32;
        if of(&asked) != of(&timed) {
            let asked: Vec<Slot> = slots_of(&asked, rows).collect();
            self.context_by_tokens(members, &asked, prompt_tokens);
            let best = self.scratch.cheapest(self.context_turn)?;
            return Some((members.at(best)?.target(), None));
        }
        let best = scratch.best_by_time(self.context_turn)?;
        let mut pulls = Pulls {
            members,
            eligible,
            columns: &self.columns,
            scratch,
            turn: self.context_turn,
        };
        let (best, source) = match pulls.sooner_than(best, tier, prompt_tokens) {
            Some((reader, source)) => (reader, Some(source)),
            None => (best, None),
        };
        Some((members.at(best)?.target(), source))
    }

    fn context_by_tokens(&mut self, members: &Membership, asked: &[Slot], prompt_tokens: usize) {
        for slot in asked {
            let Some(member) = members.at(*slot) else {
                continue;
            };
            let have = self.scratch.cached_tokens(*slot, member);
            let Given { now: own, at_beat } = given(&self.given, *slot);
            let load = &member.facts.load;
            // Others' share is what the beat says beyond what was ours when it came.
            let others_tokens =
                (load.waiting_tokens as usize).saturating_sub(at_beat.prefill_tokens);
            let others_jobs =
                (load.waiting as usize + load.running as usize).saturating_sub(at_beat.prefills);
            let tokens = prompt_tokens.saturating_sub(have)
                + own.prefill_tokens
                + own.prefills * JOB_COST_TOKENS
                + (others_tokens + others_jobs * JOB_COST_TOKENS) / self.routers;
            let cost = (self.scratch.blame(*slot), 0, tokens);
            self.scratch.candidates.push((cost, *slot));
        }
    }

    /// When a prompt with this chain would have its first token from this worker, as far as anybody can tell now, if its beginning is pulled
    /// from `source`. `None` if the worker does not say what its steps cost.
    pub fn first_token(
        &self,
        members: &Membership,
        slot: Slot,
        tier: Tier,
        prompt_tokens: usize,
        chain: &[u64],
        source: Option<&Source>,
    ) -> Option<FirstToken> {
        let facts = &members.at(slot)?.facts;
        let speed = facts.speed.as_ref()?;
        let own = self.cached_tokens(members, slot, chain);
        let (pulled, pull_us) = source.map_or((0, 0.0), |source| {
            (source.prefix.tokens as usize, source.pull_us)
        });
        let have = own.max(pulled);
        let queue = by_time::Queue::of(given(&self.given, slot), &facts.load, tier);
        let (need, have) = (prompt_tokens.saturating_sub(have) as f32, have as f32);
        // All of what others have there, not the part that a choice makes good.
        let expected = queue.first_token_us(speed, need, have) + pull_us;
        let alone = by_time::Pace::of(speed, false).first_token_us(0.0, need, have) + pull_us;
        let [alone, expected] = [alone, expected].map(|us| Duration::from_micros(us as u64));
        Some(FirstToken { alone, expected })
    }

    /// The decode worker for this handle of the prompt with this chain: by time as [`by_time::Generates`] says; else its own context worker if that
    /// decodes too, else the least-loaded one that can read it. One that has some of the prompt counts as less loaded.
    pub fn choose_decode(
        &mut self,
        members: &Membership,
        rules: Constraints<'_>,
        handle: &KvHandle,
        chain: &[u64],
    ) -> Option<Target> {
        self.decode_turn = self.decode_turn.wrapping_add(1);
        self.look_up(chain);
        if !self.eligible.bring_up(members, rules.model, rules.now) {
            return None;
        }
        let kv = members.geometry(&handle.kv)?;
        self.eligible.choose_geometry(members, kv);
        self.count_routers(members);
        let tokens = (handle.valid_tokens as usize).max(1);
        let arrives = Arrives {
            tokens: tokens as f32,
            lifetime_tokens: self.lifetime_tokens(tokens, rules.max_tokens) as f32,
            limit_us: rules.service.itl_ms.map_or(0.0, limit_us),
            late_steps: by_time::LATE_PART * self.output_tokens(rules.max_tokens) as f32,
            packs: self.prompts_wait >= by_time::PACK_FROM,
        };
        let context = members
            .slot(&handle.worker)
            .and_then(|slot| Some((slot, members.at(slot)?)))
            .filter(|(_, member)| member.beat.incarnation == handle.incarnation);
        let Self {
            scratch, eligible, ..
        } = self;
        scratch.begin(members, &rules);
        if context.is_none() {
            // Of one that has not beaten in this incarnation there is no set of readers: each is asked.
            let unheard = Target {
                worker: handle.worker.clone(),
                incarnation: handle.incarnation,
            };
            let reaches = |slot: &Slot| members.at(*slot).is_some_and(|m| m.reaches(&unheard));
            scratch.readers.clear();
            let readers = eligible.of_geometry.iter().filter(reaches);
            readers.for_each(|slot| scratch.readers.insert(slot));
        }
        let readers = match &context {
            Some((_, context)) => &*context.readers,
            None => &scratch.readers,
        };
        let own = context.filter(|(_, member)| member.facts.role == Role::Both);
        let own = own.map(|(slot, _)| slot);
        let rows = members.slots_end().div_ceil(LANES);
        let Scratch { refused, keys, .. } = scratch;
        let asked =
            |at: usize| eligible.of_geometry.word(at) & readers.word(at) & !refused.word(at);
        let is_timed = |at: usize| asked(at) & !eligible.timed.word(at) == 0;
        let best = match (0..rows).all(is_timed) {
            true => {
                let blocks = scratch.cached.all();
                self.columns.place_keys(keys, asked, blocks, arrives);
                if let Some(own) = own
                    && let Some(key) = keys.of(own)
                {
                    *key = self.columns.generates(own).own_key(arrives);
                }
                scratch.best_by_time(self.decode_turn)
            }
            false => {
                let asked: Vec<Slot> = slots_of(&asked, rows).collect();
                self.decode_by_jobs(members, &asked, own, tokens);
                self.scratch.cheapest(self.decode_turn)
            }
        };
        members.at(best?).map(Member::target)
    }

    fn decode_by_jobs(
        &mut self,
        members: &Membership,
        asked: &[Slot],
        own: Option<Slot>,
        tokens: usize,
    ) {
        for slot in asked {
            let Some(member) = members.at(*slot) else {
                continue;
            };
            let facts = &member.facts;
            let Given { now: mine, at_beat } = given(&self.given, *slot);
            let load = &facts.load;
            let beaten = [load.waiting, load.running, load.pulling].map(|n| n as usize);
            let beaten: usize = beaten.iter().sum();
            let others = beaten.saturating_sub(at_beat.decodes);
            let jobs = mine.decodes * 1024 + others * 1024 / self.routers;
            let share = jobs / (facts.capacity.batch.max(1) as usize);
            let have = self.scratch.cached_tokens(*slot, member);
            // What is below 0 counts too: CACHED_SHARE is 0 for all.
            let share = share + CACHED_SHARE - CACHED_SHARE * have.min(tokens) / tokens;
            let foreign = usize::from(own != Some(*slot));
            let cost = (self.scratch.blame(*slot), foreign, share);
            self.scratch.candidates.push((cost, *slot));
        }
    }

    /// What choices read of the worker in this slot is as it is known now.
    pub fn refresh(&mut self, members: &Membership, slot: Slot) {
        if let Some(member) = members.at(slot) {
            let lane = Lane::of(given(&self.given, slot), &member.facts, self.routers);
            self.columns.put(slot, lane);
            if slot >= self.rooms.len() {
                self.rooms.resize(slot + 1, Room::default());
            }
            self.rooms[slot] = Room::of(given(&self.given, slot), &member.facts);
        }
    }

    /// There may be more API servers now, or fewer.
    fn count_routers(&mut self, members: &Membership) {
        let routers = members.api_server_count();
        if routers != self.routers {
            self.routers = routers;
            (0..members.slots_end()).for_each(|slot| self.refresh(members, slot));
        }
    }

    /// Tokens of the prompt with this chain whose KV the worker in this slot has, as far as anybody can tell now.
    pub fn cached_tokens(&self, members: &Membership, slot: Slot, chain: &[u64]) -> usize {
        let guessed = self.prefixes.blocks_of(slot, chain);
        let blocks = guessed.max(self.reported.blocks_of(slot, chain));
        let facts = members.at(slot).map(|member| &member.facts);
        facts.map_or(0, |facts| blocks * facts.block_tokens as usize)
    }

    /// Looks up who has how much of a prompt.
    fn look_up(&mut self, chain: &[u64]) {
        let Scratch { cached, told, .. } = &mut self.scratch;
        cached.clear();
        told.clear();
        self.prefixes.cached(chain, cached);
        self.reported.cached(chain, told);
        cached.raise_all(told);
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
        self.forget_prefixes(slot);
    }

    /// A worker has left its slot.
    pub fn left(&mut self, slot: Slot, worker: &WorkerId) {
        self.forget_prefixes(slot);
        self.columns.put(slot, Lane::default());
        if let Some(room) = self.rooms.get_mut(slot) {
            *room = Room::default();
        }
        let Some(given) = self.given.get_mut(slot) else {
            return;
        };
        let left = std::mem::take(given).now;
        if left != Outstanding::default() {
            self.strays.insert(worker.clone(), left);
        }
    }

    fn forget_prefixes(&mut self, slot: Slot) {
        self.prefixes.forget(slot);
        self.reported.left(slot);
    }

    /// A beat named the worker's last report of its prefixes, if it reports them.
    pub fn told_prefixes(&mut self, slot: Slot, version: Option<u64>) {
        self.reported.beat(slot, version);
        if self.reported.knows(slot) {
            self.prefixes.age(slot);
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
        own.decode_tokens += job.decode_tokens;
        own.batch_tokens += job.batch_tokens;
        own.batch_prompts += job.batch_prompts;
        own.batch_decodes += job.batch_decodes;
        own.pulls += job.pulls;
        own.pull_tokens += job.pull_tokens;
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
        own.decode_tokens = own.decode_tokens.saturating_sub(job.decode_tokens);
        own.batch_tokens = own.batch_tokens.saturating_sub(job.batch_tokens);
        own.batch_prompts = own.batch_prompts.saturating_sub(job.batch_prompts);
        own.batch_decodes = own.batch_decodes.saturating_sub(job.batch_decodes);
        own.pulls = own.pulls.saturating_sub(job.pulls);
        own.pull_tokens = own.pull_tokens.saturating_sub(job.pull_tokens);
        if slot.is_none() && *own == Outstanding::default() {
            self.strays.remove(worker);
        }
    }

    /// An answer has ended with so many tokens, to a prompt of which so many had to be computed.
    pub fn answered(&mut self, computed: usize, tokens: usize) {
        for (mean, tokens) in [
            (&mut self.prompt_tokens, computed),
            (&mut self.output_tokens, tokens),
        ] {
            let mean = mean.get_or_insert(tokens as f32);
            *mean += (tokens as f32 - *mean) * OUTPUT_PART;
        }
    }

    /// Tokens that an answer of at most so many is expected to have.
    fn output_tokens(&self, max_tokens: usize) -> usize {
        let mean = self.output_tokens.unwrap_or(OUTPUT_GUESS);
        max_tokens.min(mean.round() as usize).max(1)
    }

    /// Tokens that a sequence is expected to have in the mean of the time in which it generates: its prompt and half of its answer.
    pub fn lifetime_tokens(&self, prompt_tokens: usize, max_tokens: usize) -> usize {
        prompt_tokens.saturating_add(self.output_tokens(max_tokens) / 2)
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

    /// The worker in this slot is about to run this prompt. One that reports will say whether it did.
    pub fn expect(&mut self, slot: Slot, chain: &[u64]) {
        if self.reported.knows(slot) {
            self.prefixes.insert(slot, chain);
        }
    }
}

fn given(all: &[Given], slot: Slot) -> Given {
    all.get(slot).copied().unwrap_or_default()
}

#[cfg(test)]
mod plain;
#[cfg(test)]
mod tests;
