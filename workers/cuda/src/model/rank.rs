//! A model on a GPU, or one rank's part of it: weights, kernels and activations.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use baton_model::{
    AttentionSpec, GatedMlpSpec, LayerKind, Mixer, Mlp, ModelSpec, TensorSource, part,
};
use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::Device;
use crate::gpu::kernel::{Kernel, Module};
use crate::gpu::sources;
use crate::options::{CudaOptions, logits_rows, padded_rows, rows_max};
use crate::products::gemm::Output;
use crate::products::matrix::Format;
use crate::products::prefill_gemm::PrefillGemm;
use crate::products::skinny::{self, Skinny};
use crate::ranks::{AllReduce, PushedSums};
use crate::step::DECODE_SIZES;

use super::buffers::Buffers;
use super::chain::Chain;
use super::tensor_parallel::TensorParallel;
use super::weights::{Embedding, GATE_UP_ROWS, ModelWeights};

/// A loaded model, or a rank's part of it.
pub(crate) struct RankModel {
    pub(crate) device: Arc<Device>,
    /// Its own sizes; the vocabulary's is the whole one.
    pub(crate) spec: ModelSpec,
    /// Of every layer.
    pub(crate) attention: AttentionSpec,
    pub(crate) options: CudaOptions,
    pub(crate) compiler: Compiler,
    pub(super) weights: ModelWeights,
    /// Of all ranks.
    pub(super) embedding: Embedding,
    /// Where there are several ranks, from [`Self::join`] on.
    pub(super) parallel: Option<TensorParallel>,
    pub(super) kernels: Kernels,
    /// Products of steps of many rows.
    pub(super) prefill_gemm: PrefillGemm,
    /// Products of steps of few rows, if the sizes allow.
    pub(super) skinny: Option<Skinny>,
    /// Several products at once, of steps of fewer rows still.
    pub(super) chain: Option<Chain>,
    pub(super) buffers: Buffers,
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
pub(super) struct Kernels {
    pub(super) embed: Kernel,
    pub(super) embed_scaled: Kernel,
    pub(super) angles: Kernel,
    pub(super) rope: Kernel,
    pub(super) argmax: Kernel,
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
            skinny,
            ..
        } = self;
        // Steps of few rows go another way, if they can.
        let few = skinny.as_ref().map_or(0, |_| skinny::ROWS_MAX);
        let Some(parallel) = parallel else {
            return Ok(());
        };
        let (partial, logits, normed) = (parallel.partial(), parallel.logits(), b.normed.at(0));
        device.bind()?;
        let mut seen = HashSet::new();
        for layer in &weights.layers {
            for (matrix, x, y) in [
                (&layer.qkv, normed, b.qkv.at(0)),
                (&layer.output, b.attended.at(0), partial),
                (&layer.gate_up, normed, b.gate_up.at(0)),
                (&layer.down, b.inner.at(0), partial),
            ] {
                if !seen.insert((matrix.format, matrix.outputs, matrix.inputs)) {
                    continue;
                }
                for &rows in sizes.iter().filter(|&&rows| rows > few) {
                    // SAFETY: as a step's; what the buffers hold does not matter before the first one.
                    unsafe { prefill_gemm.multiply(matrix, x, y, rows, Output::Bf16)? };
                }
            }
        }
        let head = weights.lm_head();
        for &rows in sizes.iter().filter(|&&rows| rows <= logits_max) {
            // SAFETY: as above.
            unsafe { prefill_gemm.multiply(head, normed, logits, rows, Output::F32)? };
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
