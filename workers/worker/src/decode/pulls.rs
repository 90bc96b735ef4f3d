//! One pull: read the KV into reserved blocks, have it released, and believe it only if the release was
//! valid. That of a prompt that still runs is read as it comes ([`super::following`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_bus::Wire;
use baton_engine::{BlockTable, Sampled};
use baton_protocol::deadlines::CONTROL_TIMEOUT_MS;
use baton_protocol::{
    Failure, FailureCode, Incarnation, KvHandle, Progress, PullParts, PullReport, Release,
    Released, decode, encode,
};
use baton_traces::Span;
use baton_transfer::BlockMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::reading::Reading;
use crate::mover::{Destination, Mover};

/// Pulls that read from one context worker at the same time; the rest wait, and who came first is first. A few fill any link,
/// and with more each only takes longer. Others' links have permits of their own: a slow one may keep its pulls for minutes.
const PULLS_OF_ONE_MAX: usize = 8;

/// The release is answered within this time or taken as invalid.
pub(super) const CONTROL_TIMEOUT: Duration = Duration::from_millis(CONTROL_TIMEOUT_MS);

/// Everything one pull needs.
pub(crate) struct Pull {
    pub(crate) key: u64,
    pub(crate) mover: Mover,
    pub(crate) wire: Wire,
    pub(crate) release_subject: String,
    pub(crate) release: Release,
    pub(crate) progress_subject: String,
    /// What of a block is read from which rank.
    pub(crate) map: Arc<BlockMap>,
    pub(crate) block_tokens: u32,
    pub(crate) handle: KvHandle,
    pub(crate) blocks: Destination,
    pub(crate) permit: PullPermit,
    /// When the request's time is over.
    pub(crate) deadline: Instant,
    /// Where its trace is recorded.
    pub(crate) trace: Option<Span>,
}

/// Who may read now: the permits at each context worker from which pulls are under way or wait.
#[derive(Default)]
pub(crate) struct PullPermits(BTreeMap<Incarnation, Arc<Semaphore>>);

/// By which one pull gets a permit for each time that it reads.
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
    pub(super) fn get(&self) -> impl Future<Output = Option<OwnedSemaphorePermit>> + Send + use<> {
        let permits = Arc::clone(&self.0);
        async move { permits.acquire_owned().await.ok() }
    }
}

/// What became of it.
pub(crate) struct Pulled {
    pub(crate) key: u64,
    pub(crate) outcome: Result<Kv, PullFailure>,
}

/// KV that is here and was released.
pub(crate) struct Kv {
    pub(crate) blocks: BlockTable,
    /// The token that follows it.
    pub(crate) next: u32,
    /// The same, if the handle had none: its API server may not have it either.
    pub(crate) first: Option<Sampled>,
    pub(crate) report: PullReport,
}

/// Why nothing came of it.
pub(crate) struct PullFailure {
    pub(crate) failure: Failure,
    /// Set when the connection is to blame and must be made again.
    pub(crate) connection: Option<String>,
    /// The context worker tells the API server itself.
    pub(crate) is_told: bool,
}

impl PullFailure {
    pub(super) fn new(code: FailureCode, message: String) -> Self {
        Self {
            failure: Failure::new(code, message),
            connection: None,
            is_told: false,
        }
    }
}

impl Pull {
    pub(crate) async fn run(mut self) -> Pulled {
        let outcome = self.outcome().await;
        if let Some(trace) = self.trace.take() {
            tell(trace, &outcome);
        }
        Pulled {
            key: self.key,
            outcome,
        }
    }

    async fn outcome(&self) -> Result<Kv, PullFailure> {
        let mut reading = Reading::of(self)?;
        let (next, first) = match self.handle.first_token {
            Some(next) => {
                reading.read_all().await?;
                (next, None)
            }
            None => {
                let first = self.follow(&mut reading).await?;
                (first.token, Some(first))
            }
        };
        let read = Instant::now();
        let handover_seconds = self.have_released().await?;
        reading.part("release", read);
        let release = read.elapsed();
        let report = PullReport {
            bytes: reading.bytes,
            seconds: (reading.busy + release).as_secs_f32(),
            handover_seconds,
            parts: Some(PullParts {
                turn: reading.turn.as_secs_f32(),
                progress: reading.progress.as_secs_f32(),
                read: reading.busy.as_secs_f32(),
                release: release.as_secs_f32(),
            }),
        };
        let (request, ranges) = (self.release.request, reading.ranges);
        tracing::debug!(%request, ranges, bytes = report.bytes, read_us = reading.seconds * 1e6, seconds = report.seconds, handover_seconds, "read and released");
        let blocks = reading.take();
        let blocks = blocks.ok_or_else(|| self.invalid("its blocks are gone".to_owned()))?;
        Ok(Kv {
            blocks,
            next,
            first,
            report,
        })
    }

    /// Releases what was read: it counts only if the lease was alive until now. How long the KV waited for that since its prompt was
    /// done, if the context worker says so.
    pub(super) async fn have_released(&self) -> Result<Option<f32>, PullFailure> {
        let invalid = |why: String| self.invalid(why);
        let payload = encode(&self.release).map_err(|error| invalid(error.to_string()))?;
        let request = self
            .wire
            .request(self.release_subject.clone(), payload.into());
        let answer = timeout(CONTROL_TIMEOUT, request)
            .await
            .map_err(|_| invalid("its release was not answered in time".to_owned()))?
            .map_err(|error| invalid(format!("its release was not answered: {error}")))?;
        let released: Released =
            decode(&answer.payload).map_err(|error| invalid(error.to_string()))?;
        match released.valid {
            true => Ok(released.handover_seconds),
            false => Err(invalid(
                "its lease had ended before it was released".to_owned(),
            )),
        }
    }

    pub(super) fn invalid(&self, why: String) -> PullFailure {
        let from = &self.handle.worker;
        let message = format!("the KV read from {from} is not to be trusted: {why}");
        PullFailure::new(FailureCode::HandleInvalid, message)
    }

    /// The question how far the prompt is.
    pub(super) fn progress(&self, have_tokens: u32) -> Progress {
        let Release {
            v,
            request,
            incarnation,
            handle,
            nonce,
            ..
        } = self.release;
        Progress {
            v,
            request,
            incarnation,
            handle,
            nonce,
            have_tokens,
        }
    }
}

/// Says what came of a pull, and ends its span.
fn tell(mut trace: Span, outcome: &Result<Kv, PullFailure>) {
    match outcome {
        Ok(Kv { report, .. }) => {
            trace.set("baton.bytes", report.bytes);
            let read = report.parts.map_or(0.0, |parts| f64::from(parts.read));
            if read > 0.0 {
                let rate = report.bytes as f64 / read / 1e9;
                trace.set("baton.gigabytes_per_second", rate);
            }
        }
        Err(PullFailure { failure, .. }) => trace.fail("pull", failure.to_string()),
    }
    trace.end();
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
