//! Transfers under way: reads are posted, and what is to follow them follows.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use ucx_sys::Ucp;

use super::ending::Quarantined;
use super::{Guard, Mover};
use crate::TransferError;
use crate::agent::version;
use crate::arena::Region;
use crate::context::status_text;
use crate::peer::{Link, PeerKey};
use crate::probe::{self, PeerReport};
use crate::pull::{Progress, PullStats, Read, Reading, Why};
use crate::stage::{Fetching, Greeting};

/// The rate of a new connection is measured for this long.
const PROBE_TIME: Duration = Duration::from_millis(50);

/// In 10⁹ bytes a second: what is read in place between GPUs and not faster is answered by the peer's processor after all,
/// so that the staged road is tried too.
const IN_PLACE_MIN: f32 = 4.0;

/// Work, and what follows it.
pub(super) struct Transfer {
    pub(super) work: Work,
    pub(super) then: Then,
}

/// How a transfer is made.
pub(super) enum Work {
    /// By reads of one side.
    Reads(Reading),
    /// By asking, chunk after chunk.
    Chunks(Fetching),
    /// Not yet: the peer must know whom it will send to.
    Greeting(Greeting),
}

impl Work {
    pub(super) fn link(&self) -> &Rc<Link> {
        match self {
            Self::Reads(reading) => &reading.link,
            Self::Chunks(fetching) => &fetching.link,
            Self::Greeting(greeting) => &greeting.link,
        }
    }

    /// When it began, and how long it may take.
    fn time(&self) -> (Instant, Duration) {
        match self {
            Self::Reads(reading) => (reading.started, reading.allowed),
            Self::Chunks(fetching) => (fetching.started, fetching.allowed),
            Self::Greeting(greeting) => (greeting.started, greeting.allowed),
        }
    }

    pub(super) fn deadline(&self) -> Instant {
        let (started, allowed) = self.time();
        started + allowed
    }

    /// Bytes moved.
    fn bytes(&self) -> u64 {
        match self {
            Self::Reads(reading) => reading.posted,
            Self::Chunks(fetching) => fetching.stored,
            Self::Greeting(_) => 0,
        }
    }

    fn post(&mut self, ucp: &Ucp, region: &Region, now: Instant) -> bool {
        match self {
            Self::Reads(reading) => reading.post(ucp, region),
            Self::Chunks(fetching) => fetching.post(ucp, now),
            Self::Greeting(greeting) => greeting.post(ucp),
        }
    }

    fn progress(&self, now: Instant) -> Progress {
        match self {
            Self::Reads(reading) => reading.progress(now),
            Self::Chunks(fetching) => fetching.progress(now),
            Self::Greeting(greeting) => greeting.progress(now),
        }
    }

    fn cut(&mut self) {
        match self {
            Self::Reads(reading) => reading.cut(),
            Self::Chunks(fetching) => fetching.cut(),
            Self::Greeting(_) => {}
        }
    }

    /// What still may write to the arena.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Reads(reading) => reading.in_flight(),
            Self::Chunks(fetching) => fetching.in_flight(),
            Self::Greeting(_) => 0,
        }
    }

    /// When it has failed: lets go of what has ended.
    pub(super) fn settle(&mut self) {
        if let Self::Chunks(fetching) = self {
            fetching.settle();
        }
    }
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
    /// Posts reads and ends transfers.
    pub(super) fn advance(&mut self, now: Instant) -> bool {
        let mut busy = false;
        let mut index = 0;
        while let Some(transfer) = self.transfers.get_mut(index) {
            if transfer.then.enough(now) {
                transfer.work.cut();
            }
            busy |= transfer.work.post(self.ucp, &self.region, now);
            let progress = transfer.work.progress(now);
            if progress == Progress::Pending {
                index += 1;
                continue;
            }
            busy = true;
            let transfer = self.transfers.swap_remove(index);
            self.count();
            match progress {
                Progress::Pending => unreachable!("it was skipped above"),
                Progress::Done => self.succeed(transfer, now),
                Progress::Failed(why) => {
                    let status = match why {
                        Why::Ucx(status) => status_text(self.ucp, status),
                        Why::Said(sentence) => sentence,
                    };
                    self.fail(transfer, |peer, doing, _| TransferError::PeerFailed {
                        peer,
                        doing,
                        status,
                    });
                }
                Progress::Late => {
                    let (_, after) = transfer.work.time();
                    self.fail(transfer, |peer, doing, pending| TransferError::Deadline {
                        peer,
                        doing,
                        after,
                        pending,
                    });
                }
            }
        }
        busy
    }

    /// A pull over the road that was found when the peer was connected.
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

    /// Begins to try the staged road. `in_place` is what reads in place reached, if they were tried.
    pub(super) fn greet(
        &mut self,
        link: Rc<Link>,
        started: Instant,
        allowed: Duration,
        in_place: Option<PeerReport>,
        reply: ConnectReply,
    ) {
        if link.regions().len() != 1 {
            let detail = "KV of several ranks is not staged".to_owned();
            let _ = reply.send(Err(TransferError::Descriptor(detail)));
            return self.close(&link);
        }
        let greeting = Greeting::new(self.stage.clone(), link, started, allowed);
        self.transfers.push(Transfer {
            work: Work::Greeting(greeting),
            then: Then::Greet { in_place, reply },
        });
    }

    fn succeed(&mut self, transfer: Transfer, now: Instant) {
        let Transfer { work, then } = transfer;
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
                if link.is_gpu(self.region.memory()) && !probe::reads_gpus(&transport) {
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
                let report = PeerReport {
                    transport,
                    gigabytes_per_second: bytes as f32 / seconds / 1e9,
                };
                let rate = report.gigabytes_per_second;
                let is_gpu = link.is_gpu(self.region.memory());
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
        let reads = probe::probe_reads(&link, &self.region);
        self.transfers.push(Transfer {
            work: self.pulling(link, reads, now, left),
            then: Then::Report {
                transport,
                until: now + PROBE_TIME,
                in_place,
                reply,
            },
        });
    }

    pub(super) fn fail(
        &mut self,
        transfer: Transfer,
        error: impl FnOnce(PeerKey, &'static str, usize) -> TransferError,
    ) {
        let Transfer { work, then } = transfer;
        let peer = work.link().key;
        let error = error(peer, then.name(), work.in_flight());
        tracing::warn!("{error}");
        self.close(&work.link().clone());
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
