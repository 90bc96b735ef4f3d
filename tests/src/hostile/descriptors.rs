//! Context workers that describe an arena which is none.

use std::time::Duration;

use baton_protocol::{
    Base64Bytes, Incarnation, MemoryType, PeerState, Role, WorkerDescriptor, WorkerId,
};
use bytes::Bytes;

use super::forged::Forged;
use super::jobs::gone;
use super::scene::Scene;
use crate::wait::{PATIENCE, eventually};

/// What may be wrong with a descriptor.
type Forge = fn(&mut WorkerDescriptor);

/// Each is well formed but for one thing. An address or a key that is whole and false is not among them: UCX cannot survive
/// it, and the bus's permissions keep it out (`docs/security.md`).
const FORGED: &[(&str, Forge)] = &[
    ("no-bytes", |it| region(it, |_, bytes| *bytes = 0)),
    ("one-byte", |it| region(it, |_, bytes| *bytes = 1)),
    ("over-the-end", |it| {
        region(it, |base, _| *base = u64::MAX - 4096)
    }),
    ("endless", |it| region(it, |_, bytes| *bytes = u64::MAX)),
    // Whole, it would be read through host memory: a GPU need not have a key.
    ("gpu-without-key", |it| {
        let rank = &mut transfer(it).ranks[0];
        rank.memory = MemoryType::Cuda;
        rank.rkey = Base64Bytes(Vec::new());
        rank.bytes -= 1;
    }),
    ("gpu-without-anything", |it| {
        let rank = &mut transfer(it).ranks[0];
        rank.memory = MemoryType::Cuda;
        rank.rkey = Base64Bytes(Vec::new());
        rank.bytes = 0;
        rank.base = 0;
    }),
    ("host-without-key", |it| {
        transfer(it).ranks[0].rkey = Base64Bytes(Vec::new())
    }),
    ("no-ranks", |it| transfer(it).ranks.clear()),
    ("many-ranks", |it| {
        let rank = transfer(it).ranks[0].clone();
        transfer(it).ranks = vec![rank; 5_000];
    }),
    ("no-address", |it| {
        transfer(it).address = Base64Bytes(Vec::new())
    }),
    ("random-address", |it| {
        transfer(it).address = Base64Bytes(vec![0x5a; 400])
    }),
    ("random-key", |it| {
        transfer(it).ranks[0].rkey = Base64Bytes(vec![0xa5; 80])
    }),
    ("no-layers", |it| it.kv.groups[0].layers = 0),
    ("no-shares", |it| it.shares.0.clear()),
    ("more-heads", |it| it.shares.0[0][0].head_count = u32::MAX),
    ("endless-blocks", |it| {
        it.kv.groups[0].layers = u32::MAX;
        it.kv.block_tokens = u32::MAX;
    }),
];

/// Forged context workers, all at once: each decode worker asks each who it is, refuses it, and goes on.
pub async fn forged(scene: &mut Scene<'_>) -> Vec<String> {
    let client = scene.stranger().await;
    let subjects = scene.subjects();
    let beat = scene.beat(Role::Context).await;
    let asked = client
        .request(subjects.describe(&beat.worker), Bytes::new())
        .await;
    let true_one = asked.expect("a context worker describes itself").payload;
    let true_one: WorkerDescriptor = serde_json::from_slice(&true_one).expect("a descriptor");
    let mut joined = Vec::new();
    for (number, (name, forge)) in FORGED.iter().enumerate() {
        let mut forged = true_one.clone();
        forged.worker = WorkerId::new(format!("forged-{name}")).expect("a plain name");
        forged.incarnation = Incarnation(5_000 + number as u64);
        forge(&mut forged);
        let mut beat = beat.clone();
        beat.worker = forged.worker.clone();
        beat.incarnation = forged.incarnation;
        let said = Bytes::from(serde_json::to_vec(&forged).expect("a message"));
        let answers = move |kind: &str| (kind == "describe").then(|| said.clone());
        joined.push((name, Forged::join(&client, &subjects, &beat, answers).await));
    }
    let mut wrong = Vec::new();
    eventually(
        "decode workers to be done with the forged",
        PATIENCE,
        async || {
            let dead = scene.cluster.dead();
            if !dead.is_empty() {
                return Ok(());
            }
            let beats = scene.cluster.beats().await;
            for (name, forged) in &joined {
                if forged.asked("describe") < 2 {
                    return Err(format!("{name} was not asked by everybody"));
                }
            }
            let peers = beats.values().flat_map(|beat| &beat.peers);
            let mut of_forged = peers.filter(|peer| peer.worker.as_str().starts_with("forged-"));
            match of_forged.find(|peer| peer.state == PeerState::Connecting) {
                Some(peer) => Err(format!("{peer:?}")),
                None => Ok(()),
            }
        },
    )
    .await;
    // A broken peer is tried again within seconds: the second time too it does no harm.
    tokio::time::sleep(Duration::from_secs(1)).await;
    for (worker, beat) in scene.cluster.beats().await {
        let ready = beat
            .peers
            .iter()
            .filter(|peer| peer.state == PeerState::Ready);
        let ready = ready.filter(|peer| peer.worker.as_str().starts_with("forged-"));
        for peer in ready {
            wrong.push(format!("{worker} would pull from {}", peer.worker));
        }
    }
    drop(joined);
    gone(scene, "forged-").await;
    wrong
}

fn transfer(of: &mut WorkerDescriptor) -> &mut baton_protocol::TransferDescriptor {
    of.transfer
        .as_mut()
        .expect("workers of this cluster move KV")
}

/// Alters the place of the first arena, and seals its key again: who forges can do so too.
fn region(of: &mut WorkerDescriptor, alter: impl FnOnce(&mut u64, &mut u64)) {
    let rank = &mut transfer(of).ranks[0];
    alter(&mut rank.base, &mut rank.bytes);
    let (base, bytes) = (rank.base.to_le_bytes(), rank.bytes.to_le_bytes());
    let sealed = &mut rank.rkey.0;
    // `UCXk`, place, length, key, checksum: see `workers/transfer/src/seal.rs`.
    let end = sealed.len() - 8;
    sealed[4..12].copy_from_slice(&base);
    sealed[12..20].copy_from_slice(&bytes);
    let checksum = fnv1a(&sealed[..end]).to_le_bytes();
    sealed[end..].copy_from_slice(&checksum);
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
