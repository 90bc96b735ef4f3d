//! The tile for AVX2 with FMA: BF16 is widened on the way, products are f32.
//!
//! Three rows of 32 columns are twelve sums of the sixteen registers; the others hold an activation of each row, widened before, and
//! one vector of weights, widened on the way. A product is done after four cycles, and two begin in each: eight sums would do if nothing
//! ever came late, twelve leave a third of the time for that. A compiler does not find this allocation and keeps sums in memory, so the
//! loop is written in assembly. Ceiling: 24 products, 8 widenings and 14 loads a pair of K, 12 cycles. One or two rows that are left over
//! are left to the compiler.

use std::arch::asm;
use std::arch::x86_64::*;

use super::strips::{self, Strips, WIDTH, Widened};
use super::{Prefetch, Tile};
use crate::pack::PANEL;

/// Vectors of a panel's row.
const VECTORS: usize = PANEL / 8;

/// Rows by threes.
pub struct Avx2;

impl Tile for Avx2 {
    const ROWS: usize = 12;
    const STRIP: usize = 3;

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

impl Strips for Avx2 {
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
                1 => strip::<1>(a, lda, b, pairs, c, ldc, load, prefetch),
                2 => strip::<2>(a, lda, b, pairs, c, ldc, load, prefetch),
                _ => {
                    let mut widened = Widened::<3>::new();
                    let a = widened.fill(a, lda, pairs);
                    three(a, b, pairs, c, ldc, load, prefetch)
                }
            }
        }
    }
}

/// Vector `$v` of the weights, times an activation of each row.
macro_rules! products {
    ($v:literal) => {
        concat!(
            "vfmadd231ps {s",
            $v,
            "}, {x}, {w}\n",
            "vfmadd231ps {t",
            $v,
            "}, {y}, {w}\n",
            "vfmadd231ps {u",
            $v,
            "}, {z}, {w}",
        )
    };
}

/// The same with the first numbers of its pairs, `$at` bytes into the row of the panel: the lower halves of the words.
macro_rules! first {
    ($v:literal, $at:literal) => {
        concat!(
            "vmovdqu {w}, ymmword ptr [{b} + ",
            $at,
            "]\n",
            "vpslld {w}, {w}, 16\n",
            products!($v),
        )
    };
}

/// With the second ones: the upper halves, and zeros for the lower.
macro_rules! second {
    ($v:literal, $at:literal) => {
        concat!(
            "vpxor {w}, {w}, {w}\n",
            "vpblendw {w}, {w}, ymmword ptr [{b} + ",
            $at,
            "], 0xaa\n",
            products!($v),
        )
    };
}

/// Three rows of one panel, whose activations are widened, [`WIDTH`] apart; gives 3. Each sum has the additions of [`strip`], in its order.
#[target_feature(enable = "avx2,fma")]
unsafe fn three(
    a: *const f32,
    b: *const u16,
    pairs: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
    prefetch: Prefetch,
) -> usize {
    let mut acc = [[_mm256_setzero_ps(); VECTORS]; 3];
    // SAFETY: the caller's promise covers three rows of `c` and `pairs` pairs, at least one, of `a` and `b`; a prefetch of any
    // address is harmless.
    unsafe {
        if load {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_loadu_ps(c.add(r * ldc + 8 * v));
                }
            }
        }
        let [[s0, s1, s2, s3], [t0, t1, t2, t3], [u0, u1, u2, u3]] = &mut acc;
        asm!(
            "2:",
            "prefetcht0 [{first}]",
            "prefetcht0 [{second}]",
            "add {first}, {step}",
            "add {second}, {step}",
            "vbroadcastss {x}, dword ptr [{a}]",
            "vbroadcastss {y}, dword ptr [{a} + {row}]",
            "vbroadcastss {z}, dword ptr [{a} + 2 * {row}]",
            first!(0, 0),
            first!(1, 32),
            first!(2, 64),
            first!(3, 96),
            "vbroadcastss {x}, dword ptr [{a} + 4]",
            "vbroadcastss {y}, dword ptr [{a} + {row} + 4]",
            "vbroadcastss {z}, dword ptr [{a} + 2 * {row} + 4]",
            second!(0, 0),
            second!(1, 32),
            second!(2, 64),
            second!(3, 96),
            "add {a}, 8",
            "add {b}, {pair}",
            "dec {pairs}",
            "jnz 2b",
            a = inout(reg) a => _,
            b = inout(reg) b => _,
            pairs = inout(reg) pairs => _,
            first = inout(reg) prefetch.first => _,
            second = inout(reg) prefetch.second => _,
            step = in(reg) prefetch.step,
            row = const size_of::<[f32; WIDTH]>(),
            pair = const 2 * PANEL * size_of::<u16>(),
            s0 = inout(ymm_reg) *s0, s1 = inout(ymm_reg) *s1, s2 = inout(ymm_reg) *s2, s3 = inout(ymm_reg) *s3,
            t0 = inout(ymm_reg) *t0, t1 = inout(ymm_reg) *t1, t2 = inout(ymm_reg) *t2, t3 = inout(ymm_reg) *t3,
            u0 = inout(ymm_reg) *u0, u1 = inout(ymm_reg) *u1, u2 = inout(ymm_reg) *u2, u3 = inout(ymm_reg) *u3,
            w = out(ymm_reg) _, x = out(ymm_reg) _, y = out(ymm_reg) _, z = out(ymm_reg) _,
            options(nostack, readonly),
        );
        for (r, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * ldc + 8 * v), *acc);
            }
        }
    }
    acc.len()
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
