//! What a choice by time reads of all workers, side by side: 32 of them together, a row of 32 numbers for each thing that is read.
//!
//! Rows are worked out when a beat comes or a job begins or ends, for one worker then. A choice only adds and multiplies them with what its own request
//! is, for all workers alike, without a branch: so the compiler makes vector instructions of it. What comes out is one number a worker,
//! the key, which is the smaller the better the worker.

use std::array::from_fn;

use super::by_time::{Arrives, Generates, Pace};
use crate::fleet::membership::Slot;

/// Workers that stand together.
pub(super) const LANES: usize = 32;

/// A number of each.
pub(super) type Row<T> = [T; LANES];

/// The key of a worker that is not asked.
pub(super) const NOBODY: i32 = i32::MAX;

/// In the key of a worker that failed this request already: it comes after all others.
pub(super) const BLAME: i32 = 1 << 30;

/// Bits of a key below its class.
pub(super) const CLASS_SHIFT: u32 = 28;

const BITS: Row<u32> = {
    let mut bits = [0; LANES];
    let mut lane = 0;
    while lane < LANES {
        bits[lane] = 1 << lane;
        lane += 1;
    }
    bits
};

/// Of all workers, by slot.
#[derive(Debug, Default)]
pub(super) struct Columns {
    prompts: Vec<Prompts>,
    generations: Vec<Generations>,
    /// Prompts that may want a decode worker before one that comes now, at most.
    ahead: Vec<Row<u32>>,
}

/// What a prompt's first token depends on.
#[derive(Clone, Debug)]
struct Prompts {
    /// Tokens ahead of interactive prompts, and of batch ones.
    ahead: [Row<f32>; 2],
    wait_us: Row<f32>,
    token_us: Row<f32>,
    pair_us: Row<f32>,
    block_tokens: Row<f32>,
}

/// What a generation's place depends on.
#[derive(Clone, Debug)]
struct Generations {
    step_us: Row<f32>,
    step_token_us: Row<f32>,
    limit_us: Row<f32>,
    generates: Row<f32>,
    batch: Row<f32>,
    blocks_left: Row<f32>,
    blocks_per_token: Row<f32>,
    link_us: Row<f32>,
    link_token_us: Row<f32>,
    block_tokens: Row<f32>,
    does_both: Row<f32>,
}

/// One worker's part of the columns.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lane {
    /// Of interactive prompts and of batch ones.
    pub(super) ahead: [f32; 2],
    pub(super) pace: Pace,
    pub(super) generates: Generates,
    pub(super) block_tokens: f32,
    pub(super) prompts_ahead: u32,
}

impl Default for Prompts {
    fn default() -> Self {
        let none = [0.0; LANES];
        Self {
            ahead: [none; 2],
            wait_us: none,
            token_us: none,
            pair_us: none,
            block_tokens: none,
        }
    }
}

impl Default for Generations {
    fn default() -> Self {
        let none = [0.0; LANES];
        Self {
            step_us: none,
            step_token_us: none,
            limit_us: none,
            generates: none,
            batch: none,
            blocks_left: none,
            blocks_per_token: none,
            link_us: none,
            link_token_us: none,
            block_tokens: none,
            does_both: none,
        }
    }
}

impl Columns {
    /// This is what is known of the worker in this slot.
    pub(super) fn put(&mut self, slot: Slot, lane: Lane) {
        let (at, i) = (slot / LANES, slot % LANES);
        if at >= self.prompts.len() {
            self.prompts.resize_with(at + 1, Prompts::default);
            self.generations.resize_with(at + 1, Generations::default);
            self.ahead.resize(at + 1, [0; LANES]);
        }
        let prompts = &mut self.prompts[at];
        (prompts.ahead[0][i], prompts.ahead[1][i]) = (lane.ahead[0], lane.ahead[1]);
        prompts.wait_us[i] = lane.pace.wait_us;
        prompts.token_us[i] = lane.pace.token_us;
        prompts.pair_us[i] = lane.pace.pair_us;
        prompts.block_tokens[i] = lane.block_tokens;
        let (all, one) = (&mut self.generations[at], lane.generates);
        all.step_us[i] = one.step_us;
        all.step_token_us[i] = one.step_token_us;
        all.limit_us[i] = one.limit_us;
        all.generates[i] = one.generates;
        all.batch[i] = one.batch;
        all.blocks_left[i] = one.blocks_left;
        all.blocks_per_token[i] = one.blocks_per_token;
        all.link_us[i] = one.link_us;
        all.link_token_us[i] = one.link_token_us;
        all.block_tokens[i] = lane.block_tokens;
        all.does_both[i] = one.does_both;
        self.ahead[at][i] = lane.prompts_ahead;
    }

    /// As it was put.
    pub(super) fn generates(&self, slot: Slot) -> Generates {
        let (at, i) = (slot / LANES, slot % LANES);
        self.generations
            .get(at)
            .map_or_else(Generates::default, |all| all.one(i))
    }

    /// Prompts that may want a decode worker before one that comes now, over all workers: no fewer than there are.
    pub(super) fn prompts_ahead(&self) -> u64 {
        let sum = |row: &Row<u32>| {
            let all = row.iter().map(|ahead| u64::from(*ahead));
            all.fold(0, u64::wrapping_add)
        };
        self.ahead.iter().map(sum).sum()
    }

    /// Keys for a prompt of so many tokens, by how many blocks of it each worker has. How many of those that are asked have prompts to run.
    pub(super) fn prompt_keys(
        &self,
        keys: &mut Keys,
        asked: impl Fn(usize) -> u32,
        blocks: &[i32],
        (tier, tokens): (usize, f32),
    ) -> usize {
        keys.begin(self.prompts.len());
        let mut busy = 0;
        for (at, all) in self.prompts.iter().enumerate() {
            let word = asked(at);
            if word == 0 {
                continue;
            }
            let blocks = row_of(blocks, at);
            let ahead = &all.ahead[tier];
            let key = |i: usize| {
                let have = blocks[i] as f32 * all.block_tokens[i];
                all.pace(i).key(ahead[i], tokens, have)
            };
            keys.rows[at] = masked(from_fn(key), word);
            let bit = |i: usize| if ahead[i] > 0.0 { BITS[i] } else { 0 };
            let is_busy = (0..LANES).fold(0, |all, i| all | bit(i));
            busy += (is_busy & word).count_ones();
        }
        busy as usize
    }

    /// Keys for a prompt of so many tokens, of which those that are asked pull the first ones; of nobody who has as many.
    pub(super) fn pull_keys(
        &self,
        keys: &mut Keys,
        asked: impl Fn(usize) -> u32,
        blocks: &[i32],
        (tier, tokens): (usize, f32),
        pulled: f32,
    ) {
        keys.begin(self.prompts.len());
        for (at, all) in self.prompts.iter().enumerate() {
            let word = asked(at);
            if word == 0 {
                continue;
            }
            let blocks = row_of(blocks, at);
            let ahead = &all.ahead[tier];
            let key = |i: usize| {
                let have = blocks[i] as f32 * all.block_tokens[i];
                let key = all.pace(i).key(ahead[i], tokens, pulled);
                if have < pulled { key } else { NOBODY }
            };
            keys.rows[at] = masked(from_fn(key), word);
        }
    }

    /// Until the first token of a prompt of so many tokens at a worker that has some of it.
    pub(super) fn first_token_us(
        &self,
        slot: Slot,
        (tier, tokens): (usize, f32),
        have: f32,
    ) -> f32 {
        let (at, i) = (slot / LANES, slot % LANES);
        self.prompts.get(at).map_or(0.0, |all| {
            let need = (tokens - have).max(0.0);
            all.pace(i).first_token_us(all.ahead[tier][i], need, have)
        })
    }

    /// Keys for a generation on workers other than the one that ran its prompt.
    pub(super) fn place_keys(
        &self,
        keys: &mut Keys,
        asked: impl Fn(usize) -> u32,
        blocks: &[i32],
        arrives: Arrives,
    ) {
        keys.begin(self.generations.len());
        for (at, all) in self.generations.iter().enumerate() {
            let word = asked(at);
            if word == 0 {
                continue;
            }
            let blocks = row_of(blocks, at);
            let key = |i: usize| {
                let have = blocks[i] as f32 * all.block_tokens[i];
                all.one(i).key(arrives, have)
            };
            keys.rows[at] = masked(from_fn(key), word);
        }
    }
}

impl Prompts {
    #[inline(always)]
    fn pace(&self, i: usize) -> Pace {
        Pace {
            wait_us: self.wait_us[i],
            token_us: self.token_us[i],
            pair_us: self.pair_us[i],
        }
    }
}

impl Generations {
    #[inline(always)]
    fn one(&self, i: usize) -> Generates {
        Generates {
            step_us: self.step_us[i],
            step_token_us: self.step_token_us[i],
            limit_us: self.limit_us[i],
            generates: self.generates[i],
            batch: self.batch[i],
            blocks_left: self.blocks_left[i],
            blocks_per_token: self.blocks_per_token[i],
            link_us: self.link_us[i],
            link_token_us: self.link_token_us[i],
            does_both: self.does_both[i],
        }
    }
}

/// The key of each worker in one choice. Their memory is kept for the next.
#[derive(Debug, Default)]
pub(super) struct Keys {
    rows: Vec<Row<i32>>,
}

impl Keys {
    fn begin(&mut self, rows: usize) {
        self.rows.clear();
        self.rows.resize(rows, [NOBODY; LANES]);
    }

    /// The key of the worker in this slot, if it is asked.
    pub(super) fn of(&mut self, slot: Slot) -> Option<&mut i32> {
        let key = self.rows.get_mut(slot / LANES)?.get_mut(slot % LANES)?;
        (*key != NOBODY).then_some(key)
    }

    /// The worker with the smallest key; of several the one whose turn it is, in the order of slots.
    pub(super) fn best(&self, turn: usize) -> Option<Slot> {
        let mut least = [NOBODY; LANES];
        for row in &self.rows {
            least = from_fn(|i| if row[i] < least[i] { row[i] } else { least[i] });
        }
        let least = least.into_iter().min().unwrap_or(NOBODY);
        if least == NOBODY {
            return None;
        }
        let equals = |row: &Row<i32>| {
            let all = row.iter().map(|key| u32::from(*key == least));
            all.fold(0, u32::wrapping_add)
        };
        let mut before = turn % self.rows.iter().map(equals).sum::<u32>() as usize;
        for (at, row) in self.rows.iter().enumerate() {
            let here = equals(row) as usize;
            if before < here {
                let mut of_row = (0..LANES).filter(|i| row[*i] == least);
                return of_row.nth(before).map(|i| at * LANES + i);
            }
            before -= here;
        }
        None
    }
}

/// The 32 numbers from `32 * at` on; 0 where there are none.
fn row_of(all: &[i32], at: usize) -> Row<i32> {
    let all = all.get(at * LANES..).unwrap_or_default();
    match all.first_chunk::<LANES>() {
        Some(row) => *row,
        None => from_fn(|i| all.get(i).copied().unwrap_or(0)),
    }
}

/// With the keys of those alone whose bit is set.
fn masked(keys: Row<i32>, word: u32) -> Row<i32> {
    from_fn(|i| match word & BITS[i] {
        0 => NOBODY,
        _ => keys[i],
    })
}
