//! An executor without a model: the next token is a hash of all tokens so far.
//!
//! It keeps a digest of every token where a model would keep keys and values, and reads all of them back
//! from the block table before it chooses. So a block that is stale, torn, in the wrong place or another
//! prompt's changes the tokens, and a test that compares texts sees it, whether the KV was computed here or
//! pulled from elsewhere.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use baton_protocol::{KvGeometry, KvGroup, StepCost, TokenLogprobs, TopLogprob};

use crate::sampling::mix;
use crate::{
    Executor, ExecutorError, ExecutorInfo, Follows, SampleRequest, Sampled, SequenceOutput,
    SequenceStep, StepOutput, StepPlan, TokenMask,
};

/// Digest of the empty sequence.
pub(crate) const EMPTY: u64 = 0x6261_746f_6e00_0001;

/// Digest of a token after those with another.
pub(crate) fn digest_of(before: u64, token: u32) -> u64 {
    mix(before.rotate_left(7) ^ u64::from(token))
}

/// A hash of all digests, by their sums over each block.
pub(crate) fn hash_of(sums: impl Iterator<Item = u64>) -> u64 {
    sums.fold(EMPTY, |hash, sum| mix(hash ^ sum))
}

/// The token that a hash stands for.
pub(crate) fn pick(hash: u64, vocab: u32) -> u32 {
    (mix(hash) % u64::from(vocab)) as u32
}

/// One 64-bit number per token of an arena: what a [`FakeExecutor`] keeps for KV.
///
/// Over an arena that is moved between workers, the number of `slot` lies at byte
/// `block * block_bytes + slot * 8`; a block must have room for 8 bytes a token.
pub trait FakeKv: Send + Sync {
    /// Store the digest of one token.
    fn write(&self, block: u32, slot: u32, digest: u64);

    /// What was stored; anything if nothing was.
    fn read(&self, block: u32, slot: u32) -> u64;

    /// Sum of the first `slots` digests of a block.
    fn sum(&self, block: u32, slots: u32) -> u64 {
        (0..slots).fold(0, |sum, slot| sum.wrapping_add(self.read(block, slot)))
    }
}

/// [`FakeKv`] in memory of its own.
#[derive(Debug)]
pub struct FakeMemory {
    block_tokens: usize,
    digests: Vec<AtomicU64>,
}

impl FakeMemory {
    /// Room for `blocks` blocks of `block_tokens` tokens.
    pub fn new(blocks: u32, block_tokens: u32) -> Self {
        let count = blocks as usize * block_tokens as usize;
        Self {
            block_tokens: block_tokens as usize,
            digests: (0..count).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl FakeKv for FakeMemory {
    fn write(&self, block: u32, slot: u32, digest: u64) {
        self.digests[block as usize * self.block_tokens + slot as usize]
            .store(digest, Ordering::Relaxed);
    }

    fn read(&self, block: u32, slot: u32) -> u64 {
        self.digests[block as usize * self.block_tokens + slot as usize].load(Ordering::Relaxed)
    }

    fn sum(&self, block: u32, slots: u32) -> u64 {
        let first = block as usize * self.block_tokens;
        self.digests[first..first + slots as usize]
            .iter()
            .fold(0, |sum, digest| {
                sum.wrapping_add(digest.load(Ordering::Relaxed))
            })
    }
}

/// What a [`FakeExecutor`] pretends to be.
#[derive(Clone, Debug)]
pub struct FakeConfig {
    /// Layout of the arena; only `block_tokens` matters to the fake itself.
    pub kv: KvGeometry,
    /// Blocks of the arena.
    pub blocks: u32,
    /// Tokens are below this.
    pub vocab: u32,
    /// Longest sequence.
    pub tokens_max: u32,
    /// Most sequences of one step.
    pub step_sequences_max: usize,
    /// Most tokens of one step.
    pub step_tokens_max: usize,
    /// How long a step takes; 0 is full speed.
    pub step_micros: u64,
    /// What it takes beside that, by what is in it.
    pub cost: Option<StepCost>,
    /// Steps that may be in flight at once. The second begins when the first ends, whenever that is collected.
    pub steps_in_flight: usize,
    /// Most tokens chosen for one sequence in one step.
    pub run_max: usize,
    /// Ids that are never chosen: end-of-sequence ids, where outputs must have their full length.
    pub never_emit: Vec<u32>,
    /// What goes wrong, for tests of what comes of it.
    pub faults: FakeFaults,
}

/// Tokens that break something when a step runs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FakeFaults {
    /// After this one there is no finite logit.
    pub no_logit: Option<u32>,
    /// A plan with this one is refused.
    pub refuse: Option<u32>,
    /// With this one the step fails, and the executor with it.
    pub step: Option<u32>,
    /// With this one the step never ends.
    pub hang: Option<u32>,
}

impl Default for FakeConfig {
    /// 4096 blocks of 16 tokens, a vocabulary of 32,000, sequences of up to 8192 tokens, full speed, step by step, runs of up
    /// to 8 tokens.
    fn default() -> Self {
        Self {
            kv: KvGeometry::bf16(
                16,
                vec![KvGroup {
                    layers: 1,
                    kv_heads: 1,
                    head_dim: 8,
                }],
            ),
            blocks: 4096,
            vocab: 32_000,
            tokens_max: 8192,
            step_sequences_max: 256,
            step_tokens_max: 8192,
            step_micros: 0,
            cost: None,
            steps_in_flight: 1,
            run_max: 8,
            never_emit: Vec::new(),
            faults: FakeFaults::default(),
        }
    }
}

/// Chooses tokens by hash. See the top of this file.
///
/// The hash takes in the seed too when the temperature is above 0, so that different seeds give different texts.
/// Stop ids are avoided before `min_tokens`; other sampling parameters change nothing. Log-probabilities have the
/// right shape and are made up.
pub struct FakeExecutor {
    info: ExecutorInfo,
    kv: Arc<dyn FakeKv>,
    step_time: Duration,
    cost: Option<StepCost>,
    never_emit: Vec<u32>,
    faults: FakeFaults,
    /// Steps in flight, and when each ends.
    submitted: VecDeque<(StepPlan, Instant)>,
}

impl FakeExecutor {
    /// With memory of its own.
    pub fn new(config: FakeConfig) -> Self {
        let memory = FakeMemory::new(config.blocks, config.kv.block_tokens);
        Self::with_memory(config, Arc::new(memory))
    }

    /// With this memory for its KV, which transfers may fill too.
    pub fn with_memory(config: FakeConfig, kv: Arc<dyn FakeKv>) -> Self {
        let info = ExecutorInfo {
            device: "fake".to_owned(),
            kv: config.kv,
            blocks: config.blocks,
            vocab: config.vocab,
            tokens_max: config.tokens_max,
            step_sequences_max: config.step_sequences_max,
            step_tokens_max: config.step_tokens_max,
            steps_in_flight: config.steps_in_flight,
            run_max: config.run_max,
        };
        Self {
            info,
            kv,
            step_time: Duration::from_micros(config.step_micros),
            cost: config.cost,
            never_emit: config.never_emit,
            faults: config.faults,
            submitted: VecDeque::new(),
        }
    }

    fn time_of(&self, plan: &StepPlan) -> Duration {
        let Some(cost) = &self.cost else {
            return self.step_time;
        };
        self.step_time.saturating_add(cost.step_time(plan.shape()))
    }

    fn run(&self, step: &SequenceStep, plan: &StepPlan) -> SequenceOutput {
        let tokens = &plan.tokens[step.tokens.clone()];
        let blocks = &plan.blocks[step.blocks.clone()];
        let block_tokens = self.info.kv.block_tokens;
        let place = |position: u32| {
            (
                blocks[(position / block_tokens) as usize],
                position % block_tokens,
            )
        };
        let mut digest = match step.start {
            0 => EMPTY,
            start => {
                let (block, slot) = place(start - 1);
                self.kv.read(block, slot)
            }
        };
        for (position, token) in (step.start..).zip(tokens) {
            digest = digest_of(digest, *token);
            let (block, slot) = place(position);
            self.kv.write(block, slot, digest);
        }
        let mut output = SequenceOutput::default();
        let targets = &plan.targets[step.targets.clone()];
        let report = |target: &u32| self.logprobs(*target, step.target_top);
        output.target_logprobs.extend(targets.iter().map(report));
        let Some(run) = &step.sample else {
            return output;
        };
        let (_, chosen_after) = tokens.split_at(tokens.len() - run.len);
        for (i, token) in chosen_after.iter().enumerate() {
            if self.faults.no_logit == Some(*token) {
                output.extend(SequenceOutput::without_token());
                break;
            }
            let request = run.request(i, &chosen_after[1..]);
            let hash = self.attend(blocks, request.position);
            match self.choose(hash, &request) {
                Some(sampled) => output.sampled.push(sampled),
                None => {
                    output.extend(SequenceOutput::without_token());
                    break;
                }
            }
        }
        output
    }

    /// The engine's promises, as far as texts depend on them.
    fn check(&self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let broken = |what: &str, key: u64| {
            Err(ExecutorError::broken_plan(format!(
                "{what} (sequence {key} of {})",
                plan.id
            )))
        };
        for step in &plan.sequences {
            if let Some(run) = &step.sample {
                if !(1..=self.info.run_max.min(step.tokens.len())).contains(&run.len) {
                    return broken("its run is none, or too long", step.key);
                }
                let end = step.start as usize + step.tokens.len();
                if run.position as usize + run.len != end + 1 {
                    return broken("its run is not at its end", step.key);
                }
            }
            let Some(follows) = step.follows else {
                continue;
            };
            let followed = self.followed(&follows)?;
            if followed.key != step.key || step.tokens.len() != 1 {
                return broken(
                    "it follows another sequence, or not with one token",
                    step.key,
                );
            }
            if step.start as usize != followed.start as usize + followed.tokens.len() {
                return broken("it follows a token of another position", step.key);
            }
        }
        Ok(())
    }

    fn followed(&self, follows: &Follows) -> Result<&SequenceStep, ExecutorError> {
        let mut plans = self.submitted.iter().map(|(plan, _)| plan);
        let Some(plan) = plans.find(|plan| plan.id == follows.step) else {
            return Err(follows.not_in_flight());
        };
        let followed = plan.sequences.get(follows.sequence);
        followed
            .filter(|step| step.chooses_one())
            .ok_or_else(|| follows.not_one())
    }

    /// Writes what a step has chosen into the steps in flight that follow it.
    fn tell_followers(&mut self, plan: &StepPlan, output: &StepOutput) {
        for (later, _) in &mut self.submitted {
            for step in &mut later.sequences {
                if let Some(follows) = step.follows.take_if(|follows| follows.step == plan.id) {
                    let sampled = output.sequences[follows.sequence].sampled.first();
                    later.tokens[step.tokens.start] = sampled.map_or(0, |sampled| sampled.token);
                }
            }
        }
    }

    /// A hash of the digests of positions `0 .. end`, each block in its place.
    fn attend(&self, blocks: &[u32], end: u32) -> u64 {
        let block_tokens = self.info.kv.block_tokens;
        let firsts = (0..end).step_by(block_tokens as usize);
        hash_of(
            blocks
                .iter()
                .zip(firsts)
                .map(|(block, first)| self.kv.sum(*block, block_tokens.min(end - first))),
        )
    }

    fn choose(&self, hash: u64, request: &SampleRequest) -> Option<Sampled> {
        let state = &*request.state;
        let seed = if state.sampling.temperature > 0.0 {
            mix(state.sampling.seed)
        } else {
            0
        };
        let banned: &[u32] = if request.ban_stop_ids {
            &state.stop_token_ids
        } else {
            &[]
        };
        let vocab = self.info.vocab;
        let first = pick(hash ^ seed, vocab);
        let mask = request.mask.as_deref();
        let masked = |token: u32| mask.is_some_and(|mask| !mask.allows(token));
        let allowed = |token: &u32| {
            !self.never_emit.contains(token) && !banned.contains(token) && !masked(*token)
        };
        let mut tokens = (0..vocab).map(|i| (first + i) % vocab);
        // Without a mask something is always chosen, so that a tiny vocabulary can be told never to end.
        let token = tokens.find(allowed).or(mask.is_none().then_some(first));
        token.map(|token| Sampled {
            token,
            logprobs: state.sampling.logprobs.map(|top| self.logprobs(token, top)),
        })
    }

    fn logprobs(&self, token: u32, top: u8) -> TokenLogprobs {
        let rank = |i: u32| TopLogprob((token + i) % self.info.vocab, -0.5 - i as f32);
        TokenLogprobs {
            logprob: -0.5,
            top: (0..u32::from(top)).map(rank).collect(),
        }
    }
}

impl Executor for FakeExecutor {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        if self.submitted.len() >= self.info.steps_in_flight {
            return Err(ExecutorError::too_many_in_flight(self.submitted.len()));
        }
        if let Some(fault) = self
            .faults
            .refuse
            .filter(|token| plan.tokens.contains(token))
        {
            return Err(ExecutorError::broken_plan(format!(
                "the fake device is configured to refuse token {fault}"
            )));
        }
        self.check(plan)?;
        if let Some((last, _)) = self.submitted.back().filter(|(last, _)| last.chooses_later) {
            return Err(ExecutorError::not_chosen(last.id));
        }
        let now = Instant::now();
        let starts = self.submitted.back().map_or(now, |(_, end)| now.max(*end));
        let takes = self.time_of(plan);
        self.submitted.push_back((plan.clone(), starts + takes));
        Ok(())
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        let Some((plan, _)) = self
            .submitted
            .back_mut()
            .filter(|(plan, _)| plan.chooses_later)
        else {
            return Err(ExecutorError::nothing_to_choose());
        };
        plan.chooses_later = false;
        for (step, mask) in plan.sequences.iter_mut().zip(masks) {
            if let (Some(run), Some(mask)) = (&mut step.sample, mask) {
                run.mask = Some(Arc::clone(mask));
            }
        }
        Ok(())
    }

    /// Runs the step here, as late as may be: whoever touches its blocks before it was collected is found out.
    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        if let Some((plan, _)) = self
            .submitted
            .front()
            .filter(|(plan, _)| plan.chooses_later)
        {
            return Err(ExecutorError::not_chosen(plan.id));
        }
        let Some((plan, end)) = self.submitted.pop_front() else {
            return Err(ExecutorError::nothing_submitted());
        };
        let rest = end.saturating_duration_since(Instant::now());
        if !rest.is_zero() {
            std::thread::sleep(rest);
        }
        if let Some(fault) = self.faults.step.filter(|fault| plan.tokens.contains(fault)) {
            return Err(ExecutorError::failed(format!(
                "the fake device breaks on token {fault}, as it was told"
            )));
        }
        if self
            .faults
            .hang
            .is_some_and(|fault| plan.tokens.contains(&fault))
        {
            loop {
                std::thread::park();
            }
        }
        let steps = plan.sequences.iter();
        let output = StepOutput {
            sequences: steps.map(|step| self.run(step, &plan)).collect(),
        };
        self.tell_followers(&plan, &output);
        Ok(output)
    }
}
