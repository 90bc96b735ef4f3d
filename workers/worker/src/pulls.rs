//! One pull: read the KV into reserved blocks, have it released, and believe it only if the release was
//! valid.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_bus::Wire;
use baton_engine::BlockTable;
use baton_protocol::limits::{CONTROL_TIMEOUT_MS, PULL_TIMEOUT_MS};
use baton_protocol::{
    Failure, FailureCode, Incarnation, KvGeometry, KvHandle, PullReport, Release, Released, decode,
    encode,
};
use baton_transfer::{PeerKey, TransferError, plan_reads};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::engine_thread::HeldBlocks;
use crate::mover::{Destination, Mover};

/// Pulls that read at the same time; the rest wait their turn. A few fill any link, and with more each
/// only takes longer.
const PULLS_MAX: usize = 16;

/// Of these, from one context worker: should it not be reached any more, the others' are not kept waiting.
const PULLS_OF_ONE_MAX: usize = PULLS_MAX / 2;

/// Waiting for its turn, and then reading, may each take this long. A request's budget is not the pull's deadline:
/// when it runs out the desk cancels the task, which ends the reads one by one, while a transfer's deadline closes
/// the connection under everybody else's.
const PULL_TIMEOUT: Duration = Duration::from_millis(PULL_TIMEOUT_MS);

/// The release is answered within this time or taken as invalid.
const CONTROL_TIMEOUT: Duration = Duration::from_millis(CONTROL_TIMEOUT_MS);

/// Everything one pull needs.
pub(crate) struct Pull {
    pub(crate) key: u64,
    pub(crate) agent: Mover,
    pub(crate) wire: Wire,
    pub(crate) release_subject: String,
    pub(crate) release: Release,
    pub(crate) kv: KvGeometry,
    pub(crate) handle: KvHandle,
    pub(crate) blocks: HeldBlocks,
    pub(crate) place: Place,
}

/// Who may read now.
pub(crate) struct Places {
    all: Arc<Semaphore>,
    /// Of context workers from which pulls are under way or wait.
    of_one: BTreeMap<Incarnation, Arc<Semaphore>>,
}

/// A place that one pull is yet to get.
pub(crate) struct Place {
    all: Arc<Semaphore>,
    of_one: Arc<Semaphore>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(PULLS_MAX)),
            of_one: BTreeMap::new(),
        }
    }
}

impl Places {
    /// For a pull from this context worker.
    pub(crate) fn place(&mut self, from: Incarnation) -> Place {
        self.of_one
            .retain(|_, places| Arc::strong_count(places) > 1);
        let of_one = self.of_one.entry(from);
        let of_one = of_one.or_insert_with(|| Arc::new(Semaphore::new(PULLS_OF_ONE_MAX)));
        Place {
            all: Arc::clone(&self.all),
            of_one: Arc::clone(of_one),
        }
    }
}

impl Place {
    /// Waits for it; `None` if it did not become free in time. It is given back with the permits.
    async fn get(self, within: Duration) -> Option<[OwnedSemaphorePermit; 2]> {
        let both = async {
            let of_one = self.of_one.acquire_owned().await?;
            Ok::<_, AcquireError>([of_one, self.all.acquire_owned().await?])
        };
        timeout(within, both).await.ok()?.ok()
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
    /// Set when the connection is to blame and must be made anew.
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
            agent,
            wire,
            release_subject,
            release,
            kv,
            handle,
            blocks,
            place,
            ..
        } = self;
        let from = &handle.worker;
        let Some(place) = place.get(PULL_TIMEOUT).await else {
            let message = format!("other pulls kept one from {from} from beginning");
            return Err(PullFailure::new(FailureCode::PullFailed, message));
        };
        let valid_blocks = kv.blocks_for(handle.valid_tokens as usize);
        let local = blocks.table().map(|table| table.ids()).unwrap_or_default();
        let reads = local
            .get(..valid_blocks)
            .ok_or_else(|| "fewer blocks are reserved than the handle has".to_owned())
            .and_then(|local| {
                plan_reads(&kv, &handle.ranks, local).map_err(|error| error.to_string())
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
        let stats = agent
            .pull(
                PeerKey(handle.incarnation.0),
                reads,
                guard.blocks.clone(),
                PULL_TIMEOUT,
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
        drop(place);

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

/// Whether the connection must be made anew; else only this handle was bad.
fn is_connection_lost(error: &TransferError) -> bool {
    match error {
        TransferError::PeerFailed { .. }
        | TransferError::Deadline { .. }
        | TransferError::NotConnected(_)
        | TransferError::Ucx { .. }
        | TransferError::Stopped => true,
        TransferError::Bounds { .. }
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

    #[tokio::test]
    async fn one_context_worker_does_not_take_every_place() {
        let mut places = Places::default();
        let [dead, other, third] = [1, 2, 3].map(Incarnation);
        let mut held = Vec::new();
        let at_once = Duration::ZERO;
        for _ in 0..PULLS_OF_ONE_MAX {
            held.push(
                places
                    .place(dead)
                    .get(at_once)
                    .await
                    .expect("there is room"),
            );
        }
        assert!(
            places.place(dead).get(at_once).await.is_none(),
            "it has its share"
        );
        for _ in PULLS_OF_ONE_MAX..PULLS_MAX {
            held.push(places.place(other).get(at_once).await.expect("not its own"));
        }
        assert!(
            places.place(third).get(at_once).await.is_none(),
            "all are taken"
        );
        held.clear();
        assert!(places.place(third).get(at_once).await.is_some());
        let again = places.place(dead);
        assert_eq!(again.of_one.available_permits(), PULLS_OF_ONE_MAX);
        assert_eq!(places.of_one.len(), 1, "who is not read from is forgotten");
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
        let (mut engine, _events) = EngineHandle::start(engine, tokens, 8).unwrap();
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
