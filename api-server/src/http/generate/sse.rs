//! The response body of a stream: server-sent events.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use actix_web::body::{BodySize, MessageBody};
use bytes::Bytes;

use super::outbox::Outbox;
use super::presence::Presence;

/// A stream says something at least this often, also to notice that nobody listens any more.
const KEEP_ALIVE: Duration = Duration::from_millis(500);

/// The body of a streamed response. Dropping it, as happens when the client leaves, ends the request.
pub struct SseBody {
    outbox: Rc<Outbox>,
    _client: Presence,
    timer: Pin<Box<tokio::time::Sleep>>,
    last_write: Instant,
}

impl SseBody {
    /// The body that empties this outbox for this client.
    pub fn new(outbox: Rc<Outbox>, client: Presence) -> Self {
        let timer = Box::pin(tokio::time::sleep(KEEP_ALIVE));
        Self {
            outbox,
            _client: client,
            timer,
            last_write: Instant::now(),
        }
    }
}

impl MessageBody for SseBody {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let this = self.get_mut();
        if let Poll::Ready(bytes) = this.outbox.poll_take(cx) {
            this.last_write = Instant::now();
            return Poll::Ready(bytes.map(Ok));
        }
        while this.timer.as_mut().poll(cx).is_ready() {
            // Writes do not touch the timer: it looks for itself how long the last one is ago.
            let due = this.last_write + KEEP_ALIVE;
            let now = Instant::now();
            if now >= due {
                this.last_write = now;
                this.timer.as_mut().reset((now + KEEP_ALIVE).into());
                return Poll::Ready(Some(Ok(Bytes::from_static(b": keep-alive\n\n"))));
            }
            this.timer.as_mut().reset(due.into());
        }
        Poll::Pending
    }
}
