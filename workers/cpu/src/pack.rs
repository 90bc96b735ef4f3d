//! Weights in the order the products read them.
//!
//! A packed matrix is a row of panels of [`PANEL`] output columns; a panel is `[k / 2][column][2]`, so 64
//! bytes are 16 columns of one K pair: one `vdpbf16ps` operand, and one row of an AMX tile. K is padded to a
//! multiple of 32 (one AMX tile) and the columns to whole panels, both with zeros, which add nothing.

use crate::memory::{Carver, Pages, Shared};
use crate::threads::Pool;

/// Columns of one panel.
pub const PANEL: usize = 32;

/// K is padded to a multiple of this.
pub const K_STEP: usize = 32;

/// A weight matrix `[columns][k]`, packed.
pub struct Packed {
    data: Pages<u16>,
    /// Length of a packed column: K, padded.
    pub k: usize,
    /// Number of panels.
    pub panels: usize,
}

impl Packed {
    /// Packs `columns` columns of `k` numbers; `column(c)` is the c-th one, `None` a column of zeros.
    pub fn new<'a>(
        pool: &mut Pool,
        memory: &mut Carver,
        columns: usize,
        k: usize,
        column: impl Fn(usize) -> Option<&'a [u16]> + Sync,
    ) -> Self {
        let (panels, k_padded) = (columns.div_ceil(PANEL), k.next_multiple_of(K_STEP));
        let mut data = memory.zeroed(panels * PANEL * k_padded);
        let out = Shared::new(&mut data);
        pool.run(panels, &|_, panel| {
            // SAFETY: every panel is one piece.
            let out = unsafe { out.slice(panel * PANEL * k_padded, PANEL * k_padded) };
            for c in (0..PANEL).take_while(|c| panel * PANEL + c < columns) {
                let Some(column) = column(panel * PANEL + c) else {
                    continue;
                };
                assert_eq!(column.len(), k, "column {c} of panel {panel}");
                for (pair, numbers) in column.chunks(2).enumerate() {
                    for (i, number) in numbers.iter().enumerate() {
                        out[(pair * PANEL + c) * 2 + i] = *number;
                    }
                }
            }
        });
        Self {
            data,
            k: k_padded,
            panels,
        }
    }

    /// One panel.
    #[inline(always)]
    pub fn panel(&self, index: usize) -> &[u16] {
        &self.data[index * PANEL * self.k..][..PANEL * self.k]
    }

    /// Bytes of all panels.
    pub fn bytes(&self) -> usize {
        self.data.len() * 2
    }
}

/// Keys of 32 tokens as a panel `[head_dim / 2][token][2]`: tokens become columns. `out` is zero beyond
/// `head_dim` and stays so.
///
/// # Safety
/// Every row is readable for `head_dim` numbers, `out` writable for `head_dim / 2` rows of 64.
#[inline(always)]
pub unsafe fn pack_keys(rows: &[*const u16; PANEL], head_dim: usize, out: *mut u16) {
    for (token, row) in rows.iter().enumerate() {
        for pair in 0..head_dim / 2 {
            // SAFETY: by the caller's promise; a pair is four bytes, aligned to two.
            unsafe {
                let value = row.add(2 * pair).cast::<u32>().read_unaligned();
                out.add((pair * PANEL + token) * 2)
                    .cast::<u32>()
                    .write_unaligned(value);
            }
        }
    }
}

/// Values of 32 tokens as panels of 32 dimensions, each `[token / 2][dimension][2]`, `panel_stride` elements apart.
///
/// # Safety
/// Every row is readable for `head_dim` numbers, `out` writable for 32 × 32 of each panel.
#[inline(always)]
pub unsafe fn pack_values(
    rows: &[*const u16; PANEL],
    head_dim: usize,
    out: *mut u16,
    panel_stride: usize,
) {
    for (pair, tokens) in rows.as_chunks::<2>().0.iter().enumerate() {
        // SAFETY: by the caller's promise.
        let (even, odd) = unsafe {
            (
                std::slice::from_raw_parts(tokens[0], head_dim),
                std::slice::from_raw_parts(tokens[1], head_dim),
            )
        };
        for (panel, (even, odd)) in even.chunks(PANEL).zip(odd.chunks(PANEL)).enumerate() {
            let at = panel * panel_stride + pair * PANEL * 2;
            // SAFETY: one pair's row of one panel, inside `out` by the caller's promise.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(at), PANEL * 2) };
            if let (Ok(even), Ok(odd)) = (
                <&[u16; PANEL]>::try_from(even),
                <&[u16; PANEL]>::try_from(odd),
            ) {
                for i in 0..PANEL {
                    out[2 * i] = even[i];
                    out[2 * i + 1] = odd[i];
                }
            } else {
                for i in 0..even.len() {
                    out[2 * i] = even[i];
                    out[2 * i + 1] = odd[i];
                }
            }
        }
    }
}
