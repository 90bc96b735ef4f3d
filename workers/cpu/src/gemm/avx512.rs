//! The tile for AVX512-BF16: `vdpbf16ps`, 12 rows of 32 columns.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::{Prefetch, Tile};
use crate::pack::PANEL;

/// Twelve rows times two vectors: 24 accumulators, two vectors of the panel, broadcasts in the rest. Per pair of
/// K that is 24 products for 14 loads.
pub struct Avx512;

impl Tile for Avx512 {
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
        // SAFETY: the caller's promise.
        unsafe {
            match rows {
                1 => strip::<1>(a, lda, b, pairs, c, ldc, load, prefetch),
                2 => strip::<2>(a, lda, b, pairs, c, ldc, load, prefetch),
                3 => strip::<3>(a, lda, b, pairs, c, ldc, load, prefetch),
                4 => strip::<4>(a, lda, b, pairs, c, ldc, load, prefetch),
                5 => strip::<5>(a, lda, b, pairs, c, ldc, load, prefetch),
                6 => strip::<6>(a, lda, b, pairs, c, ldc, load, prefetch),
                7 => strip::<7>(a, lda, b, pairs, c, ldc, load, prefetch),
                8 => strip::<8>(a, lda, b, pairs, c, ldc, load, prefetch),
                9 => strip::<9>(a, lda, b, pairs, c, ldc, load, prefetch),
                10 => strip::<10>(a, lda, b, pairs, c, ldc, load, prefetch),
                11 => strip::<11>(a, lda, b, pairs, c, ldc, load, prefetch),
                _ => strip::<12>(a, lda, b, pairs, c, ldc, load, prefetch),
            }
        }
    }

    /// Few rows leave `vdpbf16ps` waiting for itself, so they take two panels at once.
    #[inline(always)]
    unsafe fn panels(
        panels: usize,
        rows: usize,
        a: *const u16,
        lda: usize,
        b: *const u16,
        panel: usize,
        pairs: usize,
        c: *mut f32,
        ldc: usize,
        load: bool,
    ) {
        let mut at = 0;
        while at < panels {
            // SAFETY: the caller's promise; two panels only where two are left.
            unsafe {
                let (b, c) = (b.add(at * panel), c.add(at * PANEL));
                let two = at + 1 < panels && rows <= 4;
                match rows {
                    1 if two => wide::<1>(a, lda, b, panel, pairs, c, ldc, load),
                    2 if two => wide::<2>(a, lda, b, panel, pairs, c, ldc, load),
                    3 if two => wide::<3>(a, lda, b, panel, pairs, c, ldc, load),
                    4 if two => wide::<4>(a, lda, b, panel, pairs, c, ldc, load),
                    _ => Self::run(rows, a, lda, b, pairs, c, ldc, load, Prefetch::none(b)),
                }
                at += if two { 2 } else { 1 };
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_keys(rows: &[*const u16; PANEL], head_dim: usize, out: *mut u16) {
        // SAFETY: the caller's promise; sixteen pairs at a time stay inside a row of a multiple of 32.
        unsafe {
            if head_dim.is_multiple_of(32) {
                transpose(rows, head_dim, out);
            } else {
                crate::pack::pack_keys(rows, head_dim, out);
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_values(
        rows: &[*const u16; PANEL],
        head_dim: usize,
        out: *mut u16,
        panel: usize,
    ) {
        // SAFETY: as above.
        unsafe {
            if head_dim.is_multiple_of(PANEL) {
                interleave(rows, head_dim, out, panel);
            } else {
                crate::pack::pack_values(rows, head_dim, out, panel);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn strip<const R: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    pairs: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
    mut prefetch: Prefetch,
) {
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    // SAFETY: the caller's promise covers R rows of `a` and `c`, and `pairs` rows of the panel; a prefetch of
    // any address is harmless; the transmutes are between 64-byte vectors.
    unsafe {
        if load {
            for r in 0..R {
                acc[r][0] = _mm512_loadu_ps(c.add(r * ldc));
                acc[r][1] = _mm512_loadu_ps(c.add(r * ldc + 16));
            }
        }
        let mut b = b;
        for pair in 0..pairs {
            _mm_prefetch::<_MM_HINT_T1>(prefetch.first.cast());
            _mm_prefetch::<_MM_HINT_T1>(prefetch.second.cast());
            prefetch.first = prefetch.first.wrapping_add(prefetch.step);
            prefetch.second = prefetch.second.wrapping_add(prefetch.step);
            let b0: __m512bh = transmute(_mm512_loadu_si512(b.cast()));
            let b1: __m512bh = transmute(_mm512_loadu_si512(b.add(PANEL).cast()));
            for r in 0..R {
                let both = a.add(r * lda + 2 * pair).cast::<i32>().read_unaligned();
                let a: __m512bh = transmute(_mm512_set1_epi32(both));
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], b0, a);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], b1, a);
            }
            b = b.add(2 * PANEL);
        }
        for r in 0..R {
            _mm512_storeu_ps(c.add(r * ldc), acc[r][0]);
            _mm512_storeu_ps(c.add(r * ldc + 16), acc[r][1]);
        }
    }
}

/// [`strip`] over two panels, `panel` elements apart: twice the accumulators, the same sums.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn wide<const R: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    panel: usize,
    pairs: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
) {
    let mut acc = [[_mm512_setzero_ps(); 4]; R];
    // SAFETY: the caller's promise covers R rows of `a`, 64 columns of R rows of `c`, and `pairs` rows of both
    // panels; the transmutes are between 64-byte vectors.
    unsafe {
        if load {
            for r in 0..R {
                for i in 0..4 {
                    acc[r][i] = _mm512_loadu_ps(c.add(r * ldc + 16 * i));
                }
            }
        }
        for pair in 0..pairs {
            let mut columns: [__m512bh; 4] = transmute([_mm512_setzero_si512(); 4]);
            for i in 0..4 {
                let at = i / 2 * panel + 2 * PANEL * pair + i % 2 * PANEL;
                columns[i] = transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.add(at).cast()));
            }
            for r in 0..R {
                let both = a.add(r * lda + 2 * pair).cast::<i32>().read_unaligned();
                let a: __m512bh = transmute(_mm512_set1_epi32(both));
                for i in 0..4 {
                    acc[r][i] = _mm512_dpbf16_ps(acc[r][i], columns[i], a);
                }
            }
        }
        for r in 0..R {
            for i in 0..4 {
                _mm512_storeu_ps(c.add(r * ldc + 16 * i), acc[r][i]);
            }
        }
    }
}

/// Keys `[32 tokens][head_dim]` to `[head_dim / 2][32 tokens][2]`: 16×16 transposes of 32-bit pairs.
#[target_feature(enable = "avx512f")]
unsafe fn transpose(rows: &[*const u16; PANEL], head_dim: usize, out: *mut u16) {
    for half in 0..2 {
        for block in 0..head_dim / 32 {
            let mut r = [_mm512_setzero_si512(); 16];
            for (i, r) in r.iter_mut().enumerate() {
                // SAFETY: 32 numbers of a row of `head_dim`.
                *r = unsafe { _mm512_loadu_si512(rows[16 * half + i].add(32 * block).cast()) };
            }
            let mut t = [_mm512_setzero_si512(); 16];
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
                r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
                r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
            }
            // r[4g + j] holds, in its lane l, pair 4l + j of tokens 4g .. 4g + 4.
            for j in 0..4 {
                let (x0, x1, x2, x3) = (r[j], r[4 + j], r[8 + j], r[12 + j]);
                let a = _mm512_shuffle_i32x4::<0x88>(x0, x1); // lanes 0, 2 of x0, then of x1
                let b = _mm512_shuffle_i32x4::<0xdd>(x0, x1); // lanes 1, 3
                let c = _mm512_shuffle_i32x4::<0x88>(x2, x3);
                let d = _mm512_shuffle_i32x4::<0xdd>(x2, x3);
                let columns = [
                    _mm512_shuffle_i32x4::<0x88>(a, c), // lane 0 of each: pair j
                    _mm512_shuffle_i32x4::<0x88>(b, d), // lane 1: pair 4 + j
                    _mm512_shuffle_i32x4::<0xdd>(a, c), // lane 2
                    _mm512_shuffle_i32x4::<0xdd>(b, d), // lane 3
                ];
                for (lane, column) in columns.into_iter().enumerate() {
                    let pair = 16 * block + 4 * lane + j;
                    // SAFETY: sixteen tokens of one pair's row, inside `head_dim / 2` rows of 64 numbers.
                    unsafe {
                        _mm512_storeu_si512(out.add((pair * PANEL + 16 * half) * 2).cast(), column);
                    }
                }
            }
        }
    }
}

/// Values `[32 tokens][head_dim]` to panels of 32 dimensions `[16 pairs of tokens][32][2]`, `panel_stride` apart.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn interleave(
    rows: &[*const u16; PANEL],
    head_dim: usize,
    out: *mut u16,
    panel_stride: usize,
) {
    const fn order(first: u16) -> [u16; PANEL] {
        let mut order = [0; PANEL];
        let mut i = 0;
        while i < PANEL {
            order[i] = first + i as u16 / 2 + if i % 2 == 1 { 32 } else { 0 };
            i += 1;
        }
        order
    }
    const LOW: [u16; PANEL] = order(0);
    const HIGH: [u16; PANEL] = order(16);
    // SAFETY: 64-byte arrays; 32 numbers of a row of `head_dim`; one pair's row of a panel.
    unsafe {
        let low = _mm512_loadu_si512(LOW.as_ptr().cast());
        let high = _mm512_loadu_si512(HIGH.as_ptr().cast());
        for pair in 0..PANEL / 2 {
            for panel in 0..head_dim / PANEL {
                let even = _mm512_loadu_si512(rows[2 * pair].add(panel * PANEL).cast());
                let odd = _mm512_loadu_si512(rows[2 * pair + 1].add(panel * PANEL).cast());
                let out = out.add(panel * panel_stride + pair * 2 * PANEL);
                let first = _mm512_permutex2var_epi16(even, low, odd);
                let second = _mm512_permutex2var_epi16(even, high, odd);
                _mm512_storeu_si512(out.cast(), first);
                _mm512_storeu_si512(out.add(PANEL).cast(), second);
            }
        }
    }
}
