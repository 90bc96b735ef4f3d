//! What of a step the GPU is told: a few arrays of integers, one copy.
//!
//! Their places depend only on how many rows and sequences the step has room for, so a captured graph finds them where it
//! was told; rows and sequences that are only there to fill a batch point nowhere: slot -1, no tokens.

use std::sync::Arc;

use baton_engine::{Rows, Want};
use baton_protocol::KvGeometry;
use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::device::{Buffer, Device, Pinned};

/// Words of the header: rows, sequences, wanted rows, work units of prefill attention.
const HEADER: usize = 8;

/// Sizes of decode batches that are captured; others run as the next larger one.
pub const DECODE_SIZES: [usize; 20] = [
    1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512,
];

/// The size that a decode batch runs as: the next of [`DECODE_SIZES`], or its own beyond them.
pub fn decode_size(sequences: usize) -> usize {
    let size = DECODE_SIZES.iter().find(|size| **size >= sequences);
    size.copied().unwrap_or(sequences)
}

/// Steps that may be under way at once: while one runs, the arrays of the next are written.
pub const SLOTS: usize = 2;

/// The arrays of a step, on both sides. On the GPU there is one set: what a step reads was copied after the step before it.
pub struct StepArrays {
    host: [Pinned<i32>; SLOTS],
    device: Buffer<i32>,
    shape: StepShape,
}

/// How many rows, sequences, wanted rows and attention work units there is room for: all that a graph depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub sequences: usize,
    /// Rows whose logits are wanted.
    pub wanted: usize,
    /// Work units of prefill attention.
    pub work: usize,
}

/// Where the arrays of a step lie on the GPU.
#[derive(Clone, Copy, Debug)]
pub struct StepAddresses {
    /// `[8]`: [`HEADER_SEQUENCES`] and others.
    pub header: CUdeviceptr,
    /// Per row: its token, or `-1 - i` for the i-th of the best tokens of the step before.
    pub row_token: CUdeviceptr,
    /// Per row: its position.
    pub row_position: CUdeviceptr,
    /// Per row: `block * block_tokens + offset` of its own KV.
    pub row_slot: CUdeviceptr,
    /// Per sequence: its first row.
    pub seq_first_row: CUdeviceptr,
    /// Per sequence: its rows.
    pub seq_rows: CUdeviceptr,
    /// Per sequence: tokens in KV after this step.
    pub seq_kv_len: CUdeviceptr,
    /// Per sequence: where its block table begins in `tables`.
    pub seq_table: CUdeviceptr,
    /// Rows whose logits are wanted.
    pub wanted: CUdeviceptr,
    /// Pairs (sequence, first row within it) of prefill attention.
    pub work: CUdeviceptr,
    /// All block tables.
    pub tables: CUdeviceptr,
}

/// Index of the number of sequences in the header.
pub const HEADER_SEQUENCES: i32 = 1;

impl StepShape {
    /// Integers before the block tables.
    fn fixed(&self) -> usize {
        HEADER + 3 * self.rows + 4 * self.sequences + self.wanted_padded() + 2 * self.work
    }

    /// Room of the wanted rows, so that the pairs after them are aligned.
    fn wanted_padded(&self) -> usize {
        self.wanted + (self.rows + self.wanted) % 2
    }
}

impl StepArrays {
    /// Room for steps up to `shape` with this many entries in all block tables.
    ///
    /// # Errors
    /// [`CudaError::Memory`] or [`CudaError::Driver`].
    pub fn new(
        device: &Arc<Device>,
        shape: StepShape,
        table_entries: usize,
    ) -> Result<Self, CudaError> {
        let len = shape.fixed() + table_entries;
        Ok(Self {
            host: [Pinned::zeroed(device, len)?, Pinned::zeroed(device, len)?],
            device: Buffer::zeroed(device, len, "a step's arrays")?,
            shape: StepShape::default(),
        })
    }

    /// Lays out a step in a shape at least as large and starts copying it, from the host's arrays of `slot`: a step that was
    /// laid out there before must be over. `work` are the units of prefill attention. Rows that follow the step before carry
    /// `-1 - i` for the i-th of its best tokens.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Panics
    /// If the shape is too small: the caller has made it of the same rows.
    pub fn upload(
        &mut self,
        slot: usize,
        shape: StepShape,
        rows: &Rows,
        wants: &[Want],
        work: &[(i32, i32)],
        kv: &KvGeometry,
    ) -> Result<StepAddresses, CudaError> {
        assert!(rows.tokens.len() <= shape.rows && rows.sequences.len() <= shape.sequences);
        assert!(wants.len() <= shape.wanted && work.len() <= shape.work);
        self.shape = shape;
        let mut rest = &mut self.host[slot][..];
        let mut take = |count: usize| {
            let (array, tail) = std::mem::take(&mut rest).split_at_mut(count);
            rest = tail;
            array
        };
        let header = take(HEADER);
        header[0] = rows.tokens.len() as i32;
        header[HEADER_SEQUENCES as usize] = rows.sequences.len() as i32;
        header[2] = wants.len() as i32;
        header[3] = work.len() as i32;
        let (token, position, place) = (take(shape.rows), take(shape.rows), take(shape.rows));
        let count = rows.tokens.len();
        for row in 0..count {
            let (block, offset) = rows.places[row];
            token[row] = rows.tokens[row] as i32;
            position[row] = rows.positions[row] as i32;
            place[row] = (block * kv.block_tokens + offset) as i32;
        }
        token[count..].fill(0);
        position[count..].fill(0);
        place[count..].fill(-1);
        let (first, own) = (take(shape.sequences), take(shape.sequences));
        let (kv_len, table) = (take(shape.sequences), take(shape.sequences));
        let wanted = take(shape.wanted_padded());
        let units = take(2 * shape.work);
        let mut entries = 0;
        for (s, sequence) in rows.sequences.iter().enumerate() {
            let end = sequence.start + sequence.tokens;
            let blocks = &rows.blocks(s)[..kv.blocks_for(end)];
            (first[s], own[s]) = (sequence.row as i32, sequence.tokens as i32);
            (kv_len[s], table[s]) = (end as i32, entries as i32);
            for (entry, block) in rest[entries..].iter_mut().zip(blocks) {
                *entry = *block as i32;
            }
            entries += blocks.len();
        }
        let real = rows.sequences.len();
        for (i, first) in first[real..].iter_mut().enumerate() {
            *first = (count + i) as i32;
        }
        for array in [own, kv_len, table] {
            array[real..].fill(0);
        }
        for (wanted, want) in wanted.iter_mut().zip(wants) {
            *wanted = want.row as i32;
        }
        wanted[wants.len()..].fill(0);
        for (unit, work) in units.chunks_exact_mut(2).zip(work) {
            unit.copy_from_slice(&[work.0, work.1]);
        }
        // SAFETY: the device buffer is as long as the host's; the host's is written again only after the step, which
        // the caller waits for.
        unsafe { self.host[slot].upload(shape.fixed() + entries, self.device.at(0))? };
        Ok(self.addresses())
    }

    /// Where the arrays of the last step lie.
    fn addresses(&self) -> StepAddresses {
        let shape = self.shape;
        let mut at = 0;
        let mut take = |count: usize| {
            let address = self.device.at(at);
            at += count;
            address
        };
        StepAddresses {
            header: take(HEADER),
            row_token: take(shape.rows),
            row_position: take(shape.rows),
            row_slot: take(shape.rows),
            seq_first_row: take(shape.sequences),
            seq_rows: take(shape.sequences),
            seq_kv_len: take(shape.sequences),
            seq_table: take(shape.sequences),
            wanted: take(shape.wanted_padded()),
            work: take(2 * shape.work),
            tables: take(0),
        }
    }
}
