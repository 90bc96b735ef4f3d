//! Which worker gets a job: the context worker that will have run the prompt soonest, counting what its
//! prefix index probably holds, and the least-loaded decode worker that can reach the KV.
//!
//! Several API servers choose without knowing of each other's choices but by the workers' beats, up to a second old. What is
//! its own a router counts exactly. Of what the others had at the last beat it makes good its own part only, one of as many as
//! there are API servers: together they level the whole of it. Were each to level all of it, they would all run to where
//! the load was least a second ago, and back at the next beat; with three of them the swing doubles each time.
//!
//! Pure: membership and time come in, a choice goes out.

mod wait;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};

use baton_protocol::{CacheSalt, KvHandle, ModelFingerprint, Role, WorkerId};
use tokio::time::Instant;

use crate::lifecycle::Target;
use crate::membership::{Member, Membership};

/// Tokens of one link of a prompt's hash chain.
pub const PREFIX_BLOCK_TOKENS: usize = 32;

/// Links that are remembered; the least recently used go first.
const PREFIXES_MAX: usize = 1 << 16;

/// Workers remembered for one prefix.
const HOLDERS_MAX: usize = 4;

/// What one more job ahead costs, in prompt tokens: decides between workers with equal queues.
const JOB_COST_TOKENS: usize = 16;

/// Hash of every full block of a prompt together with all before it, and with whose KV it may use.
pub fn prefix_chain(CacheSalt(salt): CacheSalt, prompt: &[u32]) -> Vec<u64> {
    let state = same_hasher();
    let mut link = salt as u64 ^ (salt >> 64) as u64;
    prompt
        .chunks_exact(PREFIX_BLOCK_TOKENS)
        .map(|block| {
            let mut hasher = state.build_hasher();
            hasher.write_u64(link);
            block.iter().for_each(|token| hasher.write_u32(*token));
            link = hasher.finish();
            link
        })
        .collect()
}

/// A hasher that is the same for the life of the process.
fn same_hasher() -> std::hash::BuildHasherDefault<std::collections::hash_map::DefaultHasher> {
    std::hash::BuildHasherDefault::default()
}

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
    own: HashMap<WorkerId, Outstanding>,
    own_at_beat: HashMap<WorkerId, Outstanding>,
    prefixes: PrefixMap,
    /// Choices so far of each kind: among equals each worker is chosen in turn.
    context_turn: usize,
    decode_turn: usize,
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
    /// Now.
    pub now: Instant,
}

impl Constraints<'_> {
    fn allow(&self, member: &Member) -> bool {
        member.serves(self.model, self.now) && !self.refused.contains(&member.beat.worker)
    }

    /// 1 for a worker that failed this request already.
    fn blame(&self, member: &Member) -> usize {
        usize::from(self.failed.contains(&member.beat.worker))
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
        let routers = members.api_server_count();
        let cached = self.prefixes.cached_blocks(chain);
        let reachable = |context: &Target| {
            members.workers().any(|m| {
                m.serves(rules.model, rules.now) && m.beat.role.decodes() && m.reaches(context)
            })
        };
        let mut candidates: Vec<&Member> = members
            .workers()
            .filter(|m| m.beat.role.prefills() && rules.allow(m) && reachable(&m.target()))
            .collect();
        candidates.sort_unstable_by(|a, b| a.beat.worker.cmp(&b.beat.worker));
        self.best(self.context_turn, &candidates, |member| {
            let have = cached.get(&member.beat.worker).copied().unwrap_or(0) * PREFIX_BLOCK_TOKENS;
            let own = self.own(&member.beat.worker);
            let then = self.own_at_beat(&member.beat.worker);
            let load = &member.beat.load;
            // Others' share is what the beat says beyond what was ours when it came.
            let others_tokens = (load.waiting_tokens as usize).saturating_sub(then.prefill_tokens);
            let others_jobs =
                (load.waiting as usize + load.running as usize).saturating_sub(then.prefills);
            let tokens = prompt_tokens.saturating_sub(have)
                + own.prefill_tokens
                + own.prefills * JOB_COST_TOKENS
                + (others_tokens + others_jobs * JOB_COST_TOKENS) / routers;
            (rules.blame(member), tokens)
        })
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
        let routers = members.api_server_count();
        let context = Target {
            worker: handle.worker.clone(),
            incarnation: handle.incarnation,
        };
        let mut candidates: Vec<&Member> = members
            .workers()
            .filter(|m| m.beat.role.decodes() && rules.allow(m) && m.reaches(&context))
            .filter(|m| m.beat.kv == handle.kv)
            .collect();
        candidates.sort_unstable_by(|a, b| a.beat.worker.cmp(&b.beat.worker));
        self.best(self.decode_turn, &candidates, |member| {
            let foreign = !(member.beat.role == Role::Both && member.target() == context);
            let own = self.own(&member.beat.worker);
            let then = self.own_at_beat(&member.beat.worker);
            let load = &member.beat.load;
            let beaten = [load.waiting, load.running, load.pulling].map(|n| n as usize);
            let beaten: usize = beaten.iter().sum();
            let others = beaten.saturating_sub(then.decodes);
            let jobs = own.decodes * 1024 + others * 1024 / routers;
            let share = jobs / (member.beat.capacity.batch.max(1) as usize);
            (rules.blame(member), usize::from(foreign), share)
        })
    }

    /// The cheapest; among equals each in turn.
    fn best<C: Ord>(
        &self,
        turn: usize,
        candidates: &[&Member],
        cost: impl Fn(&Member) -> C,
    ) -> Option<Target> {
        let count = candidates.len();
        (0..count)
            .map(|i| candidates[(i + turn) % count])
            .min_by_key(|member| cost(member))
            .map(Member::target)
    }

    fn own(&self, worker: &WorkerId) -> Outstanding {
        self.own.get(worker).copied().unwrap_or_default()
    }

    fn own_at_beat(&self, worker: &WorkerId) -> Outstanding {
        self.own_at_beat.get(worker).copied().unwrap_or_default()
    }

    /// A beat came: remember what was ours of the load it tells.
    pub fn beaten(&mut self, worker: &WorkerId) {
        let own = self.own(worker);
        self.own_at_beat.insert(worker.clone(), own);
    }

    /// A worker is gone.
    pub fn forget(&mut self, worker: &WorkerId) {
        self.own_at_beat.remove(worker);
        self.prefixes.forget(worker);
    }

    /// A job of ours begins on a worker.
    pub fn begin(&mut self, worker: &WorkerId, job: Outstanding) {
        let own = self.own.entry(worker.clone()).or_default();
        own.prefills += job.prefills;
        own.prefill_tokens += job.prefill_tokens;
        own.staged += job.staged;
        own.decodes += job.decodes;
    }

    /// It ends.
    pub fn end(&mut self, worker: &WorkerId, job: Outstanding) {
        let Some(own) = self.own.get_mut(worker) else {
            return;
        };
        own.prefills = own.prefills.saturating_sub(job.prefills);
        own.prefill_tokens = own.prefill_tokens.saturating_sub(job.prefill_tokens);
        own.staged = own.staged.saturating_sub(job.staged);
        own.decodes = own.decodes.saturating_sub(job.decodes);
        if *own == Outstanding::default() {
            self.own.remove(worker);
        }
    }

    /// Whether nothing of ours is under way anywhere.
    #[cfg(any(test, feature = "simulation"))]
    pub fn is_idle(&self) -> bool {
        self.own.is_empty()
    }

    /// Of how many workers it remembers what was ours at their last beat.
    #[cfg(test)]
    pub fn remembered(&self) -> usize {
        self.own_at_beat.len()
    }

    /// This worker has run this prompt.
    pub fn remember(&mut self, worker: &WorkerId, chain: &[u64]) {
        self.prefixes.insert(worker, chain);
    }
}

/// Approximate map from prefixes to the workers that ran them. Bounded: it forgets the least recently used.
#[derive(Debug, Default)]
struct PrefixMap {
    holders: HashMap<u64, Holders>,
    /// Links in order of use; an entry whose stamp is not the link's current one is void.
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

#[derive(Debug, Default)]
struct Holders {
    workers: Vec<WorkerId>,
    stamp: u64,
}

impl PrefixMap {
    fn cached_blocks(&self, chain: &[u64]) -> HashMap<WorkerId, usize> {
        let mut cached = HashMap::new();
        for (i, link) in chain.iter().enumerate() {
            let Some(holders) = self.holders.get(link) else {
                break;
            };
            for worker in &holders.workers {
                // Only an unbroken chain from the start is of use.
                let blocks = cached.entry(worker.clone()).or_insert(0);
                if *blocks == i {
                    *blocks = i + 1;
                }
            }
        }
        cached
    }

    fn insert(&mut self, worker: &WorkerId, chain: &[u64]) {
        // The first links are used last: a chain is forgotten from its end.
        for link in chain.iter().take(PREFIXES_MAX).rev() {
            self.clock += 1;
            let holders = self.holders.entry(*link).or_default();
            holders.workers.retain(|known| known != worker);
            holders.workers.insert(0, worker.clone());
            holders.workers.truncate(HOLDERS_MAX);
            holders.stamp = self.clock;
            self.order.push_back((*link, self.clock));
        }
        while self.holders.len() > PREFIXES_MAX || self.order.len() > 2 * PREFIXES_MAX {
            let Some((link, stamp)) = self.order.pop_front() else {
                break;
            };
            if self
                .holders
                .get(&link)
                .is_some_and(|holders| holders.stamp == stamp)
            {
                self.holders.remove(&link);
            }
        }
    }

    fn forget(&mut self, worker: &WorkerId) {
        for holders in self.holders.values_mut() {
            holders.workers.retain(|known| known != worker);
        }
    }
}

#[cfg(test)]
mod tests;
