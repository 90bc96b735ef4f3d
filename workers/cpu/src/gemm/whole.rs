//! A whole product on all threads.

use std::ops::Range;

use super::{Epilogue, Part, Product};
use crate::kernel::Ops;
use crate::pack::Packed;
use crate::threads::{Pool, run_of};

/// A whole product, handed out in pieces of rows and panels. `then` is the matrix of the product that follows.
pub fn multiply(
    pool: &mut Pool,
    ops: &Ops,
    parts: &[Part<'_>],
    then: &Packed,
    epilogue: Epilogue<'_>,
    rows: usize,
) {
    let job = Product { parts, epilogue };
    let weights = parts[0].weights;
    let threads = pool.threads();
    let (cut, then_cut) = (
        Cut::new(rows, weights, threads),
        Cut::new(rows, then, threads),
    );
    pool.run(cut.pieces(), &|thread, piece| {
        let next = if run_of(thread, threads, cut.pieces()).contains(&(piece + 1)) {
            weights.panel(cut.panels(piece + 1).start)
        } else {
            let first = run_of(thread, threads, then_cut.pieces()).start;
            then.panel(then_cut.panels(first).start)
        };
        // SAFETY: the kernel was available at load; pieces are disjoint; buffers hold the step's rows.
        unsafe { (ops.product)(&job, cut.rows(piece), cut.panels(piece), next) }
    });
}

/// How a product is cut into pieces.
struct Cut {
    rows: usize,
    row_pieces: usize,
    all_panels: usize,
    panels: usize,
    panel_pieces: usize,
}

impl Cut {
    fn new(rows: usize, weights: &Packed, threads: usize) -> Self {
        /// Rows of activations that stay in the second-level cache while panels pass.
        const ROWS: usize = 192;
        // Enough pieces for an even end, few enough that claiming them costs nothing.
        let share = if rows <= 12 { 16 } else { 4 };
        let panels = weights.panels.div_ceil(share * threads).clamp(1, 16);
        Self {
            rows,
            row_pieces: rows.div_ceil(ROWS),
            all_panels: weights.panels,
            panels,
            panel_pieces: weights.panels.div_ceil(panels),
        }
    }

    fn pieces(&self) -> usize {
        self.row_pieces * self.panel_pieces
    }

    fn rows(&self, piece: usize) -> Range<usize> {
        let part = piece / self.panel_pieces;
        self.rows * part / self.row_pieces..self.rows * (part + 1) / self.row_pieces
    }

    fn panels(&self, piece: usize) -> Range<usize> {
        let first = piece % self.panel_pieces * self.panels;
        first..(first + self.panels).min(self.all_panels)
    }
}
