//! Which prefixes a worker holds the KV of, and how it is told.
//!
//! A full block of a sequence has a *link*: a 64-bit hash of its tokens and of all tokens before them, of whose KV the sequence
//! may use, and of how many tokens a block has. Whoever knows a prompt can compute the links of its blocks ([`prefix_chain`]) and
//! look up who holds them. The links of a sequence's blocks, in order, are its chain.
//!
//! A link only says where to send a prompt. Whether KV is used is decided by the worker that holds it, which compares tokens and
//! salt themselves: prompts that are made to collide get a worker that has nothing for them, and nothing else.
//!
//! A worker publishes what enters and leaves its prefix index as numbered [`PrefixReport`]s. Each beat names the number of the
//! last one ([`crate::Beat::prefix_version`]), so that a loss is noticed where no report follows it. Who is new, or has missed one,
//! asks for all in pages ([`PrefixesAsk`], [`PrefixPage`]).

use serde::{Deserialize, Serialize};

use crate::limits::{PREFIX_CHANGES_MAX, PREFIX_PAGE_MAX};
use crate::{CacheSalt, Incarnation, PackedLinks, WorkerId};

/// What every chain begins with: the fractional part of the golden ratio.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// What the links of a sequence's first blocks follow.
pub fn prefix_root(CacheSalt(salt): CacheSalt, block_tokens: usize) -> u64 {
    let root = mix(SEED ^ block_tokens as u64);
    mix(mix(root ^ salt as u64) ^ (salt >> 64) as u64)
}

/// The link of a block with these tokens after the one with the link `parent`, or after [`prefix_root`]. Tokens go in two at a
/// time, the first of them as the upper half of a word; a last one without a neighbour goes in by itself.
pub fn prefix_link(parent: u64, tokens: &[u32]) -> u64 {
    let (pairs, last) = tokens.as_chunks::<2>();
    let link = pairs.iter().fold(parent, |link, [a, b]| {
        mix(link ^ (u64::from(*a) << 32 | u64::from(*b)))
    });
    last.iter()
        .fold(link, |link, token| mix(link ^ u64::from(*token)))
}

/// The links of all full blocks of a sequence.
pub fn prefix_chain(salt: CacheSalt, block_tokens: usize, tokens: &[u32]) -> Vec<u64> {
    let block_tokens = block_tokens.max(1);
    let mut link = prefix_root(salt, block_tokens);
    tokens
        .chunks_exact(block_tokens)
        .map(|block| {
            link = prefix_link(link, block);
            link
        })
        .collect()
}

/// A word whose bits depend on all bits of another one: the finisher of SplitMix64 (Steele, Lea and Flood, 2014), after a step
/// that keeps 0 from being its own image.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(SEED);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What entered and left a worker's prefix index, published on `prefixes.<worker>`. Each link is in it once, as it stands now:
/// taken in twice it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixReport {
    /// Protocol version.
    pub v: u16,
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub incarnation: Incarnation,
    /// The report that this one follows; 0 is the empty index of a worker that just started. Who has not had it asks for all, on
    /// `prefix-pages.<worker>`.
    pub since: u64,
    /// Its own number, above `since`.
    pub version: u64,
    /// Links of blocks that are in the index now.
    #[serde(default)]
    pub added: PackedLinks,
    /// Links of blocks that are not.
    #[serde(default)]
    pub removed: PackedLinks,
    /// The worker holds more blocks than it tells of ([`crate::limits::PREFIX_BLOCKS_MAX`]): what is not told counts as not held.
    #[serde(default)]
    pub is_part: bool,
}

impl PrefixReport {
    /// Whether it holds no more than one may.
    ///
    /// # Errors
    /// Which bound it breaks, as a sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.version <= self.since {
            return Err(format!(
                "report {} does not come after {}",
                self.version, self.since
            ));
        }
        match self.added.0.len() + self.removed.0.len() {
            changes if changes > PREFIX_CHANGES_MAX => Err(format!(
                "it tells of {changes} blocks, {PREFIX_CHANGES_MAX} are allowed"
            )),
            _ => Ok(()),
        }
    }
}

/// Request on `prefix-pages.<worker>` for a part of the worker's prefix index, answered with a [`PrefixPage`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixesAsk {
    /// Protocol version.
    pub v: u16,
    /// Who asks.
    pub from: String,
    /// Blocks of the arena from this one on: 0, then what the page before says.
    pub block: u32,
}

/// Answer to a [`PrefixesAsk`]: which blocks of a part of the arena are in the index. A worker that is asked too often does not
/// answer: ask again later.
///
/// Pages are of different times. All of them with, after them, all reports above the first page's `version` are the index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixPage {
    /// Protocol version.
    pub v: u16,
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub incarnation: Incarnation,
    /// The last report before it: what that told is in the page.
    pub version: u64,
    /// Links of indexed blocks.
    #[serde(default)]
    pub links: PackedLinks,
    /// Where the next page begins; none after the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u32>,
    /// As in [`PrefixReport`].
    #[serde(default)]
    pub is_part: bool,
}

impl PrefixPage {
    /// Whether it holds no more than one may.
    ///
    /// # Errors
    /// Which bound it breaks, as a sentence.
    pub fn check(&self) -> Result<(), String> {
        match self.links.0.len() {
            links if links > PREFIX_PAGE_MAX => Err(format!(
                "it tells of {links} blocks, {PREFIX_PAGE_MAX} are allowed"
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are part of the contract: workers and API servers of several releases compare them.
    #[test]
    fn links_are_what_they_were() {
        let chain = prefix_chain(CacheSalt(0x5a17), 3, &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(chain, [0x160f_bef1_2bcb_40dc, 0xd80a_2ef6_cc10_d5dc]);
    }

    #[test]
    fn a_link_says_all_that_sets_kv_apart() {
        let tokens: Vec<u32> = (0..8).collect();
        let chain = prefix_chain(CacheSalt::NONE, 4, &tokens);
        assert_eq!(chain.len(), 2);
        let mut other = tokens.clone();
        other[0] = 9;
        let others = [
            prefix_chain(CacheSalt(1), 4, &tokens),
            prefix_chain(CacheSalt(1 << 64), 4, &tokens),
            prefix_chain(CacheSalt::NONE, 4, &other),
            prefix_chain(CacheSalt::NONE, 2, &tokens),
        ];
        for other in others {
            assert!(other.iter().all(|link| !chain.contains(link)), "{other:x?}");
        }
        assert_eq!(prefix_chain(CacheSalt::NONE, 4, &tokens[..7]), chain[..1]);
        // What comes after a block changes nothing of its link.
        other.clone_from(&tokens);
        other[7] = 9;
        let other = prefix_chain(CacheSalt::NONE, 4, &other);
        assert_eq!((other[0] == chain[0], other[1] == chain[1]), (true, false));
    }
}
