//! A model on a GPU, or one rank's part of it: weights, activations, and the launches of a step from tokens to logits.

use std::collections::BTreeSet;
use std::sync::Arc;

use baton_model::{
    AttentionSpec, GatedMlpSpec, LayerKind, Mixer, Mlp, ModelSpec, TensorSource, part,
};
use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources;
use crate::launch;
use crate::options::{CudaOptions, logits_rows, padded_rows, rows_max};
use crate::products::gemm::Output;
use crate::products::matrix::{Format, Matrix};
use crate::products::prefill_gemm::PrefillGemm;
use crate::products::skinny::{self, Epilogue, Norm, Skinny};
use crate::ranks::{AllReduce, PushedSums};
use crate::step::{DECODE_SIZES, StepAddresses, StepShape};

use super::attention::{Attention, Inputs};
use super::buffers::{ARGMAX_PARTS, Buffers};
use super::chain::{Chain, Streams};
use super::tensor_parallel::TensorParallel;
use super::weights::{Embedding, GATE_UP_ROWS, LayerWeights, ModelWeights};

/// A loaded model, or a rank's part of it.
pub(crate) struct RankModel {
    pub(crate) device: Arc<Device>,
    /// Its own sizes; the vocabulary's is the whole one.
    pub(crate) spec: ModelSpec,
    /// Of every layer.
    pub(crate) attention: AttentionSpec,
    pub(crate) options: CudaOptions,
    pub(crate) compiler: Compiler,
    weights: ModelWeights,
    /// Of all ranks.
    embedding: Embedding,
    /// Where there are several ranks, from [`Self::join`] on.
    parallel: Option<TensorParallel>,
    kernels: Kernels,
    /// Products of steps of many rows.
    prefill_gemm: PrefillGemm,
    /// Products of steps of few rows, if the sizes allow.
    skinny: Option<Skinny>,
    /// Several products at once, of steps of fewer rows still.
    chain: Option<Chain>,
    buffers: Buffers,
}

/// Which rank of how many a model is.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) rank: usize,
    pub(crate) ranks: usize,
    /// Products of few rows may wait for the other ranks': each rank has a GPU of its own, whose kernels can.
    pub(crate) pushes: bool,
}

/// Kernels of every step.
struct Kernels {
    embed: Kernel,
    embed_scaled: Kernel,
    angles: Kernel,
    rope: Kernel,
    argmax: Kernel,
}

impl RankModel {
    /// Copies the weights to the GPU, compiles the kernels and allocates the activations. `spec` is the whole model's, `source` has
    /// this rank's part.
    ///
    /// # Errors
    /// [`CudaError`] says what is missing, what does not fit, or which weight is wrong.
    pub fn load(
        device: &Arc<Device>,
        spec: &ModelSpec,
        source: &dyn TensorSource,
        options: CudaOptions,
        place: Place,
    ) -> Result<Self, CudaError> {
        let spec = &spec.of_rank(place.ranks).map_err(CudaError::Unsupported)?;
        let (attention, mlp) = check(spec)?;
        let compiler = Compiler::for_capability(device.capability())?;
        let kernels = Kernels::load(device, &compiler, attention.head_dim)?;
        let own = part(spec.vocab, place.rank, place.ranks);
        let weights = ModelWeights::load(device, spec, own, source)?;
        let formats: Vec<Format> = weights.matrices().map(|matrix| matrix.format).collect();
        let rows = rows_max(options);
        let is_skinny =
            Skinny::takes_layers(spec.hidden, attention, mlp) && (place.ranks == 1 || place.pushes);
        let skinny = match is_skinny {
            true => {
                let skinny = Skinny::new(device, &compiler, rows, &formats, place.ranks);
                Some(skinny?)
            }
            false => None,
        };
        let chain = match &skinny {
            Some(_) => Chain::new(device, &compiler, spec, mlp, &weights, place.ranks)?,
            None => None,
        };
        let prefill_gemm =
            PrefillGemm::new(device, &compiler, spec, mlp, weights.matrices(), rows)?;
        let buffers = Buffers::new(device, spec, (attention, mlp), is_skinny, options)?;
        Ok(Self {
            device: device.clone(),
            spec: spec.clone(),
            attention: attention.clone(),
            options,
            compiler,
            embedding: Embedding::of(spec.vocab, &[weights.embedding.buffer.at(0)]),
            parallel: None,
            weights,
            kernels,
            prefill_gemm,
            skinny,
            chain,
            buffers,
        })
    }

    /// Where this rank's part of the embedding is, for [`Self::join`].
    pub(crate) fn embedding_at(&self) -> CUdeviceptr {
        self.weights.embedding.buffer.at(0)
    }

    /// Whether steps of few rows go through products that push their sums.
    pub(crate) fn pushes(&self) -> bool {
        self.skinny.is_some()
    }

    /// Whether some go through chains.
    pub(crate) fn has_chain(&self) -> bool {
        self.chain.is_some()
    }

    /// Makes it a rank of a group, of which all have chains or none. Before the first step.
    ///
    /// # Errors
    /// [`CudaError`].
    pub(crate) fn join(
        &mut self,
        sums: AllReduce,
        embeddings: &[CUdeviceptr],
        chains: bool,
    ) -> Result<(), CudaError> {
        let (spec, layers) = (&self.spec, self.weights.layers.len());
        let columns = self.weights.lm_head().outputs;
        self.embedding = Embedding::of(spec.vocab, embeddings);
        let pushed = (self.skinny.is_some()).then(|| PushedSums::new(&sums, spec.hidden, layers));
        self.chain = self.chain.take().filter(|_| chains);
        if let Some(pushed) = pushed {
            self.skinny
                .iter_mut()
                .for_each(|skinny| skinny.push(pushed));
            self.chain.iter_mut().for_each(|chain| chain.push(pushed));
        }
        let rows = rows_max(self.options);
        let (steps, logits) = ((rows, spec.hidden), (self.logits_rows(), columns));
        self.parallel = Some(TensorParallel::new(sums, steps, logits)?);
        self.warm_up()
    }

    /// Has cuBLASLt plan and load every product that a step may need: it must not do so while ranks wait for each other.
    fn warm_up(&mut self) -> Result<(), CudaError> {
        let (rows_max, logits_max) = (rows_max(self.options), self.logits_rows());
        let decode = DECODE_SIZES.into_iter().filter(|size| *size <= rows_max);
        let padded = (1..=rows_max).map(padded_rows).chain(decode);
        let sizes: BTreeSet<usize> = padded.collect();
        let Self {
            weights,
            prefill_gemm,
            buffers: b,
            parallel,
            device,
            ..
        } = self;
        let Some(parallel) = parallel else {
            return Ok(());
        };
        let (partial, logits, normed) = (parallel.partial(), parallel.logits(), b.normed.at(0));
        device.bind()?;
        for rows in sizes {
            let layer = &weights.layers[0];
            // SAFETY: as `layer_of_many` and `logits`; what the buffers hold does not matter before the first step.
            unsafe {
                for (matrix, x, y) in [
                    (&layer.qkv, normed, b.qkv.at(0)),
                    (&layer.output, b.attended.at(0), partial),
                    (&layer.gate_up, normed, b.gate_up.at(0)),
                    (&layer.down, b.inner.at(0), partial),
                ] {
                    prefill_gemm.multiply(matrix, x, y, rows, Output::Bf16)?;
                }
                if rows <= logits_max {
                    let head = weights.lm_head();
                    prefill_gemm.multiply(head, normed, logits, rows, Output::F32)?;
                }
            }
        }
        device.synchronize()
    }

    /// Whether a sum that is over did without a rank.
    ///
    /// # Errors
    /// [`CudaError::Rank`].
    pub(crate) fn check(&self) -> Result<(), CudaError> {
        self.parallel.as_ref().map_or(Ok(()), TensorParallel::check)
    }

    /// What became of the weights, as a sentence for whoever starts a worker.
    pub fn weights_text(&self) -> String {
        let matrices = || self.weights.matrices();
        let fp8 = || matrices().filter(|w| w.format != Format::Bf16);
        let gigabytes = self.streamed_bytes() as f64 / 1e9;
        let mut text = format!("{} matrices, {gigabytes:.2} GB", matrices().count());
        if fp8().count() > 0 {
            text += &format!(", {} of them FP8", fp8().count());
        }
        let widened = fp8().filter(|w| self.prefill_gemm.widens(w)).count();
        if widened > 0 {
            text += &format!(
                "; {widened} of those are made BF16 for each step of more than {} tokens: this GPU has no \
                 product for their format",
                skinny::ROWS_MAX
            );
        }
        if self.weights.widened > 0 {
            text += &format!(
                "; {} came as FP8 in sizes that only BF16 can have here, and take twice the memory",
                self.weights.widened
            );
        }
        text
    }

    /// Bytes of weights that a step of one row reads.
    pub fn streamed_bytes(&self) -> usize {
        self.weights.streamed_bytes()
    }

    /// The GPU it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Rows of logits that are computed at once.
    pub(crate) fn logits_rows(&self) -> usize {
        logits_rows(self.options)
    }

    /// Logits of the last [`Self::logits`], `[rows][vocab]`.
    pub(crate) fn logits_at(&self, row: usize) -> CUdeviceptr {
        self.buffers.logits.at(row * self.spec.vocab)
    }

    /// Their best tokens.
    pub(crate) fn best_at(&self) -> CUdeviceptr {
        self.buffers.best.at(0)
    }

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
    /// As [`Self::layers`]; there is a [`Skinny`], and the embedding has left what its norms begin with.
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
            spec: ModelSpec { rms_eps: eps, .. },
            weights,
            kernels,
            prefill_gemm,
            buffers: b,
            parallel,
            ..
        } = self;
        let layer = &weights.layers[index];
        let rows = shape.rows;
        let (x, normed, attended) = (b.x.at(0), b.normed.at(0), b.attended.at(0));
        let (qkv, gate_up, inner) = (b.qkv.at(0), b.gate_up.at(0), b.inner.at(0));
        let bias = layer.qkv_bias.as_ref().map_or(0, |bias| bias.at(0));
        // Into the residual stream: alone, or with what the other ranks have.
        let parallel = parallel.as_ref();
        let add = |gemm: &mut PrefillGemm, w: &Matrix, from| match parallel {
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
            attend(kernels, *eps, b, layer, bias, index, attention, shape, at)?;
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
    /// As [`Self::layers`], and there is a [`Skinny`].
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

impl Kernels {
    fn load(device: &Arc<Device>, compiler: &Compiler, head_dim: usize) -> Result<Self, CudaError> {
        let head_dim = [format!("HEAD_DIM={head_dim}")];
        let module = |source: &sources::Source, defines: &[String]| {
            Module::load(device, &compiler.compile(source, defines)?)
        };
        let embed = module(&sources::EMBED, &[])?;
        Ok(Self {
            angles: embed.kernel("angles", 0)?,
            embed: embed.kernel("embed", 0)?,
            embed_scaled: embed.kernel("embed_scaled", 0)?,
            rope: module(&sources::ROPE, &head_dim)?.kernel("rope", 0)?,
            argmax: module(&sources::ARGMAX, &[])?.kernel("argmax", 0)?,
        })
    }
}

/// What all layers are, if the kernels compute such layers.
fn check(spec: &ModelSpec) -> Result<(&AttentionSpec, &GatedMlpSpec), CudaError> {
    spec.check().map_err(CudaError::Unsupported)?;
    let LayerKind {
        mixer: Mixer::Attention(attention),
        mlp: Mlp::Gated(mlp),
    } = &**spec.one_kind().map_err(CudaError::Unsupported)?;
    let refuse = |what: String| Err(CudaError::Unsupported(what));
    if !mlp.intermediate.is_multiple_of(GATE_UP_ROWS) {
        return refuse(format!(
            "its feed-forward layer is {} wide, no multiple of {GATE_UP_ROWS}",
            mlp.intermediate
        ));
    }
    if !spec.hidden.is_multiple_of(2) {
        return refuse(format!("its width {} is odd", spec.hidden));
    }
    if attention.head_dim > 256 {
        return refuse(format!(
            "heads of {} numbers, more than 256",
            attention.head_dim
        ));
    }
    Ok((attention, mlp))
}

#[cfg(test)]
mod tests {
    use baton_executor_tests::tiny_families;

    use super::*;

    #[test]
    fn a_model_whose_layers_differ_is_refused_by_what_they_are() {
        let mut spec = ModelSpec::try_from(tiny_families().remove(0)).expect("a model");
        assert!(check(&spec).is_ok());
        let Mlp::Gated(mlp) = &mut Arc::make_mut(&mut spec.layers[1]).mlp;
        mlp.intermediate += GATE_UP_ROWS;
        let error = check(&spec).expect_err("refused").to_string();
        assert!(error.contains("its layers differ (1 with"), "{error}");
        assert!(error.contains("a gated MLP of 144, 1 with"), "{error}");
    }
}
