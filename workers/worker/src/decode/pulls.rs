//! One pull: read the KV into reserved blocks, have it released, and believe it only if the release was
//! valid.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_bus::Wire;
use baton_engine::BlockTable;
use baton_protocol::deadlines::CONTROL_TIMEOUT_MS;
use baton_protocol::{
    Failure, FailureCode, Incarnation, KvHandle, PullReport, Release, Released, decode, encode,
};
use baton_transfer::{BlockMap, PeerKey, TransferError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::engine_thread::HeldBlocks;
use crate::mover::{Destination, Mover};

/// Pulls that read from one context worker at the same time; the rest wait, and who came first is first. A few fill any link,
/// and with more each only takes longer. Others' links have permits of their own: a slow one may keep its pulls for minutes.
const PULLS_OF_ONE_MAX: usize = 8;

/// When a request's time runs out the desk cancels its task. This much later the agent gives the pull up by itself.
const GRACE: Duration = Duration::from_secs(1);

/// The release is answered within this time or taken as invalid.
const CONTROL_TIMEOUT: Duration = Duration::from_millis(CONTROL_TIMEOUT_MS);

/// Everything one pull needs.
pub(crate) struct Pull {
    pub(crate) key: u64,
    pub(crate) mover: Mover,
    pub(crate) wire: Wire,
    pub(crate) release_subject: String,
    pub(crate) release: Release,
    /// What of a block is read from which rank.
    pub(crate) map: Arc<BlockMap>,
    pub(crate) block_tokens: u32,
    pub(crate) handle: KvHandle,
    pub(crate) blocks: HeldBlocks,
    pub(crate) permit: PullPermit,
    /// When the request's time is over.
    pub(crate) deadline: Instant,
}

/// Who may read now: the permits at each context worker from which pulls are under way or wait.
#[derive(Default)]
pub(crate) struct PullPermits(BTreeMap<Incarnation, Arc<Semaphore>>);

/// A permit that one pull is yet to get.
pub(crate) struct PullPermit(Arc<Semaphore>);

impl PullPermits {
    /// For a pull from this context worker.
    pub(crate) fn permit(&mut self, from: Incarnation) -> PullPermit {
        self.0.retain(|_, permits| Arc::strong_count(permits) > 1);
        let permits = self.0.entry(from);
        let permits = permits.or_insert_with(|| Arc::new(Semaphore::new(PULLS_OF_ONE_MAX)));
        PullPermit(Arc::clone(permits))
    }

    /// The connection to this context worker is lost: nobody waits for it any longer.
    pub(crate) fn lost(&mut self, from: Incarnation) {
        if let Some(permits) = self.0.remove(&from) {
            permits.close();
        }
    }
}

impl PullPermit {
    /// Waits for it, first come, first served; `None` once the connection is lost. Dropped, it is free again.
    async fn get(self) -> Option<OwnedSemaphorePermit> {
        self.0.acquire_owned().await.ok()
    }
}

/// What became of it.
pub(crate) struct Pulled {
    pub(crate) key: u64,
    pub(crate) outcome: Result<(BlockTable, PullReport), PullFailure>,
}

/// Why nothing came of it.
pub(crate) struct PullFailure {
    pub(crate) failure: Failure,
    /// Set when the connection is to blame and must be made again.
    pub(crate) connection: Option<String>,
}

impl PullFailure {
    fn new(code: FailureCode, message: String) -> Self {
        Self {
            failure: Failure::new(code, message),
            connection: None,
        }
    }
}

impl Pull {
    pub(crate) async fn run(self) -> Pulled {
        let key = self.key;
        Pulled {
            key,
            outcome: self.outcome().await,
        }
    }

    async fn outcome(self) -> Result<(BlockTable, PullReport), PullFailure> {
        let Self {
            mover,
            wire,
            release_subject,
            release,
            map,
            block_tokens,
            handle,
            blocks,
            permit,
            deadline,
            ..
        } = self;
        let from = &handle.worker;
        let Some(permit) = permit.get().await else {
            let message = format!("the connection to {from} was lost before its KV was pulled");
            return Err(PullFailure::new(FailureCode::PullFailed, message));
        };
        let valid_blocks = handle.valid_tokens.div_ceil(block_tokens) as usize;
        let local = blocks.table().map(|table| table.ids()).unwrap_or_default();
        let reads = local
            .get(..valid_blocks)
            .ok_or_else(|| "fewer blocks are reserved than the handle has".to_owned())
            .and_then(|local| {
                let reads = map.reads(&handle.runs, local);
                reads.map_err(|error| error.to_string())
            })
            .map_err(|error| {
                PullFailure::new(
                    FailureCode::PullFailed,
                    format!("the handle of {from} cannot be read: {error}"),
                )
            })?;

        let ranges = reads.len();
        let begun = Instant::now();
        let mut guard = Guard {
            blocks: Arc::new(Mutex::new(blocks)),
            is_done: false,
        };
        let stats = mover
            .pull(
                PeerKey(handle.incarnation.0),
                reads,
                guard.blocks.clone(),
                deadline.saturating_duration_since(begun) + GRACE,
            )
            .await;
        let (bytes, read) = match stats {
            Ok(stats) => (stats.bytes, stats.seconds),
            Err(error) => {
                let message = format!("pulling KV from {from}: {error}");
                return Err(PullFailure {
                    connection: is_connection_lost(&error).then(|| message.clone()),
                    failure: Failure::new(FailureCode::PullFailed, message),
                });
            }
        };
        guard.is_done = true;
        // Whoever waits reads while this one asks; a context worker that does not answer keeps nobody from reading.
        drop(permit);

        let invalid = |why: String| {
            PullFailure::new(
                FailureCode::HandleInvalid,
                format!("the KV read from {from} is not to be trusted: {why}"),
            )
        };
        let payload = encode(&release).map_err(|error| invalid(error.to_string()))?;
        let answer = timeout(
            CONTROL_TIMEOUT,
            wire.request(release_subject, payload.into()),
        )
        .await
        .map_err(|_| invalid("its release was not answered in time".to_owned()))?
        .map_err(|error| invalid(format!("its release was not answered: {error}")))?;
        let released: Released =
            decode(&answer.payload).map_err(|error| invalid(error.to_string()))?;
        if !released.valid {
            return Err(invalid(
                "its lease had ended before it was released".to_owned(),
            ));
        }
        let report = PullReport {
            bytes,
            seconds: begun.elapsed().as_secs_f32(),
        };
        tracing::debug!(request = %release.request, ranges, bytes, read_us = read * 1e6, seconds = report.seconds, "read and released");
        let blocks = guard
            .take()
            .ok_or_else(|| invalid("its blocks are gone".to_owned()))?;
        Ok((blocks, report))
    }
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
    use baton_engine::{Engine, EngineConfig, FakeConfig, FakeExecutor};

    use super::*;
    use crate::engine_thread::EngineHandle;
    use crate::frames::TokenOutbox;

    /// What a wait has come to by now.
    async fn by_now<T>(wait: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        tokio::select! {
            biased;
            outcome = wait => Some(outcome),
            () = tokio::task::yield_now() => None,
        }
    }

    #[tokio::test]
    async fn who_comes_first_reads_first_and_one_context_worker_does_not_take_anothers() {
        let mut permits = PullPermits::default();
        let [slow, other] = [1, 2].map(Incarnation);
        let mut held = Vec::new();
        for _ in 0..PULLS_OF_ONE_MAX {
            held.push(permits.permit(slow).get().await.expect("there is room"));
        }
        let mut first = Box::pin(permits.permit(slow).get());
        let mut second = Box::pin(permits.permit(slow).get());
        assert!(by_now(&mut first).await.is_none(), "it has its share");
        assert!(by_now(&mut second).await.is_none());
        assert!(permits.permit(other).get().await.is_some(), "not its own");
        held.pop();
        assert!(by_now(&mut second).await.is_none(), "it came later");
        assert!(by_now(&mut first).await.flatten().is_some());
        drop((first, second, held));
        let again = permits.permit(slow);
        assert_eq!(again.0.available_permits(), PULLS_OF_ONE_MAX);
        assert_eq!(permits.0.len(), 1, "who is not read from is forgotten");
    }

    #[tokio::test]
    async fn nobody_waits_for_a_permit_at_a_connection_that_is_lost() {
        let mut permits = PullPermits::default();
        let [lost, other] = [1, 2].map(Incarnation);
        let mut held = Vec::new();
        for _ in 0..PULLS_OF_ONE_MAX {
            held.push(permits.permit(lost).get().await.expect("there is room"));
            held.push(permits.permit(other).get().await.expect("there is room"));
        }
        let mut waits = Box::pin(permits.permit(lost).get());
        let mut waits_elsewhere = Box::pin(permits.permit(other).get());
        assert!(by_now(&mut waits).await.is_none());
        permits.lost(lost);
        assert!(waits.await.is_none(), "at once");
        assert!(by_now(&mut waits_elsewhere).await.is_none());
        let again = permits.permit(lost).get().await;
        assert!(again.is_some(), "when it is connected again");
    }

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
}
