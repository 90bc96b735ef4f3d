//! What beats tell of a worker's peers, put together: all of them, or what changed since a version that was heard.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_protocol::limits::PEERS_MAX;
use baton_protocol::{Beat, KvGeometry, KvGroup, PeerChanges, PeerHealth, WorkerId};

use super::Member;

/// A worker's peers after a beat.
pub(super) struct HeardPeers {
    /// By name.
    pub(super) peers: Arc<[PeerHealth]>,
    pub(super) bytes: usize,
    pub(super) version: Option<u64>,
    /// A change before this beat's was missed: all are to be asked for.
    pub(super) is_behind: bool,
}

impl HeardPeers {
    /// Takes what a beat says of the peers out of it. `known`: the same life of this worker, as it was.
    pub(super) fn of(beat: &mut Beat, known: Option<&Member>) -> Self {
        let told = std::mem::take(&mut beat.peers);
        let Some(changes) = beat.changes.take() else {
            return match known.filter(|known| *known.peers == *told) {
                Some(known) => Self {
                    version: None,
                    is_behind: false,
                    ..Self::unchanged(known)
                },
                None => Self::all(told, None),
            };
        };
        let have = known.map_or(Some(0), |known| known.version);
        let Some(known) = known else {
            return match changes.since {
                0 => Self::all(told, Some(changes.version)),
                _ => Self {
                    is_behind: true,
                    ..Self::all(Vec::new(), Some(0))
                },
            };
        };
        match have {
            // One that was overtaken, or that has nothing new.
            Some(have) if changes.version <= have => Self::unchanged(known),
            Some(have) if changes.since <= have => Self::changed(known, told, changes),
            _ => Self {
                is_behind: true,
                ..Self::unchanged(known)
            },
        }
    }

    /// All peers, of this version.
    pub(super) fn all(mut peers: Vec<PeerHealth>, version: Option<u64>) -> Self {
        // Senders name them in this order.
        peers.sort_by(|a, b| a.worker.cmp(&b.worker));
        Self {
            bytes: peers.iter().map(PeerHealth::bytes).sum(),
            peers: peers.into(),
            version,
            is_behind: false,
        }
    }

    /// Microseconds in which the worker reads a token's KV from a peer, at the mean of the rates that pulls, or else probes, reached; 0 if none did.
    /// `known`: the same worker before.
    pub(super) fn link_token_us(&self, kv: &KvGeometry, known: Option<&Member>) -> f32 {
        if let Some(known) = known
            && Arc::ptr_eq(&known.peers, &self.peers)
            && known.beat.kv == *kv
        {
            return known.facts.link_token_us;
        }
        let rate = |peer: &PeerHealth| {
            let pulled = peer.pulled_gigabytes_per_second.unwrap_or_default();
            pulled.max(peer.gigabytes_per_second)
        };
        let rates = self.peers.iter().map(rate).filter(|rate| *rate > 0.0);
        let (sum, count) = rates.fold((0.0, 0.0), |(sum, count), rate| (sum + rate, count + 1.0));
        // In floating point: what a beat says may be anything.
        let numbers = |group: &KvGroup| {
            [group.layers, group.kv_heads, group.head_dim]
                .map(|number| number as f32)
                .iter()
                .product::<f32>()
        };
        let numbers: f32 = kv.groups.iter().map(numbers).sum();
        let bytes = 2.0 * numbers * kv.dtype.bytes() as f32;
        match count > 0.0 {
            true => bytes * count / (sum * 1e3),
            false => 0.0,
        }
    }

    fn unchanged(known: &Member) -> Self {
        Self {
            peers: Arc::clone(&known.peers),
            bytes: known.peers_bytes,
            version: known.version,
            is_behind: known.is_behind,
        }
    }

    fn changed(known: &Member, told: Vec<PeerHealth>, changes: PeerChanges) -> Self {
        let mut peers: BTreeMap<&WorkerId, &PeerHealth> = known
            .peers
            .iter()
            .map(|peer| (&peer.worker, peer))
            .collect();
        for worker in &changes.gone {
            peers.remove(worker);
        }
        for peer in &told {
            if peers.len() < PEERS_MAX || peers.contains_key(&peer.worker) {
                peers.insert(&peer.worker, peer);
            }
        }
        Self::all(
            peers.into_values().cloned().collect(),
            Some(changes.version),
        )
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::{Incarnation, PeerState, PeersReply, Role};
    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::super::tests::{beat, fingerprint};
    use super::super::{ASK_INTERVAL, Membership};
    use super::*;
    use crate::request::lifecycle::Target;

    /// A decode worker that tells what changed, as the protocol's page has it.
    struct Sender {
        life: u64,
        version: u64,
        since: u64,
        all: BTreeMap<WorkerId, PeerHealth>,
        news: Vec<PeerHealth>,
        gone: Vec<WorkerId>,
    }

    impl Sender {
        fn new(life: u64) -> Self {
            Self {
                life,
                version: 0,
                since: 0,
                all: BTreeMap::new(),
                news: Vec::new(),
                gone: Vec::new(),
            }
        }

        fn changes(&mut self, number: u8, state: Option<PeerState>) {
            let name = format!("c{number}");
            let mut peer = beat("d", Role::Decode, &[&name]).peers.remove(0);
            match state {
                Some(state) => {
                    peer.state = state;
                    self.all.insert(peer.worker.clone(), peer.clone());
                    self.news.push(peer);
                }
                None => {
                    if self.all.remove(&peer.worker).is_none() {
                        return;
                    }
                    self.gone.push(peer.worker);
                }
            }
            self.version += 1;
        }

        /// A beat that tells one change; the next one follows it.
        fn beat(&mut self) -> Beat {
            let mut told = beat("d", Role::Decode, &[]);
            told.incarnation = Incarnation(self.life);
            told.peers = std::mem::take(&mut self.news);
            told.changes = Some(PeerChanges {
                since: self.since,
                version: self.version,
                gone: std::mem::take(&mut self.gone),
            });
            self.since = self.version;
            told
        }

        fn all(&self) -> PeersReply {
            PeersReply {
                v: baton_protocol::PROTOCOL_VERSION,
                worker: WorkerId::new("d").unwrap(),
                incarnation: Incarnation(self.life),
                version: self.since,
                peers: self.all.values().cloned().collect(),
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Happens {
        Changes(u8, Option<PeerState>),
        Restarts,
        Beats { is_lost: bool, is_late: bool },
        Answers { is_late: bool },
        LateComes,
    }

    fn happens() -> impl Strategy<Value = Happens> {
        let states = prop_oneof![
            3 => Just(Some(PeerState::Ready)),
            1 => Just(Some(PeerState::Broken)),
            1 => Just(None),
        ];
        prop_oneof![
            4 => (0u8..6, states).prop_map(|(number, state)| Happens::Changes(number, state)),
            1 => Just(Happens::Restarts),
            4 => any::<(bool, bool)>().prop_map(|(is_lost, is_late)| Happens::Beats { is_lost, is_late }),
            1 => any::<bool>().prop_map(|is_late| Happens::Answers { is_late }),
            2 => Just(Happens::LateComes),
        ]
    }

    enum Message {
        Beat(Box<Beat>),
        All(PeersReply),
    }

    #[test]
    fn an_answer_that_beats_have_overtaken_changes_nothing() {
        let (mut members, now) = (Membership::default(), Instant::now());
        let mut sender = Sender::new(1);
        sender.changes(0, Some(PeerState::Ready));
        members.beat(sender.beat(), now);
        let overtaken = sender.all();
        sender.changes(0, Some(PeerState::Broken));
        members.beat(sender.beat(), now);
        let state = |members: &Membership| {
            let member = members.workers().next().unwrap();
            (member.peers[0].state, member.version)
        };
        assert_eq!(state(&members), (PeerState::Broken, Some(2)));
        members.peers(overtaken.clone());
        assert_eq!(state(&members), (PeerState::Broken, Some(2)));
        let of_another_life = PeersReply {
            incarnation: Incarnation(2),
            version: 9,
            ..overtaken
        };
        members.peers(of_another_life);
        assert_eq!(state(&members), (PeerState::Broken, Some(2)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        /// Beats and answers are lost and overtake each other; when they no longer are, two beats and one answer later all is known,
        /// and who can read whose KV follows from it.
        #[test]
        fn whatever_was_lost_is_known_again(all in prop::collection::vec(happens(), 0..60)) {
            let mut now = Instant::now();
            let mut members = Membership::default();
            for number in 0..6 {
                members.beat(beat(&format!("c{number}"), Role::Context, &[]), now);
            }
            let (mut sender, mut late) = (Sender::new(1), std::collections::VecDeque::new());
            let hear = |members: &mut Membership, message: Message, now| match message {
                Message::Beat(beat) => drop(members.beat(*beat, now)),
                Message::All(all) => members.peers(all),
            };
            for happens in all {
                match happens {
                    Happens::Changes(number, state) => {
                        // Each change of one peer is told before its next.
                        let beat = sender.beat();
                        hear(&mut members, Message::Beat(Box::new(beat)), now);
                        sender.changes(number, state);
                    }
                    Happens::Restarts => {
                        sender = Sender::new(sender.life + 1);
                        late.clear();
                    }
                    Happens::Beats { is_lost, is_late } => {
                        let message = Message::Beat(Box::new(sender.beat()));
                        match (is_lost, is_late) {
                            (true, _) => {}
                            (_, true) => late.push_back(message),
                            _ => hear(&mut members, message, now),
                        }
                    }
                    Happens::Answers { is_late } => {
                        let message = Message::All(sender.all());
                        match is_late {
                            true => late.push_back(message),
                            false => hear(&mut members, message, now),
                        }
                    }
                    Happens::LateComes => {
                        if let Some(message) = late.pop_front() {
                            hear(&mut members, message, now);
                        }
                    }
                }
            }
            let worker = WorkerId::new("d").unwrap();
            for _ in 0..2 {
                now += ASK_INTERVAL;
                hear(&mut members, Message::Beat(Box::new(sender.beat())), now);
                if members.asks(&worker, now) {
                    prop_assert!(!members.asks(&worker, now), "once is enough");
                    members.peers(sender.all());
                }
            }
            prop_assert!(!members.asks(&worker, now + ASK_INTERVAL), "nothing is missing");
            let known = members.worker(&worker).unwrap();
            let expected: Vec<PeerHealth> = sender.all.values().cloned().collect();
            prop_assert_eq!(&known.peers[..], &expected[..]);
            let slot = members.slot(&worker).unwrap();
            for context in members.workers().filter(|member| member.beat.role == Role::Context) {
                let target: Target = context.target();
                prop_assert_eq!(context.readers.contains(slot), known.reaches(&target));
            }
            let _ = members.faults(&fingerprint(), now);
        }
    }
}
