//! The executor: one GPU, or several that do every step together.
//!
//! The first rank runs on the thread that calls, each other one on a [thread](thread::RankThread) of its own; all are told the same.
//! A step is told to a rank when all ranks have launched the one before: whatever a rank does for a step beside launching it,
//! no GPU waits for another meanwhile ([`crate::ranks`]). A rank that fails, or does not do its part in time, ends the executor.

mod rank;
mod thread;

use std::sync::Arc;
use std::time::Duration;

use baton_engine::{
    Executor, ExecutorError, ExecutorInfo, Fault, StepOutput, StepPlan, TokenMask, kv_geometry,
};
use baton_kv_memory::KvMemory;
use baton_protocol::KvGeometry;

use crate::error::CudaError;
use crate::gpu::device::Device;
use crate::model::{CudaModel, on_all};
use crate::ranks::ExchangeOptions;
use rank::RankExecutor;
use thread::{Command, RankThread};

/// A model on one GPU or several.
pub struct CudaExecutor {
    info: ExecutorInfo,
    first: RankExecutor,
    others: Vec<RankThread>,
    /// On one GPU.
    streamed_bytes: usize,
    /// How long a rank may be behind: longer than its GPU waits for the others'.
    behind_max: Duration,
    /// Why it is out of service.
    failed: Option<ExecutorError>,
}

impl CudaExecutor {
    /// Takes the arenas, one for each rank with its part of every block, and captures a graph for each size of a decode batch.
    ///
    /// # Errors
    /// [`CudaError`] says which field of the geometry does not fit, or what failed.
    ///
    /// # Panics
    /// If there is not one arena for each rank.
    pub fn new(
        model: CudaModel,
        memories: Vec<Arc<dyn KvMemory>>,
        kv: KvGeometry,
    ) -> Result<Self, CudaError> {
        assert_eq!(model.ranks.len(), memories.len(), "a rank has an arena");
        if let Some(difference) = kv.difference(&kv_geometry(&model.spec, kv.block_tokens)) {
            return Err(CudaError::Arena(difference));
        }
        let (devices, streamed_bytes) = (model.devices(), model.streamed_bytes());
        let ranks = model.ranks.into_iter().zip(memories).zip(&devices);
        let ranks = ranks.map(|((rank, memory), device)| {
            let made = RankExecutor::new(rank, memory, &kv);
            made.map_err(|error| match devices.len() {
                1 => error,
                _ => error.on(device.ordinal()),
            })
        });
        let mut ranks = ranks.collect::<Result<Vec<_>, _>>()?;
        capture(&mut ranks, &devices)?;
        let info = info(&ranks, &devices);
        let mut ranks = ranks.into_iter();
        let first = ranks.next().expect("there is a rank");
        let others = (1..).zip(ranks);
        let others = others.map(|(rank, mut executor)| {
            let name = format!("rank {rank} (cuda:{})", executor.model.device().ordinal());
            RankThread::start(name, move |command| carry_out(&mut executor, command))
        });
        Ok(Self {
            info,
            first,
            others: others
                .collect::<Result<_, _>>()
                .map_err(|error| CudaError::Device(error.message))?,
            streamed_bytes,
            behind_max: 2 * ExchangeOptions::default().wait,
            failed: None,
        })
    }

    /// The GPU of the first rank.
    pub fn device(&self) -> &Arc<Device> {
        self.first.model.device()
    }

    /// Bytes of weights that a step of one row reads on one GPU, for benchmarks.
    pub fn streamed_bytes(&self) -> usize {
        self.streamed_bytes
    }

    /// Has all ranks do the same: the others are told `command`, the first does `own`. What all refuse alike leaves the executor as
    /// it was; any other error takes it out of service, for ranks that have not done the same cannot go on together.
    fn together<T>(
        &mut self,
        command: impl FnOnce() -> Command,
        own: impl FnOnce(&mut RankExecutor) -> Result<T, ExecutorError>,
    ) -> Result<T, ExecutorError> {
        if self.others.is_empty() {
            return own(&mut self.first);
        }
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if let Err(error) = self.tell(command) {
            return Err(self.failed.insert(error).clone());
        }
        let done = own(&mut self.first);
        if let Err(error) = &done
            && !self.all_refuse(error)
        {
            let failed = ExecutorError::failed(error.message.clone());
            return Err(self.failed.insert(failed).clone());
        }
        done
    }

    /// Tells the other ranks what the first is about to do, once they are done with what they were told before.
    fn tell(&mut self, command: impl FnOnce() -> Command) -> Result<(), ExecutorError> {
        let (at_most, command) = (self.behind_max, command());
        self.others
            .iter_mut()
            .try_for_each(|rank| rank.settle(at_most))?;
        self.others
            .iter_mut()
            .try_for_each(|rank| rank.tell(command.clone()))
    }

    fn all_refuse(&mut self, like: &ExecutorError) -> bool {
        if like.fault == Fault::Failed {
            return false;
        }
        let at_most = self.behind_max;
        let mut refused = self
            .others
            .iter_mut()
            .map(|rank| rank.refused(like, at_most));
        refused.all(|refused| refused == Ok(true))
    }

    /// Has all ranks make room that a step lacks, before any of them begins with it: a rank that allocates waits for what runs.
    fn make_room(
        &mut self,
        plan: &StepPlan,
        masks: &[Option<Arc<TokenMask>>],
    ) -> Result<(), ExecutorError> {
        if self.others.is_empty() {
            return Ok(());
        }
        match self.first.lacks(plan, masks) {
            None => Ok(()),
            Some(room) => self.together(
                || Command::MakeRoom(room),
                |first| first.make_room(room).map_err(ExecutorError::from),
            ),
        }
    }
}

fn carry_out(rank: &mut RankExecutor, command: Command) -> Result<(), ExecutorError> {
    match command {
        Command::Submit(plan) => rank.submit(&plan),
        Command::Choose(masks) => rank.choose(&masks),
        Command::Collect => rank.collect().map(|_| ()),
        Command::MakeRoom(room) => Ok(rank.make_room(room)?),
    }
}

/// Each size is run on all ranks, then captured by all: one that makes a graph waits for what runs.
fn capture(ranks: &mut [RankExecutor], devices: &[Arc<Device>]) -> Result<(), CudaError> {
    for size in ranks[0].sizes() {
        on_each(ranks, devices, |rank| rank.rehearse(size))?;
        on_each(ranks, devices, |rank| rank.capture(size))?;
    }
    Ok(())
}

fn on_each(
    ranks: &mut [RankExecutor],
    devices: &[Arc<Device>],
    work: impl Fn(&mut RankExecutor) -> Result<(), CudaError> + Sync,
) -> Result<(), CudaError> {
    let ranks: Vec<_> = ranks.iter_mut().map(std::sync::Mutex::new).collect();
    let of = |rank: usize| {
        let rank = ranks[rank].lock();
        work(&mut rank.expect("nobody panicked with it"))
    };
    on_all(devices, &of).map(|_| ())
}

/// Of all ranks together.
fn info(ranks: &[RankExecutor], devices: &[Arc<Device>]) -> ExecutorInfo {
    let first = ranks[0].info();
    let blocks = ranks.iter().map(|rank| rank.info().blocks);
    let device = match devices {
        [_] => first.device.clone(),
        devices => {
            let ordinals: Vec<_> = devices.iter().map(|d| d.ordinal().to_string()).collect();
            let name = devices[0].name();
            format!(
                "cuda:{} {name}, {} ranks",
                ordinals.join(","),
                devices.len()
            )
        }
    };
    ExecutorInfo {
        device,
        blocks: blocks.min().unwrap_or(first.blocks),
        ..first.clone()
    }
}

impl Executor for CudaExecutor {
    fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        self.make_room(plan, &[])?;
        self.together(
            || Command::Submit(Arc::new(plan.clone())),
            |first| first.submit(plan),
        )
    }

    fn choose(&mut self, masks: &[Option<Arc<TokenMask>>]) -> Result<(), ExecutorError> {
        self.make_room(&StepPlan::default(), masks)?;
        self.together(
            || Command::Choose(masks.into()),
            |first| first.choose(masks),
        )
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.together(|| Command::Collect, RankExecutor::collect)
    }
}
