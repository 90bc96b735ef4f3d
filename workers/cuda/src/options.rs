//! How large steps may be, and how many rows that makes.

use crate::step::decode_size;

/// How large the steps of a model may be.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Most tokens of one step.
    pub step_tokens_max: usize,
    /// Most sequences of one step.
    pub step_sequences_max: usize,
}

/// Rows of a step, rounded up to what products are planned for: few plans, little waste.
pub(crate) fn padded_rows(rows: usize) -> usize {
    match rows {
        0..=128 => rows.next_multiple_of(8),
        129..=1024 => rows.next_multiple_of(64),
        _ => rows.next_multiple_of(128),
    }
}

/// Rows of the largest step.
pub(crate) fn rows_max(options: CudaOptions) -> usize {
    padded_rows(
        options
            .step_tokens_max
            .max(decode_size(options.step_sequences_max)),
    )
}

/// A decode step takes its logits at once; prompt log-probabilities take more in turns.
pub(crate) fn logits_rows(options: CudaOptions) -> usize {
    padded_rows(decode_size(options.step_sequences_max)).max(64)
}
