//! Transfers under way: reads are posted, and what is to follow them follows.
//!
//! Whoever has waited longest goes first, and stands behind all others when it has posted a turn's worth. So several pulls over a
//! link that takes one read at a time are served in turn: between two reads of one pull each of the others has at most one.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::ending::Quarantined;
use super::work::Work;
use super::{Guard, Mover, NOT_STAGED};
use crate::TransferError;
use crate::context::{status_text, version};
use crate::peer::Link;
use crate::probe::{self, PeerReport};
use crate::pull::{Progress, PullStats, Read, Reading, Why};
use crate::stage::{Fetching, Greeting};

/// The rate of a new connection is measured for this long.
const PROBE_TIME: Duration = Duration::from_millis(50);

/// In 10⁹ bytes a second: what is read in place between GPUs and not faster is answered by the peer's processor after all,
/// so that the staged transport is tried too.
const IN_PLACE_MIN: f32 = 4.0;

/// Work, and what follows it.
pub(super) struct Transfer {
    pub(super) work: Work,
    pub(super) then: Then,
    /// The round in which it last posted something, or came.
    turn: u64,
}

type ConnectReply = oneshot::Sender<Result<PeerReport, TransferError>>;

pub(super) enum Then {
    /// Hand the guard back.
    Pull {
        guard: Guard,
        reply: oneshot::Sender<Result<(Guard, PullStats), TransferError>>,
    },
    /// The connection stands: measure it.
    Probe { reply: ConnectReply },
    /// The peer will send staged KV: measure that, and take it if it is faster than reading in place.
    Greet {
        in_place: Option<PeerReport>,
        reply: ConnectReply,
    },
    /// Report what was measured.
    Report {
        transport: String,
        until: Instant,
        in_place: Option<PeerReport>,
        reply: ConnectReply,
    },
}

impl Then {
    fn name(&self) -> &'static str {
        match self {
            Self::Pull { .. } => "a pull",
            Self::Probe { .. } => "connecting",
            Self::Greet { .. } => "asking for staged KV",
            Self::Report { .. } => "the probe",
        }
    }

    /// Whether what is not posted yet need not be read: nobody waits for it, or enough was measured.
    fn enough(&self, now: Instant) -> bool {
        match self {
            Self::Pull { reply, .. } => reply.is_closed(),
            Self::Probe { .. } | Self::Greet { .. } => false,
            Self::Report { until, .. } => now >= *until,
        }
    }
}

impl Mover {
    /// Stands behind all others.
    pub(super) fn begin(&mut self, work: Work, then: Then) {
        let turn = self.round;
        self.transfers.push(Transfer { work, then, turn });
    }

    /// Posts reads and ends transfers.
    pub(super) fn advance(&mut self, now: Instant) -> bool {
        let (mut posted, mut busy) = (false, false);
        for transfer in &mut self.transfers {
            busy |= transfer.work.take_in();
        }
        let mut index = 0;
        self.round += 1;
        while let Some(transfer) = self.transfers.get_mut(index) {
            if transfer.then.enough(now) {
                transfer.work.cut();
            }
            if transfer.work.post(self.ucp, &self.regions, now) {
                transfer.turn = self.round;
                posted = true;
            }
            let progress = transfer.work.progress(now);
            if progress == Progress::Pending {
                index += 1;
                continue;
            }
            busy = true;
            // In order: whoever stands behind it is next.
            let transfer = self.transfers.remove(index);
            self.count();
            match progress {
                Progress::Done => self.succeed(transfer, now),
                Progress::Failed(why) => {
                    let error = self.failure(&transfer, why);
                    self.fail(transfer, error);
                }
                // Its time is up, and it was pending.
                Progress::Late | Progress::Pending => {
                    let error = TransferError::Deadline {
                        peer: transfer.work.link().key,
                        doing: transfer.then.name(),
                        after: transfer.work.time().1,
                        pending: transfer.work.in_flight(),
                    };
                    self.fail(transfer, error);
                }
            }
        }
        if posted {
            // Stable, and in order but for those that posted.
            self.transfers.sort_by_key(|transfer| transfer.turn);
        }
        posted || busy
    }

    fn failure(&self, transfer: &Transfer, why: Why) -> TransferError {
        let link = transfer.work.link();
        let (peer, doing) = (link.key, transfer.then.name());
        match (why, link.stalled()) {
            (Why::Said(detail), _) => TransferError::Staging { peer, detail },
            (Why::Ucx(_), Some(pending)) => TransferError::Stalled {
                peer,
                doing,
                after: link.flow.stall_after(),
                pending,
            },
            (Why::Ucx(status), None) => TransferError::PeerFailed {
                peer,
                doing,
                status: status_text(self.ucp, status),
            },
        }
    }

    /// A pull over the transport that was found when the peer was connected.
    pub(super) fn pulling(
        &self,
        link: Rc<Link>,
        reads: Vec<Read>,
        started: Instant,
        allowed: Duration,
    ) -> Work {
        match link.staged.get() {
            true => {
                let stage = self.stage.clone();
                Work::Chunks(Fetching::new(stage, link, reads, started, allowed))
            }
            false => Work::Reads(Reading::new(self.ucp, link, reads, started, allowed)),
        }
    }

    /// Begins to try the staged transport. `in_place` is what reads in place reached, if they were tried.
    pub(super) fn greet(
        &mut self,
        link: Rc<Link>,
        started: Instant,
        allowed: Duration,
        in_place: Option<PeerReport>,
        reply: ConnectReply,
    ) {
        if link.regions().len() != 1 || self.regions.all().len() != 1 {
            let _ = reply.send(Err(TransferError::Descriptor(NOT_STAGED.to_owned())));
            return self.close(&link);
        }
        let greeting = Greeting::new(self.stage.clone(), link, started, allowed);
        self.begin(Work::Greeting(greeting), Then::Greet { in_place, reply });
    }

    fn succeed(&mut self, transfer: Transfer, now: Instant) {
        let Transfer { work, then, .. } = transfer;
        let (started, allowed) = work.time();
        let (seconds, bytes) = (started.elapsed().as_secs_f32(), work.bytes());
        let left = (started + allowed).saturating_duration_since(now);
        let link = work.link().clone();
        match then {
            Then::Pull { guard, reply } => {
                // Nobody waits: the guard goes with the answer.
                let _ = reply.send(Ok((guard, PullStats { bytes, seconds })));
            }
            Then::Probe { reply } => {
                let transport = probe::describe(&link, version(self.ucp));
                if link.is_gpu(self.regions.memory()) && !probe::reads_gpus(&transport) {
                    return self.greet(link, now, left, None, reply);
                }
                self.measure(link, transport, now, left, None, reply);
            }
            Then::Greet { in_place, reply } => {
                link.staged.set(true);
                let transport = probe::describe_staged(&link);
                self.measure(link, transport, now, left, in_place, reply);
            }
            Then::Report {
                transport,
                in_place,
                reply,
                ..
            } => {
                let rate = link.flow.end_probe();
                let report = PeerReport {
                    transport,
                    gigabytes_per_second: rate.map_or(0.0, |rate| (rate / 1e9) as f32),
                };
                let rate = report.gigabytes_per_second;
                let is_gpu = link.is_gpu(self.regions.memory());
                if is_gpu && !link.staged.get() && rate < IN_PLACE_MIN {
                    return self.greet(link, now, left, Some(report), reply);
                }
                let report = match in_place {
                    Some(in_place) if in_place.gigabytes_per_second >= rate => {
                        link.staged.set(false);
                        in_place
                    }
                    _ => report,
                };
                let _ = reply.send(Ok(report));
            }
        }
    }

    fn measure(
        &mut self,
        link: Rc<Link>,
        transport: String,
        now: Instant,
        left: Duration,
        in_place: Option<PeerReport>,
        reply: ConnectReply,
    ) {
        let reads = probe::probe_reads(&link, &self.regions);
        link.flow.begin_probe();
        let work = self.pulling(link, reads, now, left);
        let then = Then::Report {
            transport,
            until: now + PROBE_TIME,
            in_place,
            reply,
        };
        self.begin(work, then);
    }

    /// Ends a transfer with an error. A pull that ran out of time, or whose KV could not be staged, posts no more, and what it has
    /// outstanding is left to end: others read over its link. Any other failure is the link's.
    pub(super) fn fail(&mut self, transfer: Transfer, error: TransferError) {
        let Transfer { mut work, then, .. } = transfer;
        let link_is_well = matches!(
            (&then, &error),
            (
                Then::Pull { .. },
                TransferError::Deadline { .. } | TransferError::Staging { .. }
            )
        );
        tracing::warn!("{error}");
        match link_is_well {
            true => work.cut(),
            false => self.close(&work.link().clone()),
        }
        let guard = match then {
            Then::Pull { guard, reply } => {
                let _ = reply.send(Err(error));
                Some(guard)
            }
            Then::Probe { reply } | Then::Greet { reply, .. } | Then::Report { reply, .. } => {
                let _ = reply.send(Err(error));
                None
            }
        };
        self.quarantine.push(Quarantined {
            work,
            _guard: guard,
        });
    }
}
