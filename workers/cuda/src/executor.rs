//! One step: told to the GPU, run, and its tokens taken back; the next is told before that.
//!
//! Everything runs on one stream, so two steps under way share all of the GPU's memory and need two of only what the host
//! touches: the arrays that it writes, the tokens that it reads ([`Slot`]). A token that the GPU has chosen is read there by
//! the step that follows. One that the host has to choose is waited for before the next step is launched.

use std::collections::VecDeque;
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
use crate::event::Event;
use crate::graph::Graph;
use crate::model::CudaModel;
use crate::step::{DECODE_SIZES, SLOTS, StepAddresses, StepArrays, StepShape, decode_size};

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
    /// Logits on the host. Only the step submitted last has any there.
    logits: Pinned<f32>,
    slots: [Slot; SLOTS],
    /// Steps submitted and not collected, the oldest first.
    submitted: VecDeque<Step>,
    /// Where the next step's arrays are written.
    slot: usize,
    /// Tokens of the last step, once it was collected.
    chosen: Vec<Option<u32>>,
    sampling_threads: usize,
}

/// What the host and the GPU exchange for one step, beside the arrays.
struct Slot {
    tokens: Pinned<i32>,
    draws: Pinned<Draw>,
    /// Behind the copies of what the step has made.
    done: Event,
}

/// A step under way.
struct Step {
    slot: usize,
    /// Rows whose logits the GPU computes, or has computed, last: nothing was made of them yet.
    wants: Vec<Want>,
    /// Of these: rows whose logits come to the host.
    on_host: Vec<bool>,
    want_logits: bool,
    output: StepOutput,
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
            steps_in_flight: SLOTS,
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
            slots: [
                Slot::new(&device, logits_rows)?,
                Slot::new(&device, logits_rows)?,
            ],
            submitted: VecDeque::with_capacity(SLOTS),
            slot: 0,
            chosen: Vec::new(),
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
            let at = self.arrays.upload(0, shape, &rows, &[], &[], &kv)?;
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

    /// Launches a step behind those under way.
    fn launch(&mut self, plan: &StepPlan) -> Result<Step, CudaError> {
        let mut wants = wants(plan, &self.rows);
        let mut step = Step {
            slot: self.slot,
            wants: Vec::new(),
            on_host: Vec::new(),
            want_logits: plan.want_logits,
            output: StepOutput {
                sequences: vec![SequenceOutput::default(); plan.sequences.len()],
            },
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
                let slot = self.slot;
                self.arrays
                    .upload(slot, shape, &self.rows, &wants, &[], &kv)?;
                // SAFETY: the plan was checked against the arena; the graph was captured with these arrays' places.
                unsafe { self.graphs[graph].1.launch()? };
                self.choose(&mut step, wants)?;
            }
            _ => {
                let work = self.attention.work(&self.rows);
                let shape = StepShape {
                    rows: padded_rows(self.rows.tokens.len()),
                    sequences: self.rows.sequences.len(),
                    wanted: wants.len() + self.model.logits_rows(),
                    work: work.len(),
                };
                let slot = self.slot;
                let at = self
                    .arrays
                    .upload(slot, shape, &self.rows, &wants, &work, &kv)?;
                // SAFETY: the plan was checked against the arena, and the engine lends these blocks to this step alone.
                unsafe { self.model.layers(&self.attention, shape, &at)? };
                let most = self.model.logits_rows();
                let mut wanted = at.wanted;
                // More rows than there is room for logits are answered in turns.
                while wants.len() > most {
                    let rest = wants.split_off(most);
                    // SAFETY: rows of this step.
                    unsafe { self.model.logits(wanted, most)? };
                    self.choose(&mut step, wants)?;
                    self.answer(&mut step)?;
                    wanted += (most * size_of::<i32>()) as u64;
                    wants = rest;
                }
                if !wants.is_empty() {
                    // Rows beyond the wanted ones are row 0 again.
                    // SAFETY: rows of this step.
                    unsafe { self.model.logits(wanted, padded_rows(wants.len()))? };
                }
                self.choose(&mut step, wants)?;
            }
        }
        Ok(step)
    }

    /// Has tokens chosen from the logits of `wants`, on the GPU where it can, and copied to the host.
    fn choose(&mut self, step: &mut Step, wants: Vec<Want>) -> Result<(), CudaError> {
        let vocab = self.model.spec.vocab;
        let slot = &mut self.slots[step.slot];
        let choices: Vec<Option<Simple>> = wants
            .iter()
            .map(|want| match &want.what {
                What::Sample(request) if !step.want_logits => simple(request, vocab),
                _ => None,
            })
            .collect();
        let mut draws = 0;
        for (row, choice) in choices.iter().enumerate() {
            slot.draws[row] = match choice {
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
        step.on_host = choices.iter().map(Option::is_none).collect();
        // SAFETY: rows that are computed before; waited for in `answer`, before anything is read or written again.
        unsafe {
            if draws > 0 {
                self.model.draw(&slot.draws, draws)?;
            }
            if !wants.is_empty() {
                slot.tokens.download(0, wants.len(), self.model.best_at())?;
            }
            for (row, _) in step.on_host.iter().enumerate().filter(|(_, host)| **host) {
                self.logits
                    .download(row * vocab, vocab, self.model.logits_at(row))?;
            }
        }
        step.wants = wants;
        slot.done.record()
    }

    /// Waits for what a step has made last, and takes it.
    fn answer(&mut self, step: &mut Step) -> Result<(), CudaError> {
        let vocab = self.model.spec.vocab;
        let slot = &self.slots[step.slot];
        slot.done.wait()?;
        let wants = std::mem::take(&mut step.wants);
        let mut answers: Vec<SequenceOutput> = wants
            .iter()
            .zip(slot.tokens.iter())
            .map(|(_, token)| SequenceOutput {
                sampled: Some(Sampled {
                    token: *token as u32,
                    logprobs: None,
                }),
                ..SequenceOutput::default()
            })
            .collect();
        let rows = self.logits.chunks_mut(vocab).zip(&mut answers);
        let jobs = wants.iter().zip(rows).zip(&step.on_host);
        let jobs: Vec<_> = jobs
            .filter(|(_, host)| **host)
            .map(|(job, _)| job)
            .collect();
        answer_all(jobs, step.want_logits, self.sampling_threads);
        for (want, answer) in wants.iter().zip(answers) {
            let sequence = &mut step.output.sequences[want.sequence];
            sequence.target_logprobs.extend(answer.target_logprobs);
            if let What::Sample(_) = want.what {
                sequence.sampled = answer.sampled;
                sequence.logits = answer.logits;
            }
        }
        Ok(())
    }

    /// Tells the rows that follow the step before where their tokens are: here, or among the best tokens on the GPU.
    fn follow(&mut self) -> Result<(), ExecutorError> {
        // What the host has to choose, it chooses now; the logits on the host are free again then.
        if let Some(mut last) = self.submitted.pop_back() {
            if last.on_host.contains(&true) {
                self.answer(&mut last)?;
            }
            self.chosen = last.output.tokens();
            for (row, want) in last.wants.iter().enumerate() {
                // As an i32: -1 - row.
                self.chosen[want.sequence] = Some(!(row as u32));
            }
            self.submitted.push_back(last);
        }
        self.rows.follow(&self.chosen)
    }
}

impl Slot {
    fn new(device: &Arc<Device>, rows: usize) -> Result<Self, CudaError> {
        Ok(Self {
            tokens: Pinned::zeroed(device, rows)?,
            draws: Pinned::zeroed(device, rows)?,
            done: Event::new(device)?,
        })
    }
}

/// A row's want, its logits, and where its answer goes.
type Job<'a> = (&'a Want, (&'a mut [f32], &'a mut SequenceOutput));

fn answer_all(mut jobs: Vec<Job<'_>>, want_logits: bool, threads: usize) {
    let run = |jobs: &mut [Job<'_>]| {
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

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        if self.submitted.len() == SLOTS {
            return Err(ExecutorError {
                message: format!("{SLOTS} steps are under way already"),
            });
        }
        self.rows.fill(plan, &self.info)?;
        self.model.device.bind()?;
        self.follow()?;
        let step = self.launch(plan)?;
        self.slot = (self.slot + 1) % SLOTS;
        self.submitted.push_back(step);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let Some(mut step) = self.submitted.pop_front() else {
            return Err(ExecutorError::nothing_submitted());
        };
        self.answer(&mut step)?;
        if self.submitted.is_empty() {
            self.chosen = step.output.tokens();
        }
        Ok(step.output)
    }
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        let _ = self.model.device.bind();
        let _ = self.model.device.synchronize();
        self.graphs.clear();
    }
}
