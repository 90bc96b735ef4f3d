//! What stays as it is in a run: who is there, and what API servers know of them at its beginning.

use baton_api_server::fuzzing::{Fleet, Target};
use baton_protocol::{
    ApiBeat, ApiServerId, Beat, Capacity, HandleId, Incarnation, KvGeometry, KvGroup, KvHandle,
    Load, ModelFingerprint, ModelInfo, Nonce, PROTOCOL_VERSION, PeerChanges, PeerHealth, PeerState,
    PrefillTimings, Role, WorkerId, WorkerState,
};
use tokio::time::Instant;

use super::{BLOCK_TOKENS, Defect, Scale};

/// Who is there.
pub struct Cluster {
    pub model: ModelFingerprint,
    /// A handle of a prompt; worker and tokens are put in for each.
    pub handle: KvHandle,
    pub names: Vec<WorkerId>,
    /// What each says with every beat; its load is put in.
    pub beats: Vec<Beat>,
}

impl Cluster {
    pub fn new(scale: &Scale) -> Self {
        let model = ModelFingerprint::new("5a".repeat(32)).expect("64 hexadecimal digits");
        let group = KvGroup {
            layers: 1,
            kv_heads: 1,
            // Keys and values of two bytes a number.
            head_dim: scale.kv_token_bytes / 4,
        };
        let kv = KvGeometry::bf16(BLOCK_TOKENS, vec![group]);
        // In the order of their numbers, which is the order that peers have to be in.
        let name = |number| WorkerId::new(format!("both-{number:05}")).expect("a plain name");
        let names: Vec<WorkerId> = (0..scale.workers).map(name).collect();
        let beat = |name: &WorkerId| Beat {
            v: PROTOCOL_VERSION,
            worker: name.clone(),
            incarnation: Incarnation(1),
            role: Role::Both,
            state: WorkerState::Serving,
            reason: None,
            model: ModelInfo {
                name: "scale".to_owned(),
                fingerprint: model.clone(),
                tokens_max: 1 << 17,
                vocab: 32_000,
            },
            kv: kv.clone(),
            device: String::new(),
            ranks: Some(1),
            weights: String::new(),
            load: Load::default(),
            capacity: Capacity {
                blocks: scale.blocks,
                batch: scale.batch,
                queue: 256,
            },
            peers: Vec::new(),
            changes: Some(changes(1)),
            transport: String::new(),
            decode_ms: 0,
            cost: Some(scale.cost.clone()),
            cost_error: None,
            itl_ms: Some(scale.itl_ms),
            step_tokens: Some(scale.step_tokens),
            prefix_version: None,
            streams: false,
            leases_prefixes: false,
        };
        let handle = KvHandle {
            worker: names[0].clone(),
            incarnation: Incarnation(1),
            handle: HandleId(1),
            nonce: Nonce(1),
            model: model.clone(),
            kv: kv.clone(),
            runs: Vec::new(),
            valid_tokens: 0,
            lease_ms: 30_000,
            first_token: Some(1),
            first_logprobs: None,
            finish: None,
            cached_tokens: 0,
            timings: PrefillTimings::default(),
            prefix_pull: None,
        };
        Self {
            beats: names.iter().map(beat).collect(),
            handle,
            model,
            names,
        }
    }

    /// The API servers: each knows all workers, which read from each other, and the other API servers.
    pub fn fleets(&self, scale: &Scale, begun: Instant) -> Vec<Fleet> {
        let peer = |worker: &WorkerId| PeerHealth {
            worker: worker.clone(),
            incarnation: Incarnation(1),
            state: PeerState::Ready,
            transport: String::new(),
            gigabytes_per_second: scale.link,
            pulled_gigabytes_per_second: None,
            pulled_bytes: 0,
            error: None,
        };
        let peers: Vec<PeerHealth> = self.names.iter().map(peer).collect();
        let known = match scale.defect {
            Some(Defect::EachAlone) => 1,
            _ => scale.api_servers,
        };
        let fleet = |_| {
            let mut fleet = Fleet::default();
            for (at, beat) in self.beats.iter().enumerate() {
                let mut peers = peers.clone();
                peers.remove(at);
                let first = Beat {
                    peers,
                    changes: Some(changes(0)),
                    ..beat.clone()
                };
                fleet.beat(first, begun);
            }
            // Who was heard before those whose KV he reads is heard once more.
            for beat in &self.beats {
                fleet.beat(beat.clone(), begun);
            }
            for number in 0..known {
                let name = format!("api-{number}");
                let beat = ApiBeat {
                    v: PROTOCOL_VERSION,
                    api_server: ApiServerId::new(name).expect("a plain name"),
                    incarnation: None,
                    in_flight: 0,
                    serving_ms: None,
                };
                fleet.api_beat(beat, begun);
            }
            fleet
        };
        (0..scale.api_servers).map(fleet).collect()
    }

    /// The number of a worker that was chosen.
    pub fn number(&self, target: &Target) -> usize {
        let at = self.names.binary_search(&target.worker);
        at.expect("only its workers are chosen")
    }
}

/// What has changed of a worker's peers since its version `since`: with the first beat all, and nothing from then on.
fn changes(since: u64) -> PeerChanges {
    PeerChanges {
        since,
        version: 1,
        gone: Vec::new(),
    }
}
