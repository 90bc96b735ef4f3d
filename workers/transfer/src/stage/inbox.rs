//! What comes by active message: heard while UCX progresses, acted on later.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::rc::Rc;

use ucx_sys::*;

use super::message::{AM_ID, Message};
use crate::TransferError;
use crate::context::check;
use crate::flow::Flow;
use crate::staging::Staging;

/// Most messages that wait. The thread reads them each time round, so more are a peer's fault; they are dropped.
const RECEIVED_MAX: usize = 4096;

/// A message that waits to be acted on.
pub(crate) struct Received {
    pub(super) message: Message,
    pub(super) body: Vec<u8>,
}

/// A chunk that was asked for.
pub(super) struct Arrival {
    /// Where it goes.
    pub(super) slot: usize,
    /// Its length.
    pub(super) bytes: usize,
    /// How much of it came.
    pub(super) got: usize,
    /// Whether the peer said that it will not come, or sent what was not asked for.
    pub(super) refused: bool,
    /// Of the connection that it comes over.
    pub(super) flow: Rc<Flow>,
}

impl Arrival {
    /// Whether nothing more of it will come.
    pub(super) fn has_ended(&self) -> bool {
        self.refused || self.got == self.bytes
    }
}

/// Bytes go straight to their slots, if somebody still waits for them; everything else waits for the thread.
#[derive(Default)]
pub(crate) struct Inbox {
    pub(super) staging: RefCell<Option<Box<dyn Staging>>>,
    pub(super) arrivals: RefCell<HashMap<u64, Arrival>>,
    pub(super) received: RefCell<VecDeque<Received>>,
}

impl Inbox {
    /// Makes the worker deliver here. The inbox must outlive the worker.
    pub(crate) fn listen(
        self: &Rc<Self>,
        ucp: &Ucp,
        worker: ucp_worker_h,
    ) -> Result<(), TransferError> {
        let param = ucp_am_handler_param_t {
            field_mask: UCP_AM_HANDLER_PARAM_FIELD_ID
                | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                | UCP_AM_HANDLER_PARAM_FIELD_CB
                | UCP_AM_HANDLER_PARAM_FIELD_ARG,
            id: AM_ID,
            flags: UCP_AM_FLAG_WHOLE_MSG,
            cb: Some(on_message),
            arg: Rc::as_ptr(self).cast_mut().cast(),
            ..Default::default()
        };
        // SAFETY: the worker is alive and this is its thread; the caller keeps the inbox until the worker is gone.
        check(ucp, "ucp_worker_set_am_recv_handler", unsafe {
            (ucp.ucp_worker_set_am_recv_handler)(worker, &param)
        })
    }

    fn hear(&self, message: Message, body: &[u8]) {
        let mut arrivals = self.arrivals.borrow_mut();
        match message {
            Message::Data { chunk, at } => {
                // Late for a chunk that was given up: its slot may be another's by now.
                let Some(arrival) = arrivals.get_mut(&chunk) else {
                    return;
                };
                let at = at as usize;
                let end = at
                    .checked_add(body.len())
                    .filter(|end| *end <= arrival.bytes);
                // Twice the same piece would leave a gap elsewhere.
                let fits = arrival.got + body.len() <= arrival.bytes && !body.is_empty();
                match (end, &mut *self.staging.borrow_mut()) {
                    (Some(end), Some(staging)) if fits && !arrival.refused => {
                        staging.slot(arrival.slot)[at..end].copy_from_slice(body);
                        arrival.got += body.len();
                        arrival.flow.delivered(body.len() as u64);
                    }
                    _ => arrival.refused = true,
                }
            }
            Message::Refused { chunk } => {
                if let Some(arrival) = arrivals.get_mut(&chunk) {
                    arrival.refused = true;
                    arrival.flow.delivered(0);
                }
            }
            Message::Hello { .. } | Message::Welcome { .. } | Message::Ask { .. } => {
                let mut received = self.received.borrow_mut();
                if received.len() < RECEIVED_MAX {
                    received.push_back(Received {
                        message,
                        body: body.to_vec(),
                    });
                }
            }
        }
    }
}

/// Hands a message to the inbox.
unsafe extern "C" fn on_message(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    data: *mut c_void,
    length: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: `arg` is the inbox that `listen` passed, which outlives the worker; UCX calls from the agent's thread, inside
    // progress, when nothing of the inbox is borrowed.
    let inbox = unsafe { &*arg.cast::<Inbox>() };
    // SAFETY: valid during the call.
    let by_rendezvous = unsafe { (*param).recv_attr } & UCP_AM_RECV_ATTR_FLAG_RNDV != 0;
    if by_rendezvous || header.is_null() {
        // Nothing of ours is sent so.
        return UCS_OK;
    }
    // SAFETY: UCX says that so many bytes are there, during the call.
    let header = unsafe { std::slice::from_raw_parts(header.cast::<u8>(), header_length) };
    let body = match data.is_null() {
        true => &[],
        // SAFETY: as above.
        false => unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length) },
    };
    if let Some(message) = Message::parse(header) {
        inbox.hear(message, body);
    }
    UCS_OK
}

#[cfg(test)]
mod tests {
    use super::super::{HostStaging, SERVING_SLOTS};
    use super::*;
    use crate::flow::STALL;

    #[test]
    fn bytes_go_to_their_slot_while_somebody_waits_for_them() {
        let mut arena = [0u8; 8];
        let inbox = Inbox::default();
        // SAFETY: the arena outlives the inbox's use.
        let staging = unsafe { HostStaging::new(arena.as_mut_ptr(), 8) };
        *inbox.staging.borrow_mut() = Some(Box::new(staging));
        let arrival = Arrival {
            slot: SERVING_SLOTS,
            bytes: 4,
            got: 0,
            refused: false,
            flow: Rc::new(Flow::new(STALL)),
        };
        inbox.arrivals.borrow_mut().insert(7, arrival);
        let first = || {
            let mut staging = inbox.staging.borrow_mut();
            staging.as_mut().unwrap().slot(SERVING_SLOTS)[..4].to_vec()
        };
        inbox.hear(Message::Data { chunk: 7, at: 2 }, &[3, 4]);
        inbox.hear(Message::Data { chunk: 7, at: 0 }, &[1, 2]);
        assert_eq!(inbox.arrivals.borrow()[&7].got, 4);
        assert_eq!(first(), [1, 2, 3, 4]);
        inbox.hear(Message::Data { chunk: 7, at: 3 }, &[9, 9]);
        assert!(
            inbox.arrivals.borrow()[&7].refused,
            "more than was asked for"
        );
        inbox.arrivals.borrow_mut().remove(&7);
        inbox.hear(Message::Data { chunk: 7, at: 0 }, &[9, 9]);
        assert_eq!(first(), [1, 2, 3, 4], "nobody waits for it any more");
    }

    #[test]
    fn letters_are_bounded() {
        let inbox = Inbox::default();
        for _ in 0..RECEIVED_MAX + 9 {
            inbox.hear(Message::Hello { reader: 1 }, &[]);
        }
        assert_eq!(inbox.received.borrow().len(), RECEIVED_MAX);
    }
}
