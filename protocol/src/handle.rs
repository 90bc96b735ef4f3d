//! The KV handle: the baton a context worker hands to a decode worker.

use serde::{Deserialize, Serialize};

use crate::{
    Base64Bytes, FinishReason, HandleId, Incarnation, ModelFingerprint, Nonce, TokenLogprobs,
    WorkerId,
};

/// Number format of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvDtype {
    /// bfloat16, two bytes.
    Bf16,
}

impl KvDtype {
    /// Bytes of one number.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
        }
    }
}

/// What two workers must agree on before one may read the other's KV: the KV fingerprint. Two values
/// are compared whole.
///
/// The arena of a rank is `[block][kv_head][layer][K,V][token in block][head_dim]`, outermost first.
/// Heads stand outside layers so that what one tensor-parallel rank needs of a block is one range
/// whatever the two sides' sizes, and a whole block is one range when they agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGeometry {
    /// Version of the arena layout; this page describes 1.
    pub layout: u16,
    /// Number format.
    pub dtype: KvDtype,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Key/value heads of the whole model, over all ranks.
    pub kv_heads: u32,
    /// Layers of the whole model.
    pub layers: u32,
    /// Numbers per head.
    pub head_dim: u32,
}

impl KvGeometry {
    /// Version of the arena layout this crate describes.
    pub const LAYOUT: u16 = 1;

    /// Bytes of one head's share of one block, all layers, keys and values.
    pub const fn head_bytes(&self) -> usize {
        self.layers as usize
            * 2
            * self.block_tokens as usize
            * self.head_dim as usize
            * self.dtype.bytes()
    }

    /// Bytes of one block that holds all heads.
    pub const fn block_bytes(&self) -> usize {
        self.kv_heads as usize * self.head_bytes()
    }

    /// Blocks that hold `tokens` tokens.
    pub const fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens as usize)
    }

    /// The first field in which two geometries differ, as a sentence; `None` when they agree.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let fields = [
            (
                "layout version",
                u32::from(self.layout),
                u32::from(other.layout),
            ),
            ("tokens per block", self.block_tokens, other.block_tokens),
            ("KV heads", self.kv_heads, other.kv_heads),
            ("layers", self.layers, other.layers),
            ("head_dim", self.head_dim, other.head_dim),
        ];
        if self.dtype != other.dtype {
            return Some(format!(
                "KV dtype is {:?} here and {:?} there",
                self.dtype, other.dtype
            ));
        }
        let (name, here, there) = fields.into_iter().find(|(_, here, there)| here != there)?;
        Some(format!("{name} is {here} here and {there} there"))
    }
}

/// A run of neighbouring blocks of an arena: blocks `first .. first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRun {
    /// Index of the first block in the arena.
    pub first: u32,
    /// Number of blocks, at least 1.
    pub count: u32,
}

/// What one tensor-parallel rank of the context worker holds of the sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRuns {
    /// First KV head this rank holds.
    pub head_first: u32,
    /// Number of KV heads this rank holds.
    pub head_count: u32,
    /// First layer this rank holds.
    pub layer_first: u32,
    /// Number of layers this rank holds.
    pub layer_count: u32,
    /// The sequence's blocks in order of their tokens, run-length coded.
    pub runs: Vec<BlockRun>,
}

/// Where the prompt's time went, on the context worker's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefillTimings {
    /// From arrival of the job to its first forward step.
    pub queue_ms: f32,
    /// From the first forward step to the first token.
    pub compute_ms: f32,
}

/// A finished prefill whose KV waits in a context worker's arena, leased.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvHandle {
    /// Who holds the KV.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Which staged cache on it.
    pub handle: HandleId,
    /// Must be shown to release it.
    pub nonce: Nonce,
    /// The model that computed it: two models can share a geometry.
    pub model: ModelFingerprint,
    /// How the KV is laid out.
    pub kv: KvGeometry,
    /// Where it is, rank by rank. Empty when nothing is staged because `finish` is set.
    pub ranks: Vec<RankRuns>,
    /// Tokens whose KV is valid: all that the job carried.
    pub valid_tokens: u32,
    /// How long the lease runs from the moment the handle was sent.
    pub lease_ms: u32,
    /// The token that follows the job's tokens.
    pub first_token: u32,
    /// Its log-probabilities, if the job asked for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_logprobs: Option<TokenLogprobs>,
    /// Set when the first token ended the generation; nothing is staged then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<FinishReason>,
    /// Tokens that the prefix index already had.
    pub cached_tokens: u32,
    /// Where the time went.
    pub timings: PrefillTimings,
}

/// Kind of memory an arena lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryType {
    /// Main memory.
    Host,
    /// Memory of an NVIDIA GPU.
    Cuda,
}

/// Version of a UCX library: major, minor, release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UcxVersion(pub u32, pub u32, pub u32);

impl UcxVersion {
    /// Whether remote keys packed by one version can be unpacked by the other. Seen: 1.13 and 1.22
    /// over TCP cannot.
    pub fn compatible(self, other: Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl std::fmt::Display for UcxVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// One rank's registered arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRegion {
    /// Packed UCX remote key.
    pub rkey: Base64Bytes,
    /// Address of the arena in its owner's address space.
    pub base: u64,
    /// Its length.
    pub bytes: u64,
    /// Its kind of memory.
    pub memory: MemoryType,
}

/// Everything a peer needs to read a worker's arenas. Constant for one incarnation, so it is sent
/// once and not with every handle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferDescriptor {
    /// Version of the UCX library at this end.
    pub ucx: UcxVersion,
    /// UCX worker address.
    pub address: Base64Bytes,
    /// The arenas, by rank.
    pub ranks: Vec<RankRegion>,
}
