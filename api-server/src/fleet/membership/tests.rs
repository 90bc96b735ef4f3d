use super::*;
use baton_protocol::{
    Capacity, Incarnation, KvGroup, Load, ModelInfo, PROTOCOL_VERSION, PeerHealth, PeerState,
    WorkerState,
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
        ranks: Some(1),
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
                pulled_bytes: 0,
                error: None,
            })
            .collect(),
        changes: None,
        transport: String::new(),
        decode_ms: 0,
        cost: None,
        cost_error: None,
        itl_ms: None,
        step_tokens: None,
        prefix_version: None,
        streams: false,
        leases_prefixes: false,
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
fn a_link_is_as_fast_as_pulls_or_else_probes_were_in_the_mean() {
    let now = Instant::now();
    let mut members = Membership::default();
    let mut told = beat("d", Role::Decode, &["a", "b", "c"]);
    // 8 bytes a token.
    told.peers[1].gigabytes_per_second = 0.0;
    told.peers[2].pulled_gigabytes_per_second = Some(3.0);
    let link = |members: &Membership| members.workers().next().unwrap().facts.link_token_us;
    members.beat(told.clone(), now);
    assert_eq!(link(&members), 0.004);
    // With changes alone it is as fast as before.
    let changes = |since| {
        Some(baton_protocol::PeerChanges {
            since,
            version: 1,
            gone: Vec::new(),
        })
    };
    told.changes = changes(0);
    members.beat(told.clone(), now);
    told.peers.clear();
    told.changes = changes(1);
    members.beat(told, now);
    assert_eq!(link(&members), 0.004);
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
    let joined = members.beat(beat("c", Role::Context, &[]), now);
    assert_eq!(joined, Taken::Joined(0));
    let mut restarted = beat("c", Role::Context, &[]);
    restarted.incarnation = Incarnation(2);
    let Taken::Restarted(0, lost) = members.beat(restarted.clone(), now) else {
        panic!("another incarnation is a restart");
    };
    assert_eq!(lost.incarnation, Incarnation(1));
    // Its late messages overtake nobody.
    let late = members.beat(beat("c", Role::Context, &[]), now);
    assert_eq!(late, Taken::Late);
    assert_eq!(members.beat(restarted, now), Taken::Known(0));
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
    assert!(members.broken_links(&fingerprint(), now).is_empty());
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
fn a_broken_link_is_named_until_it_is_mended() {
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
        let links = members.broken_links(&fingerprint(), now);
        assert_eq!(links.len(), shown, "{state:?}: {links:?}");
        assert!(members.faults(&fingerprint(), now).is_empty());
        for link in links {
            assert_eq!(link, "e cannot read KV from c: cut");
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
