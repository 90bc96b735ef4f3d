//! The beginning of a prompt that is to run here, pulled from the worker that has it: leased there by its tokens, read into blocks of
//! this worker, released, and put into the prefix index if that was valid. Then the prompt runs as any whose prefix is cached.
//!
//! Whatever fails here costs time and nothing else: the prompt runs from what there is. It gets no more time than computing would take,
//! so a prompt waits at most as long again.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_bus::Wire;
use baton_engine::BlockTable;
use baton_protocol::deadlines::{CONTROL_TIMEOUT_MS, PREFIX_PULL_MIN_MS};
use baton_protocol::{
    FailureCode, KvGeometry, KvHandle, LeaseAsk, LeaseReply, PROTOCOL_VERSION, PrefillJob,
    PrefixPull, PrefixPullFailure, PrefixSource, Release, StepShape, decode, encode,
};
use baton_transfer::BlockMap;
use tokio::task::{AbortHandle, Id};
use tokio::time::{Instant, timeout_at};

use super::DecodeSide;
use super::pulls::{Pull, PullFailure, PullPermit};
use super::reading::Reading;
use crate::bus::Outbox;
use crate::common::Common;
use crate::engine_thread::HeldBlocks;
use crate::mover::{Destination, Mover};

/// What is done about a prompt's beginning that another worker has.
pub(crate) enum Beginning {
    /// Nothing: it is here as well, or this worker pulls none.
    Here,
    /// It cannot be pulled.
    Not(PrefixPullFailure),
    /// It is being pulled.
    Pulling(PullTask),
}

/// A pull under way; dropped, it is given up.
pub(crate) struct PullTask(AbortHandle);

/// How it ended.
pub(crate) struct PrefixPulled {
    /// Of the prompt.
    pub(crate) key: u64,
    pub(crate) report: PrefixPull,
    source: PrefixSource,
    /// Set when the connection is to blame and must be made again.
    connection: Option<String>,
}

/// Everything one such pull needs.
struct Pulling {
    key: u64,
    source: PrefixSource,
    ask: LeaseAsk,
    lease_subject: String,
    release_subject: String,
    progress_subject: String,
    mover: Mover,
    wire: Wire,
    outbox: Outbox,
    map: Arc<BlockMap>,
    kv: KvGeometry,
    blocks: Destination,
    /// Tokens that are here.
    have: u32,
    permit: PullPermit,
    begun: Instant,
    /// When it is given up.
    limit: Instant,
}

/// What came of it.
struct Failed {
    failure: PrefixPullFailure,
    connection: Option<String>,
}

impl PullTask {
    pub(crate) fn id(&self) -> Id {
        self.0.id()
    }
}

impl Drop for PullTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl DecodeSide {
    /// A prompt is to run here whose beginning another worker is said to have.
    pub(crate) fn pull_prefix(
        &mut self,
        common: &Common,
        now: Instant,
        key: u64,
        job: &PrefillJob,
        lease: Duration,
    ) -> Beginning {
        let Some(source) = job.source.as_ref().filter(|_| common.me.leases_prefixes) else {
            return Beginning::Here;
        };
        let Some(mover) = common.mover.clone() else {
            return Beginning::Here;
        };
        let block_tokens = common.checks.kv.block_tokens;
        let tokens = &job.sequence.tokens.0;
        // Whole blocks, and a token at least is left to compute.
        let most = tokens.len().saturating_sub(1).min(source.tokens as usize);
        let blocks = most / block_tokens as usize;
        let tokens = &tokens[..blocks * block_tokens as usize];
        let Some(table) = common
            .pool
            .reserve_reusing(tokens, job.sequence.cache_salt, blocks, 0)
        else {
            return Beginning::Not(PrefixPullFailure::NoRoom);
        };
        if table.indexed() == blocks {
            return Beginning::Here;
        }
        let map = match self.peers.ready(&source.worker, source.incarnation) {
            Ok(link) => Arc::clone(&link.map),
            Err(error) => {
                tracing::debug!(request = %job.request, error, "the beginning of a prompt is not pulled");
                return Beginning::Not(PrefixPullFailure::Unreachable);
            }
        };
        let have = table.indexed() as u32 * block_tokens;
        let allowed = allowed(common, tokens.len() as u32 - have, have).min(lease);
        let ask = LeaseAsk {
            v: PROTOCOL_VERSION,
            request: job.request,
            api_server: job.api_server.clone(),
            api_incarnation: job.api_incarnation,
            from: common.me.worker.clone(),
            incarnation: source.incarnation,
            model: job.model.clone(),
            tokens: tokens.to_vec().into(),
            cache_salt: job.sequence.cache_salt,
            lease_ms: allowed.as_millis() as u32 + 1,
        };
        let blocks = HeldBlocks::new(table, common.engine.waker.clone());
        let pulling = Pulling {
            key,
            ask,
            lease_subject: common.cluster.lease(&source.worker),
            release_subject: common.cluster.release(&source.worker),
            progress_subject: common.cluster.progress(&source.worker),
            source: source.clone(),
            mover,
            wire: common.wire.clone(),
            outbox: common.outbox.clone(),
            map,
            kv: common.checks.kv.clone(),
            blocks: Arc::new(Mutex::new(blocks)),
            have,
            permit: self.pull_permits.permit(source.incarnation),
            begun: now,
            limit: now + allowed,
        };
        Beginning::Pulling(PullTask(self.prefix_pulls.spawn(pulling.run())))
    }

    /// One has ended. Says whether its connection is lost, which others want to know.
    pub(crate) fn on_prefix_pulled(&mut self, pulled: &PrefixPulled) -> bool {
        let Some(error) = &pulled.connection else {
            return false;
        };
        let PrefixSource {
            worker,
            incarnation,
            ..
        } = &pulled.source;
        self.pull_permits.lost(*incarnation);
        self.peers
            .pull_failed(Instant::now(), worker, *incarnation, error.clone());
        true
    }
}

/// How long a pull of so many tokens behind others may take: as long as computing them would.
fn allowed(common: &Common, tokens: u32, behind: u32) -> Duration {
    let cost = common.engine.load.cost();
    let compute = cost.map(|measured| {
        let shape = StepShape::default().and_prompt(tokens.into(), behind.into());
        measured.cost.step_time(shape)
    });
    let least = Duration::from_millis(PREFIX_PULL_MIN_MS);
    compute.map_or(Duration::from_millis(CONTROL_TIMEOUT_MS), |time| {
        time.max(least)
    })
}

impl Pulling {
    async fn run(self) -> PrefixPulled {
        let (key, source, begun) = (self.key, self.source.clone(), self.begun);
        let (request, limit) = (self.ask.request, self.limit);
        let outcome = timeout_at(limit, self.outcome()).await;
        let outcome = outcome.unwrap_or_else(|_| Err(Failed::of(PrefixPullFailure::Late)));
        let (mut report, connection) = match outcome {
            Ok(report) => (report, None),
            Err(failed) => {
                let report = PrefixPull {
                    failure: Some(failed.failure),
                    ..PrefixPull::default()
                };
                (report, failed.connection)
            }
        };
        report.seconds = begun.elapsed().as_secs_f32();
        tracing::debug!(%request, from = %source.worker, ?report, "the beginning of a prompt was pulled, or not");
        PrefixPulled {
            key,
            report,
            source,
            connection,
        }
    }

    async fn outcome(self) -> Result<PrefixPull, Failed> {
        let handle = self.lease().await?;
        let release = Release {
            v: PROTOCOL_VERSION,
            request: self.ask.request,
            incarnation: handle.incarnation,
            handle: handle.handle,
            nonce: handle.nonce,
            decode_worker: self.ask.from.clone(),
        };
        let mut held = Held {
            outbox: self.outbox,
            subject: self.release_subject.clone(),
            release: Some(release.clone()),
        };
        let tokens = handle.valid_tokens;
        let is_of_use = handle.worker == self.source.worker
            && handle.incarnation == self.source.incarnation
            && handle.model == self.ask.model
            && self.kv.difference(&handle.kv).is_none()
            && tokens.is_multiple_of(self.kv.block_tokens)
            && tokens as usize <= self.ask.tokens.0.len();
        if !is_of_use {
            return Err(Failed::of(PrefixPullFailure::Failed));
        }
        if tokens <= self.have {
            return Err(Failed::of(PrefixPullFailure::Absent));
        }
        let pull = Pull {
            key: self.key,
            mover: self.mover,
            wire: self.wire,
            release_subject: self.release_subject,
            release,
            progress_subject: self.progress_subject,
            map: self.map,
            block_tokens: self.kv.block_tokens,
            handle,
            blocks: self.blocks,
            permit: self.permit,
            deadline: self.limit,
            trace: None,
        };
        let (table, bytes) = pull.read_and_release().await?;
        held.release = None;
        let all = &self.ask.tokens.0[..tokens as usize];
        table.keep(self.ask.cache_salt, all);
        Ok(PrefixPull {
            tokens: tokens - self.have,
            bytes,
            ..PrefixPull::default()
        })
    }

    /// Has the source hold what it has.
    async fn lease(&self) -> Result<KvHandle, Failed> {
        let refused = || Failed::of(PrefixPullFailure::Refused);
        let payload = encode(&self.ask).map_err(|_| refused())?;
        let within = Duration::from_millis(CONTROL_TIMEOUT_MS);
        let answer = self
            .wire
            .request_within(self.lease_subject.clone(), payload.into(), within);
        let answer = answer.await.map_err(|error| {
            tracing::debug!(request = %self.ask.request, %error, "no lease of a prompt's beginning");
            refused()
        })?;
        match decode::<LeaseReply>(&answer.payload) {
            Ok(LeaseReply::Leased { handle, .. }) => Ok(*handle),
            Ok(LeaseReply::Absent { .. }) => Err(Failed::of(PrefixPullFailure::Absent)),
            Ok(LeaseReply::Refused { refusal, .. }) => {
                tracing::debug!(request = %self.ask.request, %refusal, "no lease of a prompt's beginning");
                Err(refused())
            }
            Err(error) => {
                tracing::debug!(%error, "the answer to a lease was not understood");
                Err(refused())
            }
        }
    }
}

impl Pull {
    /// Reads all of a handle that has no prompt. The blocks, of which those of the handle are good now.
    async fn read_and_release(&self) -> Result<(BlockTable, u64), Failed> {
        let mut reading = Reading::of(self)?;
        reading.read_all().await?;
        self.have_released().await?;
        let bytes = reading.bytes;
        let table = reading.take();
        let table = table.ok_or_else(|| Failed::of(PrefixPullFailure::Failed))?;
        Ok((table, bytes))
    }
}

impl Failed {
    fn of(failure: PrefixPullFailure) -> Self {
        Self {
            failure,
            connection: None,
        }
    }
}

impl From<PullFailure> for Failed {
    fn from(failed: PullFailure) -> Self {
        tracing::debug!(failure = %failed.failure, "the beginning of a prompt was not pulled");
        Self {
            failure: match failed.failure.code {
                FailureCode::HandleInvalid => PrefixPullFailure::Invalid,
                _ => PrefixPullFailure::Failed,
            },
            connection: failed.connection,
        }
    }
}

/// A lease at the source. Unless its release was valid it is released when this is dropped, so that the source need not wait for its end.
struct Held {
    outbox: Outbox,
    subject: String,
    release: Option<Release>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(release) = self.release.take()
            && let Err(error) = self.outbox.send(self.subject.clone(), &release)
        {
            tracing::debug!(%error, "a lease is left to its end");
        }
    }
}
