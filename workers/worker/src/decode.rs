//! The decode worker's leg: a job with a handle comes in, the KV is pulled, tokens go out.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Message, Subject};
use baton_engine::BlockTable;
use baton_protocol::{
    DecodeJob, DecodeReply, Failure, FailureCode, KvHandle, PROTOCOL_VERSION, PullReport, Refusal,
    Release, RequestId, SequenceSpec, WorkerState, decode,
};
use baton_transfer::BlockMap;
use tokio::task::{self, AbortHandle, JoinError};
use tokio::time::Instant;

use crate::desk::{Desk, task_outcome};
use crate::engine_thread::{Command, HeldBlocks};
use crate::frames::Route;
use crate::pulls::{Pull, PullFailure, Pulled};

/// A try of a generation on this worker.
pub(crate) struct Decoding {
    pub(crate) route: Route,
    admitted: Instant,
    deadline: Instant,
    /// Output index of the next token.
    index: u32,
    phase: Phase,
}

enum Phase {
    Pulling(Box<Pulling>),
    Running,
    /// Ended; the engine is yet to let go of it.
    Ending,
}

struct Pulling {
    sequence: SequenceSpec,
    handle: KvHandle,
    task: AbortHandle,
}

impl Desk {
    /// 1. A job arrives: it is admitted with blocks for it, or refused at once and its handle stays leased.
    pub(crate) fn on_decode(&mut self, message: Message) {
        let Some(reply) = message.reply else {
            tracing::debug!("a decode job without reply subject was ignored");
            return;
        };
        let job = decode::<DecodeJob>(&message.payload).map_err(|error| Refusal::Malformed {
            detail: error.to_string(),
        });
        if let Err(refusal) = job.and_then(|job| self.take_decode(job, &reply)) {
            tracing::debug!(%refusal, "decode refused");
            self.send(
                reply,
                &DecodeReply::Refused {
                    v: PROTOCOL_VERSION,
                    refusal,
                },
            );
        }
    }

    fn take_decode(&mut self, mut job: DecodeJob, reply: &Subject) -> Result<(), Refusal> {
        let now = Instant::now();
        self.heard_api_server(now, &job.api_server, job.api_incarnation)?;
        if self.state != WorkerState::Serving {
            return Err(Refusal::Draining);
        }
        if !self.me.role.decodes() {
            return Err(Refusal::WrongRole {
                detail: "this worker generates nothing: its role is context".to_owned(),
            });
        }
        self.checks.handle(&mut job)?;
        let local =
            job.handle.worker == self.me.worker && job.handle.incarnation == self.me.incarnation;
        let map = match local {
            true => None,
            false => Some(self.reachable(&job.handle)?),
        };
        let earlier: Vec<_> = self
            .decodes
            .iter()
            .filter(|(_, entry)| {
                entry.route.request == job.request && !matches!(entry.phase, Phase::Ending)
            })
            .map(|(key, entry)| (*key, entry.route.attempt))
            .collect();
        if earlier.iter().any(|(_, attempt)| *attempt == job.attempt) {
            // The answer to the first stands. A second one could overtake it.
            tracing::debug!(request = %job.request, attempt = job.attempt, "a decode job came twice");
            return Ok(());
        }
        if let Some((_, attempt)) = earlier.iter().find(|(_, attempt)| *attempt > job.attempt) {
            let detail = format!(
                "try {} of a request whose try {attempt} is here already",
                job.attempt
            );
            return Err(Refusal::Malformed { detail });
        }
        // Blocks for what is there and for the next token. A handle of this worker's own brings its own.
        let blocks = match local {
            true => 0,
            false => self.checks.kv.blocks_for(job.sequence.tokens.0.len() + 1),
        };
        let blocks = self.reserve(now, job.request, blocks)?;
        // A request has one live try.
        for (key, _) in earlier {
            self.end_decode(key, None);
        }
        self.api_servers
            .note(now, &job.api_server, job.api_incarnation);
        let admitted = DecodeReply::Admitted {
            v: PROTOCOL_VERSION,
            incarnation: self.me.incarnation,
        };
        if let Err(error) = self.outbox.send(reply.clone(), &admitted) {
            tracing::warn!(%error, "an admission was not sent: the job is dropped");
            return Ok(());
        }
        tracing::debug!(request = %job.request, attempt = job.attempt, from = %job.handle.worker, "decode admitted");
        match (blocks, map) {
            (Some(blocks), Some(map)) => {
                let blocks = HeldBlocks::new(blocks, self.engine.waker.clone());
                self.pull(now, job, blocks, map);
            }
            _ => self.adopt(now, job),
        }
        Ok(())
    }

    /// How the handle's worker is read from: it is connected.
    fn reachable(&self, handle: &KvHandle) -> Result<Arc<BlockMap>, Refusal> {
        let unreachable = |detail: String| Err(Refusal::Unreachable { detail });
        if self.agent.is_none() {
            return unreachable("this worker moves no KV: it was started without UCX".to_owned());
        }
        self.peers
            .ready(&handle.worker, handle.incarnation)
            .or_else(unreachable)
    }

    /// A place in the batch and blocks for a request's KV, unless those are meant for others that wait longer. `None` if
    /// it wants no blocks.
    fn reserve(
        &mut self,
        now: Instant,
        request: RequestId,
        blocks: usize,
    ) -> Result<Option<BlockTable>, Refusal> {
        let before = self.line.before(request, now);
        let has_place = self.decodes.len() + before.jobs < self.me.capacity.batch as usize;
        if has_place && blocks == 0 {
            self.line.leave(request);
            return Ok(None);
        }
        let fits = has_place && self.pool.stats().available() >= before.blocks + blocks;
        if let Some(table) = fits.then(|| self.pool.reserve(blocks)).flatten() {
            self.line.leave(request);
            return Ok(Some(table));
        }
        self.line.refused(request, blocks, now);
        let ages = self.decodes.values().map(|entry| now - entry.admitted);
        Err(Refusal::Busy {
            retry_after_ms: self.decode_pace.decode_hint_ms(ages, before.jobs),
        })
    }

    /// 2a. The KV is in this worker's own arena: the lease's blocks are taken over, which releases it.
    fn adopt(&mut self, now: Instant, job: DecodeJob) {
        let DecodeJob {
            request,
            attempt,
            api_server,
            budget_ms,
            sequence,
            handle,
            ..
        } = job;
        let index = sequence.output_tokens() + 1;
        let route = Route {
            api_server,
            request,
            attempt,
        };
        let blocks = self.leases.release(now, handle.handle, handle.nonce);
        let Some(blocks) = blocks.and_then(|mut held| held.take()) else {
            let failure = Failure::new(
                FailureCode::HandleInvalid,
                "the lease ended before it was taken over",
            );
            self.tell_failure(&route, index, failure);
            return;
        };
        let deadline = now + Duration::from_millis(budget_ms.into());
        let key = self.new_key(deadline);
        self.decodes.insert(
            key,
            Decoding {
                route,
                admitted: now,
                deadline,
                index,
                phase: Phase::Running,
            },
        );
        self.resume(
            key,
            sequence,
            handle.first_token,
            blocks,
            PullReport::default(),
        );
    }

    /// 2b. The KV is elsewhere: a task pulls it and has it released.
    fn pull(&mut self, now: Instant, job: DecodeJob, blocks: HeldBlocks, map: Arc<BlockMap>) {
        let Some(agent) = self.agent.clone() else {
            return;
        };
        let DecodeJob {
            request,
            attempt,
            api_server,
            budget_ms,
            sequence,
            handle,
            ..
        } = job;
        let deadline = now + Duration::from_millis(budget_ms.into());
        let key = self.new_key(deadline);
        let pull = Pull {
            key,
            agent,
            wire: self.wire.clone(),
            release_subject: self.cluster.release(&handle.worker),
            release: self.release_of(request, &handle),
            map,
            block_tokens: self.checks.kv.block_tokens,
            handle: handle.clone(),
            blocks,
            place: self.pull_places.place(handle.incarnation),
            deadline,
        };
        let task = self.pulls.spawn(pull.run());
        let index = sequence.output_tokens() + 1;
        let phase = Phase::Pulling(Box::new(Pulling {
            sequence,
            handle,
            task,
        }));
        let route = Route {
            api_server,
            request,
            attempt,
        };
        self.decodes.insert(
            key,
            Decoding {
                route,
                admitted: now,
                deadline,
                index,
                phase,
            },
        );
    }

    /// 3. The pull is over: the engine goes on from its KV, or the API server is told to try again.
    pub(crate) fn on_pulled(&mut self, pulled: Result<Pulled, JoinError>) {
        let lost = pulled.as_ref().err().map(JoinError::id);
        let Some(Pulled { key, outcome }) = task_outcome("pull", pulled) else {
            lost.into_iter().for_each(|task| self.end_lost_pull(task));
            return;
        };
        let Some(entry) = self.decodes.get_mut(&key) else {
            return;
        };
        let Phase::Pulling(_) = entry.phase else {
            return;
        };
        let Phase::Pulling(pulling) = std::mem::replace(&mut entry.phase, Phase::Running) else {
            return;
        };
        match outcome {
            Ok((blocks, report)) => {
                tracing::debug!(request = %entry.route.request, bytes = report.bytes, seconds = report.seconds, "pulled");
                self.resume(
                    key,
                    pulling.sequence,
                    pulling.handle.first_token,
                    blocks,
                    report,
                );
            }
            Err(PullFailure {
                failure,
                connection,
            }) => {
                let (route, index) = (entry.route.clone(), entry.index);
                tracing::debug!(request = %route.request, %failure, "pull failed");
                if let Some(error) = connection {
                    let handle = &pulling.handle;
                    self.pull_places.lost(handle.incarnation);
                    self.peers.pull_failed(
                        Instant::now(),
                        &handle.worker,
                        handle.incarnation,
                        error,
                    );
                    self.send_beat();
                }
                if failure.code == FailureCode::PullFailed {
                    self.let_go(&route, &pulling.handle);
                }
                self.decode_left(key);
                self.tell_failure(&route, index, failure);
            }
        }
    }

    fn resume(
        &mut self,
        key: u64,
        spec: SequenceSpec,
        next: u32,
        blocks: BlockTable,
        pulled: PullReport,
    ) {
        let Some(entry) = self.decodes.get(&key) else {
            return;
        };
        let (route, index) = (entry.route.clone(), entry.index);
        let command = Command::Decode {
            key,
            route: route.clone(),
            spec,
            next,
            blocks,
            pulled,
        };
        if !self.engine.send(command) {
            self.decode_left(key);
            let failure = Failure::new(FailureCode::Executor, "the engine takes no commands");
            self.tell_failure(&route, index, failure);
        }
    }

    /// Ends a try in whatever phase it is.
    pub(crate) fn end_decode(&mut self, key: u64, failure: Option<Failure>) {
        let Some(entry) = self.decodes.get_mut(&key) else {
            return;
        };
        self.deadlines.remove(&(entry.deadline, key));
        tracing::debug!(request = %entry.route.request, failure = failure.as_ref().map(tracing::field::display), "decode ended");
        match std::mem::replace(&mut entry.phase, Phase::Ending) {
            Phase::Pulling(pulling) => {
                let (route, index) = (entry.route.clone(), entry.index);
                self.decode_left(key);
                pulling.task.abort();
                self.let_go(&route, &pulling.handle);
                if let Some(failure) = failure {
                    self.tell_failure(&route, index, failure);
                }
            }
            Phase::Running => {
                let command = Command::Abort {
                    key,
                    failure: failure.clone(),
                };
                if !self.engine.send(command) {
                    // The engine, which would say how it ended, is gone.
                    let (route, index) = (entry.route.clone(), entry.index);
                    self.decode_left(key);
                    if let Some(failure) = failure {
                        self.tell_failure(&route, index, failure);
                    }
                }
            }
            Phase::Ending => {}
        }
    }

    /// Where a request is on this worker, for people: goes on after "while".
    pub(crate) fn place_of(&self, key: u64) -> String {
        let me = &self.me.worker;
        match self.decodes.get(&key).map(|entry| &entry.phase) {
            Some(Phase::Pulling(pulling)) => {
                format!("{me} pulled its KV from {}", pulling.handle.worker)
            }
            Some(_) => format!("it was decoding on {me}"),
            None => format!("it was prefilling on {me}"),
        }
    }

    /// Ends a try whose engine says nothing any more.
    pub(crate) fn give_decode_up(&mut self, key: u64, failure: Failure) {
        match self.decodes.get(&key) {
            Some(entry) if matches!(entry.phase, Phase::Running) => {
                let (route, index) = (entry.route.clone(), entry.index);
                self.decode_left(key);
                self.tell_failure(&route, index, failure);
            }
            _ => self.end_decode(key, Some(failure)),
        }
    }

    /// The engine let go of a try, or it never got there.
    pub(crate) fn decode_left(&mut self, key: u64) {
        if let Some(entry) = self.decodes.remove(&key) {
            self.deadlines.remove(&(entry.deadline, key));
            // Whatever ended it: this is how soon places become free.
            self.decode_pace.record(entry.admitted.elapsed());
        }
    }

    /// Says of each job that waits for its turn to pull, pulls, waits for its release, or generates that this worker is at it:
    /// a pull takes as long as its link needs, a step may be long, and who hears nothing of a job gives this worker up.
    pub(crate) fn report_jobs(&self) {
        // Nobody hears it, and what waits to be said must not grow by it.
        if !self.presence.is_connected() || !self.tokens.has_room() {
            return;
        }
        let at_work = |entry: &&Decoding| !matches!(entry.phase, Phase::Ending);
        let items = self.decodes.values().filter(at_work).map(|entry| {
            let route = &entry.route;
            (route.api_server.clone(), route.at_work(entry.index))
        });
        self.tokens.push(items.collect());
    }

    /// A pull task that ended without an outcome leaves its request waiting, unless that has ended already and cancelled it. Other
    /// tasks that have ended have an outcome, which is yet to be taken.
    fn end_lost_pull(&mut self, task: task::Id) {
        let is_its = |entry: &Decoding| matches!(&entry.phase, Phase::Pulling(pulling) if pulling.task.id() == task);
        let lost = self.decodes.iter().find(|(_, entry)| is_its(entry));
        if let Some(key) = lost.map(|(key, _)| *key) {
            let failure = Failure::new(FailureCode::Internal, "the pull task panicked");
            self.end_decode(key, Some(failure));
        }
    }

    /// Releases a handle that nobody will use. Nobody waits for the answer: it only spares the context worker
    /// the wait for the lease's end.
    fn let_go(&self, route: &Route, handle: &KvHandle) {
        let release = self.release_of(route.request, handle);
        self.send(self.cluster.release(&handle.worker), &release);
    }

    fn release_of(&self, request: RequestId, handle: &KvHandle) -> Release {
        Release {
            v: PROTOCOL_VERSION,
            request,
            incarnation: handle.incarnation,
            handle: handle.handle,
            nonce: handle.nonce,
            decode_worker: self.me.worker.clone(),
        }
    }

    fn tell_failure(&self, route: &Route, index: u32, failure: Failure) {
        self.tokens.push(vec![(
            route.api_server.clone(),
            route.failed(index, failure),
        )]);
    }

    /// Pulls under way or waiting for their turn.
    pub(crate) fn pulling(&self) -> usize {
        self.decodes
            .values()
            .filter(|entry| matches!(entry.phase, Phase::Pulling(_)))
            .count()
    }
}
