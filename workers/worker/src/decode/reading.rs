//! Reading of a handle's blocks into those that are reserved for them, from the first to the last, in one go or in several.

use std::sync::PoisonError;
use std::time::Duration;

use baton_engine::BlockTable;
use baton_protocol::{BlockRun, FailureCode};
use baton_transfer::{PeerKey, TransferError};
use tokio::time::Instant;

use super::pulls::{Pull, PullFailure};
use crate::mover::Destination;

/// When a request's time runs out the desk cancels its task. This much later the agent gives the pull up by itself.
const GRACE: Duration = Duration::from_secs(1);

/// Parts of a pull that have a span each: one that follows its prompt may have hundreds, and their sums are in its report.
const PARTS_MAX: u32 = 128;

/// How far a pull is.
pub(super) struct Reading<'a> {
    pull: &'a Pull,
    guard: Guard,
    /// The reserved blocks, one for each of the handle.
    local: Vec<u32>,
    /// How many of them need not be read any more.
    done: usize,
    pub(super) ranges: usize,
    pub(super) bytes: u64,
    /// In which something was read, as the agent measured it.
    pub(super) seconds: f32,
    /// The same with what is around it; waits for a turn are not in it.
    pub(super) busy: Duration,
    /// Waits for a turn.
    pub(super) turn: Duration,
    /// Waits for news of a prompt that runs.
    pub(super) progress: Duration,
    /// Parts that have a span.
    parts: u32,
}

impl<'a> Reading<'a> {
    /// Nothing is read yet, and what is here already need not be.
    ///
    /// # Errors
    /// [`FailureCode::PullFailed`] if the handle has not as many blocks as its tokens need, or fewer are reserved.
    pub(super) fn of(pull: &'a Pull) -> Result<Self, PullFailure> {
        let blocks = pull.handle.valid_tokens.div_ceil(pull.block_tokens) as usize;
        let named: u64 = pull
            .handle
            .runs
            .iter()
            .map(|run| u64::from(run.count))
            .sum();
        let held = pull.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let table = held.table();
        let reserved = table.map(|table| table.ids()).unwrap_or_default();
        // The first are in this worker's prefix index: their KV is here.
        let here = table.map_or(0, BlockTable::indexed).min(blocks);
        let local = match reserved.get(..blocks) {
            Some(local) if named == blocks as u64 => local.to_vec(),
            Some(_) => {
                let why = format!("it names {named} blocks, and its tokens fill {blocks}");
                return Err(unreadable(pull, &why));
            }
            None => {
                let why = "fewer blocks are reserved than the handle has";
                return Err(unreadable(pull, why));
            }
        };
        drop(held);
        Ok(Self {
            pull,
            guard: Guard {
                blocks: pull.blocks.clone(),
                is_done: true,
            },
            local,
            done: here,
            ranges: 0,
            bytes: 0,
            seconds: 0.0,
            busy: Duration::ZERO,
            turn: Duration::ZERO,
            progress: Duration::ZERO,
            parts: 0,
        })
    }

    /// Reads what was not read yet.
    pub(super) async fn read_all(&mut self) -> Result<(), PullFailure> {
        self.read_to(self.local.len()).await
    }

    /// Reads the blocks that so many tokens fill, as far as they were not read yet.
    pub(super) async fn read_full(&mut self, tokens: u32) -> Result<(), PullFailure> {
        let full = (tokens / self.pull.block_tokens) as usize;
        self.read_to(full.min(self.local.len())).await
    }

    async fn read_to(&mut self, end: usize) -> Result<(), PullFailure> {
        let pull = self.pull;
        let from = &pull.handle.worker;
        if end <= self.done {
            return Ok(());
        }
        let asked = Instant::now();
        let Some(permit) = pull.permit.get().await else {
            let message = format!("the connection to {from} was lost before its KV was pulled");
            return Err(PullFailure::new(FailureCode::PullFailed, message));
        };
        self.turn += asked.elapsed();
        self.part("turn", asked);
        let runs = cut(&pull.handle.runs, self.done, end);
        let reads = pull.map.reads(&runs, &self.local[self.done..end]);
        let reads = reads.map_err(|error| unreadable(pull, &error.to_string()))?;
        self.ranges += reads.len();
        let begun = Instant::now();
        self.guard.is_done = false;
        let stats = pull
            .mover
            .pull(
                PeerKey(pull.handle.incarnation.0),
                reads,
                self.guard.blocks.clone(),
                pull.deadline.saturating_duration_since(begun) + GRACE,
            )
            .await;
        let stats = stats.map_err(|error| {
            let message = format!("pulling KV from {from}: {error}");
            PullFailure {
                connection: is_connection_lost(&error).then(|| message.clone()),
                ..PullFailure::new(FailureCode::PullFailed, message)
            }
        })?;
        self.guard.is_done = true;
        // Whoever waits reads while this one asks; a context worker that does not answer keeps nobody from reading.
        drop(permit);
        self.done = end;
        self.bytes += stats.bytes;
        self.seconds += stats.seconds;
        self.busy += begun.elapsed();
        self.part("read", begun);
        Ok(())
    }

    /// A part of the pull has just ended.
    pub(super) fn part(&mut self, part: &'static str, begun: Instant) {
        if let Some(trace) = self.pull.trace.as_ref().filter(|_| self.parts < PARTS_MAX) {
            self.parts += 1;
            let name = match part {
                "turn" => "kv.turn",
                "progress" => "kv.progress",
                "read" => "kv.read",
                _ => "kv.release",
            };
            let times = (begun.into_std(), Instant::now().into_std());
            trace.part(name, times, "baton.part", part);
        }
    }

    /// The blocks, of which all were read.
    pub(super) fn take(mut self) -> Option<BlockTable> {
        self.guard.take()
    }
}

/// The runs of the blocks from one to before another, counted from the first.
fn cut(runs: &[BlockRun], from: usize, to: usize) -> Vec<BlockRun> {
    let (from, to) = (from as u64, to as u64);
    let mut at = 0;
    let cut = |run: &BlockRun| {
        let begin = at;
        at += u64::from(run.count);
        let (first, end) = (begin.max(from), at.min(to));
        (first < end).then(|| BlockRun {
            first: run.first.saturating_add((first - begin) as u32),
            count: (end - first) as u32,
        })
    };
    runs.iter().filter_map(cut).collect()
}

fn unreadable(pull: &Pull, why: &str) -> PullFailure {
    let from = &pull.handle.worker;
    let message = format!("the handle of {from} cannot be read: {why}");
    PullFailure::new(FailureCode::PullFailed, message)
}

/// Whether the connection must be made again; else only this handle was bad.
fn is_connection_lost(error: &TransferError) -> bool {
    match error {
        TransferError::PeerFailed { .. }
        | TransferError::Stalled { .. }
        | TransferError::NotConnected(_)
        | TransferError::Ucx { .. }
        | TransferError::Stopped => true,
        TransferError::Deadline { .. }
        | TransferError::Staging { .. }
        | TransferError::Bounds { .. }
        | TransferError::Plan(_)
        | TransferError::Busy { .. }
        | TransferError::Descriptor(_)
        | TransferError::Version { .. }
        | TransferError::Arena { .. }
        | TransferError::Library(_) => false,
    }
}

/// The destination blocks, shared with the transfer agent while it may write to them. When a pull is given
/// up, by failure or because its request ended, they count as quarantined until the agent lets go too.
struct Guard {
    blocks: Destination,
    is_done: bool,
}

impl Guard {
    fn take(&mut self) -> Option<BlockTable> {
        self.blocks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.is_done {
            self.blocks
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .quarantine();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use baton_engine::{Engine, EngineConfig, FakeConfig, FakeExecutor};
    use proptest::prelude::*;

    use super::*;
    use crate::engine_thread::{EngineHandle, HeldBlocks};
    use crate::frames::TokenOutbox;

    #[test]
    fn blocks_of_a_pull_that_was_given_up_are_quarantined_until_the_agent_lets_go() {
        let config = EngineConfig {
            step_tokens_max: 64,
            sequences_max: 8,
            queue_max: 8,
            prefix_cache: false,
        };
        let executor = FakeExecutor::new(FakeConfig::default());
        let engine = Engine::new(Box::new(executor), config);
        let pool = engine.pool();
        let tokens = Arc::new(TokenOutbox::default());
        let (mut engine, _events) = EngineHandle::start(engine, None, tokens, 8).unwrap();
        let guard = |is_done| {
            let blocks = HeldBlocks::new(pool.reserve(3).unwrap(), engine.waker.clone());
            Guard {
                blocks: Arc::new(Mutex::new(blocks)),
                is_done,
            }
        };
        let given_up = guard(false);
        let of_the_agent = given_up.blocks.clone();
        drop(given_up);
        let stats = pool.stats();
        assert_eq!((stats.quarantined, stats.used), (3, 0));
        drop(of_the_agent);
        assert_eq!(pool.stats().available(), pool.stats().total);

        let done = guard(true);
        let of_the_agent = done.blocks.clone();
        drop(done);
        assert_eq!(pool.stats().quarantined, 0, "nobody writes there any more");
        drop(of_the_agent);
        assert_eq!(pool.stats().available(), pool.stats().total);
        engine.shutdown();
    }

    proptest! {
        /// What is cut of the runs, piece by piece, is all of their blocks in order.
        #[test]
        fn pieces_of_runs_are_the_whole(
            runs in prop::collection::vec((0..1000u32, 1..9u32), 0..9),
            mut cuts in prop::collection::vec(0..80usize, 0..6),
        ) {
            let runs: Vec<_> = runs.into_iter().map(|(first, count)| BlockRun { first, count }).collect();
            let blocks = |runs: &[BlockRun]| -> Vec<u32> {
                runs.iter().flat_map(|run| run.first..run.first + run.count).collect()
            };
            let whole = blocks(&runs);
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(whole.len()));
            cuts.extend([0, whole.len()]);
            cuts.sort_unstable();
            let pieces: Vec<u32> = cuts.windows(2).flat_map(|ends| blocks(&cut(&runs, ends[0], ends[1]))).collect();
            prop_assert_eq!(pieces, whole);
        }
    }
}
