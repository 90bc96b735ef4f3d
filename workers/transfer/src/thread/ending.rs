//! What UCX has yet to let go of: transfers that failed or were given up, in quarantine, and endpoints that are being closed.

use std::ffi::c_void;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ucx_sys::UCS_INPROGRESS;

use super::work::Work;
use super::{Guard, Mover};
use crate::TransferError;
use crate::key::PeerKey;
use crate::peer::Link;

/// At shutdown UCX gets this long to end what it has in flight.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// A transfer that failed or was given up, and whose requests have not all ended.
pub(super) struct Quarantined {
    pub(super) work: Work,
    /// Dropped with this value, when UCX writes no more.
    pub(super) _guard: Option<Guard>,
}

/// An endpoint that UCX is closing.
pub(super) struct Closing {
    link: Rc<Link>,
    request: Option<*mut c_void>,
}

impl Mover {
    pub(super) fn disconnect(&mut self, peer: PeerKey) {
        if let Some(link) = self.links.get(&peer).cloned() {
            self.close(&link);
        }
    }

    /// Closes a link once; its other transfers see the failure in their turn.
    pub(super) fn close(&mut self, link: &Rc<Link>) {
        if self
            .links
            .get(&link.key)
            .is_some_and(|current| Rc::ptr_eq(current, link))
        {
            self.links.remove(&link.key);
            self.vitals.forget_pulls(link.key);
            self.vitals.tell_connected(link.key, false);
            let request = link.close();
            self.closing.push(Closing {
                link: link.clone(),
                request,
            });
        }
    }

    /// Closes links of readers that are served, those that nobody can look up any more.
    pub(super) fn close_all(&mut self, links: Vec<Rc<Link>>) {
        for link in links {
            let request = link.close();
            self.closing.push(Closing { link, request });
        }
    }

    /// Closes links that failed while nobody used them.
    pub(super) fn close_failed(&mut self) {
        let failed: Vec<_> = self
            .links
            .values()
            .filter(|link| link.failure().is_some())
            .cloned()
            .collect();
        for link in failed {
            match link.stalled() {
                Some(owed) => {
                    tracing::warn!(peer = %link.key, owed, "the connection delivered nothing for too long")
                }
                None => tracing::warn!(peer = %link.key, "the connection failed"),
            }
            self.close(&link);
        }
    }

    /// Lets go of what UCX is done with.
    pub(super) fn sweep(&mut self) {
        self.quarantine.retain_mut(|quarantined| {
            quarantined.work.settle();
            quarantined.work.in_flight() > 0
        });
        let ucp = self.ucp;
        self.closing.retain_mut(|closing| {
            if let Some(request) = closing.request
                // SAFETY: the request is ours until it is freed below, once.
                && unsafe { (ucp.ucp_request_check_status)(request) } != UCS_INPROGRESS
            {
                // SAFETY: as above.
                unsafe { (ucp.ucp_request_free)(request) };
                closing.request = None;
            }
            // A transfer that still holds the link has requests in flight.
            closing.request.is_some() || Rc::strong_count(&closing.link) > 1
        });
    }

    /// Ends everything, as far as UCX lets it.
    pub(super) fn drain(&mut self) {
        for transfer in std::mem::take(&mut self.transfers) {
            self.fail(transfer, TransferError::Stopped);
        }
        for link in self.links.values().cloned().collect::<Vec<_>>() {
            self.close(&link);
        }
        let readers = self.serving.end();
        self.close_all(readers);
        let end = Instant::now() + DRAIN_TIME;
        while !self.idle() && Instant::now() < end {
            self.worker.progress();
            self.serving.settle();
            self.sweep();
            std::thread::yield_now();
        }
    }

    /// Whether UCX holds nothing of ours.
    pub(super) fn idle(&self) -> bool {
        self.quarantine.is_empty() && self.closing.is_empty() && self.serving.is_idle()
    }
}
