//! One step through the whole model.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use baton_engine::{
    Choices, Executor, ExecutorError, ExecutorInfo, Rows, SequenceOutput, StepOutput, StepPlan,
    Want, answer, count_followed, uniform_arena, wants,
};
use baton_kv_memory::{Address, KvMemory};
use baton_model::{AttentionSpec, Mixer, ModelSpec, TensorSource, Weights};
use baton_protocol::KvGeometry;

use crate::attention::{self, Attention, HeadLayout, Piece, Scratch};
use crate::error::CpuError;
use crate::gemm::{Epilogue, ROW_STEP, multiply};
use crate::kernel::{Kernel, Ops};
use crate::memory::{Pages, Shared};
use crate::pack::{K_STEP, PANEL};
use crate::qkv::Qkv;
use crate::threads::Pool;
use crate::weights::{LayerWeights, ModelWeights};

/// How to run.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Threads, the one that calls `submit` included.
    pub threads: usize,
    /// Instructions to use; `None` takes the best available.
    pub kernel: Option<Kernel>,
    /// Most tokens of one step.
    pub step_tokens_max: usize,
    /// Most sequences of one step.
    pub step_sequences_max: usize,
}

/// A model on a CPU.
pub struct CpuExecutor {
    info: ExecutorInfo,
    spec: ModelSpec,
    shape: HeadLayout,
    frequencies: Vec<f64>,
    memory: Arc<dyn KvMemory>,
    weights: ModelWeights,
    ops: &'static Ops,
    pool: Pool,
    buffers: Buffers,
    rows: Rows,
    /// Steps in flight, the oldest first: a step is computed when it is submitted.
    done: VecDeque<(Choices, StepOutput)>,
}

/// Activations of a step, allocated once. Row strides are whole panels and K steps.
struct Buffers {
    /// Residual stream, f32.
    x: Pages<f32>,
    /// A norm's output.
    normed: Pages<u16>,
    qkv: Pages<f32>,
    /// Queries, by KV head.
    q: Pages<u16>,
    /// Attention's output.
    attended: Pages<u16>,
    /// The feed-forward layer's inside.
    inner: Pages<u16>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Rows whose logits are wanted, then their logits.
    chosen: Pages<u16>,
    logits: Pages<f32>,
    pieces: Vec<Piece>,
    scratch: Vec<Scratch>,
    /// Rows the buffers hold.
    rows: usize,
}

/// Most tokens chosen for one sequence in one step. Nothing here depends on it: attention takes any number of rows of a sequence.
const RUN_MAX: usize = 8;

/// Rows of logits computed at once: the output matrix is read once for these.
const LOGITS_ROWS: usize = 64;

impl CpuExecutor {
    /// Packs the weights and takes the arena.
    ///
    /// # Errors
    /// [`CpuError`] says which weight, which field of the geometry or which kernel does not fit.
    pub fn load(
        spec: &ModelSpec,
        weights: &Weights,
        memory: Arc<dyn KvMemory>,
        kv: KvGeometry,
        options: CpuOptions,
    ) -> Result<Self, CpuError> {
        Self::load_from(spec, weights, memory, kv, options)
    }

    /// As [`CpuExecutor::load`], from anything that has tensors.
    ///
    /// # Errors
    /// As there.
    pub fn load_from(
        spec: &ModelSpec,
        weights: &dyn TensorSource,
        memory: Arc<dyn KvMemory>,
        kv: KvGeometry,
        options: CpuOptions,
    ) -> Result<Self, CpuError> {
        let attention = check(spec)?;
        let (group, blocks) = uniform_arena(spec, &kv, memory.len()).map_err(CpuError::Arena)?;
        if memory.address().host().is_none() {
            let told = "it is on a GPU, and a CPU cannot compute there";
            return Err(CpuError::Arena(told.to_owned()));
        }
        let kernel = options.kernel.unwrap_or_else(Kernel::best);
        if !kernel.available() {
            return Err(CpuError::Kernel(kernel.to_string()));
        }
        let threads = options.threads.max(1);
        let mut pool = Pool::new(threads);
        let weights = ModelWeights::load(spec, weights, &mut pool)?;
        let shape = HeadLayout {
            block_tokens: kv.block_tokens as usize,
            block_bytes: kv.block_bytes(),
            head_bytes: (u64::from(group.layers) * kv.cell_bytes(&group)) as usize,
            kv_heads: attention.kv_heads,
            group: attention.heads / attention.kv_heads,
            head_dim: attention.head_dim,
            head_dim_padded: attention.head_dim.next_multiple_of(PANEL),
            window: attention.sliding_window,
        };
        let info = ExecutorInfo {
            device: format!("cpu {kernel}, {threads} threads"),
            kv,
            blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
            vocab: spec.vocab as u32,
            tokens_max: spec.tokens_max as u32,
            step_sequences_max: options.step_sequences_max,
            step_tokens_max: options.step_tokens_max,
            steps_in_flight: 1,
            run_max: RUN_MAX,
        };
        let buffers = Buffers::new(&shape, &weights, options.step_tokens_max, threads);
        Ok(Self {
            info,
            spec: spec.clone(),
            frequencies: attention.rope.inverse_frequencies(attention.head_dim),
            shape,
            memory,
            weights,
            ops: kernel.ops(),
            pool,
            buffers,
            rows: Rows::default(),
            done: VecDeque::new(),
        })
    }

    /// Threads, the caller of `submit` included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Bytes of weights that a step of one row reads, for benchmarks.
    pub fn streamed_bytes(&self) -> usize {
        self.weights.streamed_bytes()
    }
}

impl Executor for CpuExecutor {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.rows.fill(plan, &self.info)?;
        let in_flight = self.done.iter().map(|(choices, _)| choices);
        self.rows.follow(in_flight)?;
        self.embed();
        attention::pieces(
            &self.shape,
            &self.rows,
            self.pool.threads(),
            &mut self.buffers.pieces,
        );
        for layer in 0..self.weights.layers.len() {
            self.layer(layer);
        }
        let output = self.output(plan);
        self.done.push_back((Choices::of(plan, &output), output));
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let done = self.done.pop_front();
        let (_, output) = done.ok_or_else(ExecutorError::nothing_submitted)?;
        Ok(output)
    }
}

impl CpuExecutor {
    /// Embeddings into the residual stream, angles into cosines and sines.
    fn embed(&mut self) {
        let Self {
            rows,
            buffers,
            weights,
            ops,
            spec,
            frequencies,
            ..
        } = self;
        let half = frequencies.len();
        let stride = spec.hidden.next_multiple_of(PANEL);
        for (row, token) in rows.tokens.iter().enumerate() {
            let embedding = &weights.embedding[*token as usize * spec.hidden..][..spec.hidden];
            // SAFETY: the kernel was available at load.
            unsafe { (ops.widen)(embedding, &mut buffers.x[row * stride..][..spec.hidden]) };
        }
        for (row, position) in rows.positions.iter().enumerate() {
            for (i, frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = (f64::from(*position) * frequency).sin_cos();
                buffers.cos[row * half + i] = cos as f32;
                buffers.sin[row * half + i] = sin as f32;
            }
        }
    }

    fn layer(&mut self, index: usize) {
        let Self {
            rows,
            buffers,
            weights,
            ops,
            spec,
            shape,
            pool,
            memory,
            ..
        } = self;
        let count = rows.tokens.len();
        let layer = &weights.layers[index];
        let then = weights
            .layers
            .get(index + 1)
            .map_or(&weights.lm_head, |l| &l.qkv);
        let LayerWeights {
            qkv,
            output,
            gate_up,
            down,
            ..
        } = layer;
        let (x, hidden) = (buffers.x.as_mut_ptr(), output.panels * PANEL);
        let arena = match memory.address() {
            Address::Host(base) => base.as_ptr(),
            Address::Device(_) => unreachable!("refused at load"),
        };

        let normed = norm(
            pool,
            ops,
            spec,
            &buffers.x,
            hidden,
            &layer.attention_norm,
            &mut buffers.normed,
            count,
        );
        let store = Epilogue::Store {
            c: buffers.qkv.as_mut_ptr(),
            ldc: qkv.panels * PANEL,
            bias: layer.qkv_bias.as_deref(),
        };
        multiply(pool, ops, normed, qkv, output, store, count);

        let job = Qkv {
            shape,
            rows,
            qkv: buffers.qkv.as_mut_ptr(),
            ldq: qkv.panels * PANEL,
            cos: &buffers.cos,
            sin: &buffers.sin,
            norms: layer.qk_norm.as_ref().map(|(q, k)| (&q[..], &k[..])),
            eps: spec.rms_eps,
            arena,
            layer: index,
            q: buffers.q.as_mut_ptr(),
            q_rows: buffers.rows,
        };
        by_rows(pool, count, |_, range| {
            // SAFETY: the kernel was available at load; rows are disjoint; the plan was checked against
            // the arena, and the engine lends these blocks to this step alone.
            unsafe { (ops.rotate)(&job, range) }
        });

        let ldo = output.k;
        let job = Attention {
            shape,
            rows,
            arena,
            layer: index,
            q: buffers.q.as_ptr(),
            q_rows: buffers.rows,
            out: buffers.attended.as_mut_ptr(),
            ldo,
        };
        let (pieces, scratch) = (&buffers.pieces, Shared::new(&mut buffers.scratch));
        pool.run(pieces.len(), &|thread, piece| {
            let next = pieces.get(piece + 1);
            // SAFETY: as above; pieces are disjoint, and a thread has one scratch and one piece at a time.
            unsafe { (ops.attend)(&job, &pieces[piece], next, &mut scratch.slice(thread, 1)[0]) }
        });
        let attended = (buffers.attended.as_ptr(), ldo);
        multiply(
            pool,
            ops,
            attended,
            output,
            gate_up,
            Epilogue::Add { c: x, ldc: hidden },
            count,
        );

        let normed = norm(
            pool,
            ops,
            spec,
            &buffers.x,
            hidden,
            &layer.mlp_norm,
            &mut buffers.normed,
            count,
        );
        let ldo = down.k;
        let swiglu = Epilogue::SwiGlu {
            out: buffers.inner.as_mut_ptr(),
            ldo,
        };
        multiply(pool, ops, normed, gate_up, down, swiglu, count);
        let inner = (buffers.inner.as_ptr(), ldo);
        multiply(
            pool,
            ops,
            inner,
            down,
            then,
            Epilogue::Add { c: x, ldc: hidden },
            count,
        );
    }

    /// Logits of the rows that are asked for, and what is made of them.
    fn output(&mut self, plan: &StepPlan) -> StepOutput {
        let mut wants = wants(plan, &self.rows);
        count_followed(&mut wants, &self.rows);
        let mut output = StepOutput {
            sequences: vec![SequenceOutput::default(); plan.sequences.len()],
        };
        for wants in wants.chunks(LOGITS_ROWS) {
            self.logits(wants);
            let (vocab, stride) = (self.spec.vocab, self.weights.lm_head.panels * PANEL);
            let mut answers: Vec<Option<SequenceOutput>> = vec![None; wants.len()];
            let (rows, out) = (
                Shared::new(&mut self.buffers.logits),
                Shared::new(&mut answers),
            );
            self.pool.run(wants.len(), &|_, i| {
                // SAFETY: one row and one answer per piece.
                unsafe {
                    let logits = &mut rows.slice(i * stride, vocab)[..];
                    out.slice(i, 1)[0] = Some(answer(&wants[i], logits, plan.want_logits));
                }
            });
            for (want, answer) in wants.iter().zip(answers.into_iter().flatten()) {
                output.sequences[want.sequence].extend(answer);
            }
        }
        output
    }

    fn logits(&mut self, wants: &[Want]) {
        let Self {
            buffers,
            weights,
            ops,
            spec,
            pool,
            ..
        } = self;
        let head = &weights.lm_head;
        let stride = spec.hidden.next_multiple_of(PANEL);
        for (i, want) in wants.iter().enumerate() {
            let x = &buffers.x[want.row * stride..][..spec.hidden];
            let out = &mut buffers.chosen[i * head.k..][..spec.hidden];
            // SAFETY: the kernel was available at load.
            unsafe { (ops.rms_norm)(x, &weights.norm, spec.rms_eps, out) };
        }
        let store = Epilogue::Store {
            c: buffers.logits.as_mut_ptr(),
            ldc: head.panels * PANEL,
            bias: None,
        };
        multiply(
            pool,
            ops,
            (buffers.chosen.as_ptr(), head.k),
            head,
            &weights.layers[0].qkv,
            store,
            wants.len(),
        );
    }
}

/// Norms all rows of `x` into `out`; the result is a product's `a` and `lda`.
fn norm(
    pool: &mut Pool,
    ops: &Ops,
    spec: &ModelSpec,
    x: &[f32],
    stride: usize,
    weight: &[f32],
    out: &mut Pages<u16>,
    rows: usize,
) -> (*const u16, usize) {
    let lda = spec.hidden.next_multiple_of(K_STEP);
    let shared = Shared::new(out);
    by_rows(pool, rows, |_, range| {
        for row in range {
            // SAFETY: rows are disjoint; the kernel was available at load.
            unsafe {
                let out = shared.slice(row * lda, spec.hidden);
                (ops.rms_norm)(&x[row * stride..][..spec.hidden], weight, spec.rms_eps, out);
            }
        }
    });
    (out.as_ptr(), lda)
}

/// Hands out rows in pieces worth a thread's while; a few rows are done at once by the caller.
fn by_rows(pool: &mut Pool, rows: usize, work: impl Fn(usize, Range<usize>) + Sync) {
    const PIECE: usize = 8;
    pool.run(rows.div_ceil(PIECE), &|thread, piece| {
        work(thread, piece * PIECE..((piece + 1) * PIECE).min(rows));
    });
}

impl Buffers {
    fn new(shape: &HeadLayout, weights: &ModelWeights, tokens: usize, threads: usize) -> Self {
        // A tile may read a whole ROW_STEP of rows from any row on.
        let rows = tokens + ROW_STEP;
        let layer = &weights.layers[0];
        let half = shape.head_dim / 2;
        Self {
            x: Pages::zeroed(rows * layer.output.panels * PANEL),
            normed: Pages::zeroed(rows * layer.qkv.k),
            qkv: Pages::zeroed(rows * layer.qkv.panels * PANEL),
            q: Pages::zeroed(rows * shape.kv_heads * shape.group * shape.head_dim_padded),
            attended: Pages::zeroed(rows * layer.output.k),
            inner: Pages::zeroed(rows * layer.down.k.max(layer.gate_up.panels * PANEL / 2)),
            cos: vec![0.0; rows * half],
            sin: vec![0.0; rows * half],
            chosen: Pages::zeroed((LOGITS_ROWS + ROW_STEP) * weights.lm_head.k),
            logits: Pages::zeroed(LOGITS_ROWS * weights.lm_head.panels * PANEL),
            pieces: Vec::new(),
            scratch: (0..threads).map(|_| Scratch::new(shape)).collect(),
            rows,
        }
    }
}

/// The attention of all layers, if this executor computes such a model.
fn check(spec: &ModelSpec) -> Result<&AttentionSpec, CpuError> {
    spec.check().map_err(CpuError::Unsupported)?;
    let kind = spec.one_kind().map_err(CpuError::Unsupported)?;
    let Mixer::Attention(attention) = &kind.mixer;
    Ok(attention)
}
