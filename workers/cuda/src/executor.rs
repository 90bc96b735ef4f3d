//! One step: told to the GPU, run, and its tokens taken back.

use std::sync::Arc;

use baton_engine::{
    Executor, ExecutorError, ExecutorInfo, KvMemory, Rows, Sampled, SequenceOutput, Simple,
    StepOutput, StepPlan, Want, What, answer, arena_blocks, simple, wants,
};
use baton_protocol::KvGeometry;

use crate::attention::Attention;
use crate::buffers::{Draw, padded_rows, rows_max};
use crate::device::{Device, Pinned};
use crate::error::CudaError;
use crate::graph::Graph;
use crate::model::CudaModel;
use crate::step::{DECODE_SIZES, StepAddresses, StepArrays, StepShape, decode_size};

/// Threads that choose tokens by more than their logit. A row of 128,256 logits takes some 0.2 ms.
const SAMPLING_THREADS_MAX: usize = 16;

/// A model on a GPU.
pub struct CudaExecutor {
    info: ExecutorInfo,
    model: CudaModel,
    attention: Attention,
    arrays: StepArrays,
    graphs: Vec<(usize, Graph)>,
    rows: Rows,
    logits: Pinned<f32>,
    tokens: Pinned<i32>,
    draws: Pinned<Draw>,
    sampling_threads: usize,
}

impl CudaExecutor {
    /// Takes the arena, and captures a graph for each size of a decode batch.
    ///
    /// # Errors
    /// [`CudaError`] says which field of the geometry does not fit, or what failed.
    pub fn new(
        model: CudaModel,
        memory: Arc<dyn KvMemory>,
        kv: KvGeometry,
    ) -> Result<Self, CudaError> {
        let (spec, options, device) = (&model.spec, model.options, model.device.clone());
        let blocks = arena_blocks(spec, &kv, memory.len()).map_err(CudaError::Arena)?;
        let info = ExecutorInfo {
            device: format!("cuda:{} {}", device.ordinal(), device.name()),
            // A slot is block * block_tokens + offset in 31 bits.
            blocks: u32::try_from(blocks)
                .unwrap_or(u32::MAX)
                .min(i32::MAX as u32 / kv.block_tokens),
            vocab: spec.vocab as u32,
            tokens_max: spec.tokens_max as u32,
            step_sequences_max: options.step_sequences_max,
            step_tokens_max: options.step_tokens_max,
            kv: kv.clone(),
        };
        let sequences = options.step_sequences_max;
        let attention = Attention::new(
            &device,
            &model.compiler,
            spec,
            memory,
            kv.clone(),
            sequences,
        )?;
        let rows = rows_max(options);
        let largest = StepShape {
            rows,
            sequences: decode_size(sequences),
            wanted: rows + sequences + model.logits_rows(),
            work: attention.work_max(rows, sequences),
        };
        let entries = sequences * kv.blocks_for(spec.tokens_max);
        let logits_rows = model.logits_rows();
        let mut executor = Self {
            arrays: StepArrays::new(&device, largest, entries)?,
            logits: Pinned::zeroed(&device, logits_rows * spec.vocab)?,
            tokens: Pinned::zeroed(&device, logits_rows)?,
            draws: Pinned::zeroed(&device, logits_rows)?,
            sampling_threads: std::thread::available_parallelism()
                .map_or(1, usize::from)
                .min(SAMPLING_THREADS_MAX),
            info,
            model,
            attention,
            graphs: Vec::new(),
            rows: Rows::default(),
        };
        executor.capture()?;
        Ok(executor)
    }

    /// The GPU it runs on.
    pub fn device(&self) -> &Arc<Device> {
        self.model.device()
    }

    /// Bytes of weights that a step of one row reads, for benchmarks.
    pub fn streamed_bytes(&self) -> usize {
        self.model.streamed_bytes()
    }

    /// Runs each decode size once without a sequence, so that everything is loaded and planned, and captures it.
    fn capture(&mut self) -> Result<(), CudaError> {
        let device = self.model.device.clone();
        let largest = decode_size(self.info.step_sequences_max);
        for size in DECODE_SIZES.into_iter().filter(|size| *size <= largest) {
            let shape = decode_shape(size);
            let (rows, kv) = (Rows::default(), self.info.kv.clone());
            let at = self.arrays.upload(shape, &rows, &[], &[], &kv)?;
            // SAFETY: rows without slots and sequences without tokens touch no block.
            unsafe { self.decode(shape, &at)? };
            device.synchronize()?;
            // SAFETY: as above.
            let graph = Graph::capture(&device, || unsafe { self.decode(shape, &at) })?;
            self.graphs.push((size, graph));
        }
        Ok(())
    }

    /// Everything of a decode step, in order.
    ///
    /// # Safety
    /// As [`CudaModel::layers`].
    unsafe fn decode(&mut self, shape: StepShape, at: &StepAddresses) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe {
            self.model.layers(&self.attention, shape, at)?;
            self.model.all_logits(shape)
        }
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOutput, CudaError> {
        self.model.device.bind()?;
        let wants = wants(plan, &self.rows);
        let mut output = StepOutput {
            sequences: vec![SequenceOutput::default(); plan.sequences.len()],
        };
        let one_each = plan.sequences.iter().all(|s| s.tokens.len() == 1)
            && wants.len() == plan.sequences.len()
            && wants.iter().all(|w| matches!(w.what, What::Sample(_)));
        let captured = self
            .graphs
            .iter()
            .position(|(size, _)| *size >= wants.len());
        let kv = self.info.kv.clone();
        match captured {
            Some(graph) if one_each => {
                let shape = decode_shape(self.graphs[graph].0);
                self.arrays.upload(shape, &self.rows, &wants, &[], &kv)?;
                // SAFETY: the plan was checked against the arena; the graph was captured with these arrays' places.
                unsafe { self.graphs[graph].1.launch()? };
                self.take(&wants, plan.want_logits, &mut output)?;
            }
            _ => {
                let work = self.attention.work(&self.rows);
                let shape = StepShape {
                    rows: padded_rows(self.rows.tokens.len()),
                    sequences: self.rows.sequences.len(),
                    wanted: wants.len() + self.model.logits_rows(),
                    work: work.len(),
                };
                let at = self.arrays.upload(shape, &self.rows, &wants, &work, &kv)?;
                // SAFETY: the plan was checked against the arena, and the engine lends these blocks to this step alone.
                unsafe { self.model.layers(&self.attention, shape, &at)? };
                let most = self.model.logits_rows();
                for (i, wants) in wants.chunks(most).enumerate() {
                    let wanted = at.wanted + (i * most * size_of::<i32>()) as u64;
                    // Rows beyond the wanted ones are row 0 again.
                    // SAFETY: rows of this step.
                    unsafe { self.model.logits(wanted, padded_rows(wants.len()))? };
                    self.take(wants, plan.want_logits, &mut output)?;
                }
                if wants.is_empty() {
                    self.model.device.synchronize()?;
                }
            }
        }
        Ok(output)
    }

    /// Waits for the logits of `wants` and makes of them what was asked.
    fn take(
        &mut self,
        wants: &[Want<'_>],
        want_logits: bool,
        output: &mut StepOutput,
    ) -> Result<(), CudaError> {
        let vocab = self.model.spec.vocab;
        let choices: Vec<Option<Simple>> = wants
            .iter()
            .map(|want| match want.what {
                What::Sample(request) if !want_logits => simple(request, vocab),
                _ => None,
            })
            .collect();
        let on_host: Vec<bool> = choices.iter().map(Option::is_none).collect();
        let mut draws = 0;
        for (row, choice) in choices.iter().enumerate() {
            self.draws[row] = match choice {
                Some(Simple::Draw {
                    inverse_temperature,
                    weight_min,
                    bits,
                }) => {
                    draws = row + 1;
                    Draw {
                        inverse: *inverse_temperature,
                        weight_min: *weight_min,
                        bits: *bits,
                    }
                }
                _ => Draw::default(),
            };
        }
        // SAFETY: rows that were just computed; waited for below, before anything is read or written again.
        unsafe {
            if draws > 0 {
                self.model.draw(&self.draws, draws)?;
            }
            self.tokens.download(0, wants.len(), self.model.best_at())?;
            for (row, _) in on_host.iter().enumerate().filter(|(_, host)| **host) {
                self.logits
                    .download(row * vocab, vocab, self.model.logits_at(row))?;
            }
        }
        self.model.device.synchronize()?;
        let mut answers: Vec<SequenceOutput> = wants
            .iter()
            .zip(self.tokens.iter())
            .map(|(_, token)| SequenceOutput {
                sampled: Some(Sampled {
                    token: *token as u32,
                    logprobs: None,
                }),
                ..SequenceOutput::default()
            })
            .collect();
        let rows = self.logits.chunks_mut(vocab).zip(&mut answers);
        let jobs = wants.iter().zip(rows).zip(&on_host);
        let jobs: Vec<_> = jobs
            .filter(|(_, host)| **host)
            .map(|(job, _)| job)
            .collect();
        answer_all(jobs, want_logits, self.sampling_threads);
        for (want, answer) in wants.iter().zip(answers) {
            let sequence = &mut output.sequences[want.sequence];
            sequence.target_logprobs.extend(answer.target_logprobs);
            if let What::Sample(_) = want.what {
                sequence.sampled = answer.sampled;
                sequence.logits = answer.logits;
            }
        }
        Ok(())
    }
}

/// A row's want, its logits, and where its answer goes.
type Job<'a, 'w> = (&'a Want<'w>, (&'a mut [f32], &'a mut SequenceOutput));

fn answer_all(mut jobs: Vec<Job<'_, '_>>, want_logits: bool, threads: usize) {
    let run = |jobs: &mut [Job<'_, '_>]| {
        for (want, (logits, out)) in jobs {
            **out = answer(want, logits, want_logits);
        }
    };
    if jobs.len() <= 2 || threads == 1 {
        return run(&mut jobs);
    }
    let each = jobs.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for jobs in jobs.chunks_mut(each) {
            scope.spawn(move || run(jobs));
        }
    });
}

fn decode_shape(size: usize) -> StepShape {
    StepShape {
        rows: size,
        sequences: size,
        wanted: size,
        work: 0,
    }
}

impl Executor for CudaExecutor {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    fn forward(&mut self, plan: &StepPlan) -> Result<StepOutput, ExecutorError> {
        self.rows.fill(plan, &self.info)?;
        Ok(self.run(plan)?)
    }
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        let _ = self.model.device.bind();
        let _ = self.model.device.synchronize();
        self.graphs.clear();
    }
}
