//! What the membership of a large cluster takes of memory, from messages as they come over the bus.

use baton_api_server::fuzzing::Fleet;
use baton_protocol::{
    Beat, Capacity, Incarnation, KvGeometry, KvGroup, Load, ModelFingerprint, ModelInfo,
    PROTOCOL_VERSION, PeerChanges, PeerHealth, PeerState, PeersReply, Role, WorkerId, WorkerState,
    decode, encode,
};
use tokio::time::Instant;

const PAIRS: usize = 500;

const MIB_MAX: usize = 50;

fn name(role: &str, number: usize) -> WorkerId {
    WorkerId::new(format!("{role}-worker-{number:04}")).expect("a plain name")
}

fn beat(worker: WorkerId, role: Role, changes: Option<PeerChanges>) -> Beat {
    Beat {
        v: PROTOCOL_VERSION,
        worker,
        incarnation: Incarnation(1),
        role,
        state: WorkerState::Serving,
        reason: None,
        model: ModelInfo {
            name: "meta-llama/Llama-3.1-8B-Instruct".to_owned(),
            fingerprint: ModelFingerprint::new("a".repeat(64)).expect("64 digits"),
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
        load: Load::default(),
        capacity: Capacity::default(),
        peers: Vec::new(),
        changes,
        transport: "ucx 1.18.0 rc_mlx5,cuda_ipc".to_owned(),
        decode_ms: 9_000,
        cost: None,
        cost_error: None,
        itl_ms: None,
        step_tokens: None,
        prefix_version: None,
        streams: false,
        leases_prefixes: false,
    }
}

/// Bytes of memory that this process has.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("it has memory");
    let kib: usize = line
        .trim_end_matches("kB")
        .trim()
        .parse()
        .expect("a number");
    kib << 10
}

fn hear_all(fleet: &mut Fleet, round: u64) {
    let now = Instant::now();
    for number in 0..PAIRS {
        let context = encode(&beat(name("context", number), Role::Context, None)).expect("a beat");
        fleet.beat(decode(&context).expect("a beat"), now);
        let changes = PeerChanges {
            since: 40 + round,
            version: 40 + round,
            gone: Vec::new(),
        };
        let worker = name("decode", number);
        let told = beat(worker.clone(), Role::Decode, Some(changes));
        fleet.beat(
            decode(&encode(&told).expect("a beat")).expect("a beat"),
            now,
        );
        let peer = |number| PeerHealth {
            worker: name("context", number),
            incarnation: Incarnation(1),
            state: PeerState::Ready,
            transport: "rc_mlx5,cuda_ipc".to_owned(),
            gigabytes_per_second: 40.0,
            pulled_gigabytes_per_second: Some(38.5 + round as f32),
            pulled_bytes: 46_137_344,
            error: None,
        };
        let all = PeersReply {
            v: PROTOCOL_VERSION,
            worker,
            incarnation: Incarnation(1),
            version: 40 + round,
            peers: (0..PAIRS).map(peer).collect(),
        };
        fleet.peers(decode(&encode(&all).expect("a reply")).expect("a reply"));
    }
}

#[test]
fn a_thousand_workers_take_fifty_mebibytes_at_most() {
    let before = resident();
    let mut fleet = Fleet::default();
    // What comes again takes the place of what was there.
    for round in 0..4 {
        hear_all(&mut fleet, round);
        let mib = resident().saturating_sub(before) >> 20;
        println!("round {round}: {mib} MiB");
        assert!(mib <= MIB_MAX, "{mib} MiB in round {round}");
    }
    let members = fleet.members();
    assert_eq!(members.workers().count(), 2 * PAIRS);
    let known: usize = members.workers().map(|member| member.peers.len()).sum();
    assert_eq!(known, PAIRS * PAIRS);
}
