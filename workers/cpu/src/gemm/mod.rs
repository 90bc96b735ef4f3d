//! The one product everything goes through: a few rows of BF16 activations times one panel of 32 columns.
//!
//! Per kernel there is one [`Tile`]; weights, scores (`Q·Kᵀ`, keys packed as a panel) and weighted values
//! (`P·V`) use it. [`product`] walks rows and panels of a weight matrix and does what follows the product while
//! it is still in the first-level cache.
//!
//! The order of additions per element is fixed by the tile: K pairs from first to last into one accumulator.

pub mod amx;
pub mod avx2;
pub mod avx512;
pub mod portable;
mod strips;
mod whole;

pub use whole::multiply;

use std::ops::Range;

use crate::math::{bf16_of, silu};
use crate::pack::{PANEL, Packed};

/// `c[rows][32] (+)= a[rows][2 * pairs] · b[pairs][32][2]`.
pub trait Tile {
    /// Most rows of one call.
    const ROWS: usize;

    /// Rows that are computed together: calls have a multiple of this where there are so many. Divides [`Self::ROWS`].
    const STRIP: usize = 1;

    /// Called once on a thread before a series of [`Tile::run`].
    ///
    /// # Safety
    /// The CPU has the kernel's features.
    unsafe fn begin() {}

    /// Called once after the series.
    ///
    /// # Safety
    /// [`Tile::begin`] was called.
    unsafe fn end() {}

    /// The product. `c` starts from what it holds if `load`, else from zero. `lda`, `ldc` in elements.
    ///
    /// # Safety
    /// The CPU has the kernel's features; `a`, `b`, `c` cover the shapes above (`rows` rows each;
    /// AMX reads and writes whole tiles of 16); `1 <= rows <= ROWS`.
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
    );

    /// The product with `panels` panels, `panel` elements apart, whose columns stand side by side in `c`: every
    /// element is what [`Tile::run`] makes of it.
    ///
    /// # Safety
    /// As for [`Tile::run`], for each panel.
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
        for i in 0..panels {
            // SAFETY: the same promise.
            unsafe {
                let (b, c) = (b.add(i * panel), c.add(i * PANEL));
                Self::run(rows, a, lda, b, pairs, c, ldc, load, Prefetch::none(b));
            }
        }
    }

    /// As [`crate::pack::pack_keys`].
    ///
    /// # Safety
    /// As there, and the CPU has the kernel's features.
    #[inline(always)]
    unsafe fn pack_keys(rows: &[*const u16; PANEL], head_dim: usize, out: *mut u16) {
        // SAFETY: the same promise.
        unsafe { crate::pack::pack_keys(rows, head_dim, out) }
    }

    /// As [`crate::pack::pack_values`].
    ///
    /// # Safety
    /// As there, and the CPU has the kernel's features.
    #[inline(always)]
    unsafe fn pack_values(
        rows: &[*const u16; PANEL],
        head_dim: usize,
        out: *mut u16,
        panel: usize,
    ) {
        // SAFETY: the same promise.
        unsafe { crate::pack::pack_values(rows, head_dim, out, panel) }
    }
}

/// Lines to fetch while a tile computes: two per pair of K, each `step` bytes after the last.
#[derive(Clone, Copy)]
pub struct Prefetch {
    pub first: *const u8,
    pub second: *const u8,
    pub step: usize,
}

impl Prefetch {
    const AHEAD: usize = 4096;

    /// Nothing worth fetching: touches what is there already.
    #[inline(always)]
    pub fn none(b: *const u16) -> Self {
        Self {
            first: b.cast(),
            second: b.cast(),
            step: 0,
        }
    }

    /// What is left of it after so many pairs of K.
    #[inline(always)]
    fn after(self, pairs: usize) -> Self {
        Self {
            first: self.first.wrapping_add(pairs * self.step),
            second: self.second.wrapping_add(pairs * self.step),
            ..self
        }
    }

    /// The panel being computed, some way ahead: 64 lines in flight stream from memory on one core.
    #[inline(always)]
    fn ahead(panel: &[u16]) -> Self {
        let first = panel.as_ptr().cast::<u8>().wrapping_add(Self::AHEAD);
        Self {
            first,
            second: first.wrapping_add(64),
            step: 128,
        }
    }

    /// The share of `next` that tile `tile` of `tiles` brings in, so that memory works while all of them
    /// compute and not only while the first one does.
    #[inline(always)]
    fn share(next: &[u16], tile: usize, tiles: usize, pairs: usize) -> Self {
        let half = size_of_val(next) / 2;
        let first = next.as_ptr().cast::<u8>().wrapping_add(half * tile / tiles);
        Self {
            first,
            second: first.wrapping_add(half),
            step: half.div_ceil(tiles * pairs).min(64),
        }
    }

    /// Fetches what [`Prefetch::ahead`] takes to be there when a panel begins.
    #[inline(always)]
    fn begin(panel: &[u16]) {
        for line in (0..size_of_val(panel).min(Self::AHEAD)).step_by(64) {
            fetch(panel.as_ptr().cast::<u8>().wrapping_add(line));
        }
    }
}

/// Asks for a line.
#[inline(always)]
pub fn fetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; any address will do.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Rows beyond a buffer's last one that a tile may read: activation buffers have a multiple of this.
pub const ROW_STEP: usize = 32;

/// What happens to a finished product. Strides in elements; pointers to row 0, column 0 of the output.
#[derive(Clone, Copy)]
pub enum Epilogue<'a> {
    /// `c = product + bias`; the bias covers whole panels.
    Store {
        c: *mut f32,
        ldc: usize,
        bias: Option<&'a [f32]>,
    },
    /// `c += product`: the residual stream.
    Add { c: *mut f32, ldc: usize },
    /// Columns of a panel are 16 gates, then their 16 ups: `out = bf16(silu(gate) * up)`, 16 a panel.
    SwiGlu { out: *mut u16, ldo: usize },
}

/// A product whose K is cut into parts, the ranks': every element is one accumulator that runs over the first part, then over the
/// second, and so on. So it is what one part of all of K makes of it, bit for bit.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// In the order of the additions, one at least; all have the same panels.
    pub parts: &'a [Part<'a>],
    pub epilogue: Epilogue<'a>,
}

/// One part of K.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// BF16 activations, row 0; rows `lda` apart, K padded with zeros, readable to a multiple of [`ROW_STEP`].
    pub a: *const u16,
    pub lda: usize,
    pub weights: &'a Packed,
}

// SAFETY: pointers only; `product` carries the obligation.
unsafe impl Send for Product<'_> {}
// SAFETY: as above.
unsafe impl Sync for Product<'_> {}
// SAFETY: as above.
unsafe impl Send for Part<'_> {}
// SAFETY: as above.
unsafe impl Sync for Part<'_> {}

/// How many tiles so many rows are.
#[inline(always)]
pub fn tiles<T: Tile>(rows: usize) -> usize {
    rows.div_ceil(T::STRIP).div_ceil(T::ROWS / T::STRIP)
}

/// The rows of one of so many tiles. All have nearly as many strips: 32 rows of strips of one are 10 + 11 + 11, not 12 + 12 + 8.
#[inline(always)]
pub fn tile_rows<T: Tile>(rows: &Range<usize>, tile: usize, tiles: usize) -> Range<usize> {
    let strips = rows.len().div_ceil(T::STRIP);
    let begin = |tile: usize| (rows.start + strips * tile / tiles * T::STRIP).min(rows.end);
    begin(tile)..begin(tile + 1)
}

/// Computes rows `rows` of panels `panels`; `next` is the panel that this thread will probably need after them.
///
/// # Safety
/// The CPU has `T`'s features; `product`'s pointers cover these rows and panels; nobody else touches those
/// outputs meanwhile.
#[inline(always)]
pub unsafe fn product<T: Tile>(
    product: &Product<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
    next: &[u16],
) {
    #[repr(align(64))]
    struct Scratch([f32; ROW_STEP * PANEL]);
    let mut scratch = Scratch([0.0; ROW_STEP * PANEL]);
    let tiles = tiles::<T>(rows.len());
    // SAFETY: by the caller's promise.
    unsafe { T::begin() };
    for panel in panels.clone() {
        for tile in 0..tiles {
            let of_tile = tile_rows::<T>(&rows, tile, tiles);
            let (first, height) = (of_tile.start, of_tile.len());
            let c = scratch.0.as_mut_ptr();
            for (index, part) in product.parts.iter().enumerate() {
                let b = part.weights.panel(panel);
                let next = match panel + 1 < panels.end {
                    true => part.weights.panel(panel + 1),
                    false => next,
                };
                // SAFETY: by the caller's promise; the scratch holds ROW_STEP rows of one panel.
                unsafe {
                    let (a, pairs) = (part.a.add(first * part.lda), part.weights.k / 2);
                    let prefetch = match tiles {
                        1 => Prefetch::ahead(b),
                        _ => Prefetch::share(next, tile, tiles, pairs),
                    };
                    let (b, goes_on) = (b.as_ptr(), index > 0);
                    T::run(height, a, part.lda, b, pairs, c, PANEL, goes_on, prefetch);
                }
            }
            // SAFETY: as above.
            unsafe { finish(&product.epilogue, &scratch.0, first, height, panel) };
        }
    }
    if tiles == 1 {
        Prefetch::begin(next);
    }
    // SAFETY: begun above.
    unsafe { T::end() };
}

#[inline(always)]
unsafe fn finish(
    epilogue: &Epilogue<'_>,
    scratch: &[f32],
    first: usize,
    height: usize,
    panel: usize,
) {
    let (tile, _) = scratch.as_chunks::<PANEL>();
    for (row, sums) in tile.iter().enumerate().take(height) {
        // SAFETY: `product`'s promise: the output covers these rows and panels, and is this thread's.
        unsafe {
            match epilogue {
                Epilogue::Store { c, ldc, bias } => {
                    let c = c
                        .add((first + row) * ldc + panel * PANEL)
                        .cast::<[f32; PANEL]>();
                    *c = *sums;
                    if let Some(bias) = bias {
                        let bias = &bias[panel * PANEL..][..PANEL];
                        for i in 0..PANEL {
                            (*c)[i] += bias[i];
                        }
                    }
                }
                Epilogue::Add { c, ldc } => {
                    let c = c
                        .add((first + row) * ldc + panel * PANEL)
                        .cast::<[f32; PANEL]>();
                    for i in 0..PANEL {
                        (*c)[i] += sums[i];
                    }
                }
                Epilogue::SwiGlu { out, ldo } => {
                    const HALF: usize = PANEL / 2;
                    let out = out
                        .add((first + row) * ldo + panel * HALF)
                        .cast::<[u16; HALF]>();
                    for i in 0..HALF {
                        (*out)[i] = bf16_of(silu(sums[i]) * sums[HALF + i]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Kernel, Ops};
    use crate::math::f32_of;
    use crate::memory::Carver;
    use crate::pack::{K_STEP, pack_keys, pack_values};
    use crate::threads::Pool;

    /// What padding and outputs hold before: a product that reads or keeps any of it shows it.
    const POISON: f32 = f32::NAN;

    struct Case {
        a: Vec<u16>,
        lda: usize,
        columns: Vec<Vec<u16>>,
        weights: Packed,
    }

    fn random(seed: &mut u64) -> f32 {
        *seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn case(rows: usize, k: usize, columns: usize) -> Case {
        let mut seed = (rows * 1_000_003 + k * 1009 + columns) as u64;
        let lda = k.next_multiple_of(K_STEP);
        let mut a = vec![bf16_of(POISON); (rows + ROW_STEP) * lda];
        for row in a.chunks_mut(lda).take(rows) {
            row[..k].fill_with(|| bf16_of(random(&mut seed)));
            row[k..].fill(0);
        }
        let columns: Vec<Vec<u16>> = (0..columns)
            .map(|_| (0..k).map(|_| bf16_of(random(&mut seed))).collect())
            .collect();
        let (mut pool, mut memory) = (Pool::new(1), Carver::default());
        let weights = Packed::new(&mut pool, &mut memory, columns.len(), k, |c| {
            Some(&columns[c])
        });
        Case {
            a,
            lda,
            columns,
            weights,
        }
    }

    impl Case {
        fn store(&self, ops: &Ops, rows: Range<usize>, panels: Range<usize>) -> Vec<f32> {
            let ldc = self.weights.panels * PANEL;
            let mut c = vec![POISON; (self.a.len() / self.lda) * ldc];
            let epilogue = Epilogue::Store {
                c: c.as_mut_ptr(),
                ldc,
                bias: None,
            };
            self.run(ops, epilogue, rows, panels);
            c
        }

        fn run(&self, ops: &Ops, epilogue: Epilogue<'_>, rows: Range<usize>, panels: Range<usize>) {
            let part = Part {
                a: self.a.as_ptr(),
                lda: self.lda,
                weights: &self.weights,
            };
            let job = Product {
                parts: &[part],
                epilogue,
            };
            // SAFETY: the kernel is available; the outputs of these tests cover all rows and panels.
            unsafe { (ops.product)(&job, rows, panels, self.weights.panel(0)) }
        }

        fn truth(&self, row: usize, column: usize) -> f64 {
            let a = &self.a[row * self.lda..];
            let pairs = a.iter().zip(&self.columns[column]);
            pairs
                .map(|(a, b)| f64::from(f32_of(*a)) * f64::from(f32_of(*b)))
                .sum()
        }
    }

    fn kernels() -> impl Iterator<Item = Kernel> {
        Kernel::ALL.into_iter().filter(|k| k.available())
    }

    #[test]
    fn products_are_right_for_every_height_and_odd_sizes() {
        for kernel in kernels() {
            for (rows, k, columns) in
                (1..=40)
                    .map(|rows| (rows, 70, 40))
                    .chain([(3, 1, 1), (13, 576, 64), (2, 1537, 33)])
            {
                let case = case(rows, k, columns);
                let ldc = case.weights.panels * PANEL;
                let c = case.store(kernel.ops(), 0..rows, 0..case.weights.panels);
                for row in 0..rows {
                    for column in 0..columns {
                        let (ours, truth) =
                            (f64::from(c[row * ldc + column]), case.truth(row, column));
                        let bound = 2e-6 * (k as f64).sqrt() + 1e-6 * truth.abs();
                        assert!(
                            (ours - truth).abs() < bound,
                            "{kernel} {rows}x{k}x{columns} at {row},{column}: {ours} for {truth}"
                        );
                    }
                    assert!(
                        c[row * ldc..][columns..ldc].iter().all(|c| *c == 0.0),
                        "padding"
                    );
                }
                assert!(
                    c[rows * ldc..].iter().all(|c| c.is_nan()),
                    "{kernel} wrote row {rows}"
                );
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn plain_rust_has_the_same_bits_with_and_without_avx() {
        for rows in [1, 2, 3, 5, 12, 37] {
            let case = case(rows, 600, 96);
            let [least, most] = crate::kernel::portable_ops()
                .map(|ops| case.store(ops, 0..rows, 0..3).into_iter().map(f32::to_bits));
            assert!(least.eq(most), "{rows} rows");
        }
    }

    /// Parts of any even width, padded each to whole steps of K.
    #[test]
    fn a_product_in_parts_of_k_has_the_same_bits() {
        for kernel in kernels() {
            let case = case(29, 206, 70);
            let ldc = case.weights.panels * PANEL;
            let whole = case.store(kernel.ops(), 0..29, 0..case.weights.panels);
            for cuts in [vec![0_usize, 64, 206], vec![0, 10, 38, 40, 206]] {
                let parts: Vec<usize> = cuts.windows(2).map(|cut| cut[1] - cut[0]).collect();
                // The last part ends where the whole does: its tiles are the same.
                if kernel.for_parts(&parts[..parts.len() - 1]) != kernel {
                    continue;
                }
                let parts: Vec<(Vec<u16>, usize, Packed)> = cuts
                    .windows(2)
                    .map(|cut| {
                        let (k, lda) = (cut[0]..cut[1], (cut[1] - cut[0]).next_multiple_of(K_STEP));
                        let mut a = vec![bf16_of(POISON); (29 + ROW_STEP) * lda];
                        for (row, to) in a.chunks_mut(lda).take(29).enumerate() {
                            to.fill(0);
                            to[..k.len()].copy_from_slice(&case.a[row * case.lda..][k.clone()]);
                        }
                        let (mut pool, mut memory) = (Pool::new(1), Carver::default());
                        let packed = Packed::new(&mut pool, &mut memory, 70, k.len(), |c| {
                            Some(&case.columns[c][k.clone()])
                        });
                        (a, lda, packed)
                    })
                    .collect();
                let parts: Vec<Part<'_>> = parts
                    .iter()
                    .map(|(a, lda, weights)| Part {
                        a: a.as_ptr(),
                        lda: *lda,
                        weights,
                    })
                    .collect();
                let mut c = vec![POISON; whole.len()];
                let epilogue = Epilogue::Store {
                    c: c.as_mut_ptr(),
                    ldc,
                    bias: None,
                };
                let parts = &parts;
                let job = Product { parts, epilogue };
                let panels = 0..case.weights.panels;
                // SAFETY: the kernel is available; `c` covers all rows and panels.
                unsafe { (kernel.ops().product)(&job, 0..29, panels, parts[0].weights.panel(0)) };
                for (at, (ours, theirs)) in c.iter().zip(&whole).enumerate() {
                    assert_eq!(
                        ours.to_bits(),
                        theirs.to_bits(),
                        "{kernel} {cuts:?} at {at}"
                    );
                }
            }
        }
    }

    #[test]
    fn an_element_does_not_depend_on_its_neighbours() {
        for kernel in kernels() {
            let case = case(37, 200, 96);
            let ldc = case.weights.panels * PANEL;
            let whole = case.store(kernel.ops(), 0..37, 0..3);
            for rows in [0..1, 5..6, 3..15, 30..37, 7..36] {
                for panels in [0..1, 1..3] {
                    let part = case.store(kernel.ops(), rows.clone(), panels.clone());
                    for at in rows.clone().flat_map(|row| {
                        let from = row * ldc + panels.start * PANEL;
                        from..from + panels.len() * PANEL
                    }) {
                        assert_eq!(part[at].to_bits(), whole[at].to_bits(), "{kernel} {rows:?}");
                    }
                    let written = part.iter().filter(|c| !c.is_nan()).count();
                    assert_eq!(written, rows.len() * panels.len() * PANEL, "{kernel}");
                }
            }
        }
    }

    #[test]
    fn epilogues_do_what_they_say() {
        for kernel in kernels() {
            let (rows, columns) = (14, 64);
            let case = case(rows, 96, columns);
            let sums = case.store(kernel.ops(), 0..rows, 0..2);
            let bias: Vec<f32> = (0..columns).map(|i| i as f32 * 0.25).collect();
            let mut c = vec![POISON; rows * columns];
            let store = Epilogue::Store {
                c: c.as_mut_ptr(),
                ldc: columns,
                bias: Some(&bias),
            };
            case.run(kernel.ops(), store, 0..rows, 0..2);
            for (i, c) in c.iter().enumerate() {
                assert_eq!(*c, sums[i] + bias[i % columns]);
            }
            let mut c = vec![1.5f32; rows * columns];
            let add = Epilogue::Add {
                c: c.as_mut_ptr(),
                ldc: columns,
            };
            case.run(kernel.ops(), add, 0..rows, 0..2);
            for (c, sum) in c.iter().zip(&sums) {
                assert_eq!(*c, 1.5 + sum);
            }
            let mut out = vec![bf16_of(POISON); rows * columns / 2];
            let gate = Epilogue::SwiGlu {
                out: out.as_mut_ptr(),
                ldo: columns / 2,
            };
            case.run(kernel.ops(), gate, 0..rows, 0..2);
            for row in 0..rows {
                for i in 0..columns / 2 {
                    let at = row * columns + i / 16 * PANEL + i % 16;
                    let (gate, up) = (f64::from(sums[at]), f64::from(sums[at + 16]));
                    let truth = gate / (1.0 + (-gate).exp()) * up;
                    let ours = f64::from(f32_of(out[row * columns / 2 + i]));
                    assert!(
                        (ours - truth).abs() <= truth.abs() / 250.0 + 1e-6,
                        "{ours} {truth}"
                    );
                }
            }
        }
    }

    #[test]
    fn values_are_packed_alike_by_every_kernel() {
        for head_dim in [6usize, 32, 64, 80, 128] {
            let values: Vec<u16> = (0..32 * head_dim).map(|i| i as u16).collect();
            let rows = std::array::from_fn(|t| values[t * head_dim..].as_ptr());
            let room = head_dim.next_multiple_of(PANEL) * PANEL;
            let mut plain = vec![9u16; room];
            // SAFETY: 32 rows of head_dim numbers; room for whole panels.
            unsafe { pack_values(&rows, head_dim, plain.as_mut_ptr(), PANEL * PANEL) };
            for token in 0..PANEL {
                for dim in 0..head_dim {
                    let at = dim / PANEL * PANEL * PANEL + token / 2 * 2 * PANEL;
                    let packed = plain[at + dim % PANEL * 2 + token % 2];
                    assert_eq!(packed, values[token * head_dim + dim]);
                }
            }
            #[cfg(target_arch = "x86_64")]
            if Kernel::Avx512Bf16.available() {
                let mut fast = vec![9u16; room];
                // SAFETY: as above, and the CPU has AVX512.
                unsafe {
                    let out = fast.as_mut_ptr();
                    avx512::Avx512::pack_values(&rows, head_dim, out, PANEL * PANEL);
                }
                assert_eq!(fast, plain);
            }
        }
    }

    #[test]
    fn keys_are_packed_alike_by_every_kernel() {
        for head_dim in [6usize, 32, 64, 80, 128] {
            let keys: Vec<u16> = (0..32 * head_dim).map(|i| i as u16).collect();
            let rows: [*const u16; PANEL] = std::array::from_fn(|t| keys[t * head_dim..].as_ptr());
            let mut plain = vec![9u16; head_dim * PANEL];
            // SAFETY: 32 rows of head_dim numbers; room for head_dim / 2 rows of 64.
            unsafe { pack_keys(&rows, head_dim, plain.as_mut_ptr()) };
            for pair in 0..head_dim / 2 {
                for token in 0..PANEL {
                    let packed = &plain[(pair * PANEL + token) * 2..][..2];
                    assert_eq!(packed, &keys[token * head_dim + 2 * pair..][..2]);
                }
            }
            #[cfg(target_arch = "x86_64")]
            if Kernel::Avx512Bf16.available() {
                let mut fast = vec![9u16; head_dim * PANEL];
                // SAFETY: as above, and the CPU has AVX512.
                unsafe { avx512::Avx512::pack_keys(&rows, head_dim, fast.as_mut_ptr()) };
                assert_eq!(fast, plain);
            }
        }
    }
}
