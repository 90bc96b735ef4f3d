//! What happens between the query-key-value product and attention, row by row: norms per head (Qwen3), rotary
//! positions, rounding, and the new KV into the arena.

use std::ops::Range;

use baton_engine::Rows;

use crate::attention::HeadLayout;
use crate::math::{bf16_of, inverse_rms};

/// One layer's rows.
#[derive(Clone, Copy)]
pub struct Qkv<'a> {
    pub shape: &'a HeadLayout,
    pub rows: &'a Rows,
    /// `[row][query heads, key heads, value heads][head_dim]`, rows `ldq` apart. Overwritten.
    pub qkv: *mut f32,
    pub ldq: usize,
    /// Cosine and sine of each row: `[row][head_dim / 2]`.
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// Weights of the query and key norms, and their epsilon.
    pub norms: Option<(&'a [f32], &'a [f32])>,
    pub eps: f32,
    pub arena: *mut u8,
    pub layer: usize,
    /// As in [`crate::attention::Attention`].
    pub q: *mut u16,
    pub q_rows: usize,
}

// SAFETY: pointers only; `rotate` carries the obligation.
unsafe impl Send for Qkv<'_> {}
// SAFETY: as above.
unsafe impl Sync for Qkv<'_> {}

/// Finishes queries, keys and values of some rows.
///
/// # Safety
/// The pointers of `job` cover these rows, and nobody else touches them meanwhile.
#[inline(always)]
pub unsafe fn rotate(job: &Qkv<'_>, rows: Range<usize>) {
    let shape = job.shape;
    let (dim, group, kv_heads) = (shape.head_dim, shape.group, shape.kv_heads);
    let heads = group * kv_heads;
    let scale = std::f32::consts::LOG2_E / (dim as f32).sqrt();
    for row in rows {
        let cos = &job.cos[row * dim / 2..][..dim / 2];
        let sin = &job.sin[row * dim / 2..][..dim / 2];
        // SAFETY: one row of the product.
        let qkv = unsafe {
            let all = (heads + 2 * kv_heads) * dim;
            std::slice::from_raw_parts_mut(job.qkv.add(row * job.ldq), all)
        };
        let (q, kv) = qkv.split_at_mut(heads * dim);
        let (k, v) = kv.split_at_mut(kv_heads * dim);
        for (head, q) in q.chunks_exact_mut(dim).enumerate() {
            turn(q, cos, sin, job.norms.map(|(q, _)| (q, job.eps)));
            // SAFETY: this row and head of the queries.
            let out = unsafe {
                let at = (head / group * job.q_rows + row) * group + head % group;
                std::slice::from_raw_parts_mut(job.q.add(at * shape.head_dim_padded), dim)
            };
            for (out, q) in out.iter_mut().zip(q) {
                *out = bf16_of(*q * scale);
            }
        }
        let (block, slot) = job.rows.places[row];
        for (head, (k, v)) in k.chunks_exact_mut(dim).zip(v.chunks_exact(dim)).enumerate() {
            turn(k, cos, sin, job.norms.map(|(_, k)| (k, job.eps)));
            // SAFETY: a slot of a block in the arena that is this row's alone.
            let (key, value) = unsafe {
                let at = shape.key_offset(block, slot as usize, head, job.layer);
                let key = job.arena.add(at).cast::<u16>();
                let value = key.byte_add(shape.value_offset());
                (
                    std::slice::from_raw_parts_mut(key, dim),
                    std::slice::from_raw_parts_mut(value, dim),
                )
            };
            for (out, k) in key.iter_mut().zip(k) {
                *out = bf16_of(*k);
            }
            for (out, v) in value.iter_mut().zip(v) {
                *out = bf16_of(*v);
            }
        }
    }
}

/// Norm, if there is one, and rotation of one head in the half-split form.
#[inline(always)]
fn turn(x: &mut [f32], cos: &[f32], sin: &[f32], norm: Option<(&[f32], f32)>) {
    if let Some((weight, eps)) = norm {
        let scale = inverse_rms(x, eps);
        for (x, w) in x.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    }
    let (low, high) = x.split_at_mut(cos.len());
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (x, y) = (*a, *b);
        *a = x * cos - y * sin;
        *b = y * cos + x * sin;
    }
}
