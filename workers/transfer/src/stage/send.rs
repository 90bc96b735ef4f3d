//! Messages on their way.

use std::cell::Cell;
use std::ffi::c_void;
use std::rc::Rc;

use ucx_sys::*;

use super::message::{AM_ID, Head, Message};
use crate::flow::Flow;
use crate::peer::Link;

/// Counts messages that UCX has not ended.
#[derive(Default)]
pub(crate) struct Sent {
    in_flight: Cell<usize>,
    failure: Cell<Option<ucs_status_t>>,
}

impl Sent {
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    pub(super) fn failure(&self) -> Option<ucs_status_t> {
        self.failure.get()
    }
}

/// What a message carries.
pub(super) enum Body {
    Nothing,
    /// Goes with the message.
    Own(Vec<u8>),
    /// Stays where it is until the message has ended.
    At(*const u8, usize),
}

/// Lives until UCX is done with the message: UCX reads head and body meanwhile.
struct Sending {
    head: Head,
    body: Body,
    sent: Rc<Sent>,
    flow: Rc<Flow>,
    request_free: unsafe extern "C" fn(*mut c_void),
}

/// Sends over a link that has not failed. What becomes of it shows in `sent`.
///
/// # Safety
/// A body that stays where it is does so, unchanged, until `sent` counts the message off.
pub(super) unsafe fn send(ucp: &Ucp, link: &Link, message: Message, body: Body, sent: &Rc<Sent>) {
    if let Some(status) = link.failure() {
        sent.failure.set(Some(status));
        return;
    }
    let sending = Box::into_raw(Box::new(Sending {
        head: message.head(),
        body,
        sent: sent.clone(),
        flow: link.flow.clone(),
        request_free: ucp.ucp_request_free,
    }));
    let param = ucp_request_param_t {
        op_attr_mask: UCP_OP_ATTR_FIELD_CALLBACK
            | UCP_OP_ATTR_FIELD_USER_DATA
            | UCP_OP_ATTR_FIELD_FLAGS
            | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        // Never by rendezvous, which UCX answers from inside.
        flags: UCP_AM_SEND_FLAG_EAGER,
        cb: Some(on_sent),
        user_data: sending.cast(),
        memory_type: UCS_MEMORY_TYPE_HOST,
        ..Default::default()
    };
    // SAFETY: made above, and only freed when the message has ended.
    let message = unsafe { &*sending };
    let (buffer, length) = match &message.body {
        Body::Nothing => (std::ptr::null(), 0),
        Body::Own(bytes) => (bytes.as_ptr(), bytes.len()),
        Body::At(at, length) => (*at, *length),
    };
    // SAFETY: the endpoint is open; head and body stay until the message has ended, see above and the caller's promise.
    let pointer = unsafe {
        (ucp.ucp_am_send_nbx)(
            link.ep(),
            AM_ID,
            message.head.as_ptr().cast(),
            message.head.len(),
            buffer.cast(),
            length,
            &param,
        )
    };
    match status_of_pointer(pointer) {
        Ok(Some(_)) => {
            sent.in_flight.set(sent.in_flight.get() + 1);
            link.flow.message_posted();
        }
        ended => {
            if let Err(status) = ended {
                sent.failure.set(Some(status));
            }
            // SAFETY: it has ended and no callback will come.
            drop(unsafe { Box::from_raw(sending) });
        }
    }
}

/// Counts a message off and frees what it was made of.
unsafe extern "C" fn on_sent(request: *mut c_void, status: ucs_status_t, user_data: *mut c_void) {
    // SAFETY: `user_data` is the message that `send` passed, and it has ended.
    let sending = unsafe { Box::from_raw(user_data.cast::<Sending>()) };
    sending.sent.in_flight.set(sending.sent.in_flight.get() - 1);
    sending.flow.message_ended();
    if status != UCS_OK {
        sending.sent.failure.set(Some(status));
    }
    // SAFETY: the request has ended and this is its only owner.
    unsafe { (sending.request_free)(request) };
}
