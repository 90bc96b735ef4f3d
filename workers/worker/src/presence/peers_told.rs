//! What the beats have told of the peers, and what the next one has to.
//!
//! A few peers are told with each beat. Of more, only what changed is told, numbered, so that a beat stays small however large
//! the cluster is; whoever missed a change asks for all (`baton_protocol::PeerChanges`).

use std::collections::BTreeMap;
use std::time::Duration;

use baton_protocol::limits::PEERS_TOLD_MAX;
use baton_protocol::{PeerChanges, PeerHealth, WorkerId};
use tokio::time::Instant;

/// Questions for all peers that are answered in one [`ANSWERS_TIME`]. Each API server asks once, or after a loss.
const ANSWERS_MAX: usize = 16;

/// Most peers that one beat tells of for what was pulled from them alone: people look at these links.
const BUSY_TOLD_MAX: usize = 4;

const ANSWERS_TIME: Duration = Duration::from_secs(1);

/// What a beat tells.
#[derive(Debug, PartialEq)]
pub(crate) struct Told {
    pub(crate) peers: Vec<PeerHealth>,
    pub(crate) changes: Option<PeerChanges>,
    /// Some changes found no room: another beat is to tell them soon.
    pub(crate) is_part: bool,
}

/// What listeners know that missed nothing.
pub(crate) struct PeersTold {
    /// Most peers that one beat tells of.
    at_once: usize,
    version: u64,
    told: BTreeMap<WorkerId, PeerHealth>,
    answers_since: Option<Instant>,
    answers: usize,
}

impl Default for PeersTold {
    fn default() -> Self {
        Self::of(PEERS_TOLD_MAX)
    }
}

impl PeersTold {
    /// Tells of so many peers with a beat.
    pub(crate) fn of(at_once: usize) -> Self {
        Self {
            at_once,
            version: 0,
            told: BTreeMap::new(),
            answers_since: None,
            answers: 0,
        }
    }

    /// What the next beat tells, of peers that stand as in `all`. It counts as told from now on.
    pub(crate) fn tell(&mut self, all: Vec<PeerHealth>) -> Told {
        let all: BTreeMap<WorkerId, PeerHealth> = all
            .into_iter()
            .map(|mut peer| {
                peer.cut();
                (peer.worker.clone(), peer)
            })
            .collect();
        if all.len() <= self.at_once {
            self.version += u64::from(self.told != all);
            self.told = all;
            return Told {
                peers: self.told.values().cloned().collect(),
                changes: None,
                is_part: false,
            };
        }
        let gone: Vec<WorkerId> = self
            .told
            .keys()
            .filter(|worker| !all.contains_key(*worker))
            .take(self.at_once)
            .cloned()
            .collect();
        let is_news = |peer: &PeerHealth| {
            let told = self.told.get(&peer.worker);
            told.is_none_or(|told| differs(told, peer))
        };
        let (mut peers, others): (Vec<_>, Vec<_>) = all.into_values().partition(is_news);
        let room = self.at_once - gone.len();
        let is_part = gone.len() == self.at_once || peers.len() > room;
        peers.truncate(room);
        peers.extend(self.busiest(others, room - peers.len()));
        for worker in &gone {
            self.told.remove(worker);
        }
        for peer in &peers {
            self.told.insert(peer.worker.clone(), peer.clone());
        }
        let since = self.version;
        self.version += u64::from(!(gone.is_empty() && peers.is_empty()));
        Told {
            peers,
            changes: Some(PeerChanges {
                since,
                version: self.version,
                gone,
            }),
            is_part,
        }
    }

    /// Of peers that are no news but for what was pulled from them, those of which the most was.
    fn busiest(&self, others: Vec<PeerHealth>, room: usize) -> impl Iterator<Item = PeerHealth> {
        let pulled = |peer: &PeerHealth| {
            let told = self.told.get(&peer.worker)?.pulled_bytes;
            let grown = peer.pulled_bytes.saturating_sub(told);
            (grown > 0).then_some(grown)
        };
        let mut busy: Vec<_> = others
            .into_iter()
            .filter_map(|peer| Some((pulled(&peer)?, peer)))
            .collect();
        busy.sort_by_key(|(grown, _)| std::cmp::Reverse(*grown));
        let room = room.min(BUSY_TOLD_MAX);
        busy.into_iter().map(|(_, peer)| peer).take(room)
    }

    /// All that was told, and its version, if not too many have asked just now.
    pub(crate) fn all(&mut self, now: Instant) -> Option<(u64, Vec<PeerHealth>)> {
        let is_over = |since: Instant| now.duration_since(since) >= ANSWERS_TIME;
        if self.answers_since.is_none_or(is_over) {
            (self.answers_since, self.answers) = (Some(now), 0);
        }
        self.answers += 1;
        (self.answers <= ANSWERS_MAX).then(|| (self.version, self.told.values().cloned().collect()))
    }
}

/// Whether a peer's state is news. The rate of pulls moves all the time: a quarter up or down is. What they brought never is: of
/// that the busiest are told where there is room.
fn differs(told: &PeerHealth, now: &PeerHealth) -> bool {
    let rate = |peer: &PeerHealth| peer.pulled_gigabytes_per_second;
    let rate_differs = match (rate(told), rate(now)) {
        (Some(told), Some(now)) => now < 0.75 * told || now > 1.25 * told,
        (told, now) => told.is_some() != now.is_some(),
    };
    let alike = PeerHealth {
        pulled_gigabytes_per_second: rate(told),
        pulled_bytes: told.pulled_bytes,
        ..now.clone()
    };
    rate_differs || alike != *told
}

#[cfg(test)]
mod tests {
    use baton_protocol::{
        Beat, Capacity, Incarnation, KvGeometry, KvGroup, Load, ModelFingerprint, ModelInfo,
        PROTOCOL_VERSION, PeerState, PeersReply, Role, WorkerState, encode,
    };

    use super::*;

    fn peer(number: usize) -> PeerHealth {
        PeerHealth {
            worker: WorkerId::new(format!("c{number:04}")).unwrap(),
            incarnation: Incarnation(1),
            state: PeerState::Ready,
            transport: "tcp".to_owned(),
            gigabytes_per_second: 1.0,
            pulled_gigabytes_per_second: Some(1.0),
            pulled_bytes: 0,
            error: None,
        }
    }

    fn peers(count: usize) -> Vec<PeerHealth> {
        (0..count).map(peer).collect()
    }

    #[test]
    fn few_peers_are_told_each_time() {
        let mut told = PeersTold::default();
        for _ in 0..3 {
            let said = told.tell(peers(PEERS_TOLD_MAX));
            assert_eq!(said.peers, peers(PEERS_TOLD_MAX));
            assert_eq!((said.changes, said.is_part), (None, false));
        }
    }

    #[test]
    fn many_are_told_in_parts_and_then_only_what_changes() {
        let (mut told, mut all) = (PeersTold::default(), peers(3 * PEERS_TOLD_MAX - 1));
        for part in 0..3 {
            let said = told.tell(all.clone());
            let changes = said.changes.unwrap();
            assert_eq!((changes.since, changes.version), (part, part + 1));
            assert_eq!(said.is_part, part < 2);
        }
        // The rate of pulls wanders a little, which is no news.
        all[3].pulled_gigabytes_per_second = Some(1.2);
        let said = told.tell(all.clone());
        assert_eq!(said.peers, []);
        let changes = said.changes.unwrap();
        assert_eq!((changes.since, changes.version), (3, 3));
        all[3].pulled_gigabytes_per_second = Some(1.3);
        all[5].state = PeerState::Broken;
        let gone = all.remove(7).worker;
        let said = told.tell(all.clone());
        assert_eq!(said.peers, [all[3].clone(), all[5].clone()]);
        let changes = said.changes.unwrap();
        assert_eq!((changes.since, changes.version), (3, 4));
        assert_eq!(changes.gone, [gone]);
        assert_eq!(told.all(Instant::now()).unwrap(), (4, all));
    }

    #[test]
    fn of_many_the_busiest_are_told_where_there_is_room() {
        let (mut told, mut all) = (PeersTold::default(), peers(3 * PEERS_TOLD_MAX));
        while told.tell(all.clone()).is_part {}
        for (number, peer) in all.iter_mut().enumerate().skip(2) {
            peer.pulled_bytes = 1_000 * number as u64;
        }
        let said = told.tell(all.clone());
        let busiest: Vec<_> = all.iter().rev().take(BUSY_TOLD_MAX).cloned().collect();
        assert_eq!((said.peers, said.is_part), (busiest, false));
        // What is news goes first, and what was pulled asks for no beat of its own.
        for peer in &mut all[..PEERS_TOLD_MAX - 1] {
            peer.state = PeerState::Broken;
        }
        let said = told.tell(all.clone());
        assert_eq!(said.peers.len(), PEERS_TOLD_MAX);
        assert_eq!(said.peers[..PEERS_TOLD_MAX - 1], all[..PEERS_TOLD_MAX - 1]);
        assert!(!said.is_part);
        let next = all.len() - BUSY_TOLD_MAX - 1;
        assert_eq!(said.peers[PEERS_TOLD_MAX - 1], all[next]);
    }

    #[test]
    fn who_asks_for_all_without_end_is_answered_now_and_then() {
        let (mut told, now) = (PeersTold::default(), Instant::now());
        let answers = (0..1_000).filter(|_| told.all(now).is_some()).count();
        assert_eq!(answers, ANSWERS_MAX);
        assert!(told.all(now + ANSWERS_TIME).is_some());
    }

    fn bytes_of_a_beat(told: Told) -> usize {
        let beat = Beat {
            v: PROTOCOL_VERSION,
            worker: WorkerId::new("decode-0000").unwrap(),
            incarnation: Incarnation(u64::MAX),
            role: Role::Decode,
            state: WorkerState::Serving,
            reason: None,
            model: ModelInfo {
                name: "meta-llama/Llama-3.1-8B-Instruct".to_owned(),
                fingerprint: ModelFingerprint::new("a".repeat(64)).unwrap(),
                tokens_max: 131_072,
                vocab: 128_256,
            },
            kv: KvGeometry::bf16(
                32,
                vec![KvGroup {
                    layers: 32,
                    kv_heads: 8,
                    head_dim: 128,
                }],
            ),
            device: "NVIDIA H200".to_owned(),
            ranks: Some(1),
            weights: "bf16".to_owned(),
            load: Load {
                running: 200,
                blocks_used: 12_345,
                ..Load::default()
            },
            capacity: Capacity {
                blocks: 20_000,
                batch: 256,
                queue: 256,
            },
            peers: told.peers,
            changes: told.changes,
            transport: "ucx 1.18.0 rc_mlx5,cuda_ipc".to_owned(),
            decode_ms: 9_000,
            cost: None,
            cost_error: None,
            itl_ms: None,
            step_tokens: None,
            prefix_version: None,
            streams: false,
            leases_prefixes: false,
        };
        encode(&beat).unwrap().len()
    }

    /// What all workers say together each second grows with their number and not with that of the pairs. Beside it what it was
    /// with all peers in each beat.
    #[test]
    fn what_is_said_each_second_is_linear_in_the_workers() {
        println!("workers, bytes a second, with all peers in each beat");
        for pairs in [5, 50, 500, 1_000] {
            let (mut told, all) = (PeersTold::default(), peers(pairs));
            let mut parts = 1;
            while told.tell(all.clone()).is_part {
                parts += 1;
            }
            assert_eq!(parts, pairs.div_ceil(PEERS_TOLD_MAX));
            let context = bytes_of_a_beat(PeersTold::default().tell(Vec::new()));
            let decode = bytes_of_a_beat(told.tell(all.clone()));
            let whole = PeersReply {
                v: PROTOCOL_VERSION,
                worker: WorkerId::new("decode-0000").unwrap(),
                incarnation: Incarnation(1),
                version: 1,
                peers: all,
            };
            let now = pairs * (context + decode);
            let before = pairs * (2 * context + encode(&whole).unwrap().len());
            println!("{:>7} {now:>14} {before:>14}", 2 * pairs);
            let each = now / (2 * pairs);
            assert!(
                each < 1_500,
                "{each} bytes a beat among {} workers",
                2 * pairs
            );
        }
    }
}
