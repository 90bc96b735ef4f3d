//! The decode side: a job with a handle comes in, the KV is pulled, tokens go out.

mod admission;
mod connect;
mod following;
mod line;
mod peers;
mod prefix;
mod pulls;
mod reading;

use std::collections::BTreeMap;

use async_nats::Subject;
use baton_engine::{BlockTable, Sampled};
use baton_protocol::{
    ApiServerId, Beat, DecodeReply, Failure, FailureCode, KvHandle, KvShares, PROTOCOL_VERSION,
    PeerHealth, PullReport, Refusal, Release, RequestId, SequenceSpec, Tier,
};
use baton_traces::{Kind, Span};
use baton_transfer::PeerKey;
use tokio::task::{self, AbortHandle, JoinError, JoinSet};
use tokio::time::Instant;

use crate::common::{Common, task_outcome};
use crate::engine_thread::Command;
use crate::frames::Route;
use crate::pace::Pace;
use connect::LinkOutcome;
use line::Line;
use peers::Peers;
use pulls::{Kv, PullFailure, PullPermits, Pulled};

pub(crate) use prefix::{Beginning, PrefixPulled, PullTask};

/// A worker that generates has this.
pub(crate) struct DecodeSide {
    /// Pulls and generations, by key.
    pub(crate) decodes: BTreeMap<u64, Decoding>,
    /// Jobs that wait for a place.
    line: Line,
    /// Under way, or waiting for their turn.
    pub(crate) pulls: JoinSet<Pulled>,
    /// Of prompts' beginnings.
    prefix_pulls: JoinSet<PrefixPulled>,
    pull_permits: PullPermits,
    pub(crate) peers: Peers,
    /// Connections that are being made.
    pub(crate) links: JoinSet<LinkOutcome>,
    /// What our ranks hold of the KV.
    shares: KvShares,
    /// How long generations take, from admission to end.
    pace: Pace,
}

/// What ended beside the desk.
pub(crate) enum Ended {
    Pull(Result<Pulled, JoinError>),
    Prefix(Result<PrefixPulled, JoinError>),
    Link(Result<LinkOutcome, JoinError>),
}

/// A try of a generation on this worker.
pub(crate) struct Decoding {
    route: Route,
    tier: Tier,
    admitted: Instant,
    deadline: Instant,
    /// Output index of the next token.
    index: u32,
    phase: Phase,
    /// Where its trace is recorded: from its admission until the engine has let go of it.
    trace: Option<Span>,
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

impl DecodeSide {
    pub(crate) fn new(common: &Common, shares: KvShares) -> Self {
        let checks = &common.checks;
        let me = common.me.worker.clone();
        Self {
            decodes: BTreeMap::new(),
            line: Line::default(),
            pulls: JoinSet::new(),
            prefix_pulls: JoinSet::new(),
            pull_permits: PullPermits::default(),
            peers: Peers::new(me, checks.model.clone(), checks.kv.clone()),
            links: JoinSet::new(),
            shares,
            pace: Pace::default(),
        }
    }

    /// The next pull or connection to end; `None` where there is none.
    pub(crate) async fn next_ended(&mut self) -> Option<Ended> {
        tokio::select! {
            biased;
            Some(pulled) = self.pulls.join_next() => Some(Ended::Pull(pulled)),
            Some(prefix) = self.prefix_pulls.join_next() => Some(Ended::Prefix(prefix)),
            Some(link) = self.links.join_next() => Some(Ended::Link(link)),
            else => None,
        }
    }

    /// The pull is over: the engine goes on from its KV, or the API server is told to try again. Says whether its connection
    /// is lost, which others want to know.
    pub(crate) fn on_pulled(
        &mut self,
        common: &mut Common,
        pulled: Result<Pulled, JoinError>,
    ) -> bool {
        let lost = pulled.as_ref().err().map(JoinError::id);
        let Some(Pulled { key, outcome }) = task_outcome("pull", pulled) else {
            lost.into_iter()
                .for_each(|task| self.end_lost_pull(common, task));
            return false;
        };
        let Some(entry) = self.decodes.get_mut(&key) else {
            return false;
        };
        let Phase::Pulling(_) = entry.phase else {
            return false;
        };
        let Phase::Pulling(pulling) = std::mem::replace(&mut entry.phase, Phase::Running) else {
            return false;
        };
        match outcome {
            Ok(Kv {
                blocks,
                next,
                first,
                report,
            }) => {
                tracing::debug!(request = %entry.route.request, bytes = report.bytes, seconds = report.seconds, "pulled");
                self.resume(common, key, pulling.sequence, (next, first), blocks, report);
                false
            }
            Err(PullFailure {
                failure,
                connection,
                is_told,
            }) => {
                let (route, index) = (entry.route.clone(), entry.index);
                tracing::debug!(request = %route.request, %failure, "pull failed");
                let is_lost = connection.is_some();
                if let Some(trace) = &mut entry.trace {
                    trace.fail("pull", failure.to_string());
                }
                if let Some(error) = connection {
                    let handle = &pulling.handle;
                    self.pull_permits.lost(handle.incarnation);
                    self.peers.pull_failed(
                        Instant::now(),
                        &handle.worker,
                        handle.incarnation,
                        error,
                    );
                }
                if failure.code == FailureCode::PullFailed {
                    let_go(common, &route, &pulling.handle);
                }
                self.left(common, key);
                if !is_told {
                    tell_failure(common, &route, index, failure);
                }
                is_lost
            }
        }
    }

    fn resume(
        &mut self,
        common: &mut Common,
        key: u64,
        spec: SequenceSpec,
        (next, first): (u32, Option<Sampled>),
        blocks: BlockTable,
        pulled: PullReport,
    ) {
        let Some(entry) = self.decodes.get(&key) else {
            return;
        };
        let (route, index) = (entry.route.clone(), entry.index);
        let now = Instant::now().into_std();
        let trace = entry.trace.as_ref();
        let trace = trace.and_then(|trace| trace.child(Kind::Internal, "generate", now));
        let command = Command::Decode {
            key,
            route: route.clone(),
            spec,
            next,
            first,
            blocks,
            pulled,
            trace: trace.map(Box::new),
        };
        if !common.engine.send(command) {
            self.left(common, key);
            let failure = Failure::new(FailureCode::Executor, "the engine takes no commands");
            tell_failure(common, &route, index, failure);
        }
    }

    /// Ends a try in whatever phase it is.
    pub(crate) fn end(&mut self, common: &mut Common, key: u64, failure: Option<Failure>) {
        let Some(entry) = self.decodes.get_mut(&key) else {
            return;
        };
        common.deadlines.remove(&(entry.deadline, key));
        tracing::debug!(request = %entry.route.request, failure = failure.as_ref().map(tracing::field::display), "decode ended");
        if let (Some(trace), Some(failure)) = (&mut entry.trace, &failure) {
            trace.fail("ended", failure.to_string());
        }
        match std::mem::replace(&mut entry.phase, Phase::Ending) {
            Phase::Pulling(pulling) => {
                let (route, index) = (entry.route.clone(), entry.index);
                self.left(common, key);
                pulling.task.abort();
                let_go(common, &route, &pulling.handle);
                if let Some(failure) = failure {
                    tell_failure(common, &route, index, failure);
                }
            }
            Phase::Running => {
                let command = Command::Abort {
                    key,
                    failure: failure.clone(),
                };
                if !common.engine.send(command) {
                    // The engine, which would say how it ended, is gone.
                    let (route, index) = (entry.route.clone(), entry.index);
                    self.left(common, key);
                    if let Some(failure) = failure {
                        tell_failure(common, &route, index, failure);
                    }
                }
            }
            Phase::Ending => {}
        }
    }

    /// Where a request is on this worker, for people: goes on after "while".
    pub(crate) fn place_of(&self, common: &Common, key: u64) -> Option<String> {
        let me = &common.me.worker;
        let entry = self.decodes.get(&key)?;
        Some(match &entry.phase {
            Phase::Pulling(pulling) => {
                format!("{me} pulled its KV from {}", pulling.handle.worker)
            }
            Phase::Running | Phase::Ending => format!("it was decoding on {me}"),
        })
    }

    /// Ends a try whose engine says nothing any more.
    pub(crate) fn give_up(&mut self, common: &mut Common, key: u64, failure: Failure) {
        match self.decodes.get(&key) {
            Some(entry) if matches!(entry.phase, Phase::Running) => {
                let (route, index) = (entry.route.clone(), entry.index);
                self.left(common, key);
                tell_failure(common, &route, index, failure);
            }
            _ => self.end(common, key, Some(failure)),
        }
    }

    /// The engine let go of a try, or it never got there.
    pub(crate) fn left(&mut self, common: &mut Common, key: u64) {
        if let Some(entry) = self.decodes.remove(&key) {
            common.deadlines.remove(&(entry.deadline, key));
            // Whatever ended it: this is how soon places become free.
            self.pace.record(entry.admitted.elapsed());
            if let Some(trace) = entry.trace {
                trace.end();
            }
        }
    }

    /// Says of each job that waits for its turn to pull, pulls, waits for its release, or generates that this worker is at it:
    /// a pull takes as long as its link needs, a step may be long, and who hears nothing of a job gives this worker up.
    pub(crate) fn report_jobs(&self, common: &Common) {
        // What waits to be said must not grow by it.
        if !common.tokens.has_room() {
            return;
        }
        let at_work = |entry: &&Decoding| !matches!(entry.phase, Phase::Ending);
        let items = self.decodes.values().filter(at_work).map(|entry| {
            let route = &entry.route;
            (route.api_server.clone(), route.at_work(entry.index))
        });
        common.tokens.push(items.collect());
    }

    /// A pull task that ended without an outcome leaves its request waiting, unless that has ended already and cancelled it. Other
    /// tasks that have ended have an outcome, which is yet to be taken.
    fn end_lost_pull(&mut self, common: &mut Common, task: task::Id) {
        let is_its = |entry: &Decoding| matches!(&entry.phase, Phase::Pulling(pulling) if pulling.task.id() == task);
        let lost = self.decodes.iter().find(|(_, entry)| is_its(entry));
        if let Some(key) = lost.map(|(key, _)| *key) {
            let failure = Failure::new(FailureCode::Internal, "the pull task panicked");
            self.end(common, key, Some(failure));
        }
    }

    /// Pulls under way or waiting for their turn.
    pub(crate) fn pulling(&self) -> usize {
        self.decodes
            .values()
            .filter(|entry| matches!(entry.phase, Phase::Pulling(_)))
            .count()
    }

    /// Pulls and generations of interactive requests.
    pub(crate) fn interactive(&self) -> usize {
        let all = self.decodes.values();
        all.filter(|entry| entry.tier == Tier::Interactive).count()
    }

    /// A request is over, or another worker has it: its place in the line is free.
    pub(crate) fn leave_line(&mut self, request: RequestId) {
        self.line.leave(request);
    }

    /// Mean time of a generation.
    pub(crate) fn mean_ms(&self) -> u32 {
        self.pace.mean_ms()
    }

    /// Keys of the tries here whose API server and request are these.
    pub(crate) fn keys_of<'a>(
        &'a self,
        are: &'a impl Fn(&ApiServerId, &RequestId) -> bool,
    ) -> impl Iterator<Item = u64> + 'a {
        let entries = self.decodes.iter();
        entries
            .filter(|(_, entry)| are(&entry.route.api_server, &entry.route.request))
            .map(|(key, _)| *key)
    }

    /// A worker beat.
    pub(crate) fn heard(&mut self, common: &Common, beat: &Beat) {
        if common.mover.is_some() {
            let actions = self.peers.heard(Instant::now(), beat);
            self.act_all(common, actions);
        }
    }

    /// Lets go of peers that fell silent, and tries broken ones again.
    pub(crate) fn tick_peers(&mut self, common: &Common, now: Instant) {
        let actions = self.peers.tick(now);
        self.act_all(common, actions);
    }

    /// Connections that broke while nobody pulled over them are made again.
    pub(crate) fn look_at_connections(&mut self, common: &Common, now: Instant) {
        if let Some(mover) = &common.mover {
            self.peers.look(now, |incarnation| {
                mover.is_connected(PeerKey(incarnation.0))
            });
        }
    }

    /// Context workers, how fast pulls from them are, and what they brought.
    pub(crate) fn peer_health(&self, common: &Common) -> Vec<PeerHealth> {
        let mut peers = self.peers.health();
        if let Some(mover) = &common.mover {
            for peer in &mut peers {
                let key = PeerKey(peer.incarnation.0);
                peer.pulled_gigabytes_per_second = mover.pulled_rate(key);
                peer.pulled_bytes = mover.pulled_bytes(key);
            }
        }
        peers
    }
}

/// Answers a job that was not taken.
pub(crate) fn refuse(common: &Common, reply: Subject, refusal: Refusal) {
    tracing::debug!(%refusal, "decode refused");
    let v = PROTOCOL_VERSION;
    common.send(reply, &DecodeReply::Refused { v, refusal });
}

/// Releases a handle that nobody will use. Nobody waits for the answer: it only spares the context worker
/// the wait for the lease's end.
fn let_go(common: &Common, route: &Route, handle: &KvHandle) {
    let release = release_of(common, route.request, handle);
    common.send(common.cluster.release(&handle.worker), &release);
}

fn release_of(common: &Common, request: RequestId, handle: &KvHandle) -> Release {
    Release {
        v: PROTOCOL_VERSION,
        request,
        incarnation: handle.incarnation,
        handle: handle.handle,
        nonce: handle.nonce,
        decode_worker: common.me.worker.clone(),
    }
}

fn tell_failure(common: &Common, route: &Route, index: u32, failure: Failure) {
    common.tokens.push(vec![(
        route.api_server.clone(),
        route.failed(index, failure),
    )]);
}
