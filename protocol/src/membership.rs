//! Who is in the cluster, what they serve and how they fare. Soft state: a worker is what it last beat.

use serde::{Deserialize, Serialize};

use crate::limits::{PEERS_TOLD_MAX, SENTENCE_BYTES_MAX};
use crate::peers::{PeerChanges, PeerHealth, PeerState};
use crate::{
    ApiServerId, Incarnation, KvGeometry, KvShares, ModelFingerprint, StepCost, TransferDescriptor,
    WorkerId, cut,
};

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Runs prompts and stages their KV.
    Context,
    /// Pulls KV and generates.
    Decode,
    /// Does both; a handle of its own is adopted in place, without a pull.
    Both,
}

impl Role {
    /// Whether it takes prefill jobs.
    pub fn prefills(self) -> bool {
        matches!(self, Self::Context | Self::Both)
    }

    /// Whether it takes decode jobs.
    pub fn decodes(self) -> bool {
        matches!(self, Self::Decode | Self::Both)
    }

    /// The name used in flags, metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }
}

/// Whether a worker takes jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// It does.
    Serving,
    /// It finishes what it has and leaves.
    Draining,
    /// Its executor is out of service; it waits to be replaced.
    Failed,
}

/// The model a worker serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Name clients ask for.
    pub name: String,
    /// What it is, exactly.
    pub fingerprint: ModelFingerprint,
    /// Longest sequence, prompt and output, in tokens.
    pub tokens_max: u32,
    /// Size of the vocabulary: logits per position.
    pub vocab: u32,
}

/// What a worker is busy with at this moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Load {
    /// Sequences waiting for their first step.
    pub waiting: u32,
    /// Sequences in the running batch.
    pub running: u32,
    /// Prompt tokens not yet run.
    pub waiting_tokens: u32,
    /// Those of them that belong to batch requests.
    pub batch_tokens: u32,
    /// Generating sequences among those that wait or run.
    pub decoding: u32,
    /// Tokens that these have together: the KV that a step of them reads.
    pub decoding_tokens: u64,
    /// Batch requests that generate or whose KV is being pulled: interactive ones need not wait for their places. 0 of workers of
    /// earlier releases, where they do.
    pub batch_decoding: u32,
    /// Staged handles that wait for their release.
    pub leased: u32,
    /// Pulls under way.
    pub pulling: u32,
    /// Blocks held by sequences, leases and pulls. Blocks that only the prefix index keeps are free.
    pub blocks_used: u32,
    /// Blocks that hold a reusable prefix and nobody uses.
    pub blocks_cached: u32,
    /// Blocks that cannot be reused before a broken transfer has ended.
    pub blocks_quarantined: u32,
    /// Steps that its executor has refused since it started. Each is a defect.
    pub plans_refused: u32,
}

/// What a worker can hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capacity {
    /// Blocks of its arena.
    pub blocks: u32,
    /// Sequences in one batch.
    pub batch: u32,
    /// Jobs that may wait.
    pub queue: u32,
}

/// Any worker, published on `beat.<worker>` every [`crate::deadlines::BEAT_INTERVAL_MS`] and at once after
/// [`Hello`] or a change of state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// Protocol version.
    pub v: u16,
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub incarnation: Incarnation,
    /// What it does.
    pub role: Role,
    /// Whether it takes jobs.
    pub state: WorkerState,
    /// Why it is `failed`, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What it serves.
    pub model: ModelInfo,
    /// How its KV is laid out.
    pub kv: KvGeometry,
    /// What it computes on, for people: `cpu avx512-bf16, 2 threads`.
    pub device: String,
    /// Number of its ranks: of an arena and a part of the model each. Senders of old say none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<u32>,
    /// How it keeps its weights, for people: `bf16`, `fp8-channel`, `fp8-block`. Workers of one model may differ in
    /// it and pull each other's KV.
    #[serde(default)]
    pub weights: String,
    /// How busy it is.
    pub load: Load,
    /// What it can hold.
    pub capacity: Capacity,
    /// Decode workers: the context workers that they know. All of them, or with `changes` those that changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerHealth>,
    /// Of a worker that knows more than [`PEERS_TOLD_MAX`] context workers: what `peers` builds upon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<PeerChanges>,
    /// How it moves KV, for people: `ucx 1.13.1 posix,cma,tcp`, or why it cannot.
    #[serde(default)]
    pub transport: String,
    /// Mean time from a generation's admission to its end here, of those that ended lately: by it API servers tell how
    /// soon a full worker has room. 0 before the first end.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub decode_ms: u32,
    /// What its steps cost, as measured. Senders of old say nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<StepCost>,
    /// How well that predicts them: nine of ten of the last steps within this part of what they took. Senders of old say nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_error: Option<f32>,
    /// Mean time between tokens that it keeps its steps to, in milliseconds. Senders of old say nothing, and keep to none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub itl_ms: Option<u32>,
    /// Most tokens of a step. Senders of old say nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_tokens: Option<u32>,
    /// Number of its last [`crate::PrefixReport`], 0 before the first. Senders of old say nothing, and send none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_version: Option<u64>,
    /// Whether it streams KV: a context worker's handles may come while their prompts run, and a decode worker takes such handles.
    /// Senders of old say nothing and do not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub streams: bool,
    /// Whether it leases what is in its prefix index to other workers ([`crate::LeaseAsk`]), and, if it generates too, pulls what jobs
    /// name a source of. Senders of old say nothing and do not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub leases_prefixes: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Beat {
    /// Whether it holds no more than receivers keep of each worker: its sentences and peers are bounded.
    ///
    /// # Errors
    /// Which bound it breaks, as a sentence.
    pub fn check(&self) -> Result<(), String> {
        let texts = [
            ("reason", self.reason.as_deref().unwrap_or_default()),
            ("model name", &self.model.name),
            ("device", &self.device),
            ("weights", &self.weights),
            ("transport", &self.transport),
        ];
        if let Some(cost) = &self.cost {
            cost.check()?;
        }
        let of_peers = self.peers.iter().flat_map(PeerHealth::texts);
        for (what, text) in texts.into_iter().chain(of_peers) {
            let bytes = text.len();
            if bytes > SENTENCE_BYTES_MAX {
                return Err(format!(
                    "its {what} has {bytes} bytes, {SENTENCE_BYTES_MAX} are allowed"
                ));
            }
        }
        let gone = self
            .changes
            .as_ref()
            .map_or(0, |changes| changes.gone.len());
        match self.peers.len() + gone {
            peers if peers > PEERS_TOLD_MAX => Err(format!(
                "it tells of {peers} peers, {PEERS_TOLD_MAX} are allowed"
            )),
            _ => Ok(()),
        }
    }

    /// Cuts sentences that are too long, and leaves out peers beyond the bound: first those that cannot be pulled from.
    #[must_use]
    pub fn within_bounds(mut self) -> Self {
        let short = |text: &mut String| *text = cut(std::mem::take(text), SENTENCE_BYTES_MAX);
        self.reason.iter_mut().for_each(short);
        [&mut self.device, &mut self.weights, &mut self.transport]
            .into_iter()
            .for_each(short);
        if self.peers.len() > PEERS_TOLD_MAX {
            self.peers
                .sort_by_key(|peer| peer.state != PeerState::Ready);
            self.peers.truncate(PEERS_TOLD_MAX);
        }
        self.peers.iter_mut().for_each(PeerHealth::cut);
        self
    }

    /// Bytes that it holds in memory, about.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.worker.as_str().len()
            + self.reason.as_ref().map_or(0, String::len)
            + self.model.name.len()
            + self.device.len()
            + self.weights.len()
            + self.transport.len()
            + self.peers.iter().map(PeerHealth::bytes).sum::<usize>()
            + self
                .cost
                .as_ref()
                .map_or(0, |cost| size_of_val(cost.layers.as_slice()))
    }
}

/// Answer to an empty request on `describe.<worker>`: what peers need once per incarnation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerDescriptor {
    /// Protocol version.
    pub v: u16,
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub incarnation: Incarnation,
    /// What it does.
    pub role: Role,
    /// What it serves.
    pub model: ModelInfo,
    /// How its KV is laid out.
    pub kv: KvGeometry,
    /// What each of its ranks holds of the KV: as many ranks as `transfer` names arenas.
    pub shares: KvShares,
    /// How to read its arenas; `None` if it moves no KV.
    pub transfer: Option<TransferDescriptor>,
}

/// API server, published on `api-beat.<api-server>` every [`crate::deadlines::BEAT_INTERVAL_MS`]: workers end the
/// requests of an API server that fell silent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiBeat {
    /// Protocol version.
    pub v: u16,
    /// Who.
    pub api_server: ApiServerId,
    /// Which life, as in its jobs: workers end what a former one asked for. Senders of old say none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// Requests in flight.
    pub in_flight: u32,
    /// For how long this life has served, in milliseconds. 0: it does not serve, because it waits to see whether another
    /// process has its name. Senders of old say nothing and serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving_ms: Option<u64>,
}

impl ApiBeat {
    /// Whether it only waits for its name: it asks for nothing, and takes nobody's place.
    pub fn stands_by(&self) -> bool {
        self.serving_ms == Some(0)
    }
}

/// Anybody who just joined, published on `hello`: beat now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol version.
    pub v: u16,
    /// Who asks.
    pub from: String,
}
