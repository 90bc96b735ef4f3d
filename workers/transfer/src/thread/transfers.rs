//! Transfers under way: reads are posted, and what is to follow them follows.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::ending::Quarantined;
use super::{Guard, Mover};
use crate::TransferError;
use crate::agent::version;
use crate::context::status_text;
use crate::peer::PeerKey;
use crate::probe::{self, PeerReport};
use crate::pull::{Progress, PullStats, Reading};

/// The rate of a new connection is measured for this long.
const PROBE_TIME: Duration = Duration::from_millis(50);

/// Reads, and what follows them.
pub(super) struct Transfer {
    pub(super) reading: Reading,
    pub(super) then: Then,
}

pub(super) enum Then {
    /// Hand the guard back.
    Pull {
        guard: Guard,
        reply: oneshot::Sender<Result<(Guard, PullStats), TransferError>>,
    },
    /// The connection stands: measure it.
    Probe {
        reply: oneshot::Sender<Result<PeerReport, TransferError>>,
    },
    /// Report what was measured.
    Report {
        transport: String,
        until: Instant,
        reply: oneshot::Sender<Result<PeerReport, TransferError>>,
    },
}

impl Then {
    fn name(&self) -> &'static str {
        match self {
            Self::Pull { .. } => "a pull",
            Self::Probe { .. } => "connecting",
            Self::Report { .. } => "the probe",
        }
    }

    /// Whether what is not posted yet need not be read: nobody waits for it, or enough was measured.
    fn enough(&self, now: Instant) -> bool {
        match self {
            Self::Pull { reply, .. } => reply.is_closed(),
            Self::Probe { .. } => false,
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
                transfer.reading.cut();
            }
            busy |= transfer.reading.post(self.ucp, &self.region);
            let progress = transfer.reading.progress(now);
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
                Progress::Failed(status) => {
                    let status = status_text(self.ucp, status);
                    self.fail(transfer, |peer, doing, _| TransferError::PeerFailed {
                        peer,
                        doing,
                        status,
                    });
                }
                Progress::Late => {
                    let after = transfer.reading.allowed;
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

    fn succeed(&mut self, transfer: Transfer, now: Instant) {
        let Transfer { reading, then } = transfer;
        let seconds = reading.started.elapsed().as_secs_f32();
        match then {
            Then::Pull { guard, reply } => {
                let stats = PullStats {
                    bytes: reading.posted,
                    seconds,
                };
                // Nobody waits: the guard goes with the answer.
                let _ = reply.send(Ok((guard, stats)));
            }
            Then::Probe { reply } => {
                let transport = probe::describe(&reading.link, version(self.ucp));
                let reads = probe::probe_reads(&reading.link, self.region.scratch());
                let left = reading.deadline().saturating_duration_since(now);
                let reading = Reading::new(self.ucp, reading.link, reads, now, left);
                let until = now + PROBE_TIME;
                self.transfers.push(Transfer {
                    reading,
                    then: Then::Report {
                        transport,
                        until,
                        reply,
                    },
                });
            }
            Then::Report {
                transport, reply, ..
            } => {
                let gigabytes_per_second = reading.posted as f32 / seconds / 1e9;
                let _ = reply.send(Ok(PeerReport {
                    transport,
                    gigabytes_per_second,
                }));
            }
        }
    }

    pub(super) fn fail(
        &mut self,
        transfer: Transfer,
        error: impl FnOnce(PeerKey, &'static str, usize) -> TransferError,
    ) {
        let Transfer { reading, then } = transfer;
        let peer = reading.link.key;
        let error = error(peer, then.name(), reading.in_flight());
        tracing::warn!("{error}");
        self.close(&reading.link.clone());
        let guard = match then {
            Then::Pull { guard, reply } => {
                let _ = reply.send(Err(error));
                Some(guard)
            }
            Then::Probe { reply } | Then::Report { reply, .. } => {
                let _ = reply.send(Err(error));
                None
            }
        };
        self.quarantine.push(Quarantined {
            reading,
            _guard: guard,
        });
    }
}
