//! Who is in the cluster: soft state, made of the last beat of each worker.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_protocol::deadlines::{GONE_AFTER_MS, SUSPECT_AFTER_MS};
use baton_protocol::limits::SEQUENCE_TOKENS_MIN;
use baton_protocol::{
    ApiBeat, ApiServerId, Beat, Incarnation, ModelFingerprint, PeerState, Role, WorkerId,
    WorkerState,
};
use tokio::time::Instant;

use crate::lifecycle::Target;

/// Who is silent for this long gets nothing new.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(SUSPECT_AFTER_MS);
/// Who is silent for this long is gone.
pub const GONE_AFTER: Duration = Duration::from_millis(GONE_AFTER_MS);

/// Most workers that are remembered; beats of others are ignored.
pub const WORKERS_MAX: usize = 4096;

/// Most bytes that beats of all workers take together. One of a worker with 100 peers takes some 20 KB; beats of workers that
/// find no room are ignored as those of too many workers are.
pub const BEATS_BYTES_MAX: usize = 16 << 20;

/// Most complaints that are made at once.
const COMPLAINTS_MAX: usize = 16;

/// A worker and when it was last heard.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its last beat.
    pub beat: Beat,
    /// When that came.
    pub seen: Instant,
    /// The life before this one, whose last words may come late.
    former: Option<Incarnation>,
}

impl Member {
    /// This life of the worker.
    pub fn target(&self) -> Target {
        Target {
            worker: self.beat.worker.clone(),
            incarnation: self.beat.incarnation,
        }
    }

    /// Tokens that its KV holds. Who says nothing of its blocks is taken to have enough.
    fn holds(&self) -> u32 {
        match self.beat.capacity.blocks {
            0 => u32::MAX,
            blocks => blocks.saturating_mul(self.beat.kv.block_tokens),
        }
    }

    /// How long it has been silent.
    pub fn silent(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.seen)
    }

    /// Whether it may get new jobs.
    pub fn serves(&self, model: &ModelFingerprint, now: Instant) -> bool {
        self.beat.state == WorkerState::Serving
            && self.beat.model.fingerprint == *model
            && self.silent(now) < SUSPECT_AFTER
    }

    /// Its state in words: what it says, or that it fell silent.
    pub fn state(&self, now: Instant) -> &'static str {
        match self.beat.state {
            _ if self.silent(now) >= SUSPECT_AFTER => "suspect",
            WorkerState::Serving => "serving",
            WorkerState::Draining => "draining",
            WorkerState::Failed => "failed",
        }
    }

    /// Its state with what there is to say of it, if that is not that all is well: for people.
    pub fn complaint(&self, now: Instant) -> Option<String> {
        let (worker, state) = (&self.beat.worker, self.state(now));
        match (state, &self.beat.reason) {
            ("serving", _) => None,
            ("suspect", _) => {
                let silent = self.silent(now).as_secs_f32();
                Some(format!("{worker} has been silent for {silent:.1} s"))
            }
            (_, Some(reason)) => Some(format!("{worker} is {state}: {reason}")),
            (_, None) => Some(format!("{worker} is {state}")),
        }
    }

    /// Whether it can take over KV that `context` holds.
    pub fn reaches(&self, context: &Target) -> bool {
        let own = self.beat.role == Role::Both && self.target() == *context;
        own || self.beat.peers.iter().any(|peer| {
            peer.state == PeerState::Ready
                && peer.worker == context.worker
                && peer.incarnation == context.incarnation
        })
    }
}

/// All workers and API servers heard of lately.
#[derive(Debug, Default)]
pub struct Membership {
    workers: BTreeMap<WorkerId, Member>,
    /// Bytes of the workers' beats.
    bytes: usize,
    api_servers: BTreeMap<ApiServerId, (ApiBeat, Instant)>,
}

impl Membership {
    /// Takes a beat in; the older life if this is a new one of a known worker. One that there is no room for changes nothing.
    pub fn beat(&mut self, beat: Beat, now: Instant) -> Option<Target> {
        let known = self.workers.get(&beat.worker);
        let bytes = self.bytes + beat.bytes() - known.map_or(0, |known| known.beat.bytes());
        if bytes > BEATS_BYTES_MAX || (known.is_none() && self.workers.len() >= WORKERS_MAX) {
            return None;
        }
        let name = beat.worker.clone();
        let Some(known) = self.workers.get_mut(&name) else {
            self.bytes = bytes;
            let member = Member {
                beat,
                seen: now,
                former: None,
            };
            self.workers.insert(name, member);
            return None;
        };
        if known.former == Some(beat.incarnation) {
            return None;
        }
        let old = known.target();
        let is_reborn = old.incarnation != beat.incarnation;
        if is_reborn {
            known.former = Some(old.incarnation);
        }
        (known.beat, known.seen) = (beat, now);
        self.bytes = bytes;
        is_reborn.then_some(old)
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
        if let Some(then) = now.checked_sub(SUSPECT_AFTER) {
            self.workers
                .values_mut()
                .for_each(|member| member.seen = member.seen.min(then));
        }
    }

    /// Forgets who was silent for too long, and returns the workers among them.
    pub fn sweep(&mut self, now: Instant) -> Vec<Target> {
        let gone = |seen: Instant| now.saturating_duration_since(seen) >= GONE_AFTER;
        self.api_servers.retain(|_, (_, seen)| !gone(*seen));
        let lost: Vec<Target> = self
            .workers
            .values()
            .filter(|m| gone(m.seen))
            .map(Member::target)
            .collect();
        self.workers.retain(|_, member| !gone(member.seen));
        self.bytes = self.workers.values().map(|m| m.beat.bytes()).sum();
        lost
    }

    /// The worker of this name.
    pub fn worker(&self, worker: &WorkerId) -> Option<&Member> {
        self.workers.get(worker)
    }

    /// All workers.
    pub fn workers(&self) -> impl Iterator<Item = &Member> {
        self.workers.values()
    }

    /// All API servers.
    pub fn api_servers(&self) -> impl Iterator<Item = &ApiBeat> {
        self.api_servers.values().map(|(beat, _)| beat)
    }

    /// How many API servers give jobs to the workers: this one, and others that were heard lately.
    pub fn api_server_count(&self) -> usize {
        self.api_servers.len().max(1)
    }

    /// Why requests for this model cannot be served now; empty if they can.
    pub fn faults(&self, model: &ModelFingerprint, now: Instant) -> Vec<String> {
        let serving: Vec<_> = self
            .workers
            .values()
            .filter(|m| m.serves(model, now))
            .collect();
        let contexts: Vec<_> = serving.iter().filter(|m| m.beat.role.prefills()).collect();
        let decoders: Vec<_> = serving.iter().filter(|m| m.beat.role.decodes()).collect();
        let mut faults = Vec::new();
        if contexts.is_empty() {
            faults.push(self.nobody("context", Role::prefills, now));
        }
        if decoders.is_empty() {
            faults.push(self.nobody("decode", Role::decodes, now));
        }
        let road = contexts
            .iter()
            .any(|c| decoders.iter().any(|d| d.reaches(&c.target())));
        if faults.is_empty() && !road {
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
        let serving = || self.workers.values().filter(|m| m.serves(model, now));
        let contexts = || serving().filter(|m| m.beat.role.prefills());
        let pairs = serving()
            .filter(|m| m.beat.role.decodes())
            .flat_map(|d| contexts().map(move |c| (c, d)));
        pairs
            .filter(|(c, d)| d.reaches(&c.target()))
            .map(|(c, d)| {
                let longest = c.beat.model.tokens_max;
                (c.holds().min(d.holds()).min(longest), longest)
            })
            .max()
    }

    /// Roads for KV of this model that are broken, each with its last error. Requests go round them.
    pub fn broken_roads(&self, model: &ModelFingerprint, now: Instant) -> Vec<String> {
        let mut broken: Vec<String> = self
            .workers
            .values()
            .filter(|m| m.serves(model, now))
            .flat_map(|m| m.beat.peers.iter().map(move |peer| (m, peer)))
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

    /// What is the matter with workers, those with a deputy too.
    pub fn complaints(&self, now: Instant) -> Vec<String> {
        let mut all: Vec<_> = self.workers.values().collect();
        all.sort_unstable_by(|a, b| a.beat.worker.cmp(&b.beat.worker));
        let complaints = all
            .into_iter()
            .filter(|m| m.beat.state != WorkerState::Draining)
            .filter_map(|member| member.complaint(now));
        complaints.take(COMPLAINTS_MAX).collect()
    }

    /// That no worker of this role serves, and why not those that there are.
    fn nobody(&self, role: &str, has: fn(Role) -> bool, now: Instant) -> String {
        let members = self.workers.values().filter(|m| has(m.beat.role));
        let mut why: Vec<_> = members.filter_map(|m| m.complaint(now)).collect();
        why.sort_unstable();
        why.truncate(COMPLAINTS_MAX);
        match why.is_empty() {
            true => format!("no {role} worker serves the model"),
            false => format!("no {role} worker serves the model: {}", why.join("; ")),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use baton_protocol::{
        Capacity, KvGeometry, KvGroup, Load, ModelInfo, PROTOCOL_VERSION, PeerHealth,
    };

    pub(crate) fn fingerprint() -> ModelFingerprint {
        ModelFingerprint::new("ab".repeat(32)).unwrap()
    }

    pub(crate) fn beat(name: &str, role: Role, peers: &[&str]) -> Beat {
        Beat {
            v: PROTOCOL_VERSION,
            worker: WorkerId::new(name).unwrap(),
            incarnation: Incarnation(1),
            role,
            state: WorkerState::Serving,
            reason: None,
            model: ModelInfo {
                name: "m".to_owned(),
                fingerprint: fingerprint(),
                tokens_max: 2048,
                vocab: 100,
            },
            kv: KvGeometry::bf16(
                16,
                vec![KvGroup {
                    layers: 1,
                    kv_heads: 1,
                    head_dim: 2,
                }],
            ),
            device: "test".to_owned(),
            weights: "bf16".to_owned(),
            load: Load::default(),
            capacity: Capacity {
                blocks: 100,
                batch: 8,
                queue: 8,
            },
            peers: peers
                .iter()
                .map(|peer| PeerHealth {
                    worker: WorkerId::new(*peer).unwrap(),
                    incarnation: Incarnation(1),
                    state: PeerState::Ready,
                    transport: "tcp".to_owned(),
                    gigabytes_per_second: 1.0,
                    pulled_gigabytes_per_second: None,
                    error: None,
                })
                .collect(),
            transport: String::new(),
            decode_ms: 0,
        }
    }

    #[test]
    fn silence_makes_suspect_then_gone() {
        let start = Instant::now();
        let mut members = Membership::default();
        members.beat(beat("c", Role::Context, &[]), start);
        let suspect = start + SUSPECT_AFTER;
        let member = members.worker(&WorkerId::new("c").unwrap()).unwrap();
        assert!(member.serves(&fingerprint(), start));
        assert!(!member.serves(&fingerprint(), suspect));
        assert_eq!(member.state(suspect), "suspect");
        assert!(members.sweep(suspect).is_empty());
        assert_eq!(members.sweep(start + GONE_AFTER).len(), 1);
        assert_eq!(members.workers().count(), 0);
    }

    #[test]
    fn beats_are_bounded_in_bytes_and_room_comes_back() {
        let now = Instant::now();
        let mut members = Membership::default();
        let peers = ["c"; baton_protocol::limits::PEERS_MAX];
        let mut large = beat("w", Role::Decode, &peers);
        for peer in &mut large.peers {
            peer.error = Some("x".repeat(baton_protocol::limits::SENTENCE_BYTES_MAX));
        }
        let named = |number: usize| Beat {
            worker: WorkerId::new(format!("w{number:04}")).unwrap(),
            ..large.clone()
        };
        let fit = BEATS_BYTES_MAX / named(0).bytes();
        assert!(fit < WORKERS_MAX);
        for number in 0..fit + 10 {
            members.beat(named(number), now);
        }
        assert_eq!(members.workers().count(), fit);
        // Those that are known are heard on; smaller beats make room.
        let later = now + SUSPECT_AFTER;
        members.beat(named(0), later);
        assert_eq!(members.worker(&named(0).worker).unwrap().seen, later);
        let small = Beat {
            peers: Vec::new(),
            ..named(0)
        };
        members.beat(small, later);
        members.beat(named(fit), later);
        assert_eq!(members.workers().count(), fit + 1);
        members.sweep(later + GONE_AFTER);
        assert_eq!(members.bytes, 0);
    }

    #[test]
    fn after_an_outage_workers_get_jobs_when_they_are_heard_again() {
        let now = Instant::now() + GONE_AFTER;
        let mut members = Membership::default();
        members.beat(beat("b", Role::Both, &[]), now);
        assert!(members.faults(&fingerprint(), now).is_empty());
        members.suspect_all(now);
        assert!(!members.faults(&fingerprint(), now).is_empty());
        assert!(members.sweep(now).is_empty(), "it is not gone");
        members.beat(beat("b", Role::Both, &[]), now);
        assert!(members.faults(&fingerprint(), now).is_empty());
    }

    #[test]
    fn a_restart_loses_the_old_life() {
        let now = Instant::now();
        let mut members = Membership::default();
        assert_eq!(members.beat(beat("c", Role::Context, &[]), now), None);
        let mut reborn = beat("c", Role::Context, &[]);
        reborn.incarnation = Incarnation(2);
        let lost = members.beat(reborn.clone(), now).unwrap();
        assert_eq!(lost.incarnation, Incarnation(1));
        // Its last words overtake nobody.
        assert_eq!(members.beat(beat("c", Role::Context, &[]), now), None);
        assert_eq!(members.beat(reborn, now), None);
        let member = members.workers().next().unwrap();
        assert_eq!(member.beat.incarnation, Incarnation(2));
    }

    #[test]
    fn health_names_what_is_missing() {
        let now = Instant::now();
        let mut members = Membership::default();
        assert_eq!(members.faults(&fingerprint(), now).len(), 2);
        members.beat(beat("c", Role::Context, &[]), now);
        members.beat(beat("d", Role::Decode, &[]), now);
        assert_eq!(members.faults(&fingerprint(), now).len(), 1);
        members.beat(beat("d", Role::Decode, &["c"]), now);
        assert!(members.faults(&fingerprint(), now).is_empty());
        assert!(members.broken_roads(&fingerprint(), now).is_empty());
    }

    #[test]
    fn the_longest_sequence_is_what_a_pair_that_is_connected_can_hold() {
        let now = Instant::now();
        let mut members = Membership::default();
        let with = |name, role, peers: &[&str], blocks| {
            let mut beat = beat(name, role, peers);
            beat.capacity.blocks = blocks;
            beat
        };
        members.beat(with("c", Role::Context, &[], 100), now);
        assert_eq!(members.longest_sequence(&fingerprint(), now), None);
        // The large decode worker cannot read from the context worker.
        members.beat(with("d", Role::Decode, &["c"], 50), now);
        members.beat(with("e", Role::Decode, &[], 1000), now);
        let longest = |members: &Membership| members.longest_sequence(&fingerprint(), now);
        assert_eq!(longest(&members), Some((800, 2048)));
        assert_eq!(members.too_small(&fingerprint(), now), None);
        members.beat(with("d", Role::Decode, &["c"], 2), now);
        assert_eq!(longest(&members), Some((32, 2048)));
        let told = members.too_small(&fingerprint(), now).unwrap();
        assert!(told.contains("32 tokens") && told.contains("--kv-mib"));
        // The model has no longer ones than it has.
        members.beat(with("b", Role::Both, &[], 1000), now);
        assert_eq!(longest(&members), Some((2048, 2048)));
        // Nothing said is not nothing there.
        members.beat(with("b", Role::Both, &[], 0), now);
        assert_eq!(longest(&members), Some((2048, 2048)));
    }

    #[test]
    fn a_broken_road_is_named_until_it_is_mended() {
        let now = Instant::now();
        let mut members = Membership::default();
        members.beat(beat("c", Role::Context, &[]), now);
        members.beat(beat("d", Role::Decode, &["c"]), now);
        for (state, error, shown) in [
            (PeerState::Connecting, None, 0),
            (PeerState::Broken, Some("cut"), 1),
            (PeerState::Connecting, Some("cut"), 1),
            (PeerState::Ready, None, 0),
        ] {
            let mut broken = beat("e", Role::Decode, &["c"]);
            broken.peers[0].state = state;
            broken.peers[0].error = error.map(str::to_owned);
            members.beat(broken, now);
            let roads = members.broken_roads(&fingerprint(), now);
            assert_eq!(roads.len(), shown, "{state:?}: {roads:?}");
            assert!(members.faults(&fingerprint(), now).is_empty());
            for road in roads {
                assert_eq!(road, "e cannot read KV from c: cut");
            }
        }
    }

    #[test]
    fn what_is_the_matter_is_said() {
        let now = Instant::now();
        let mut members = Membership::default();
        members.beat(beat("c", Role::Context, &[]), now);
        members.beat(beat("d", Role::Decode, &["c"]), now);
        assert!(members.complaints(now).is_empty());

        let failed = Beat {
            state: WorkerState::Failed,
            reason: Some("the executor hangs".to_owned()),
            ..beat("d", Role::Decode, &["c"])
        };
        members.beat(failed, now);
        let faults = members.faults(&fingerprint(), now);
        let why = "no decode worker serves the model: d is failed: the executor hangs";
        assert_eq!(faults, [why]);
        assert_eq!(members.complaints(now), ["d is failed: the executor hangs"]);
        let later = now + SUSPECT_AFTER;
        let why = "no context worker serves the model: c has been silent for 2.5 s";
        assert_eq!(members.faults(&fingerprint(), later)[0], why);
    }
}
