//! The tile in plain Rust, for any CPU; with AVX2 switched on it would still lack the fused multiply-add.

use super::{Prefetch, Tile};
use crate::math::f32_of;
use crate::pack::PANEL;

/// One row at a time, 32 accumulators: `acc += a₀·b₀`, then `acc += a₁·b₁`, each rounded twice.
pub struct Portable;

impl Tile for Portable {
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
        for row in 0..rows {
            // SAFETY: the caller's promise covers `rows` rows of each.
            let (a, b, c) = unsafe {
                (
                    std::slice::from_raw_parts(a.add(row * lda), 2 * pairs),
                    std::slice::from_raw_parts(b, pairs * 2 * PANEL),
                    &mut *c.add(row * ldc).cast::<[f32; PANEL]>(),
                )
            };
            let mut acc = if load { *c } else { [0.0; PANEL] };
            let (a, _) = a.as_chunks::<2>();
            let (b, _) = b.as_chunks::<{ 2 * PANEL }>();
            for (a, b) in a.iter().zip(b) {
                let (a0, a1) = (f32_of(a[0]), f32_of(a[1]));
                for i in 0..PANEL {
                    acc[i] += a0 * f32_of(b[2 * i]);
                    acc[i] += a1 * f32_of(b[2 * i + 1]);
                }
            }
            *c = acc;
        }
    }
}
