//! The tile for AVX2 with FMA: BF16 is widened on the way, products are f32.
//!
//! Two rows of 32 columns are eight sums of the sixteen registers. That is as many as two products a cycle keep busy, each of which
//! is done after four, and leaves room for the widened weights and activations; with three rows the compiler keeps sums in memory.
//! Ceiling: 16 products, 12 widenings and 6 loads a pair of K, 8 cycles.

use std::arch::x86_64::*;

use super::{Prefetch, Tile};
use crate::pack::PANEL;

/// Vectors of a panel's row.
const VECTORS: usize = PANEL / 8;

/// Pairs of K after which the next rows have their turn: so many rows of a panel, 16 KiB, stay in the first-level cache beside the
/// activations and sums.
const PAIRS: usize = 128;

/// Rows in pairs.
pub struct Avx2;

impl Tile for Avx2 {
    const ROWS: usize = 12;

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
        for first in (0..pairs).step_by(PAIRS) {
            let pairs = PAIRS.min(pairs - first);
            let load = load || first > 0;
            let mut row = 0;
            while row < rows {
                // The first rows fetch for all.
                let prefetch = match row {
                    0 => prefetch.after(first),
                    _ => Prefetch::none(b),
                };
                // SAFETY: the caller's promise, row by row and part by part of K.
                row += unsafe {
                    let (a, c) = (a.add(row * lda + 2 * first), c.add(row * ldc));
                    let b = b.add(first * 2 * PANEL);
                    match rows - row {
                        1 => strip::<1>(a, lda, b, pairs, c, ldc, load, prefetch),
                        _ => strip::<2>(a, lda, b, pairs, c, ldc, load, prefetch),
                    }
                };
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_keys(rows: &[*const u16; PANEL], head_dim: usize, out: *mut u16) {
        // SAFETY: the caller's promise; eight pairs at a time stay inside a row of a multiple of 16.
        unsafe {
            if head_dim.is_multiple_of(16) {
                transpose(rows, head_dim, out);
            } else {
                crate::pack::pack_keys(rows, head_dim, out);
            }
        }
    }
}

/// `R` rows of one panel; gives `R`.
#[target_feature(enable = "avx2,fma")]
unsafe fn strip<const R: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    pairs: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
    mut prefetch: Prefetch,
) -> usize {
    let mut acc = [[_mm256_setzero_ps(); VECTORS]; R];
    let high = _mm256_set1_epi32(!0xffff);
    // SAFETY: the caller's promise covers R rows of `a` and `c`, and `pairs` rows of the panel; a prefetch of any address is
    // harmless.
    unsafe {
        if load {
            for r in 0..R {
                for v in 0..VECTORS {
                    acc[r][v] = _mm256_loadu_ps(c.add(r * ldc + 8 * v));
                }
            }
        }
        let mut b = b;
        for pair in 0..pairs {
            _mm_prefetch::<_MM_HINT_T0>(prefetch.first.cast());
            _mm_prefetch::<_MM_HINT_T0>(prefetch.second.cast());
            prefetch.first = prefetch.first.wrapping_add(prefetch.step);
            prefetch.second = prefetch.second.wrapping_add(prefetch.step);
            let mut even = [_mm256_setzero_ps(); R];
            let mut odd = [_mm256_setzero_ps(); R];
            for r in 0..R {
                let both = a.add(r * lda + 2 * pair).cast::<i32>().read_unaligned();
                let both = _mm256_set1_epi32(both);
                even[r] = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(both));
                odd[r] = _mm256_castsi256_ps(_mm256_and_si256(both, high));
            }
            for v in 0..VECTORS {
                let both = _mm256_loadu_si256(b.add(16 * v).cast());
                let b0 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(both));
                let b1 = _mm256_castsi256_ps(_mm256_and_si256(both, high));
                for r in 0..R {
                    acc[r][v] = _mm256_fmadd_ps(even[r], b0, acc[r][v]);
                    acc[r][v] = _mm256_fmadd_ps(odd[r], b1, acc[r][v]);
                }
            }
            b = b.add(2 * PANEL);
        }
        for r in 0..R {
            for v in 0..VECTORS {
                _mm256_storeu_ps(c.add(r * ldc + 8 * v), acc[r][v]);
            }
        }
    }
    R
}

/// Keys `[32 tokens][head_dim]` to `[head_dim / 2][32 tokens][2]`: 8×8 transposes of 32-bit pairs.
#[target_feature(enable = "avx2")]
unsafe fn transpose(rows: &[*const u16; PANEL], head_dim: usize, out: *mut u16) {
    for (eighth, rows) in rows.as_chunks::<8>().0.iter().enumerate() {
        for block in 0..head_dim / 16 {
            let mut r = [_mm256_setzero_si256(); 8];
            for (i, r) in r.iter_mut().enumerate() {
                // SAFETY: 16 numbers of a row of `head_dim`.
                *r = unsafe { _mm256_loadu_si256(rows[i].add(16 * block).cast()) };
            }
            let mut t = [_mm256_setzero_si256(); 8];
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..2 {
                r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
            }
            // r[j] holds pairs j and 4 + j of four tokens, r[4 + j] those of the other four.
            for j in 0..4 {
                let columns = [
                    _mm256_permute2x128_si256::<0x20>(r[j], r[4 + j]),
                    _mm256_permute2x128_si256::<0x31>(r[j], r[4 + j]),
                ];
                for (lane, column) in columns.into_iter().enumerate() {
                    let pair = 8 * block + 4 * lane + j;
                    // SAFETY: eight tokens of one pair's row, inside `head_dim / 2` rows of 64 numbers.
                    unsafe {
                        let out = out.add((pair * PANEL + 8 * eighth) * 2);
                        _mm256_storeu_si256(out.cast(), column);
                    }
                }
            }
        }
    }
}
