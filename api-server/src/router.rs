//! Which worker gets a job: the context worker that will have run the prompt soonest, counting what its
//! prefix index probably holds, and the least-loaded decode worker that can reach the KV.
//!
//! Pure: membership and time come in, a choice goes out.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::time::Instant;

use baton_protocol::{KvHandle, ModelFingerprint, Role, WorkerId};

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

/// Hash of every full block of a prompt together with all before it.
pub fn prefix_chain(prompt: &[u32]) -> Vec<u64> {
    let state = foldless();
    let mut link = 0;
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
fn foldless() -> std::hash::BuildHasherDefault<std::collections::hash_map::DefaultHasher> {
    std::hash::BuildHasherDefault::default()
}

/// What this API server has under way on one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outstanding {
    /// Prompts being run.
    pub prefills: usize,
    /// Tokens of these prompts.
    pub prefill_tokens: usize,
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
            let others = (load.waiting_tokens as usize).saturating_sub(then.prefill_tokens);
            let jobs = own.prefills
                + (load.waiting as usize + load.running as usize).saturating_sub(then.prefills);
            let tokens = prompt_tokens.saturating_sub(have)
                + own.prefill_tokens
                + others
                + jobs * JOB_COST_TOKENS;
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
            let beaten = (load.waiting + load.running + load.pulling) as usize;
            let jobs = own.decodes + beaten.saturating_sub(then.decodes);
            let share = jobs * 1024 / (member.beat.capacity.batch.max(1) as usize);
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
        own.decodes += job.decodes;
    }

    /// It ends.
    pub fn end(&mut self, worker: &WorkerId, job: Outstanding) {
        let Some(own) = self.own.get_mut(worker) else {
            return;
        };
        own.prefills = own.prefills.saturating_sub(job.prefills);
        own.prefill_tokens = own.prefill_tokens.saturating_sub(job.prefill_tokens);
        own.decodes = own.decodes.saturating_sub(job.decodes);
        if *own == Outstanding::default() {
            self.own.remove(worker);
        }
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
mod tests {
    use super::*;
    use crate::membership::tests::{beat, fingerprint};
    use baton_protocol::{HandleId, Incarnation, Nonce, PrefillTimings};

    fn worker(name: &str) -> WorkerId {
        WorkerId::new(name).unwrap()
    }

    struct Setup {
        members: Membership,
        router: Router,
        model: ModelFingerprint,
        now: Instant,
    }

    impl Setup {
        fn new(workers: &[(&str, Role, &[&str])]) -> Self {
            let now = Instant::now();
            let mut members = Membership::default();
            for (name, role, peers) in workers {
                members.beat(beat(name, *role, peers), now);
            }
            Self {
                members,
                router: Router::default(),
                model: fingerprint(),
                now,
            }
        }

        fn context(
            &mut self,
            refused: &[WorkerId],
            tokens: usize,
            chain: &[u64],
        ) -> Option<String> {
            let rules = Constraints {
                model: &self.model,
                refused,
                failed: &[],
                now: self.now,
            };
            let target = self
                .router
                .choose_context(&self.members, rules, tokens, chain)?;
            Some(target.worker.to_string())
        }

        fn decode(&mut self, failed: &[WorkerId], context: &str) -> Option<String> {
            let rules = Constraints {
                model: &self.model,
                refused: &[],
                failed,
                now: self.now,
            };
            let handle = KvHandle {
                worker: worker(context),
                incarnation: Incarnation(1),
                handle: HandleId(1),
                nonce: Nonce(1),
                model: self.model.clone(),
                kv: beat("x", Role::Both, &[]).kv,
                ranks: Vec::new(),
                valid_tokens: 1,
                lease_ms: 1,
                first_token: 1,
                first_logprobs: None,
                finish: None,
                cached_tokens: 0,
                timings: PrefillTimings::default(),
            };
            let target = self.router.choose_decode(&self.members, rules, &handle)?;
            Some(target.worker.to_string())
        }
    }

    const TWO_AND_TWO: &[(&str, Role, &[&str])] = &[
        ("c1", Role::Context, &[]),
        ("c2", Role::Context, &[]),
        ("d1", Role::Decode, &["c1", "c2"]),
        ("d2", Role::Decode, &["c2"]),
    ];

    #[test]
    fn bursts_spread_between_beats() {
        let mut s = Setup::new(TWO_AND_TWO);
        let job = Outstanding {
            prefills: 1,
            prefill_tokens: 100,
            decodes: 0,
        };
        let mut counts = HashMap::new();
        for _ in 0..10 {
            let name = s.context(&[], 100, &[]).unwrap();
            s.router.begin(&worker(&name), job);
            *counts.entry(name).or_insert(0) += 1;
        }
        assert_eq!(counts["c1"], 5);
        assert_eq!(counts["c2"], 5);
    }

    #[test]
    fn a_known_prefix_attracts_until_the_queue_outweighs_it() {
        let mut s = Setup::new(TWO_AND_TWO);
        let prompt: Vec<u32> = (0..256).collect();
        let chain = prefix_chain(&prompt);
        assert_eq!(chain.len(), 8);
        s.router.remember(&worker("c2"), &chain);
        for _ in 0..4 {
            assert_eq!(s.context(&[], 256, &chain).unwrap(), "c2");
        }
        let other: Vec<u32> = (7..263).collect();
        assert_ne!(prefix_chain(&other)[0], chain[0]);
        let heavy = Outstanding {
            prefills: 1,
            prefill_tokens: 1000,
            decodes: 0,
        };
        s.router.begin(&worker("c2"), heavy);
        assert_eq!(s.context(&[], 256, &chain).unwrap(), "c1");
        s.router.end(&worker("c2"), heavy);
        assert_eq!(s.context(&[], 256, &chain).unwrap(), "c2");
    }

    #[test]
    fn own_jobs_in_a_beat_are_not_counted_twice() {
        let mut s = Setup::new(TWO_AND_TWO);
        let job = Outstanding {
            prefills: 1,
            prefill_tokens: 500,
            decodes: 0,
        };
        s.router.begin(&worker("c1"), job);
        let mut told = beat("c1", Role::Context, &[]);
        told.load.waiting_tokens = 500;
        s.router.beaten(&worker("c1"));
        s.members.beat(told, s.now);
        s.router.end(&worker("c1"), job);
        // Ours is done: what the beat told was all ours, so the worker is idle again.
        let names: Vec<_> = (0..2).map(|_| s.context(&[], 10, &[]).unwrap()).collect();
        assert!(names.contains(&"c1".to_owned()));
    }

    #[test]
    fn refused_suspect_and_unreachable_workers_are_not_chosen() {
        let mut s = Setup::new(TWO_AND_TWO);
        assert_eq!(s.context(&[worker("c1")], 1, &[]).unwrap(), "c2");
        assert_eq!(s.context(&[worker("c1"), worker("c2")], 1, &[]), None);
        s.now += std::time::Duration::from_secs(3);
        assert_eq!(s.context(&[], 1, &[]), None);
        let mut s = Setup::new(&[("c1", Role::Context, &[]), ("d1", Role::Decode, &[])]);
        assert_eq!(s.context(&[], 1, &[]), None, "no decode worker reaches it");
    }

    #[test]
    fn decode_goes_where_the_kv_can_be_read_and_the_load_is_least() {
        let mut s = Setup::new(TWO_AND_TWO);
        assert_eq!(s.decode(&[], "c1").unwrap(), "d1");
        s.router.begin(
            &worker("d1"),
            Outstanding {
                decodes: 1,
                ..Outstanding::default()
            },
        );
        assert_eq!(s.decode(&[], "c2").unwrap(), "d2");
        assert_eq!(
            s.decode(&[worker("d2")], "c2").unwrap(),
            "d1",
            "d2 failed this request"
        );
        assert_eq!(
            s.decode(&[worker("d1")], "c1").unwrap(),
            "d1",
            "there is no other"
        );
    }

    #[test]
    fn equals_take_turns_also_when_choices_of_both_kinds_alternate() {
        let mut s = Setup::new(TWO_AND_TWO);
        let names: Vec<_> = (0..2)
            .map(|_| {
                s.decode(&[], "c2").unwrap();
                s.context(&[], 10, &[]).unwrap()
            })
            .collect();
        assert_ne!(names[0], names[1]);
    }

    #[test]
    fn a_worker_that_does_both_keeps_its_own() {
        let mut s = Setup::new(&[("b", Role::Both, &[]), ("d", Role::Decode, &["b"])]);
        s.router.begin(
            &worker("b"),
            Outstanding {
                decodes: 5,
                ..Outstanding::default()
            },
        );
        assert_eq!(s.decode(&[], "b").unwrap(), "b");
        assert_eq!(s.decode(&[worker("b")], "b").unwrap(), "d");
    }

    #[test]
    fn the_prefix_map_is_bounded() {
        let mut map = PrefixMap::default();
        for i in 0..(PREFIXES_MAX as u64 * 2) {
            map.insert(&worker("c"), &[i]);
        }
        assert!(map.holders.len() <= PREFIXES_MAX);
        assert!(map.order.len() <= 2 * PREFIXES_MAX);
        assert!(map.cached_blocks(&[0]).is_empty());
    }
}
