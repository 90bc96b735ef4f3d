//! The tile in plain Rust, for any CPU. Products and sums are rounded apart: a fused multiply-add is no instruction of every CPU.
//!
//! It is written so that the compiler finds vectors: activations are widened before, weights are read as words of 32 bits, and the sums of
//! a strip fit into sixteen registers of four or eight numbers. Each element is one accumulator: `acc += a₀·b₀`, then `acc += a₁·b₁`.

use super::strips::{self, Strips, WIDTH, Widened};
use super::{Prefetch, Tile, fetch};
use crate::pack::PANEL;

/// Rows by fours.
pub struct Portable;

impl Tile for Portable {
    const ROWS: usize = 12;
    const STRIP: usize = 4;

    #[inline(always)]
    unsafe fn run(
        rows: usize,
        a: *const u16,
        lda: usize,
        b: *const u16,
        pairs: usize,
        c: *mut f32,
        ldc: usize,
        load: bool,
        prefetch: Prefetch,
    ) {
        // SAFETY: the caller's promise.
        unsafe { strips::run::<Self>(rows, a, lda, b, pairs, c, ldc, load, prefetch) }
    }
}

impl Strips for Portable {
    #[inline(always)]
    unsafe fn strip(
        rows: usize,
        a: *const u16,
        lda: usize,
        b: *const u16,
        pairs: usize,
        c: *mut f32,
        ldc: usize,
        load: bool,
        prefetch: Prefetch,
    ) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                1 => strip::<1, 32>(a, lda, b, pairs, c, ldc, load, prefetch),
                2 => strip::<2, 16>(a, lda, b, pairs, c, ldc, load, prefetch),
                3 => strip::<3, 8>(a, lda, b, pairs, c, ldc, load, prefetch),
                _ => strip::<4, 8>(a, lda, b, pairs, c, ldc, load, prefetch),
            }
        }
    }
}

/// `ROWS` rows of one panel, so many columns at a time; gives `ROWS`.
///
/// # Safety
/// `a` has `pairs` pairs of them, one part at most, `b` as many rows of the panel, and `c` their rows of a panel's columns.
#[inline(always)]
unsafe fn strip<const ROWS: usize, const COLUMNS: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    pairs: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
    prefetch: Prefetch,
) -> usize {
    let mut widened = Widened::<ROWS>::new();
    // SAFETY: the caller's promise.
    let a = unsafe { widened.fill(a, lda, pairs) };
    for column in (0..PANEL).step_by(COLUMNS) {
        let mut acc = [[0.0; COLUMNS]; ROWS];
        if load {
            for (row, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *acc = unsafe { c.add(row * ldc + column).cast::<[f32; COLUMNS]>().read() };
            }
        }
        for pair in 0..pairs {
            if column == 0 {
                fetch(prefetch.first.wrapping_add(pair * prefetch.step));
            }
            if column == PANEL - COLUMNS {
                fetch(prefetch.second.wrapping_add(pair * prefetch.step));
            }
            // SAFETY: the caller's promise.
            let words = unsafe {
                b.add(2 * (pair * PANEL + column))
                    .cast::<[u32; COLUMNS]>()
                    .read_unaligned()
            };
            let (mut first, mut second) = ([0.0; COLUMNS], [0.0; COLUMNS]);
            for i in 0..COLUMNS {
                [first[i], second[i]] = halves(words[i]);
            }
            for (row, acc) in acc.iter_mut().enumerate() {
                // SAFETY: filled above.
                let [a0, a1] = unsafe { a.add(row * WIDTH + 2 * pair).cast::<[f32; 2]>().read() };
                for i in 0..COLUMNS {
                    acc[i] += a0 * first[i];
                }
                for i in 0..COLUMNS {
                    acc[i] += a1 * second[i];
                }
            }
        }
        for (row, acc) in acc.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                c.add(row * ldc + column)
                    .cast::<[f32; COLUMNS]>()
                    .write(acc)
            };
        }
    }
    ROWS
}

/// A pair of BF16, as one word, widened. The compiler would take 16-bit lanes apart one by one.
#[inline(always)]
fn halves(pair: u32) -> [f32; 2] {
    let pair = match cfg!(target_endian = "little") {
        true => pair,
        false => pair.rotate_left(16),
    };
    [
        f32::from_bits(pair << 16),
        f32::from_bits(pair & 0xffff_0000),
    ]
}
