//! The launches of a step, from tokens to logits.

use cudarc::driver::sys::CUdeviceptr;

use super::attention::{Attention, Inputs};
use super::buffers::{ARGMAX_PARTS, Buffers};
use super::chain::{Chain, Streams};
use super::rank::{Kernels, RankModel};
use super::weights::LayerWeights;
use crate::error::CudaError;
use crate::gpu::device::Buffer;
use crate::gpu::kernel::LaunchConfig;
use crate::launch;
use crate::products::gemm::Output;
use crate::products::matrix::Matrix;
use crate::products::prefill_gemm::PrefillGemm;
use crate::products::skinny::{self, Epilogue, Norm};
use crate::step::{StepAddresses, StepShape};

impl RankModel {
    /// From tokens to the residual stream after the last layer; writes the KV of every row.
    ///
    /// # Safety
    /// `at` is a step of this shape, whose slots and tables lie in the arena of `attention`.
    pub(crate) unsafe fn layers(
        &mut self,
        attention: &Attention,
        shape: StepShape,
        at: &StepAddresses,
    ) -> Result<(), CudaError> {
        let (k, b, hidden) = (&self.kernels, &self.buffers, self.spec.hidden as i32);
        let half = (self.attention.head_dim / 2) as i32;
        let rows = LaunchConfig::row(shape.rows, 128).early();
        let table = self.embedding;
        let is_skinny = self.skinny.is_some() && shape.rows <= skinny::ROWS_MAX;
        // SAFETY: the kernels' arguments, by their files; buffers hold the shape's rows.
        unsafe {
            let (rope_table, frequencies) = (b.rope_table.at(0), b.frequencies.at(0));
            launch!(
                k.angles,
                rows,
                rope_table,
                frequencies,
                at.row_position,
                half
            )?;
            if is_skinny {
                let gamma = self.weights.layers[0].attention_norm.at(0);
                let (x, z, squares) = (b.x.at(0), b.normed.at(0), b.squares.at(0));
                let (token, chosen) = (at.row_token, b.best.at(0));
                launch!(
                    k.embed_scaled,
                    rows,
                    x,
                    z,
                    squares,
                    table,
                    gamma,
                    token,
                    chosen,
                    hidden
                )?;
            } else {
                let (token, chosen) = (at.row_token, b.best.at(0));
                launch!(k.embed, rows, b.x.at(0), table, token, chosen, hidden)?;
            }
            if let Some(chain) = self.chain_of(shape.rows) {
                return self.layers_in_chains(chain, attention, shape, at);
            }
            for layer in 0..self.weights.layers.len() {
                if is_skinny {
                    self.decode_layer(layer, attention, shape, at)?;
                } else {
                    self.layer_of_many(layer, attention, shape, at)?;
                }
            }
        }
        Ok(())
    }

    fn chain_of(&self, rows: usize) -> Option<&Chain> {
        self.chain.as_ref().filter(|chain| chain.takes(rows))
    }

    /// All layers, what is between two attentions in one launch.
    ///
    /// # Safety
    /// As [`Self::layers`]; there is a [`crate::products::skinny::Skinny`], and the embedding has left what its norms begin with.
    unsafe fn layers_in_chains(
        &self,
        chain: &Chain,
        attention: &Attention,
        shape: StepShape,
        at: &StepAddresses,
    ) -> Result<(), CudaError> {
        let (eps, b, k) = (self.spec.rms_eps, &self.buffers, &self.kernels);
        let streams = Streams {
            attended: b.attended.at(0),
            residual: b.x.at(0),
            qkv: b.qkv.at(0),
            z: b.normed.at(0),
            squares: b.squares.at(0),
        };
        // SAFETY: as `layers`; weights as loaded.
        unsafe {
            self.decode_qkv(0, shape.rows)?;
            for (index, layer) in self.weights.layers.iter().enumerate() {
                attend(k, eps, b, layer, 0, index, attention, shape, at)?;
                chain.launch(&self.weights, index, &streams, shape.rows)?;
            }
        }
        Ok(())
    }

    /// A layer through cuBLASLt.
    ///
    /// # Safety
    /// As [`Self::layers`].
    unsafe fn layer_of_many(
        &mut self,
        index: usize,
        attention: &Attention,
        shape: StepShape,
        at: &StepAddresses,
    ) -> Result<(), CudaError> {
        let Self {
            spec,
            weights,
            kernels,
            prefill_gemm,
            buffers: b,
            parallel,
            ..
        } = self;
        let layer = &weights.layers[index];
        let bias = layer.qkv_bias.as_ref().map_or(0, |bias| bias.at(0));
        let (rows, eps) = (shape.rows, spec.rms_eps);
        let (x, normed, attended) = (b.x.at(0), b.normed.at(0), b.attended.at(0));
        let (qkv, gate_up, inner) = (b.qkv.at(0), b.gate_up.at(0), b.inner.at(0));
        let all = parallel.as_ref();
        // Into the residual stream: alone, or with what the other ranks have.
        let add = |gemm: &mut PrefillGemm, w: &Matrix, from| match all {
            // SAFETY: as below.
            None => unsafe { gemm.multiply(w, from, x, rows, Output::AddF32) },
            // SAFETY: as below; all ranks run the same step.
            Some(all) => unsafe {
                gemm.multiply(w, from, all.partial(), rows, Output::Bf16)?;
                all.add(x, rows)
            },
        };
        // SAFETY: as `layers`; weights as loaded, activations of this many rows.
        unsafe {
            prefill_gemm.norm(&layer.qkv, normed, x, &layer.attention_norm, 0, rows)?;
            prefill_gemm.multiply(&layer.qkv, normed, qkv, rows, Output::Bf16)?;
            attend(kernels, eps, b, layer, bias, index, attention, shape, at)?;
            prefill_gemm.prepare(&layer.output, attended, rows)?;
            add(prefill_gemm, &layer.output, attended)?;
            prefill_gemm.norm(&layer.gate_up, normed, x, &layer.mlp_norm, 0, rows)?;
            prefill_gemm.multiply(&layer.gate_up, normed, gate_up, rows, Output::Bf16)?;
            prefill_gemm.swiglu(&layer.down, inner, gate_up, rows)?;
            add(prefill_gemm, &layer.down, inner)
        }
    }

    /// A layer whose products are bound by reading the weights: norms, SwiGLU and the residual stream are in their ends.
    ///
    /// # Safety
    /// As [`Self::layers`], and there is a [`crate::products::skinny::Skinny`].
    unsafe fn decode_layer(
        &self,
        index: usize,
        attention: &Attention,
        shape: StepShape,
        at: &StepAddresses,
    ) -> Result<(), CudaError> {
        let (eps, b, weights) = (self.spec.rms_eps, &self.buffers, &self.weights);
        let skinny = self.skinny.as_ref().expect("the caller has looked");
        let layer = &weights.layers[index];
        let (rows, squares) = (shape.rows, b.squares.at(0));
        let norm = Some(self.decode_norm());
        let residual = |sum, gamma: &Buffer<u8>| Epilogue::Residual {
            sum: (index, sum),
            residual: b.x.at(0),
            gamma: gamma.at(0),
            z: b.normed.at(0),
            squares,
        };
        let next = weights.layers.get(index + 1);
        let next = next.map_or(&weights.norm, |next| &next.attention_norm);
        let swiglu = Epilogue::SwiGlu { y: b.inner.at(0) };
        // SAFETY: as `layers`; weights as loaded.
        unsafe {
            self.decode_qkv(index, rows)?;
            attend(&self.kernels, eps, b, layer, 0, index, attention, shape, at)?;
            let end = residual(0, &layer.mlp_norm);
            skinny.multiply(&layer.output, &b.skinny_attended, rows, None, end)?;
            skinny.multiply(&layer.gate_up, &b.skinny_normed, rows, norm, swiglu)?;
            skinny.multiply(&layer.down, &b.skinny_inner, rows, None, residual(1, next))
        }
    }

    /// A layer's queries, keys and values.
    ///
    /// # Safety
    /// As [`Self::decode_layer`].
    unsafe fn decode_qkv(&self, index: usize, rows: usize) -> Result<(), CudaError> {
        let (b, layer) = (&self.buffers, &self.weights.layers[index]);
        let skinny = self.skinny.as_ref().expect("the caller has looked");
        let end = Epilogue::Store {
            y: b.qkv.at(0),
            bias: layer.qkv_bias.as_ref().map_or(0, |bias| bias.at(0)),
        };
        let norm = Some(self.decode_norm());
        // SAFETY: as the caller's; weights as loaded.
        unsafe { skinny.multiply(&layer.qkv, &b.skinny_normed, rows, norm, end) }
    }

    /// What a product of few rows begins with, where a product before it has left it.
    fn decode_norm(&self) -> Norm {
        Norm {
            squares: self.buffers.squares.at(0),
            parts: self.spec.hidden.div_ceil(skinny::SQUARES),
            eps: self.spec.rms_eps,
        }
    }

    /// Logits of all rows of a step, in order, and the best token of each.
    ///
    /// # Safety
    /// [`Self::layers`] has run the step.
    pub(crate) unsafe fn all_logits(&mut self, shape: StepShape) -> Result<(), CudaError> {
        let (b, rows) = (&self.buffers, shape.rows);
        match &self.skinny {
            Some(skinny) if rows <= skinny::ROWS_MAX => {
                let norm = match self.chain_of(rows) {
                    Some(_) => Norm {
                        parts: Chain::squares(self.spec.hidden),
                        ..self.decode_norm()
                    },
                    None => self.decode_norm(),
                };
                let (head, x) = (self.weights.lm_head(), &b.skinny_normed);
                let y = self.own_logits();
                // SAFETY: the last layer has left z and the squares; buffers hold the rows.
                unsafe {
                    skinny.multiply(head, x, rows, Some(norm), Epilogue::Logits { y })?;
                    self.best(rows)
                }
            }
            // SAFETY: null chooses every row.
            _ => unsafe { self.logits(0, rows) },
        }
    }

    /// Logits of `rows` wanted rows, and the best token of each.
    ///
    /// # Safety
    /// `wanted` are rows of the step that [`Self::layers`] has run, at most [`Self::logits_rows`].
    pub(crate) unsafe fn logits(
        &mut self,
        wanted: CUdeviceptr,
        rows: usize,
    ) -> Result<(), CudaError> {
        let logits = self.own_logits();
        let Self {
            weights,
            prefill_gemm,
            buffers: b,
            ..
        } = self;
        let (head, gamma) = (weights.lm_head(), &weights.norm);
        let (x, normed) = (b.x.at(0), b.normed.at(0));
        // SAFETY: buffers hold this many rows.
        unsafe {
            prefill_gemm.norm(head, normed, x, gamma, wanted, rows)?;
            prefill_gemm.multiply(head, normed, logits, rows, Output::F32)?;
            self.best(rows)
        }
    }

    /// Where the product with the output matrix goes.
    fn own_logits(&self) -> CUdeviceptr {
        match &self.parallel {
            None => self.buffers.logits.at(0),
            Some(all) => all.logits(),
        }
    }

    /// All logits, where ranks have their parts, and the best token of each row.
    ///
    /// # Safety
    /// There are [`Self::own_logits`] of this many rows.
    unsafe fn best(&self, rows: usize) -> Result<(), CudaError> {
        let (b, vocab) = (&self.buffers, self.spec.vocab);
        if let Some(all) = &self.parallel {
            // SAFETY: the caller's promise; all ranks run the same step.
            unsafe { all.gather(b.logits.at(0), rows, vocab)? };
        }
        let shape = LaunchConfig::plane(ARGMAX_PARTS, rows, 256).early();
        // SAFETY: the kernel's arguments, by its file.
        unsafe {
            launch!(
                self.kernels.argmax,
                shape,
                b.best.at(0),
                b.logits.at(0),
                vocab as i32,
                vocab as i64,
                b.best_parts.at(0),
                b.best_arrived.at(0),
            )
        }
    }
}

/// From the query-key-value product to attention's output.
///
/// # Safety
/// As [`RankModel::layers`].
unsafe fn attend(
    kernels: &Kernels,
    eps: f32,
    b: &Buffers,
    layer: &LayerWeights,
    bias: CUdeviceptr,
    index: usize,
    attention: &Attention,
    shape: StepShape,
    at: &StepAddresses,
) -> Result<(), CudaError> {
    let norms = layer.qk_norm.as_ref();
    let (q_norm, k_norm) = norms.map_or((0, 0), |(q, k)| (q.at(0), k.at(0)));
    let inputs = Inputs {
        qkv: b.qkv.at(0),
        bias,
        q_norm,
        k_norm,
        eps,
        rope_table: b.rope_table.at(0),
        q: b.q.at(0),
    };
    let (q_heads, kv_heads) = attention.heads();
    let heads = q_heads + 2 * kv_heads;
    let rope = LaunchConfig::plane(heads.div_ceil(4), shape.rows, 128).early();
    // SAFETY: the kernels' arguments, by their files.
    unsafe {
        if !attention.makes_queries(shape) {
            launch!(
                kernels.rope,
                rope,
                inputs.qkv,
                bias,
                q_norm,
                k_norm,
                inputs.eps,
                inputs.rope_table,
                at.row_slot,
                inputs.q,
                attention.arena(),
                q_heads as i32,
                kv_heads as i32,
                attention.layers() as i32,
                index as i32,
                attention.block_tokens() as i32,
            )?;
        }
        attention.launch(index, shape, at, &inputs, b.attended.at(0))
    }
}
