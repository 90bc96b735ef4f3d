//! One step through the whole model.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use baton_engine::{
    Choices, Executor, ExecutorError, ExecutorInfo, Rows, SequenceOutput, StepOutput, StepPlan,
    TokenMask, Want, add_masks, answer, count_followed, kv_geometry, uniform_arena, wants,
};
use baton_kv_memory::KvMemory;
use baton_model::{AttentionSpec, Mixer, Mlp, ModelSpec, TensorSource};
use baton_protocol::{KvGeometry, KvGroup};

use crate::attention::{self, Attention, HeadLayout, Piece, Scratch};
use crate::error::CpuError;
use crate::gemm::{Epilogue, Part, ROW_STEP, multiply};
use crate::kernel::{Kernel, Ops};
use crate::memory::{Pages, Shared};
use crate::pack::{K_STEP, PANEL};
use crate::qkv::Qkv;
use crate::rank::{Rank, rows_for};
use crate::threads::Pool;
use crate::weights::ModelWeights;

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
    /// A rank's.
    shape: HeadLayout,
    frequencies: Vec<f64>,
    /// `[vocab][hidden]`.
    embedding: Pages<u16>,
    /// The last norm.
    norm: Vec<f32>,
    ranks: Vec<Rank>,
    ops: &'static Ops,
    pool: Pool,
    buffers: Buffers,
    rows: Rows,
    /// Steps in flight, the oldest first: a step is computed when it is submitted.
    done: VecDeque<(Choices, StepOutput)>,
    /// A step behind them whose tokens are chosen later.
    unchosen: Option<Unchosen>,
}

/// A step that waits for masks. Its residual stream is in the buffers until they come.
struct Unchosen {
    plan: StepPlan,
    /// Rows whose tokens are chosen then.
    wants: Vec<Want>,
    /// What is made of the others.
    output: StepOutput,
}

/// Activations of a step that all ranks share, allocated once. Row strides are whole panels and K steps.
struct Buffers {
    /// Residual stream, f32.
    x: Pages<f32>,
    /// A norm's output.
    normed: Pages<u16>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Rows whose logits are wanted, then their logits.
    chosen: Pages<u16>,
    logits: Pages<f32>,
    /// Numbers from one row of logits to the next.
    logits_stride: usize,
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
    /// Packs the weights and takes the arenas, for as many ranks as there are sources of weights. A source has its rank's part
    /// of the model, an arena its rank's KV of every block.
    ///
    /// # Errors
    /// [`CpuError`] says which weight, which field of the geometry or which kernel does not fit.
    ///
    /// # Panics
    /// If there is not one arena for each source.
    pub fn load(
        spec: &ModelSpec,
        sources: &[&dyn TensorSource],
        memories: Vec<Arc<dyn KvMemory>>,
        kv: KvGeometry,
        options: CpuOptions,
    ) -> Result<Self, CpuError> {
        assert_eq!(
            sources.len(),
            memories.len(),
            "a rank has weights and an arena"
        );
        check(spec)?;
        let of_rank = spec.of_rank(sources.len()).map_err(CpuError::Unsupported)?;
        let attention = check(&of_rank)?;
        let (group, blocks) = arenas(spec, &of_rank, &kv, &memories)?;
        let mut kernel = options.kernel.map_or_else(Kernel::chosen, Ok)?;
        if sources.len() > 1 {
            let Mlp::Gated(mlp) = &of_rank.one_kind().map_err(CpuError::Unsupported)?.mlp;
            kernel = kernel.for_parts(&[attention.heads * attention.head_dim, mlp.intermediate]);
        }
        let kernel = kernel.usable()?;
        let threads = options.threads.max(1);
        let mut pool = Pool::new(threads);
        let weights = ModelWeights::load(spec, sources, &mut pool)?;
        let shape = HeadLayout {
            block_tokens: kv.block_tokens as usize,
            block_bytes: kv_geometry(&of_rank, kv.block_tokens).block_bytes(),
            head_bytes: (u64::from(group.layers) * kv.cell_bytes(&group)) as usize,
            kv_heads: attention.kv_heads,
            group: attention.heads / attention.kv_heads,
            head_dim: attention.head_dim,
            head_dim_padded: attention.head_dim.next_multiple_of(PANEL),
            window: attention.sliding_window,
        };
        let mut device = match threads {
            1 => format!("cpu {kernel}, 1 thread"),
            _ => format!("cpu {kernel}, {threads} threads"),
        };
        if sources.len() > 1 {
            device += &format!(", {} ranks", sources.len());
        }
        let info = ExecutorInfo {
            device,
            kv,
            blocks: u32::try_from(blocks).unwrap_or(u32::MAX),
            vocab: spec.vocab as u32,
            tokens_max: spec.tokens_max as u32,
            step_sequences_max: options.step_sequences_max,
            step_tokens_max: options.step_tokens_max,
            steps_in_flight: 1,
            run_max: RUN_MAX,
        };
        let rows = rows_for(options.step_tokens_max);
        let buffers = Buffers::new(&shape, &weights, spec, rows, threads);
        let ranks = weights.ranks.into_iter().zip(memories);
        let ranks = ranks.map(|(weights, memory)| Rank::new(weights, memory, &shape, rows));
        Ok(Self {
            info,
            spec: spec.clone(),
            frequencies: attention.rope.inverse_frequencies(attention.head_dim),
            embedding: weights.embedding,
            norm: weights.norm,
            ranks: ranks.collect(),
            shape,
            ops: kernel.ops(),
            pool,
            buffers,
            rows: Rows::default(),
            done: VecDeque::new(),
            unchosen: None,
        })
    }

    /// Threads, the caller of `submit` included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Bytes of weights that a step of one row reads, for benchmarks.
    pub fn streamed_bytes(&self) -> usize {
        self.ranks
            .iter()
            .map(|rank| rank.weights.streamed_bytes())
            .sum()
    }
}

impl Executor for CpuExecutor {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    /// More steps may be in flight than are worth it here.
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        if let Some(unchosen) = &self.unchosen {
            return Err(ExecutorError::not_chosen(unchosen.plan.id));
        }
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
        for layer in 0..self.spec.layers.len() {
            self.layer(layer);
        }
        let mut wants = wants(plan, &self.rows);
        count_followed(&mut wants, &self.rows);
        let later = plan.chooses_later.then(|| {
            let later = wants.extract_if(.., |want| !want.is_target());
            later.collect::<Vec<Want>>()
        });
        let mut output = StepOutput {
            sequences: vec![SequenceOutput::default(); plan.sequences.len()],
        };
        self.answer(&wants, plan.want_logits, &mut output);
        match later {
            Some(wants) => {
                self.unchosen = Some(Unchosen {
                    plan: plan.clone(),
                    wants,
                    output,
                });
            }
            None => self.done.push_back((Choices::of(plan, &output), output)),
        }
        Ok(())
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        let Some(unchosen) = self.unchosen.take() else {
            return Err(ExecutorError::nothing_to_choose());
        };
        let Unchosen {
            plan,
            mut wants,
            mut output,
        } = unchosen;
        add_masks(&mut wants, masks);
        self.answer(&wants, plan.want_logits, &mut output);
        self.done.push_back((Choices::of(&plan, &output), output));
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        match (self.done.pop_front(), &self.unchosen) {
            (Some((_, output)), _) => Ok(output),
            (None, Some(unchosen)) => Err(ExecutorError::not_chosen(unchosen.plan.id)),
            (None, None) => Err(ExecutorError::nothing_submitted()),
        }
    }
}

impl CpuExecutor {
    /// Embeddings into the residual stream, angles into cosines and sines.
    fn embed(&mut self) {
        let Self {
            rows,
            buffers,
            embedding,
            ops,
            spec,
            frequencies,
            ..
        } = self;
        let half = frequencies.len();
        let stride = spec.hidden.next_multiple_of(PANEL);
        for (row, token) in rows.tokens.iter().enumerate() {
            let embedding = &embedding[*token as usize * spec.hidden..][..spec.hidden];
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
        self.attention(index);
        self.mlp(index);
    }

    /// The layer's first half, into the residual stream.
    fn attention(&mut self, index: usize) {
        let Self {
            rows,
            buffers,
            ranks,
            ops,
            spec,
            shape,
            pool,
            ..
        } = self;
        let count = rows.tokens.len();
        let first = &ranks[0].weights.layers[index];
        let hidden = first.output.panels * PANEL;
        let (weight, out) = (&first.attention_norm, &mut buffers.normed);
        let (a, lda) = norm(pool, ops, spec, &buffers.x, hidden, weight, out, count);
        for rank in &mut *ranks {
            let layer = &rank.weights.layers[index];
            let weights = &layer.qkv;
            let store = Epilogue::Store {
                c: rank.qkv.as_mut_ptr(),
                ldc: weights.panels * PANEL,
                bias: layer.qkv_bias.as_deref(),
            };
            let part = Part { a, lda, weights };
            multiply(pool, ops, &[part], &layer.output, store, count);

            let arena = rank.arena();
            let job = Qkv {
                shape,
                rows,
                qkv: rank.qkv.as_mut_ptr(),
                ldq: weights.panels * PANEL,
                cos: &buffers.cos,
                sin: &buffers.sin,
                norms: layer.qk_norm.as_ref().map(|(q, k)| (&q[..], &k[..])),
                eps: spec.rms_eps,
                arena,
                layer: index,
                q: rank.q.as_mut_ptr(),
                q_rows: buffers.rows,
            };
            by_rows(pool, count, |_, range| {
                // SAFETY: the kernel was available at load; rows are disjoint; the plan was checked against
                // the arena, and the engine lends these blocks to this step alone.
                unsafe { (ops.rotate)(&job, range) }
            });
        }

        let attention = |rank: &mut Rank| Attention {
            shape,
            rows,
            arena: rank.arena(),
            layer: index,
            q: rank.q.as_ptr(),
            q_rows: buffers.rows,
            out: rank.attended.as_mut_ptr(),
            ldo: rank.weights.layers[index].output.k,
        };
        let jobs: Vec<Attention<'_>> = ranks.iter_mut().map(attention).collect();
        let (pieces, scratch) = (&buffers.pieces, Shared::new(&mut buffers.scratch));
        pool.run(jobs.len() * pieces.len(), &|thread, at| {
            let (job, piece) = (&jobs[at / pieces.len()], at % pieces.len());
            let next = pieces.get(piece + 1);
            // SAFETY: as above; pieces are disjoint, and a thread has one scratch and one piece at a time.
            unsafe { (ops.attend)(job, &pieces[piece], next, &mut scratch.slice(thread, 1)[0]) }
        });
        let parts: Vec<Part<'_>> = ranks.iter().map(|rank| rank.attended(index)).collect();
        let then = &ranks[0].weights.layers[index].gate_up;
        let (c, ldc) = (buffers.x.as_mut_ptr(), hidden);
        multiply(pool, ops, &parts, then, Epilogue::Add { c, ldc }, count);
    }

    /// The layer's second half, into the residual stream.
    fn mlp(&mut self, index: usize) {
        let Self {
            rows,
            buffers,
            ranks,
            ops,
            spec,
            pool,
            ..
        } = self;
        let count = rows.tokens.len();
        let first = &ranks[0].weights.layers[index];
        let hidden = first.output.panels * PANEL;
        let (weight, out) = (&first.mlp_norm, &mut buffers.normed);
        let (a, lda) = norm(pool, ops, spec, &buffers.x, hidden, weight, out, count);
        for rank in &mut *ranks {
            let layer = &rank.weights.layers[index];
            let weights = &layer.gate_up;
            let swiglu = Epilogue::SwiGlu {
                out: rank.inner.as_mut_ptr(),
                ldo: layer.down.k,
            };
            let part = Part { a, lda, weights };
            multiply(pool, ops, &[part], &layer.down, swiglu, count);
        }
        let parts: Vec<Part<'_>> = ranks.iter().map(|rank| rank.inner(index)).collect();
        let first = &ranks[0].weights;
        let then = first
            .layers
            .get(index + 1)
            .map_or(&first.lm_head, |l| &l.qkv);
        let (c, ldc) = (buffers.x.as_mut_ptr(), hidden);
        multiply(pool, ops, &parts, then, Epilogue::Add { c, ldc }, count);
    }

    /// Logits of the rows that are asked for, and what is made of them, into `output`.
    fn answer(&mut self, wants: &[Want], want_logits: bool, output: &mut StepOutput) {
        for wants in wants.chunks(LOGITS_ROWS) {
            self.logits(wants);
            let (vocab, stride) = (self.spec.vocab, self.buffers.logits_stride);
            let mut answers: Vec<Option<SequenceOutput>> = vec![None; wants.len()];
            let (rows, out) = (
                Shared::new(&mut self.buffers.logits),
                Shared::new(&mut answers),
            );
            self.pool.run(wants.len(), &|_, i| {
                // SAFETY: one row and one answer per piece.
                unsafe {
                    let logits = &mut rows.slice(i * stride, vocab)[..];
                    out.slice(i, 1)[0] = Some(answer(&wants[i], logits, want_logits));
                }
            });
            for (want, answer) in wants.iter().zip(answers.into_iter().flatten()) {
                output.sequences[want.sequence].extend(answer);
            }
        }
    }

    fn logits(&mut self, wants: &[Want]) {
        let Self {
            buffers,
            norm,
            ranks,
            ops,
            spec,
            pool,
            ..
        } = self;
        let lda = ranks[0].weights.lm_head.k;
        let stride = spec.hidden.next_multiple_of(PANEL);
        for (i, want) in wants.iter().enumerate() {
            let x = &buffers.x[want.row * stride..][..spec.hidden];
            let out = &mut buffers.chosen[i * lda..][..spec.hidden];
            // SAFETY: the kernel was available at load.
            unsafe { (ops.rms_norm)(x, norm, spec.rms_eps, out) };
        }
        // A rank's last panel reaches beyond its part of the vocabulary: the next rank writes there after it.
        for rank in ranks.iter() {
            let weights = &rank.weights.lm_head;
            let c = &mut buffers.logits[rank.weights.vocab.start..];
            let store = Epilogue::Store {
                c: c.as_mut_ptr(),
                ldc: buffers.logits_stride,
                bias: None,
            };
            let a = buffers.chosen.as_ptr();
            let part = Part { a, lda, weights };
            let then = &ranks[0].weights.layers[0].qkv;
            multiply(pool, ops, &[part], then, store, wants.len());
        }
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
    fn new(
        shape: &HeadLayout,
        weights: &ModelWeights,
        spec: &ModelSpec,
        rows: usize,
        threads: usize,
    ) -> Self {
        let first = &weights.ranks[0];
        let (layer, half) = (&first.layers[0], shape.head_dim / 2);
        // Each rank writes whole panels.
        let ends = weights.ranks.iter();
        let ends = ends.map(|rank| rank.vocab.start + rank.lm_head.panels * PANEL);
        let logits_stride = ends.fold(spec.vocab, usize::max).next_multiple_of(PANEL);
        Self {
            x: Pages::zeroed(rows * layer.output.panels * PANEL),
            normed: Pages::zeroed(rows * layer.qkv.k),
            cos: vec![0.0; rows * half],
            sin: vec![0.0; rows * half],
            chosen: Pages::zeroed((LOGITS_ROWS + ROW_STEP) * first.lm_head.k),
            logits: Pages::zeroed(LOGITS_ROWS * logits_stride),
            logits_stride,
            pieces: Vec::new(),
            scratch: (0..threads).map(|_| Scratch::new(shape)).collect(),
            rows,
        }
    }
}

/// The group of all layers, and the blocks that every rank's arena holds.
fn arenas(
    spec: &ModelSpec,
    of_rank: &ModelSpec,
    kv: &KvGeometry,
    memories: &[Arc<dyn KvMemory>],
) -> Result<(KvGroup, usize), CpuError> {
    if let Some(difference) = kv.difference(&kv_geometry(spec, kv.block_tokens)) {
        return Err(CpuError::Arena(difference));
    }
    let of_rank_kv = kv_geometry(of_rank, kv.block_tokens);
    let mut fewest: Option<(KvGroup, usize)> = None;
    for memory in memories {
        let held = uniform_arena(of_rank, &of_rank_kv, memory.len());
        let (group, blocks) = held.map_err(CpuError::Arena)?;
        if memory.address().host().is_none() {
            let told = "it is on a GPU, and a CPU cannot compute there";
            return Err(CpuError::Arena(told.to_owned()));
        }
        let blocks = fewest.map_or(blocks, |(_, fewest)| fewest.min(blocks));
        fewest = Some((group, blocks));
    }
    fewest.ok_or_else(|| CpuError::Arena("there is none".to_owned()))
}

/// The attention of all layers, if this executor computes such a model.
fn check(spec: &ModelSpec) -> Result<&AttentionSpec, CpuError> {
    spec.check().map_err(CpuError::Unsupported)?;
    let kind = spec.one_kind().map_err(CpuError::Unsupported)?;
    let Mixer::Attention(attention) = &kind.mixer;
    Ok(attention)
}
