//! Activations in f32, for kernels that multiply in it: widened once for all columns of a panel.

use crate::math::f32_of;

/// Pairs of K after which the next rows have their turn: so many rows of a panel, 16 KiB, stay in the first-level cache beside the
/// activations and sums.
const PAIRS: usize = 128;

/// Numbers of a row.
pub const WIDTH: usize = 2 * PAIRS;

/// Some pairs of K of `ROWS` rows.
#[repr(align(32))]
pub struct Widened<const ROWS: usize>(pub [[f32; WIDTH]; ROWS]);

impl<const ROWS: usize> Widened<ROWS> {
    /// Nothing yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self([[0.0; WIDTH]; ROWS])
    }

    /// Takes the next `pairs` pairs of these rows.
    ///
    /// # Safety
    /// They are there, and no more than a part has.
    #[inline(always)]
    pub unsafe fn fill(&mut self, a: *const u16, lda: usize, pairs: usize) {
        for (row, out) in self.0.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let a = unsafe { std::slice::from_raw_parts(a.add(row * lda), 2 * pairs) };
            for (out, a) in out.iter_mut().zip(a) {
                *out = f32_of(*a);
            }
        }
    }
}

/// The parts of K that have their turn one after the other: the first pair of each, and how many they are.
#[inline(always)]
pub fn parts(pairs: usize) -> impl Iterator<Item = (usize, usize)> {
    let parts = pairs.div_ceil(PAIRS);
    (0..parts).map(move |part| {
        let first = pairs * part / parts;
        (first, pairs * (part + 1) / parts - first)
    })
}
