//! An executor that chooses by the sampling rules, and tells which blocks its steps in flight may touch.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::*;
use crate::{Choices, FakeMemory, SequenceStep, StepOutput, StepPlan, TokenMask, sample, uniform};

/// Logits by hash of all tokens so far, then the sampling rules: what a model does, as far as the engine can tell.
struct Sampler {
    inner: FakeExecutor,
    submitted: VecDeque<StepPlan>,
    /// What steps chose that are collected, and were not when a step still in flight was submitted.
    chosen: VecDeque<Choices>,
    watch: Watch,
}

/// The steps that were submitted.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Watched>>);

#[derive(Default)]
struct Watched {
    /// The blocks of each step in flight.
    blocks: VecDeque<Vec<u32>>,
    /// Of each step so far, its sequences and how many tokens are chosen for each.
    runs: Vec<Vec<(u64, usize)>>,
    /// Steps whose tokens were chosen when masks came.
    chosen_later: usize,
}

impl Watch {
    pub fn blocks(&self) -> Vec<u32> {
        self.with(|watched| watched.blocks.iter().flatten().copied().collect())
    }

    /// How many are in flight.
    pub fn steps(&self) -> usize {
        self.with(|watched| watched.blocks.len())
    }

    /// Of each step so far, its sequences and how many tokens are chosen for each.
    pub fn runs(&self) -> Vec<Vec<(u64, usize)>> {
        self.with(|watched| watched.runs.clone())
    }

    /// Steps whose tokens were chosen when masks came.
    pub fn chosen_later(&self) -> usize {
        self.with(|watched| watched.chosen_later)
    }

    fn with<T>(&self, run: impl FnOnce(&mut Watched) -> T) -> T {
        run(&mut self.0.lock().expect("no panic under the lock"))
    }
}

impl Executor for Sampler {
    fn info(&self) -> &ExecutorInfo {
        self.inner.info()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        assert!(self.submitted.len() < self.info().steps_in_flight);
        assert!(self.submitted.iter().all(|before| !before.chooses_later));
        for step in &plan.sequences {
            let run = step.sample.as_ref().map_or(0, |run| run.len);
            assert!(run <= self.info().run_max, "a run of {run}");
            if let Some(follows) = step.follows {
                let mut steps = self.submitted.iter();
                let followed = steps.find(|plan| plan.id == follows.step);
                let followed =
                    followed.expect("it is in flight").sequences[follows.sequence].clone();
                assert!(followed.key == step.key && followed.chooses_one());
                assert_eq!(
                    followed.start as usize + followed.tokens.len(),
                    step.start as usize
                );
            }
        }
        let run = |step: &SequenceStep| (step.key, step.sample.as_ref().map_or(0, |run| run.len));
        self.watch.with(|watched| {
            watched.blocks.push_back(plan.blocks.clone());
            watched.runs.push(plan.sequences.iter().map(run).collect());
        });
        self.submitted.push_back(plan.clone());
        Ok(())
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        assert_eq!(self.submitted.len(), 1, "those before it are collected");
        let plan = &mut self.submitted[0];
        assert!(std::mem::take(&mut plan.chooses_later), "it waits for this");
        assert_eq!(plan.sequences.len(), masks.len());
        for (step, mask) in plan.sequences.iter_mut().zip(masks) {
            if let Some(mask) = mask {
                let run = step.sample.as_mut().expect("a token is chosen for it");
                assert!(run.mask.is_none() && step.follows.is_some());
                run.mask = Some(Arc::clone(mask));
            }
        }
        self.watch.with(|watched| watched.chosen_later += 1);
        Ok(())
    }

    /// Runs the step as late as may be.
    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let mut plan = self.submitted.pop_front().expect("a step was submitted");
        assert!(!plan.chooses_later, "it waits for masks");
        for step in &mut plan.sequences {
            let Some(follows) = step.follows.take() else {
                continue;
            };
            let chosen = follows.find(self.chosen.iter())?;
            plan.tokens[step.tokens.start] = chosen;
            let run = step.sample.as_mut().expect("only what generates follows");
            if run.state.has_penalty() {
                Arc::make_mut(&mut run.state).count(chosen);
            }
        }
        let mut output = self.inner.forward(&plan)?;
        for (step, row) in plan.sequences.iter().zip(&mut output.sequences) {
            let Some(run) = &step.sample else {
                continue;
            };
            let tokens = &plan.tokens[step.tokens.clone()];
            let drafts = &tokens[tokens.len() - run.len + 1..];
            for (i, sampled) in row.sampled.as_mut_slice().iter_mut().enumerate() {
                let hash = u64::from(sampled.token);
                let logit = |i| uniform(hash, i) as f32 * 12.0 - 6.0;
                let mut logits: Vec<f32> = (0..VOCAB).map(logit).collect();
                let request = run.request(i, drafts);
                *sampled = sample(&mut logits, &request).expect("they are finite");
            }
        }
        self.chosen.push_back(Choices::of(&plan, &output));
        let follows = |id| {
            let steps = self.submitted.iter().flat_map(|plan| &plan.sequences);
            steps.flat_map(|step| step.follows).any(|f| f.step == id)
        };
        self.chosen.retain(|choices| follows(choices.step));
        self.watch.with(|watched| watched.blocks.pop_front());
        Ok(output)
    }
}

pub fn sampler(setup: Setup) -> Engine {
    watched_sampler(setup).0
}

/// The engine, the blocks of its steps in flight, and its arena.
pub fn watched_sampler(setup: Setup) -> (Engine, Watch, Arc<FakeMemory>) {
    let memory = Arc::new(FakeMemory::new(setup.blocks, BLOCK_TOKENS));
    let watch = Watch::default();
    let executor = Sampler {
        inner: FakeExecutor::with_memory(fake(setup), memory.clone()),
        submitted: VecDeque::new(),
        chosen: VecDeque::new(),
        watch: watch.clone(),
    };
    (engine_on(setup, Box::new(executor)), watch, memory)
}
