//! The lease of the KV that a generation waits for, by this server's own clock, and its renewals.
//!
//! A handle is mostly released within milliseconds, so nothing is said of its lease before a third of it is over.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use baton_protocol::deadlines::{CONTROL_TIMEOUT_MS, lease_renew_interval_ms};
use baton_protocol::{KvHandle, PROTOCOL_VERSION, Renew, Renewed, RequestId};
use tokio::time::Instant;

use crate::bus::Bus;
use crate::request::lifecycle::{NoReply, Target};

type Answer = (Instant, Result<Renewed, NoReply>);

/// A lease that is kept alive.
pub(super) struct Lease {
    holder: Target,
    renew: Renew,
    length: Duration,
    interval: Duration,
    /// It has ended by then for sure, unless a renewal is confirmed.
    until: Instant,
    /// When the next renewal is due; `None` while one is under way, or when none can help.
    renew_at: Option<Instant>,
    under_way: Option<Pin<Box<dyn Future<Output = Answer>>>>,
}

impl Lease {
    /// Of a handle that came just now.
    pub(super) fn new(request: RequestId, handle: &KvHandle, now: Instant) -> Self {
        let length = Duration::from_millis(handle.lease_ms.into());
        let interval = Duration::from_millis(lease_renew_interval_ms(handle.lease_ms));
        Self {
            holder: Target {
                worker: handle.worker.clone(),
                incarnation: handle.incarnation,
            },
            renew: Renew {
                v: PROTOCOL_VERSION,
                request,
                incarnation: handle.incarnation,
                handle: handle.handle,
                nonce: handle.nonce,
            },
            length,
            interval,
            until: now + length,
            renew_at: Some(now + interval),
            under_way: None,
        }
    }

    /// Whether it must have ended.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        now >= self.until
    }

    /// When it will have.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// When [`Self::renew`] is due.
    pub(super) fn renew_at(&self) -> Option<Instant> {
        self.renew_at
    }

    /// Asks its holder to keep it.
    pub(super) fn renew(&mut self, bus: &Bus, now: Instant) {
        self.renew_at = None;
        let (bus, holder, renew) = (bus.clone(), self.holder.clone(), self.renew.clone());
        let timeout = Duration::from_millis(CONTROL_TIMEOUT_MS).min(self.interval);
        self.under_way = Some(Box::pin(async move {
            (now, bus.renew(&holder, &renew, timeout).await)
        }));
    }

    /// Waits for the answer to a renewal, if one is under way, and takes it in. False if the lease has ended.
    pub(super) async fn renewed(&mut self) -> bool {
        let (sent, answer) = match &mut self.under_way {
            Some(answer) => answer.await,
            None => std::future::pending().await,
        };
        self.under_way = None;
        self.take_in(sent, answer, Instant::now())
    }

    fn take_in(&mut self, sent: Instant, answer: Result<Renewed, NoReply>, now: Instant) -> bool {
        match answer {
            Ok(Renewed { valid: true, .. }) => {
                self.until = sent + self.length;
                self.renew_at = Some(sent + self.interval);
            }
            Ok(Renewed { valid: false, .. }) => {
                self.until = now;
                return false;
            }
            // The time that was waited is the pause.
            Err(NoReply::TimedOut) => self.renew_at = Some(now),
            // Nobody is there, or a worker of an earlier release that knows no renewals: the clock decides.
            Err(_) => {
                let pause = Duration::from_millis(CONTROL_TIMEOUT_MS).min(self.interval);
                self.renew_at = Some(now + pause);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::lifecycle::tests::handle;

    fn lease(now: Instant) -> Lease {
        let mut handle = handle("c", 7);
        handle.lease_ms = 30_000;
        Lease::new(RequestId(1), &handle, now)
    }

    fn answer(valid: bool) -> Result<Renewed, NoReply> {
        Ok(Renewed {
            v: PROTOCOL_VERSION,
            valid,
        })
    }

    #[test]
    fn a_lease_ends_by_the_clock_unless_a_renewal_is_confirmed() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut lease = lease(now);
        assert_eq!(lease.renew_at(), Some(now + 10 * second));
        assert!(!lease.is_over(now + 29 * second) && lease.is_over(now + 30 * second));
        // It counts from when the renewal was sent: the worker took it after that.
        let (sent, heard) = (now + 10 * second, now + 12 * second);
        assert!(lease.take_in(sent, answer(true), heard));
        assert_eq!(lease.until(), now + 40 * second);
        assert_eq!(lease.renew_at(), Some(now + 20 * second));
        for lost in [NoReply::TimedOut, NoReply::NoResponders] {
            assert!(lease.take_in(now + 20 * second, Err(lost), now + 23 * second));
            assert_eq!(lease.until(), now + 40 * second, "nothing was confirmed");
            assert!(lease.renew_at() < Some(now + 40 * second), "tried again");
        }
        assert!(!lease.take_in(now + 26 * second, answer(false), now + 27 * second));
        assert!(lease.is_over(now + 27 * second));
    }
}
