//! Attention over the paged arena, one piece per (sequence, KV head, some query tokens).
//!
//! A piece walks the KV in steps of 64 tokens at absolute positions, oldest first. Of each step it packs keys
//! and values as panels once, for all query heads that share the KV head and all its query tokens; scores and
//! weighted values then go through the kernel's tile, with a running maximum and sum per row (Milakov and
//! Gimelshein, arXiv:1805.02867). Decode is the same code with one query token, hence the same arithmetic.
//!
//! Queries are scaled by `log2(e) / sqrt(head_dim)` before they are rounded to BF16, so weights are powers of
//! two; weights are rounded to BF16 and summed as rounded, so they still add up to one.

use std::ops::Range;

use baton_engine::Rows;

use crate::gemm::{Tile, fetch, tile_rows, tiles};
use crate::math::{LANES, bf16_of, exp2, f32_of, sum_lanes};
use crate::memory::Pages;
use crate::pack::PANEL;

/// KV tokens of one step: two panels, so that the few rows of a decode step still fill the pipeline, and a
/// row's maximum moves half as often.
const STEP: usize = 2 * PANEL;

/// Query rows of one piece: packing a step is spread over these, and their sums stay in the second-level cache.
const PIECE_ROWS: usize = 96;

/// Attention of one layer over all rows of a step.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    pub shape: &'a HeadLayout,
    pub rows: &'a Rows,
    /// The arena, and this layer in it.
    pub arena: *const u8,
    pub layer: usize,
    /// Queries `[kv_head][row][group][head_dim_padded]`, rotated and scaled; `q_rows` rows per KV head.
    pub q: *const u16,
    pub q_rows: usize,
    /// Output `[row][head * head_dim]`, rows `ldo` apart.
    pub out: *mut u16,
    pub ldo: usize,
}

// SAFETY: pointers only; `attend` carries the obligation.
unsafe impl Send for Attention<'_> {}
// SAFETY: as above.
unsafe impl Sync for Attention<'_> {}

/// Heads and their sizes, and how far they see.
#[derive(Clone, Debug)]
pub struct HeadLayout {
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Bytes of a block: all heads of all layers.
    pub block_bytes: usize,
    /// Bytes of one head of all layers.
    pub head_bytes: usize,
    pub kv_heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    pub head_dim: usize,
    /// `head_dim` rounded up to panels.
    pub head_dim_padded: usize,
    pub window: Option<usize>,
}

impl HeadLayout {
    /// Bytes from the arena's base to a token's key; its value stands `value_offset` further on.
    #[inline(always)]
    pub fn key_offset(&self, block: u32, slot: usize, head: usize, layer: usize) -> usize {
        block as usize * self.block_bytes
            + head * self.head_bytes
            + 2 * layer * self.value_offset()
            + slot * self.head_dim * 2
    }

    /// First position that a token at `position` sees.
    #[inline(always)]
    pub fn seen_from(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Bytes from a token's key to its value: one block's keys of one head and layer.
    #[inline(always)]
    pub fn value_offset(&self) -> usize {
        self.block_tokens * self.head_dim * 2
    }
}

/// One piece of a layer's attention.
#[derive(Clone, Debug)]
pub struct Piece {
    pub sequence: usize,
    pub head: usize,
    /// Query tokens, counted from the sequence's first token of this step.
    pub tokens: Range<usize>,
}

/// Pieces of a step in `threads` runs of one cost, the costly ones of each first, so that threads end together.
pub fn pieces(shape: &HeadLayout, rows: &Rows, threads: usize, out: &mut Vec<Piece>) {
    out.clear();
    let tokens_max = (PIECE_ROWS / shape.group).max(1);
    for (sequence, s) in rows.sequences.iter().enumerate() {
        for first in (0..s.tokens).step_by(tokens_max) {
            let tokens = first..(first + tokens_max).min(s.tokens);
            out.extend((0..shape.kv_heads).map(|head| Piece {
                sequence,
                head,
                tokens: tokens.clone(),
            }));
        }
    }
    out.sort_by_key(|p| {
        let end = rows.sequences[p.sequence].start + p.tokens.end;
        std::cmp::Reverse(p.tokens.len() * end)
    });
    let dealt = (0..threads).flat_map(|thread| out.iter().skip(thread).step_by(threads));
    *out = dealt.cloned().collect();
}

/// What a thread needs for one piece.
pub struct Scratch {
    keys: Pages<u16>,
    values: Pages<u16>,
    scores: Pages<f32>,
    weights: Pages<u16>,
    sums: Pages<f32>,
    top: Vec<f32>,
    /// Partial sums of the weights of each row.
    total: Vec<[f32; LANES]>,
    /// What stands in for the rows of tokens that do not exist.
    zeros: Pages<u16>,
}

impl Scratch {
    pub fn new(shape: &HeadLayout) -> Self {
        let rows = PIECE_ROWS.max(shape.group);
        let dim = shape.head_dim_padded;
        Self {
            keys: Pages::zeroed(dim * STEP),
            values: Pages::zeroed(dim * STEP),
            scores: Pages::zeroed(rows * STEP),
            weights: Pages::zeroed(rows * STEP),
            sums: Pages::zeroed(rows * dim),
            top: vec![0.0; rows],
            total: vec![[0.0; LANES]; rows],
            zeros: Pages::zeroed(dim),
        }
    }
}

/// Computes one piece; `next` is the one that this thread will probably compute after it.
///
/// # Safety
/// The CPU has `T`'s features; the pointers of `job` cover its rows; every block of the sequence lies in the
/// arena and nobody writes it meanwhile; nobody else touches these outputs.
#[inline(always)]
pub unsafe fn attend<T: Tile>(
    job: &Attention<'_>,
    piece: &Piece,
    next: Option<&Piece>,
    scratch: &mut Scratch,
) {
    let (shape, sequence) = (job.shape, &job.rows.sequences[piece.sequence]);
    let (group, dim) = (shape.group, shape.head_dim_padded);
    let rows = piece.tokens.len() * group;
    let position = |row: usize| sequence.start + piece.tokens.start + row / group;
    let kv_tokens = sequence.start + piece.tokens.end; // none of these rows sees beyond
    let seen_from = |position: usize| shape.seen_from(position);

    scratch.sums[..rows * dim].fill(0.0);
    scratch.top[..rows].fill(f32::NEG_INFINITY);
    scratch.total[..rows].fill([0.0; LANES]);
    let q_row = job.q_rows * piece.head + sequence.row + piece.tokens.start;
    // SAFETY: rows of `q` by the caller's promise.
    let q = unsafe { job.q.add(q_row * group * dim) };

    let first_step = seen_from(position(0)) / STEP;
    for step in first_step..kv_tokens.div_ceil(STEP) {
        let at = step * STEP;
        // Rows are in order of position: those before `begin` do not reach this step yet, those from `end`
        // on have left it behind.
        let begin = (at.saturating_sub(position(0)) * group).min(rows);
        let mut end = rows;
        while end > begin && seen_from(position(end - 1)) >= at + STEP {
            end -= 1;
        }
        if begin == end {
            continue;
        }
        // SAFETY: tokens below `kv_tokens` have blocks, by the caller's promise.
        unsafe { load_step::<T>(job, piece, next, at, kv_tokens, scratch) };
        // Of a second panel without tokens nothing is read: its weights are zero.
        let panels = (kv_tokens - at).div_ceil(PANEL).min(STEP / PANEL);

        for_tiles::<T>(begin..end, |first, height| {
            // SAFETY: rows of `q`, the packed keys, rows of the scores.
            unsafe {
                let (q, scores) = (q.add(first * dim), scratch.scores.as_mut_ptr());
                let (keys, scores) = (scratch.keys.as_ptr(), scores.add(first * STEP));
                let (panel, pairs) = (dim * PANEL, dim / 2);
                T::panels(
                    panels, height, q, dim, keys, panel, pairs, scores, STEP, false,
                );
            }
        });
        for row in begin..end {
            let position = position(row);
            let seen = seen_from(position).saturating_sub(at)..(position + 1 - at).min(STEP);
            let (scores, _) = scratch.scores[row * STEP..].as_chunks::<STEP>();
            let (weights, _) = scratch.weights[row * STEP..].as_chunks_mut::<STEP>();
            let decay = soften(
                &scores[0],
                seen,
                &mut scratch.top[row],
                &mut scratch.total[row],
                &mut weights[0],
            );
            if decay != 1.0 {
                for sum in &mut scratch.sums[row * dim..][..dim] {
                    *sum *= decay;
                }
            }
        }
        for_tiles::<T>(begin..end, |first, height| {
            // SAFETY: rows of the weights, the packed values, rows of the sums.
            unsafe {
                let (weights, values) = (scratch.weights.as_ptr(), scratch.values.as_ptr());
                let (weights, sums) = (weights.add(first * STEP), scratch.sums.as_mut_ptr());
                let (panel, pairs) = (PANEL * STEP, panels * PANEL / 2);
                let sums = sums.add(first * dim);
                T::panels(
                    dim / PANEL,
                    height,
                    weights,
                    STEP,
                    values,
                    panel,
                    pairs,
                    sums,
                    dim,
                    true,
                );
            }
        });
    }
    for row in 0..rows {
        let inverse = 1.0 / sum_lanes(scratch.total[row]);
        let out_row = sequence.row + piece.tokens.start + row / group;
        let head = piece.head * group + row % group;
        // SAFETY: this row and head of the output are this piece's.
        let out = unsafe {
            let at = job.out.add(out_row * job.ldo + head * shape.head_dim);
            std::slice::from_raw_parts_mut(at, shape.head_dim)
        };
        for (out, sum) in out.iter_mut().zip(&scratch.sums[row * dim..]) {
            *out = bf16_of(sum * inverse);
        }
    }
}

#[inline(always)]
fn for_tiles<T: Tile>(rows: Range<usize>, mut tile: impl FnMut(usize, usize)) {
    let tiles = tiles::<T>(rows.len());
    for i in 0..tiles {
        let of_tile = tile_rows::<T>(&rows, i, tiles);
        tile(of_tile.start, of_tile.len());
    }
}

/// Packs keys and values of the tokens `at .. at + STEP`; those from `kv_tokens` on as zeros: their memory may
/// hold anything, and zero times NaN is not zero.
#[inline(always)]
unsafe fn load_step<T: Tile>(
    job: &Attention<'_>,
    piece: &Piece,
    next: Option<&Piece>,
    at: usize,
    kv_tokens: usize,
    scratch: &mut Scratch,
) {
    let shape = job.shape;
    let blocks = job.rows.blocks(piece.sequence);
    let block_tokens = shape.block_tokens;
    let mut keys = [[scratch.zeros.as_ptr(); PANEL]; STEP / PANEL];
    let mut values = keys;
    let mut token = 0;
    while token < STEP && at + token < kv_tokens {
        let (block, slot) = ((at + token) / block_tokens, (at + token) % block_tokens);
        let run = (block_tokens - slot)
            .min(STEP - token)
            .min(kv_tokens - at - token);
        let offset = shape.key_offset(blocks[block], slot, piece.head, job.layer);
        for i in 0..run {
            // SAFETY: inside the arena by the caller's promise.
            unsafe {
                let key = job.arena.add(offset + i * shape.head_dim * 2);
                let (panel, column) = ((token + i) / PANEL, (token + i) % PANEL);
                keys[panel][column] = key.cast();
                values[panel][column] = key.add(shape.value_offset()).cast();
            }
        }
        token += run;
    }
    // While this step is packed, the next one comes in: this piece's, or the first of the one that follows.
    let ahead = at + STEP;
    let (upcoming, ahead, until) = match (ahead < kv_tokens, next) {
        (true, _) => (piece, ahead, kv_tokens),
        (false, Some(next)) => {
            let sequence = &job.rows.sequences[next.sequence];
            let first = shape.seen_from(sequence.start + next.tokens.start);
            let until = sequence.start + next.tokens.end;
            (next, first / STEP * STEP, until)
        }
        (false, None) => (piece, ahead, ahead),
    };
    for panel in 0..STEP / PANEL {
        let tokens = ahead + panel * PANEL..(ahead + (panel + 1) * PANEL).min(until);
        fetch_tokens(job, upcoming, tokens);
        if panel * PANEL >= token {
            continue;
        }
        // SAFETY: rows of head_dim numbers in the arena, or zeros; the scratch is sized for one step.
        unsafe {
            let out = scratch.keys.as_mut_ptr();
            let out = out.add(panel * PANEL * shape.head_dim_padded);
            T::pack_keys(&keys[panel], shape.head_dim, out);
            let out = scratch.values.as_mut_ptr().add(panel * PANEL * PANEL);
            T::pack_values(&values[panel], shape.head_dim, out, PANEL * STEP);
        }
    }
}

/// Asks for the keys and values of some tokens.
#[inline(always)]
fn fetch_tokens(job: &Attention<'_>, piece: &Piece, tokens: Range<usize>) {
    let shape = job.shape;
    let blocks = job.rows.blocks(piece.sequence);
    let block_tokens = shape.block_tokens;
    let mut at = tokens.start;
    while at < tokens.end {
        let (block, slot) = (at / block_tokens, at % block_tokens);
        let run = (block_tokens - slot).min(tokens.end - at);
        let offset = shape.key_offset(blocks[block], slot, piece.head, job.layer);
        for line in (0..run * shape.head_dim * 2).step_by(64) {
            fetch(job.arena.wrapping_add(offset + line));
            fetch(job.arena.wrapping_add(offset + shape.value_offset() + line));
        }
        at += run;
    }
}

/// One row's step of the running softmax: turns scores into BF16 weights, moves the maximum and the sum, and
/// says by how much everything summed before must shrink.
#[inline(always)]
fn soften(
    scores: &[f32; STEP],
    seen: Range<usize>,
    top: &mut f32,
    total: &mut [f32; LANES],
    weights: &mut [u16; STEP],
) -> f32 {
    let mut s = *scores;
    if seen.len() < STEP {
        // Lane numbers as narrow as the lanes.
        let (start, end) = (seen.start as i32, seen.end as i32);
        for (i, s) in (0..).zip(&mut s) {
            *s = if i >= start && i < end {
                *s
            } else {
                f32::NEG_INFINITY
            };
        }
    }
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in s.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    let mut decay = 1.0;
    if lanes[0] > *top {
        decay = exp2(*top - lanes[0]);
        *top = lanes[0];
        for total in total.iter_mut() {
            *total *= decay;
        }
    }
    for (s, weights) in s
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(weights.as_chunks_mut::<LANES>().0)
    {
        for i in 0..LANES {
            let weight = bf16_of(exp2(s[i] - *top));
            weights[i] = weight;
            total[i] += f32_of(weight);
        }
    }
    decay
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}
