//! Choosing tokens where the logits are: what `kernels/sample.cu` is told of each row, and what its answers mean.
//!
//! A greedy row without edits needs nothing of this: its token is the best one, which is found with the logits. All others go
//! through the kernel, which chooses by the engine's rules and the engine's arithmetic. Only tokens and, where they were
//! asked for, the logits behind a few log-probabilities come to the host; the logarithm is taken here.

use std::sync::Arc;

use baton_engine::{
    Distribution, Draw, LOGPROB_MIN, SampleRequest, Sampled, StepPlan, TokenMask, Want, What,
};
use baton_protocol::{TokenLogprobs, TopLogprob};
use cudarc::driver::sys::CUdeviceptr;

use crate::error::CudaError;
use crate::gpu::compile::Compiler;
use crate::gpu::device::{Buffer, Device, Pinned, Plain};
use crate::gpu::kernel::{Kernel, LaunchConfig, Module};
use crate::gpu::sources;
use crate::launch;

/// How a row is sampled, as the kernel reads it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct Row {
    bits: u64,
    /// 0 takes the best token.
    inverse_temperature: f32,
    top_p: f32,
    weight_min: f32,
    top_k: u32,
    repetition: f32,
    frequency: f32,
    presence: f32,
    /// Where its edits begin: biases, then bans, then counts.
    edits: u32,
    biases: u32,
    bans: u32,
    counts: u32,
    /// A row of the step whose token counts once more, or -1.
    pending: i32,
    /// The token that is asked about, or -1 for one to choose.
    given: i32,
    /// Most likely tokens to report; -1 without log-probabilities.
    top: i32,
    /// Which of the batch's masks says what tokens may be chosen, or -1 for all.
    mask: i32,
    unused: i32,
}

/// A token and what is done to its logit: bits of a bias, nothing, or how often it stands in the output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct Edit {
    token: u32,
    value: u32,
}

/// What log-probabilities of a row are made of: the largest logit, the token's, and all weights in the engine's units.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Head {
    peak: f32,
    logit: f32,
    total: u64,
}

/// One of the most likely tokens.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Top {
    token: u32,
    logit: f32,
}

impl Plain for Row {}
impl Plain for Edit {}
impl Plain for Head {}
impl Plain for Top {}

/// Log-probabilities of a row at most: what the engine's `u8` can say.
const TOPS_MAX: usize = u8::MAX as usize;

/// Logits that a warp of the kernel takes at a time, and its warps: a block wants as many groups.
const GROUP: usize = 256;
const WARPS: usize = 16;

/// The kernel, and what it reads and writes on the GPU. One set: steps run one after the other.
pub struct Sampler {
    device: Arc<Device>,
    kernel: Kernel,
    threads: u32,
    vocab: usize,
    rows: Buffer<Row>,
    edits: Buffer<Edit>,
    /// Of the rows that have one, one after the other.
    masks: Buffer<u32>,
    heads: Buffer<Head>,
    tops: Buffer<Top>,
}

/// What the host and the GPU exchange for one batch of rows. It is written again when the copies out of it are done.
pub struct Batch {
    rows: Pinned<Row>,
    edits: Pinned<Edit>,
    masks: Pinned<u32>,
    tokens: Pinned<i32>,
    heads: Pinned<Head>,
    tops: Pinned<Top>,
    /// Places of a row in `tops`.
    tops_each: usize,
}

/// Numbers that a batch takes room for, beside its rows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Room {
    edits: usize,
    /// Words of masks.
    masks: usize,
    /// Logits on the host.
    pub(crate) logits: bool,
}

impl Room {
    pub(crate) fn and_logits(self, logits: bool) -> Self {
        Self { logits, ..self }
    }
}

/// What a row's logits say to what was asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The chosen token; `None` if no token was possible, because all logits were minus infinity or no number.
    Sampled(Option<Sampled>),
    /// Of the token that was asked about.
    Target(TokenLogprobs),
}

impl Sampler {
    /// For up to `rows` rows at once.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] if the vocabulary is too large; [`CudaError::Memory`], [`CudaError::Driver`] and those of the
    /// compiler.
    pub fn new(
        device: &Arc<Device>,
        compiler: &Compiler,
        vocab: usize,
        rows: usize,
    ) -> Result<Self, CudaError> {
        let module = Module::load(device, &compiler.compile(&sources::SAMPLE, &[])?)?;
        let [threads, _, vocab_max, _] = module.constants("sample_launch")?;
        if vocab > vocab_max as usize {
            return Err(CudaError::Unsupported(format!(
                "a vocabulary of {vocab} tokens, more than {vocab_max}"
            )));
        }
        Ok(Self {
            device: device.clone(),
            kernel: module.kernel("sample", 0)?,
            threads: threads as u32,
            vocab,
            rows: Buffer::zeroed(device, rows, "sampling parameters")?,
            edits: Buffer::zeroed(device, 1 << 12, "sampling parameters")?,
            masks: Buffer::zeroed(device, 1, "masks")?,
            heads: Buffer::zeroed(device, rows, "log-probabilities")?,
            tops: Buffer::zeroed(device, rows * TOPS_MAX, "log-probabilities")?,
        })
    }

    /// Room for batches of as many rows.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn batch(&self) -> Result<Batch, CudaError> {
        let (device, rows) = (&self.device, self.rows.len());
        Ok(Batch {
            rows: Pinned::zeroed(device, rows)?,
            edits: Pinned::zeroed(device, self.edits.len())?,
            masks: Pinned::zeroed(device, 1)?,
            tokens: Pinned::zeroed(device, rows)?,
            heads: Pinned::zeroed(device, rows)?,
            tops: Pinned::zeroed(device, rows * TOPS_MAX)?,
            tops_each: 0,
        })
    }

    /// Chooses the tokens of the first rows of `logits`, one for each want, and starts copying what was chosen to the host.
    /// Never waits for the GPU, but to make room for more edits or masks than there ever were.
    ///
    /// `follows` says of a want whether its sequence goes on from a token that the step before chose: that token then is in
    /// `row_token` and not in the sequence's counts.
    ///
    /// # Errors
    /// [`CudaError::Memory`] and [`CudaError::Driver`].
    ///
    /// # Safety
    /// `tokens` has the best token of each row of `logits` (which are changed), -1 where none is possible, and gets the chosen
    /// ones; `row_token` has the tokens of the step's rows. What was copied for the batch's last rows has been waited for.
    pub unsafe fn launch(
        &mut self,
        batch: &mut Batch,
        wants: &[Want],
        follows: impl Fn(&Want) -> bool,
        tokens: CUdeviceptr,
        logits: CUdeviceptr,
        row_token: CUdeviceptr,
    ) -> Result<(), CudaError> {
        let edits = wants.iter().map(edits_of).sum();
        let words = self.vocab.div_ceil(32);
        let masks = wants.iter().filter_map(mask_of).count() * words;
        let room = Room {
            edits,
            masks,
            ..Room::default()
        };
        self.make_room(batch, room)?;
        let (mut edits, mut masked) = (0, 0);
        let mut plain = true;
        for (row, want) in batch.rows.iter_mut().zip(wants) {
            *row = pack(
                want,
                follows(want),
                self.vocab,
                &mut batch.edits,
                &mut edits,
            );
            if let Some(mask) = mask_of(want) {
                row.mask = masked as i32;
                let words = &mut batch.masks[masked * words..][..words];
                // Ids beyond a mask's end may not be chosen.
                let given = mask.words().iter().copied().chain(std::iter::repeat(0));
                words
                    .iter_mut()
                    .zip(given)
                    .for_each(|(to, from)| *to = from);
                masked += 1;
            }
            plain &= row.is_plain();
        }
        let tops = batch.rows[..wants.len()].iter().map(|row| row.top).max();
        batch.tops_each = tops.map_or(0, |top| top.max(0) as usize);
        // SAFETY: arrays of these lengths; the kernel's arguments, by its file; the caller's promise.
        unsafe {
            if !plain {
                batch.rows.upload(wants.len(), self.rows.at(0))?;
                if edits > 0 {
                    batch.edits.upload(edits, self.edits.at(0))?;
                }
                if masks > 0 {
                    batch.masks.upload(masks, self.masks.at(0))?;
                }
                launch!(
                    self.kernel,
                    self.shape(wants.len()),
                    tokens,
                    logits,
                    self.rows.at(0),
                    self.edits.at(0),
                    self.masks.at(0),
                    row_token,
                    self.heads.at(0),
                    self.tops.at(0),
                    self.vocab as i32,
                    batch.tops_each as i32,
                )?;
                if tops.is_some_and(|top| top >= 0) {
                    batch.heads.download(0, wants.len(), self.heads.at(0))?;
                }
                if batch.tops_each > 0 {
                    let count = wants.len() * batch.tops_each;
                    batch.tops.download(0, count, self.tops.at(0))?;
                }
            }
            if !wants.is_empty() {
                batch.tokens.download(0, wants.len(), tokens)?;
            }
        }
        Ok(())
    }

    /// As many blocks a row as fill the GPU: one pass of one block over a row takes longer than all else together.
    fn shape(&self, rows: usize) -> LaunchConfig {
        let blocks = match self.device.capability() >= (9, 0) {
            true => blocks(rows, self.vocab, self.device.multiprocessors() as usize),
            false => 1,
        };
        LaunchConfig::plane(blocks, rows, self.threads).cluster(blocks)
    }

    /// At most what choosing the tokens of a plan takes, with masks that come later.
    pub(crate) fn needed(&self, plan: &StepPlan, masks: &[Option<Arc<TokenMask>>]) -> Room {
        let runs = || plan.sequences.iter().filter_map(|s| s.sample.as_ref());
        let edits = runs().map(|run| {
            let state = &run.state;
            let each = state.sampling.logit_bias.len() + state.counts.len();
            run.len * (each + state.stop_token_ids.len() + run.len)
        });
        let masked =
            runs().filter(|run| run.mask.is_some()).count() + masks.iter().flatten().count();
        Room {
            edits: edits.sum(),
            masks: masked * self.vocab.div_ceil(32),
            logits: false,
        }
    }

    pub(crate) fn has_room(&self, batch: &Batch, room: Room) -> bool {
        room.masks <= self.masks.len().min(batch.masks.len())
            && room.edits <= self.edits.len().min(batch.edits.len())
    }

    /// # Errors
    /// [`CudaError::Memory`] and [`CudaError::Driver`].
    pub(crate) fn make_room(&mut self, batch: &mut Batch, needed: Room) -> Result<(), CudaError> {
        let Room { edits, masks, .. } = needed;
        let room = masks.next_power_of_two();
        if masks > self.masks.len() {
            self.masks = Buffer::zeroed(&self.device, room, "masks")?;
        }
        if masks > batch.masks.len() {
            batch.masks = Pinned::zeroed(&self.device, room)?;
        }
        let room = edits.next_power_of_two();
        if edits > self.edits.len() {
            self.edits = Buffer::zeroed(&self.device, room, "sampling parameters")?;
        }
        if edits > batch.edits.len() {
            batch.edits = Pinned::zeroed(&self.device, room)?;
        }
        Ok(())
    }
}

impl Batch {
    /// What was answered to the wants of the last launch, in their order. Their copies have been waited for.
    pub fn answers(&self, wants: &[Want]) -> Vec<Answer> {
        let answer = |(i, want): (usize, &Want)| {
            let logprobs = || {
                let head = self.heads[i];
                let distribution = (head.peak > f32::NEG_INFINITY)
                    .then(|| Distribution::new(head.peak, head.total));
                let top = |top: &Top| {
                    let logprob = distribution.as_ref().map(|d| d.logprob(top.logit));
                    TopLogprob(top.token, logprob.unwrap_or(LOGPROB_MIN))
                };
                let first = i * self.tops_each;
                let reported = match distribution {
                    Some(_) => self.rows[i].top.max(0) as usize,
                    None => 0,
                };
                TokenLogprobs {
                    logprob: distribution
                        .as_ref()
                        .map_or(LOGPROB_MIN, |d| d.logprob(head.logit)),
                    top: self.tops[first..first + reported].iter().map(top).collect(),
                }
            };
            match &want.what {
                What::Target { .. } => Answer::Target(logprobs()),
                What::Sample(request) => {
                    let asked = request.state.sampling.logprobs.is_some();
                    let token = u32::try_from(self.tokens[i]).ok();
                    Answer::Sampled(token.map(|token| Sampled {
                        token,
                        logprobs: asked.then(logprobs),
                    }))
                }
            }
        };
        wants.iter().enumerate().map(answer).collect()
    }
}

impl Row {
    /// The best token, and nothing else.
    const PLAIN: Self = Self {
        bits: 0,
        inverse_temperature: 0.0,
        top_p: 1.0,
        weight_min: 0.0,
        top_k: 0,
        repetition: 1.0,
        frequency: 0.0,
        presence: 0.0,
        edits: 0,
        biases: 0,
        bans: 0,
        counts: 0,
        pending: -1,
        given: -1,
        top: -1,
        mask: -1,
        unused: 0,
    };

    /// Whether the kernel leaves the best token as it is.
    fn is_plain(&self) -> bool {
        let edits = self.biases + self.bans + self.counts;
        let changed = edits > 0 || self.pending >= 0 || self.mask >= 0;
        self.inverse_temperature == 0.0 && self.top < 0 && !changed
    }
}

/// Blocks of a row's cluster. A block wants a group for each of its warps. Clusters lie within parts of the GPU of 16 or 18
/// multiprocessors, so of more than two blocks not all multiprocessors can be used.
fn blocks(rows: usize, vocab: usize, multiprocessors: usize) -> usize {
    let filled = vocab / GROUP / WARPS;
    let fits = |blocks: &usize| {
        let usable = match blocks {
            0..=2 => multiprocessors,
            _ => multiprocessors * 7 / 8,
        };
        *blocks <= filled && blocks * rows <= usable
    };
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}

/// What tokens a want may be answered with, if not all.
fn mask_of(want: &Want) -> Option<&TokenMask> {
    match &want.what {
        What::Target { .. } => None,
        What::Sample(request) => request.mask.as_deref(),
    }
}

/// Edits that a want needs room for.
fn edits_of(want: &Want) -> usize {
    match &want.what {
        What::Target { .. } => 0,
        What::Sample(request) => {
            let state = &*request.state;
            state.sampling.logit_bias.len() + bans(request).len() + state.counts.len()
        }
    }
}

fn bans(request: &SampleRequest) -> &[u32] {
    match request.ban_stop_ids {
        true => &request.state.stop_token_ids,
        false => &[],
    }
}

/// Writes a want down for the kernel, its edits behind the first `used`.
fn pack(want: &Want, follows: bool, vocab: usize, edits: &mut [Edit], used: &mut usize) -> Row {
    let top_of = |top: u8| usize::from(top).min(vocab) as i32;
    let request = match &want.what {
        What::Target { token, top } => {
            return Row {
                given: *token as i32,
                top: top_of(*top),
                ..Row::PLAIN
            };
        }
        What::Sample(request) => request,
    };
    let state = &*request.state;
    let sampling = &state.sampling;
    let first = *used;
    let mut push = |token, value| {
        edits[*used] = Edit { token, value };
        *used += 1;
    };
    for (token, bias) in &sampling.logit_bias {
        push(*token, bias.to_bits());
    }
    for token in bans(request) {
        push(*token, 0);
    }
    for count in &state.counts {
        push(count.token, count.output);
    }
    let biases = sampling.logit_bias.len();
    // Biases of one token are added in their order.
    edits[first..first + biases].sort_by_key(|edit| edit.token);
    let row = Row {
        repetition: sampling.repetition_penalty,
        frequency: sampling.frequency_penalty,
        presence: sampling.presence_penalty,
        edits: first as u32,
        biases: biases as u32,
        bans: bans(request).len() as u32,
        counts: state.counts.len() as u32,
        pending: match follows && state.has_penalty() {
            true => want.row as i32,
            false => -1,
        },
        top: sampling.logprobs.map_or(-1, top_of),
        ..Row::PLAIN
    };
    match Draw::of(request, vocab) {
        None => row,
        Some(draw) => Row {
            bits: draw.bits,
            inverse_temperature: draw.inverse_temperature,
            top_p: draw.top_p,
            weight_min: draw.weight_min,
            top_k: draw.top_k,
            ..row
        },
    }
}

#[cfg(test)]
mod tests {
    use baton_engine::{SampleState, TokenCount};
    use baton_protocol::Sampling;

    use super::*;

    fn want(state: SampleState, ban_stop_ids: bool) -> Want {
        Want {
            sequence: 0,
            row: 5,
            what: What::Sample(SampleRequest {
                position: 3,
                state: Arc::new(state),
                ban_stop_ids,
                mask: None,
            }),
        }
    }

    #[test]
    fn few_rows_get_clusters() {
        let blocks = |rows| super::blocks(rows, 128_256, 132);
        assert_eq!(
            [1, 14, 15, 28, 29, 66, 67, 512].map(blocks),
            [8, 8, 4, 4, 2, 2, 1, 1]
        );
        assert_eq!(
            [40, 3001, 8192, 49_152].map(|vocab| super::blocks(1, vocab, 132)),
            [1, 1, 2, 8]
        );
    }

    fn edit(token: u32, value: u32) -> Edit {
        Edit { token, value }
    }

    #[test]
    fn rows_are_packed_as_the_kernel_reads_them() {
        assert_eq!((size_of::<Row>(), align_of::<Row>()), (72, 8));
        assert_eq!((size_of::<Head>(), size_of::<Top>()), (16, 8));
        let mut edits = [Edit::default(); 16];
        let mut used = 0;
        let mut packed = |want: &Want, follows| {
            let before = used;
            let row = pack(want, follows, 100, &mut edits, &mut used);
            assert_eq!(used - before, edits_of(want), "edits have room");
            row
        };
        let greedy = packed(&want(SampleState::default(), true), true);
        assert_eq!(greedy, Row::PLAIN);
        assert!(greedy.is_plain());

        let state = SampleState {
            sampling: Sampling {
                temperature: 0.5,
                top_k: 7,
                top_p: 0.25,
                min_p: 0.125,
                repetition_penalty: 1.5,
                presence_penalty: 2.5,
                frequency_penalty: 3.5,
                logit_bias: vec![(9, 1.0), (4, 2.0), (9, 3.0)],
                seed: 11,
                logprobs: Some(200),
            },
            stop_token_ids: vec![2, 1],
            counts: vec![TokenCount {
                token: 8,
                prompt: 3,
                output: 6,
            }],
        };
        let row = packed(&want(state.clone(), true), true);
        let expected = Row {
            bits: baton_engine::random_bits(11, 3),
            inverse_temperature: 2.0,
            top_p: 0.25,
            weight_min: 0.125,
            top_k: 7,
            repetition: 1.5,
            frequency: 3.5,
            presence: 2.5,
            edits: 0,
            biases: 3,
            bans: 2,
            counts: 1,
            pending: 5,
            given: -1,
            top: 100,
            mask: -1,
            unused: 0,
        };
        assert_eq!(row, expected);
        let target = packed(
            &Want {
                sequence: 0,
                row: 0,
                what: What::Target { token: 6, top: 2 },
            },
            true,
        );
        assert_eq!((target.given, target.top, target.pending), (6, 2, -1));
        let second = packed(&want(state, false), false);
        assert_eq!((second.edits, second.bans, second.pending), (6, 0, -1));
        let bits = f32::to_bits;
        let first = [
            edit(4, bits(2.0)),
            edit(9, bits(1.0)),
            edit(9, bits(3.0)),
            edit(2, 0),
            edit(1, 0),
            edit(8, 6),
        ];
        assert_eq!(edits[..6], first);
        assert_eq!(edits[6..9], first[..3]);
    }
}
