//! An executor that chooses by the sampling rules, and tells which blocks its steps in flight may touch.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::*;
use crate::{FakeMemory, StepPlan, sample, uniform};

/// Logits by hash of all tokens so far, then the sampling rules: what a model does, as far as the engine can tell.
struct Sampler {
    inner: FakeExecutor,
    submitted: VecDeque<StepPlan>,
    /// Tokens of the step collected last.
    chosen: Vec<Option<u32>>,
    watch: Watch,
}

/// The blocks of each step in flight.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<VecDeque<Vec<u32>>>>);

impl Watch {
    pub fn blocks(&self) -> Vec<u32> {
        let steps = self.0.lock().expect("no panic under the lock");
        steps.iter().flatten().copied().collect()
    }

    pub fn steps(&self) -> usize {
        self.0.lock().expect("no panic under the lock").len()
    }
}

impl Executor for Sampler {
    fn info(&self) -> &ExecutorInfo {
        self.inner.info()
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        assert!(self.submitted.len() < self.info().steps_in_flight);
        let mut watch = self.watch.0.lock().expect("no panic under the lock");
        watch.push_back(plan.blocks.clone());
        self.submitted.push_back(plan.clone());
        Ok(())
    }

    /// Runs the step as late as may be.
    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let mut plan = self.submitted.pop_front().expect("a step was submitted");
        for step in &mut plan.sequences {
            let Some(sequence) = step.follows.take() else {
                continue;
            };
            let chosen = self.chosen[sequence].expect("it was asked for");
            plan.tokens[step.tokens.start] = chosen;
            let request = step.sample.as_mut().expect("only what generates follows");
            if request.state.has_penalty() {
                Arc::make_mut(&mut request.state).count(chosen);
            }
        }
        let mut output = self.inner.forward(&plan)?;
        for (step, row) in plan.sequences.iter().zip(&mut output.sequences) {
            if let (Some(request), Some(sampled)) = (&step.sample, &mut row.sampled) {
                let hash = u64::from(sampled.token);
                let logit = |i| uniform(hash, i) as f32 * 12.0 - 6.0;
                let mut logits: Vec<f32> = (0..VOCAB).map(logit).collect();
                *sampled = sample(&mut logits, request).expect("they are finite");
            }
        }
        self.chosen = output.tokens();
        let mut watch = self.watch.0.lock().expect("no panic under the lock");
        watch.pop_front();
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
        chosen: Vec::new(),
        watch: watch.clone(),
    };
    (engine_on(setup, Box::new(executor)), watch, memory)
}
