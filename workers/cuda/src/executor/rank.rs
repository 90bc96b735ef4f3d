//! One step on one GPU: told to it, run, and its tokens taken back; the next is told before that.
//!
//! Where there are several GPUs, each has all logits and chooses all tokens: the choice depends on nothing but them, so all ranks
//! choose the same, and the next step finds its tokens on each GPU.
//!
//! Everything runs on one stream, so two steps under way share all of the GPU's memory and need two of only what the host
//! touches: the arrays that it writes, the tokens that it reads ([`Slot`]). A step that follows reads a token where the step in
//! flight has chosen it: the tokens chosen last lie on the GPU until the next step's are chosen, and with two steps in flight it is
//! always the step right behind that reads them. Only where a plan wants logits the host chooses from them, and the next step is
//! launched after that.

use std::collections::VecDeque;
use std::sync::Arc;

use baton_engine::{
    Choice, Choices, ExecutorError, ExecutorInfo, Rows, SequenceOutput, StepId, StepOutput,
    StepPlan, TokenMask, Want, What, add_masks, answer, kv_geometry, uniform_arena, wants,
};
use baton_kv_memory::KvMemory;
use baton_protocol::KvGeometry;

use crate::error::CudaError;
use crate::gpu::device::{Device, Pinned};
use crate::gpu::event::Event;
use crate::gpu::graph::Graph;
use crate::model::attention::Attention;
use crate::model::rank::RankModel;
use crate::options::{padded_rows, rows_max};
use crate::sampling::{Answer, Batch, Room, Sampler};
use crate::step::{DECODE_SIZES, SLOTS, StepAddresses, StepArrays, StepShape, decode_size};

/// A model, or a rank's part of it, on a GPU.
pub(super) struct RankExecutor {
    info: ExecutorInfo,
    pub(super) model: RankModel,
    attention: Attention,
    arrays: StepArrays,
    graphs: Vec<(usize, Graph)>,
    rows: Rows,
    sampler: Sampler,
    /// Logits on the host, for plans that want them. Only the step submitted last has any there.
    logits: Option<Pinned<f32>>,
    slots: [Slot; SLOTS],
    /// Steps submitted and not collected, the oldest first.
    submitted: VecDeque<Step>,
    /// Where the next step's arrays are written.
    slot: usize,
}

/// What the host and the GPU exchange for one step, beside the arrays.
struct Slot {
    batch: Batch,
    /// Behind the copies of what the step has made.
    done: Event,
}

/// A step in flight.
struct Step {
    id: StepId,
    slot: usize,
    /// Rows whose logits the GPU computes, or has computed, last: nothing was made of them yet.
    wants: Vec<Want>,
    want_logits: bool,
    output: StepOutput,
    /// Rows whose tokens are chosen later, all of the step's, and where its arrays lie. Their logits are the last that the GPU computes of
    /// it, and stay until then.
    unchosen: Option<(Vec<Want>, StepAddresses)>,
}

impl RankExecutor {
    /// Takes the arena: `kv` is the whole model's, `memory` has this rank's part of each block. Nothing is captured yet.
    ///
    /// # Errors
    /// [`CudaError`] says which field of the geometry does not fit, or what failed.
    pub(super) fn new(
        model: RankModel,
        memory: Arc<dyn KvMemory>,
        kv: &KvGeometry,
    ) -> Result<Self, CudaError> {
        let (spec, options, device) = (&model.spec, model.options, model.device.clone());
        let own = kv_geometry(spec, kv.block_tokens);
        let (layers, blocks) = uniform_arena(spec, &own, memory.len()).map_err(CudaError::Arena)?;
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
            // Longer runs would go through the kernels for prompts: there are none yet for a few rows of each sequence.
            run_max: 1,
            kv: kv.clone(),
        };
        let sequences = options.step_sequences_max;
        let attention = Attention::new(
            &device,
            &model.compiler,
            &model.attention,
            memory,
            (&own, layers),
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
        let sampler = Sampler::new(&device, &model.compiler, spec.vocab, model.logits_rows())?;
        Ok(Self {
            arrays: StepArrays::new(&device, largest, entries)?,
            logits: None,
            slots: [Slot::new(&device, &sampler)?, Slot::new(&device, &sampler)?],
            sampler,
            submitted: VecDeque::with_capacity(SLOTS),
            slot: 0,
            info,
            model,
            attention,
            graphs: Vec::new(),
            rows: Rows::default(),
        })
    }

    pub(super) fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    /// Decode sizes that are captured.
    pub(super) fn sizes(&self) -> impl Iterator<Item = usize> + use<> {
        let largest = decode_size(self.info.step_sequences_max);
        DECODE_SIZES
            .into_iter()
            .filter(move |size| *size <= largest)
    }

    /// Runs a decode size once without a sequence, so that everything is loaded and planned. All ranks do it, at the same time.
    pub(super) fn rehearse(&mut self, size: usize) -> Result<(), CudaError> {
        self.model.device.bind()?;
        let (shape, at) = self.empty_step(size)?;
        // SAFETY: rows without slots and sequences without tokens touch no block.
        unsafe { self.decode(shape, &at)? };
        self.model.device.synchronize()
    }

    /// Captures a decode size. All ranks have rehearsed it.
    pub(super) fn capture(&mut self, size: usize) -> Result<(), CudaError> {
        let device = self.model.device.clone();
        device.bind()?;
        let (shape, at) = self.empty_step(size)?;
        // SAFETY: as `rehearse`.
        let graph = Graph::capture(&device, || unsafe { self.decode(shape, &at) })?;
        self.graphs.push((size, graph));
        device.synchronize()
    }

    fn empty_step(&mut self, size: usize) -> Result<(StepShape, StepAddresses), CudaError> {
        let shape = decode_shape(size);
        let (rows, kv) = (Rows::default(), self.info.kv.clone());
        let at = self.arrays.upload(0, shape, &rows, &[], &[], &kv)?;
        Ok((shape, at))
    }

    /// Room that a step takes beyond what there is, if its tokens are chosen as the plan says and with these masks.
    pub(super) fn lacks(&self, plan: &StepPlan, masks: &[Option<Arc<TokenMask>>]) -> Option<Room> {
        let needed = self.sampler.needed(plan, masks);
        let logits = plan.want_logits && self.logits.is_none();
        let batches = self.slots.iter().map(|slot| &slot.batch);
        let lacks = logits
            || batches
                .into_iter()
                .any(|b| !self.sampler.has_room(b, needed));
        lacks.then_some(needed.and_logits(logits))
    }

    /// Makes that room. No step waits for another rank that this one would keep waiting.
    pub(super) fn make_room(&mut self, room: Room) -> Result<(), CudaError> {
        self.model.device.bind()?;
        self.model.device.synchronize()?;
        for slot in &mut self.slots {
            self.sampler.make_room(&mut slot.batch, room)?;
        }
        if room.logits && self.logits.is_none() {
            self.logits = Some(self.host_logits()?);
        }
        Ok(())
    }

    fn host_logits(&self) -> Result<Pinned<f32>, CudaError> {
        let rows = self.model.logits_rows();
        Pinned::zeroed(&self.model.device, rows * self.model.spec.vocab)
    }

    /// Everything of a decode step, in order.
    ///
    /// # Safety
    /// As [`RankModel::layers`].
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
            id: plan.id,
            slot: self.slot,
            wants: Vec::new(),
            want_logits: plan.want_logits,
            output: StepOutput {
                sequences: vec![SequenceOutput::default(); plan.sequences.len()],
            },
            unchosen: None,
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
                let at = self
                    .arrays
                    .upload(slot, shape, &self.rows, &wants, &[], &kv)?;
                // SAFETY: the plan was checked against the arena; the graph was captured with these arrays' places.
                unsafe { self.graphs[graph].1.launch()? };
                self.sample_or_keep(&mut step, wants, at, plan.chooses_later)?;
            }
            _ => {
                // Rows that may have to wait for masks are the last ones, so that what stays on the GPU is their logits.
                wants.sort_by_key(|want| !want.is_target());
                let mut targets = wants.iter().filter(|want| want.is_target()).count();
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
                // More rows than there is room for logits are answered in turns. There is room for all that choose a token.
                while wants.len() > most && targets > 0 {
                    let turn = targets.min(most);
                    let rest = wants.split_off(turn);
                    // SAFETY: rows of this step.
                    unsafe { self.model.logits(wanted, padded_rows(turn))? };
                    self.sample(&mut step, wants, &at)?;
                    self.answer(&mut step)?;
                    wanted += (turn * size_of::<i32>()) as u64;
                    targets -= turn;
                    wants = rest;
                }
                if !wants.is_empty() {
                    // Rows beyond the wanted ones are row 0 again.
                    // SAFETY: rows of this step.
                    unsafe { self.model.logits(wanted, padded_rows(wants.len()))? };
                }
                self.sample_or_keep(&mut step, wants, at, plan.chooses_later)?;
            }
        }
        Ok(step)
    }

    /// Has tokens chosen from the logits of `wants`, or keeps them for [`Self::choose`].
    fn sample_or_keep(
        &mut self,
        step: &mut Step,
        wants: Vec<Want>,
        at: StepAddresses,
        later: bool,
    ) -> Result<(), CudaError> {
        if later {
            step.unchosen = Some((wants, at));
            return Ok(());
        }
        self.sample(step, wants, &at)
    }

    /// Has tokens chosen from the logits of `wants`, and what was chosen copied to the host.
    fn sample(
        &mut self,
        step: &mut Step,
        wants: Vec<Want>,
        at: &StepAddresses,
    ) -> Result<(), CudaError> {
        let (best, logits) = (self.model.best_at(), self.model.logits_at(0));
        if step.want_logits {
            let vocab = self.model.spec.vocab;
            let host = match self.logits.take() {
                Some(host) => host,
                None => self.host_logits()?,
            };
            let host = self.logits.insert(host);
            // SAFETY: rows that are computed before; waited for in `answer`, before anything is read or written again.
            unsafe { host.download(0, wants.len() * vocab, logits)? };
        } else {
            let followers = &self.rows.follows;
            let follows = |want: &Want| followers.binary_search_by_key(&want.row, |f| f.0).is_ok();
            let slot = &mut self.slots[step.slot];
            // SAFETY: rows that are computed before, with the best token of each; waited for in `answer`, before anything is read
            // or written again.
            unsafe {
                self.sampler.launch(
                    &mut slot.batch,
                    &wants,
                    follows,
                    best,
                    logits,
                    at.row_token,
                )?;
            }
        }
        step.wants = wants;
        self.slots[step.slot].done.record()
    }

    /// Waits for what a step has made last, and takes it.
    fn answer(&mut self, step: &mut Step) -> Result<(), CudaError> {
        let slot = &self.slots[step.slot];
        slot.done.wait()?;
        self.model.check()?;
        let wants = std::mem::take(&mut step.wants);
        let sequences = &mut step.output.sequences;
        if step.want_logits {
            let host = self.logits.iter_mut();
            let rows = host.flat_map(|logits| logits.chunks_mut(self.model.spec.vocab));
            for (want, logits) in wants.iter().zip(rows) {
                let answer = answer(want, logits, true);
                sequences[want.sequence].extend(answer);
            }
            return Ok(());
        }
        for (want, answer) in wants.iter().zip(slot.batch.answers(&wants)) {
            let output = &mut sequences[want.sequence];
            match answer {
                Answer::Target(logprobs) => output.target_logprobs.push(logprobs),
                Answer::Sampled(Some(sampled)) => output.extend(SequenceOutput {
                    sampled: Some(sampled).into(),
                    ..SequenceOutput::default()
                }),
                Answer::Sampled(None) => output.extend(SequenceOutput::without_token()),
            }
        }
        Ok(())
    }

    /// Of a step in flight whose logits are wanted the host chooses the tokens, now that the next one may follow it: its memory
    /// for logits is free again then.
    fn choose_on_host(&mut self) -> Result<(), ExecutorError> {
        if let Some(mut last) = self.submitted.pop_back() {
            let answered = match last.want_logits {
                true => self.answer(&mut last),
                false => Ok(()),
            };
            self.submitted.push_back(last);
            answered?;
        }
        Ok(())
    }

    /// Tells the rows that follow the step in flight where their tokens are: here, or among the best tokens on the GPU.
    fn follow(&mut self) -> Result<(), ExecutorError> {
        if self.rows.follows.is_empty() {
            return Ok(());
        }
        // Of an earlier step the GPU has no tokens any more: whoever follows one is refused.
        let last = self.submitted.back();
        self.rows.follow(last.map(Step::choices).iter())
    }
}

impl Step {
    /// What it has chosen, or where the GPU will find it.
    fn choices(&self) -> Choices {
        let known = |output: &SequenceOutput| match (output.sampled.first(), &output.failure) {
            (Some(sampled), _) => Choice::Token(sampled.token),
            (None, Some(_)) => Choice::Failed,
            (None, None) => Choice::NotOne,
        };
        let mut sequences: Vec<Choice> = self.output.sequences.iter().map(known).collect();
        for (row, want) in self.wants.iter().enumerate() {
            if let What::Sample(_) = want.what {
                // As an i32: -1 - row.
                sequences[want.sequence] = Choice::Token(!(row as u32));
            }
        }
        Choices {
            step: self.id,
            sequences,
        }
    }
}

impl Slot {
    fn new(device: &Arc<Device>, sampler: &Sampler) -> Result<Self, CudaError> {
        Ok(Self {
            batch: sampler.batch()?,
            done: Event::new(device)?,
        })
    }
}

fn decode_shape(size: usize) -> StepShape {
    StepShape {
        rows: size,
        sequences: size,
        wanted: size,
        work: 0,
    }
}

impl RankExecutor {
    /// As [`baton_engine::Executor::submit`].
    pub(super) fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        if self.submitted.len() == SLOTS {
            return Err(ExecutorError::too_many_in_flight(SLOTS));
        }
        if let Some(last) = self.submitted.back().filter(|last| last.unchosen.is_some()) {
            return Err(ExecutorError::not_chosen(last.id));
        }
        self.rows.fill(plan, &self.info)?;
        self.model.device.bind()?;
        self.choose_on_host()?;
        self.follow()?;
        let step = self.launch(plan)?;
        self.slot = (self.slot + 1) % SLOTS;
        self.submitted.push_back(step);
        Ok(())
    }

    /// As [`baton_engine::Executor::choose`].
    pub(super) fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        let Some(mut step) = self.submitted.pop_back() else {
            return Err(ExecutorError::nothing_to_choose());
        };
        let chosen = match step.unchosen.take() {
            None => Err(ExecutorError::nothing_to_choose()),
            Some((mut wants, at)) => {
                add_masks(&mut wants, masks);
                let bound = self.model.device.bind();
                bound
                    .and_then(|()| self.sample(&mut step, wants, &at))
                    .map_err(ExecutorError::from)
            }
        };
        self.submitted.push_back(step);
        chosen
    }

    /// As [`baton_engine::Executor::collect`].
    pub(super) fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let Some(mut step) = self.submitted.pop_front() else {
            return Err(ExecutorError::nothing_submitted());
        };
        if step.unchosen.is_some() {
            let id = step.id;
            self.submitted.push_front(step);
            return Err(ExecutorError::not_chosen(id));
        }
        self.answer(&mut step)?;
        Ok(step.output)
    }
}

impl Drop for RankExecutor {
    fn drop(&mut self) {
        let _ = self.model.device.bind();
        let _ = self.model.device.synchronize();
        self.graphs.clear();
    }
}
