//! How KV lies in memory: the geometry, which part of it each rank holds, and runs of blocks.

use std::ops::Range;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

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

/// Layers whose KV is alike: of a model whose layers are all alike, all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGroup {
    /// Number of layers, over all ranks.
    pub layers: u32,
    /// Key/value heads of each, over all ranks.
    pub kv_heads: u32,
    /// Numbers per head.
    pub head_dim: u32,
}

/// What two workers must agree on before one may read the other's KV: the KV fingerprint. Two values are compared whole.
///
/// A block holds `block_tokens` tokens of every layer. It is
/// `[group][kv_head][layer of the group][K,V][token in block][head_dim]`, outermost first; a rank's arena is one such block
/// after the other, with the heads and layers of its [`KvShare`]s and no others. Heads stand outside layers so that what one
/// tensor-parallel rank needs of a block is one range whatever the two sides' sizes, and a whole block is one range when they
/// agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvGeometry {
    /// Version of the arena layout; this page describes 1.
    pub layout: u16,
    /// Number format.
    pub dtype: KvDtype,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// The model's layers, in groups: one at least, [`Self::GROUPS_MAX`] at most.
    #[serde(deserialize_with = "few_groups")]
    pub groups: Vec<KvGroup>,
}

/// Beats and handles carry geometries, and whoever keeps them counts them as small.
fn few_groups<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<KvGroup>, D::Error> {
    let groups = Vec::deserialize(deserializer)?;
    match groups.len() {
        1..=KvGeometry::GROUPS_MAX => Ok(groups),
        count => Err(D::Error::custom(format!(
            "a geometry of {count} groups of layers, which is not 1 to {}",
            KvGeometry::GROUPS_MAX
        ))),
    }
}

impl KvGeometry {
    /// Version of the arena layout this crate describes.
    pub const LAYOUT: u16 = 1;

    /// Most groups of layers.
    pub const GROUPS_MAX: usize = 16;

    /// BF16, laid out as this crate describes.
    pub fn bf16(block_tokens: u32, groups: Vec<KvGroup>) -> Self {
        Self {
            layout: Self::LAYOUT,
            dtype: KvDtype::Bf16,
            block_tokens,
            groups,
        }
    }

    /// The group that all layers are in; `None` if there are several.
    pub fn only_group(&self) -> Option<KvGroup> {
        match self.groups[..] {
            [group] => Some(group),
            _ => None,
        }
    }

    /// Bytes of one head of one layer of a group in one block: keys and values.
    pub const fn cell_bytes(&self, group: &KvGroup) -> u64 {
        2 * self.block_tokens as u64 * group.head_dim as u64 * self.dtype.bytes() as u64
    }

    /// Bytes of one block that holds all heads of all layers.
    pub fn block_bytes(&self) -> usize {
        let bytes = |group: &KvGroup| {
            let cells = u64::from(group.kv_heads) * u64::from(group.layers);
            cells * self.cell_bytes(group)
        };
        self.groups.iter().map(bytes).sum::<u64>() as usize
    }

    /// Blocks that hold `tokens` tokens.
    pub const fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens as usize)
    }

    /// The first field in which two geometries differ, as a sentence; `None` when they agree.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if self.dtype != other.dtype {
            return Some(format!(
                "KV dtype is {:?} here and {:?} there",
                self.dtype, other.dtype
            ));
        }
        let layouts = [self, other].map(|kv| u32::from(kv.layout));
        let counts = [self, other].map(|kv| kv.groups.len() as u32);
        let mut fields = vec![
            ("layout version", layouts),
            ("tokens per block", [self.block_tokens, other.block_tokens]),
            ("groups of layers", counts),
        ];
        for (ours, theirs) in self.groups.iter().zip(&other.groups) {
            fields.extend([
                ("KV heads", [ours.kv_heads, theirs.kv_heads]),
                ("layers", [ours.layers, theirs.layers]),
                ("head_dim", [ours.head_dim, theirs.head_dim]),
            ]);
        }
        let (name, [here, there]) = fields
            .into_iter()
            .find(|(_, [here, there])| here != there)?;
        Some(format!("{name} is {here} here and {there} there"))
    }
}

/// What one rank holds of one [`KvGroup`]: some heads of some of its layers. A count of 0: nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvShare {
    /// First KV head.
    pub head_first: u32,
    /// Number of KV heads.
    pub head_count: u32,
    /// First layer, counted within the group.
    pub layer_first: u32,
    /// Number of layers.
    pub layer_count: u32,
}

impl KvShare {
    /// Everything.
    pub const fn whole(group: &KvGroup) -> Self {
        Self {
            head_first: 0,
            head_count: group.kv_heads,
            layer_first: 0,
            layer_count: group.layers,
        }
    }

    /// Its heads. It must have passed [`KvShares::check`].
    pub const fn heads(&self) -> Range<u32> {
        self.head_first..self.head_first + self.head_count
    }

    /// Its layers. It must have passed [`KvShares::check`].
    pub const fn layers(&self) -> Range<u32> {
        self.layer_first..self.layer_first + self.layer_count
    }

    /// Pairs of head and layer.
    pub const fn cells(&self) -> u64 {
        self.head_count as u64 * self.layer_count as u64
    }

    fn is_within(&self, group: &KvGroup) -> bool {
        let reaches = |first: u32, count: u32, limit: u32| {
            first.checked_add(count).is_some_and(|end| end <= limit)
        };
        reaches(self.head_first, self.head_count, group.kv_heads)
            && reaches(self.layer_first, self.layer_count, group.layers)
    }
}

/// What each rank of a worker holds: `[rank][group]`. Constant for one incarnation.
///
/// All ranks use the same block ids, so one list of blocks says where a sequence lies on all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KvShares(pub Vec<Vec<KvShare>>);

impl KvShares {
    /// Most ranks of one worker.
    pub const RANKS_MAX: usize = 256;

    /// One rank that holds everything.
    pub fn whole(kv: &KvGeometry) -> Self {
        Self::parallel(kv, 1, 1)
    }

    /// `tensor` × `pipeline` ranks. Each pipeline stage has a run of each group's layers, and its ranks share out the heads.
    /// The parts are as equal as they can be. Where a stage has more ranks than a group has heads, neighbouring ranks hold the
    /// same head.
    ///
    /// # Panics
    /// If either count is 0.
    pub fn parallel(kv: &KvGeometry, tensor: u32, pipeline: u32) -> Self {
        let rank = |index: u32| {
            let (stage, place) = (index / tensor, index % tensor);
            let share = |group: &KvGroup| {
                let layers = part(group.layers, stage, pipeline);
                let heads = match tensor <= group.kv_heads {
                    true => part(group.kv_heads, place, tensor),
                    false => {
                        let head = u64::from(place) * u64::from(group.kv_heads) / u64::from(tensor);
                        head as u32..head as u32 + 1
                    }
                };
                KvShare {
                    head_first: heads.start,
                    head_count: heads.end - heads.start,
                    layer_first: layers.start,
                    layer_count: layers.end - layers.start,
                }
            };
            kv.groups.iter().map(share).collect()
        };
        Self((0..tensor * pipeline).map(rank).collect())
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.0.len()
    }

    /// Bytes of one block on a rank. The shares must have passed [`Self::check`].
    pub fn block_bytes(&self, kv: &KvGeometry, rank: usize) -> u64 {
        let shares = self.0[rank].iter().zip(&kv.groups);
        shares
            .map(|(share, group)| share.cells() * kv.cell_bytes(group))
            .sum()
    }

    /// Whether every rank holds something, within the geometry's bounds. Another worker's shares are not to be used before.
    ///
    /// # Errors
    /// What is wrong, as a sentence.
    pub fn check(&self, kv: &KvGeometry) -> Result<(), String> {
        match self.0.len() {
            0 => return Err("it names no rank".to_owned()),
            count if count > Self::RANKS_MAX => {
                return Err(format!(
                    "it names {count} ranks, {} at most",
                    Self::RANKS_MAX
                ));
            }
            _ => {}
        }
        for (rank, shares) in self.0.iter().enumerate() {
            if shares.len() != kv.groups.len() {
                return Err(format!(
                    "rank {rank} names shares of {} groups of layers, there are {}",
                    shares.len(),
                    kv.groups.len()
                ));
            }
            for (share, group) in shares.iter().zip(&kv.groups) {
                if !share.is_within(group) {
                    return Err(format!(
                        "rank {rank} claims heads {}+{} of {} and layers {}+{} of {}",
                        share.head_first,
                        share.head_count,
                        group.kv_heads,
                        share.layer_first,
                        share.layer_count,
                        group.layers
                    ));
                }
            }
            if shares.iter().all(|share| share.cells() == 0) {
                return Err(format!("rank {rank} holds nothing"));
            }
        }
        Ok(())
    }
}

/// The `index`-th of `parts` nearly equal parts of `0 .. count`.
fn part(count: u32, index: u32, parts: u32) -> Range<u32> {
    let end = |index: u32| (u64::from(count) * u64::from(index) / u64::from(parts)) as u32;
    end(index)..end(index + 1)
}

/// A run of neighbouring blocks of an arena: blocks `first .. first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRun {
    /// Index of the first block in the arena.
    pub first: u32,
    /// Number of blocks, at least 1.
    pub count: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(kv_heads: u32, layers: u32) -> KvGeometry {
        let group = KvGroup {
            layers,
            kv_heads,
            head_dim: 64,
        };
        KvGeometry::bf16(32, vec![group])
    }

    #[test]
    fn ranks_share_out_heads_and_replicate_them_where_there_are_too_few() {
        let heads = |kv_heads, tensor| {
            let shares = KvShares::parallel(&geometry(kv_heads, 2), tensor, 1);
            let heads = shares.0.iter().map(|rank| rank[0].heads());
            heads.collect::<Vec<_>>()
        };
        assert_eq!(heads(8, 2), [0..4, 4..8]);
        assert_eq!(heads(3, 3), [0..1, 1..2, 2..3]);
        assert_eq!(heads(3, 2), [0..1, 1..3]);
        assert_eq!(heads(2, 4), [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(heads(1, 3), [0..1, 0..1, 0..1]);
    }

    #[test]
    fn stages_share_out_layers() {
        let kv = geometry(2, 5);
        let shares = KvShares::parallel(&kv, 2, 2);
        let layers: Vec<_> = shares.0.iter().map(|rank| rank[0].layers()).collect();
        assert_eq!(layers, [0..2, 0..2, 2..5, 2..5]);
        assert_eq!(shares.check(&kv), Ok(()));
        let cell = kv.cell_bytes(&kv.groups[0]);
        assert_eq!(cell, 2 * 32 * 64 * 2);
        assert_eq!(shares.block_bytes(&kv, 0), 2 * cell);
        assert_eq!(shares.block_bytes(&kv, 3), 3 * cell);
        let all: u64 = (0..4).map(|rank| shares.block_bytes(&kv, rank)).sum();
        assert_eq!(all, kv.block_bytes() as u64);
    }

    #[test]
    fn shares_that_nobody_can_have_are_refused() {
        let kv = geometry(2, 3);
        let good = KvShares::whole(&kv);
        let refused = |alter: &dyn Fn(&mut Vec<Vec<KvShare>>)| {
            let mut shares = good.clone();
            alter(&mut shares.0);
            shares.check(&kv).expect_err("refused")
        };
        assert_eq!(good.check(&kv), Ok(()));
        assert!(refused(&|ranks| ranks.clear()).contains("no rank"));
        assert!(refused(&|ranks| *ranks = vec![ranks[0].clone(); 257]).contains("257 ranks"));
        assert!(refused(&|ranks| ranks[0].clear()).contains("0 groups"));
        assert!(refused(&|ranks| ranks[0][0].head_first = u32::MAX).contains("claims heads"));
        assert!(refused(&|ranks| ranks[0][0].layer_count = 4).contains("layers 0+4 of 3"));
        assert!(refused(&|ranks| ranks[0][0].layer_count = 0).contains("holds nothing"));
    }

    #[test]
    fn a_geometry_has_few_groups() {
        let text = |groups: usize| {
            let kv = KvGeometry::bf16(32, vec![geometry(1, 1).groups[0]; groups]);
            serde_json::to_string(&kv).expect("encodes")
        };
        let read = |text: &str| serde_json::from_str::<KvGeometry>(text);
        assert!(read(&text(KvGeometry::GROUPS_MAX)).is_ok());
        for groups in [0, KvGeometry::GROUPS_MAX + 1] {
            let error = read(&text(groups)).expect_err("refused").to_string();
            assert!(error.contains(&format!("{groups} groups")), "{error}");
        }
    }

    #[test]
    fn the_first_difference_is_named() {
        let kv = geometry(2, 3);
        assert_eq!(kv.difference(&kv), None);
        let told = |other: KvGeometry| kv.difference(&other).expect("a difference");
        assert_eq!(told(geometry(2, 4)), "layers is 3 here and 4 there");
        let two = KvGeometry::bf16(32, vec![kv.groups[0]; 2]);
        assert_eq!(told(two), "groups of layers is 1 here and 2 there");
    }
}
