//! One executor for many engines, one after the other, with a record of what they asked of it.

use std::sync::{Arc, Mutex, MutexGuard};

use baton_engine::{Executor, ExecutorError, ExecutorInfo, StepOutput, StepPlan, TokenMask};

use super::Seen;

/// Lends the executor, as if it had fewer blocks and bore that many steps in flight.
#[derive(Clone)]
pub struct Lent {
    pub info: ExecutorInfo,
    pub executor: Arc<Mutex<Box<dyn Executor>>>,
    pub seen: Arc<Mutex<Seen>>,
}

impl Lent {
    /// What was asked of it so far.
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("a failed test has ended")
    }

    /// The executor itself, while no engine has a step in flight.
    pub fn executor(&self) -> MutexGuard<'_, Box<dyn Executor>> {
        self.executor.lock().expect("a failed test has ended")
    }
}

impl Executor for Lent {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.seen().note(plan);
        self.executor().submit(plan)
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        let nothing = |mask: &&Arc<TokenMask>| mask.words().is_empty();
        let void = masks.iter().flatten().filter(nothing).count();
        self.seen().void += void;
        self.executor().choose(masks)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.executor().collect()
    }
}
