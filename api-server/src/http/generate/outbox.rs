//! What the choices of one request write into its stream, until the response body takes it. All of them live on one HTTP thread.
//! Whatever has gathered since the last write leaves in one piece.

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use crate::error::{ApiError, ErrorKind};
use crate::output::{StreamWriter, Tally, Usage};

/// Bytes that may wait for a slow reader. With these written no more tokens are rendered; they wait as ids.
const WAITING_BYTES_MAX: usize = 64 << 10;

/// Most events with a token take less.
const EVENT_BYTES: usize = 512;

/// The stream of one request, between its choices and its body.
pub struct Outbox {
    inner: RefCell<Inner>,
    /// Told when what waited was taken.
    taken: Notify,
}

/// One choice's part in the stream, which it ends. One that is dropped before, as when its driver breaks, ends it with an error:
/// the client would wait for ever.
pub struct Share {
    outbox: Rc<Outbox>,
    is_over: Cell<bool>,
}

struct Inner {
    /// How its door writes it.
    writer: Box<dyn StreamWriter>,
    bytes: Vec<u8>,
    waker: Option<Waker>,
    open_choices: usize,
    tally: Tally,
    /// Something was written already, so a failure can only be told in the stream.
    started: bool,
    failure: Option<ApiError>,
    ended: bool,
    /// The body is gone: whoever writes will hear that the client left.
    closed: bool,
}

impl Outbox {
    /// An outbox for this many choices, whose tokens are counted here, for a stream that is written so.
    pub fn new(choices: usize, tally: Tally, writer: Box<dyn StreamWriter>) -> Rc<Self> {
        Rc::new(Self {
            taken: Notify::new(),
            inner: RefCell::new(Inner {
                writer,
                bytes: Vec::new(),
                waker: None,
                open_choices: choices,
                tally,
                started: false,
                failure: None,
                ended: false,
                closed: false,
            }),
        })
    }

    /// Appends to the stream.
    pub fn write(&self, write: impl FnOnce(&mut dyn StreamWriter, &mut Vec<u8>)) {
        let mut inner = self.inner.borrow_mut();
        if inner.ended {
            return;
        }
        inner.started = true;
        let (writer, bytes) = inner.page();
        write(writer, bytes);
        inner.wake();
    }

    /// Whether another `bytes` may be written.
    pub fn has_room(&self, bytes: usize) -> bool {
        let inner = self.inner.borrow();
        // After a failure there is nothing more to write, and the body's end brings the news to the other choices.
        inner.closed || !inner.ended && inner.bytes.len() + bytes < WAITING_BYTES_MAX
    }

    /// Waits until what was written has been taken.
    pub async fn room(&self) {
        while !self.has_room(0) {
            self.taken.notified().await;
        }
    }

    /// A choice's part in it. There are to be as many as choices.
    pub fn share(self: &Rc<Self>) -> Share {
        Share {
            outbox: Rc::clone(self),
            is_over: Cell::new(false),
        }
    }

    /// A choice has ended; after the last one the stream does.
    fn choice_done(&self, index: usize, usage: Usage) {
        let mut inner = self.inner.borrow_mut();
        inner.tally.add(index, usage);
        inner.open_choices -= 1;
        if inner.open_choices == 0 && !inner.ended {
            let usage = inner.tally.usage();
            let (writer, bytes) = inner.page();
            writer.done(usage, bytes);
            inner.ended = true;
        }
        inner.wake();
    }

    /// A choice failed, and with it the request. True if the stream itself tells it: it is no status any more.
    fn fail(&self, error: ApiError) -> bool {
        let mut inner = self.inner.borrow_mut();
        if inner.ended {
            return false;
        }
        if inner.started {
            let (writer, bytes) = inner.page();
            writer.fail(&error, bytes);
        } else {
            inner.failure = Some(error);
        }
        inner.ended = true;
        inner.wake();
        inner.started
    }

    /// The body is gone, or never came to be, and with it whoever read.
    pub fn close(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.ended = true;
        inner.closed = true;
        inner.bytes = Vec::new();
        self.taken.notify_waiters();
    }

    /// What was written since the last time; nothing more after the end. Whoever asks is woken when there is more.
    pub fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut inner = self.inner.borrow_mut();
        if !inner.bytes.is_empty() {
            let bytes = inner.take();
            self.taken.notify_waiters();
            return Poll::Ready(Some(bytes));
        }
        if inner.ended {
            return Poll::Ready(None);
        }
        let waker = inner.waker.as_ref();
        if !waker.is_some_and(|waker| waker.will_wake(cx.waker())) {
            inner.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Waits until the stream has begun, or has failed before it did, but not longer than `patience`.
    ///
    /// # Errors
    /// The failure: it can still become a status.
    pub async fn begun(&self, patience: Duration) -> Result<(), ApiError> {
        let first = std::future::poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            if let Some(error) = inner.failure.take() {
                return Poll::Ready(Err(error));
            }
            if inner.started {
                return Poll::Ready(Ok(()));
            }
            inner.waker = Some(cx.waker().clone());
            Poll::Pending
        });
        let outcome = tokio::time::timeout(patience, first)
            .await
            .unwrap_or(Ok(()));
        // From here on the status is sent.
        self.inner.borrow_mut().started = true;
        outcome
    }
}

impl Share {
    /// The choice has ended; after the last one the stream does.
    pub fn done(&self, index: usize, usage: Usage) {
        self.is_over.set(true);
        self.outbox.choice_done(index, usage);
    }

    /// The choice failed, and with it the request. True if the stream itself tells it: it is no status any more.
    pub fn fail(&self, error: ApiError) -> bool {
        self.is_over.set(true);
        self.outbox.fail(error)
    }
}

impl Deref for Share {
    type Target = Outbox;

    fn deref(&self) -> &Outbox {
        &self.outbox
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if !self.is_over.get() {
            let error = ApiError::new(ErrorKind::Internal, "a generation was dropped");
            self.outbox.fail(error);
        }
    }
}

impl Inner {
    /// Where to write. A buffer that was just given back by another stream is in the cache; one that this stream kept since its last
    /// event is not.
    fn page(&mut self) -> (&mut dyn StreamWriter, &mut Vec<u8>) {
        if self.bytes.capacity() == 0 {
            self.bytes = Vec::with_capacity(EVENT_BYTES);
        }
        (&mut *self.writer, &mut self.bytes)
    }

    /// What was written.
    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes).into()
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_protocol::FinishReason;

    use super::*;
    use crate::openai::{ApiKind, Shape, Shown};
    use crate::output::Finish;

    /// What a stream of two choices says, one of which ends.
    fn stream(second: impl FnOnce(Share)) -> String {
        let shape = Shape::new(ApiKind::Completion, "1", "m", "f", Shown::default());
        let outbox = Outbox::new(2, Tally::new(1, 1, 2), Box::new(shape));
        let (first, other) = (outbox.share(), outbox.share());
        let usage = Usage::default();
        let finish = Finish {
            reason: FinishReason::Stop,
            has_called: false,
            stop: None,
        };
        first.write(|writer, out| writer.finish(0, &finish, usage, out));
        first.done(0, Usage::default());
        drop(first);
        assert!(!outbox.inner.borrow().ended, "the other goes on");
        second(other);
        assert!(outbox.inner.borrow().ended);
        let bytes = outbox.inner.borrow_mut().take();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn a_stream_ends_also_if_a_choice_breaks() {
        let done = stream(|share| share.done(1, Usage::default()));
        assert!(done.ends_with("data: [DONE]\n\n"), "{done}");
        assert!(!done.contains("error"), "{done}");
        let broken = stream(drop);
        assert!(!broken.contains("[DONE]"), "{broken}");
        assert!(
            broken.contains("event: error") && broken.contains("internal_error"),
            "{broken}"
        );
    }
}
