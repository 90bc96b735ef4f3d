//! What kernels that multiply in f32 have in common: K in parts that stay in the first-level cache, a few rows together, and their
//! activations widened before.

use std::mem::MaybeUninit;

use super::Prefetch;
use crate::math::f32_of;
use crate::pack::PANEL;

/// Most pairs of K of one part. 128 rows of a panel are 16 KiB: they stay in the first-level cache beside activations and sums while all
/// rows of a tile are computed with them.
const PAIRS: usize = 128;

/// Numbers of a row.
pub const WIDTH: usize = 2 * PAIRS;

/// A kernel that computes some rows together.
pub trait Strips {
    /// Computes the first of `rows` rows with one part of K of one panel: one strip, or less if there are not so many. Returns how many rows these were.
    ///
    /// # Safety
    /// As for [`super::Tile::run`]; `pairs` is 1 to [`PAIRS`].
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
    ) -> usize;
}

/// [`super::Tile::run`]: for each part of K, strip by strip.
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn run<S: Strips>(
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
    let parts = pairs.div_ceil(PAIRS);
    for part in 0..parts {
        let first = pairs * part / parts;
        let pairs = pairs * (part + 1) / parts - first;
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
                S::strip(rows - row, a, lda, b, pairs, c, ldc, load, prefetch)
            };
        }
    }
}

/// Activations of `ROWS` rows and one part of K in f32.
#[repr(align(32))]
pub struct Widened<const ROWS: usize>([[MaybeUninit<f32>; WIDTH]; ROWS]);

impl<const ROWS: usize> Widened<ROWS> {
    /// Nothing yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self([[MaybeUninit::uninit(); WIDTH]; ROWS])
    }

    /// Widens `pairs` pairs of these rows. Returns a pointer to the first row; rows are [`WIDTH`] apart.
    ///
    /// # Safety
    /// The rows are there.
    #[inline(always)]
    pub unsafe fn fill(&mut self, a: *const u16, lda: usize, pairs: usize) -> *const f32 {
        for (row, out) in self.0.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let a = unsafe { std::slice::from_raw_parts(a.add(row * lda), 2 * pairs) };
            for (out, a) in out.iter_mut().zip(a) {
                out.write(f32_of(*a));
            }
        }
        self.0.as_ptr().cast()
    }
}
