//! The tile for AVX2 with FMA: BF16 pairs are widened with a shift and a mask, products are f32.

use std::arch::x86_64::*;

use super::{Prefetch, Tile};
use crate::pack::PANEL;

/// Three rows of 32 columns: 12 accumulators of the 16 registers.
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
        _: Prefetch,
    ) {
        let mut row = 0;
        // SAFETY: the caller's promise, row by row.
        unsafe {
            while row < rows {
                let (a, c) = (a.add(row * lda), c.add(row * ldc));
                match rows - row {
                    1 => strip::<1>(a, lda, b, pairs, c, ldc, load),
                    2 => strip::<2>(a, lda, b, pairs, c, ldc, load),
                    _ => strip::<3>(a, lda, b, pairs, c, ldc, load),
                }
                row += 3;
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn strip<const R: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    pairs: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
) {
    const VECTORS: usize = PANEL / 8;
    let mut acc = [[_mm256_setzero_ps(); VECTORS]; R];
    // SAFETY: the caller's promise covers R rows of `a` and `c`, and `pairs` rows of the panel.
    unsafe {
        if load {
            for r in 0..R {
                for v in 0..VECTORS {
                    acc[r][v] = _mm256_loadu_ps(c.add(r * ldc + 8 * v));
                }
            }
        }
        for pair in 0..pairs {
            let b = b.add(pair * 2 * PANEL);
            let mut even = [_mm256_setzero_ps(); R];
            let mut odd = [_mm256_setzero_ps(); R];
            for r in 0..R {
                let both = a.add(r * lda + 2 * pair).cast::<i32>().read_unaligned();
                even[r] = _mm256_castsi256_ps(_mm256_set1_epi32(both << 16));
                odd[r] = _mm256_castsi256_ps(_mm256_set1_epi32(both & !0xffff));
            }
            for v in 0..VECTORS {
                let both = _mm256_loadu_si256(b.add(16 * v).cast());
                let b0 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(both));
                let b1 = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(!0xffff)));
                for r in 0..R {
                    acc[r][v] = _mm256_fmadd_ps(even[r], b0, acc[r][v]);
                    acc[r][v] = _mm256_fmadd_ps(odd[r], b1, acc[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..VECTORS {
                _mm256_storeu_ps(c.add(r * ldc + 8 * v), acc[r][v]);
            }
        }
    }
}
