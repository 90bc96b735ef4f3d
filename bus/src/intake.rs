//! A subscription whose backlog is bounded in bytes.
//!
//! The NATS client bounds a subscription's backlog in messages, and a message may have megabytes: a bus that is flooded would
//! fill the memory. Here a task takes messages over as soon as they come, up to a bound in bytes; what is beyond is dropped, and
//! told to whoever can answer for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use async_nats::Message;
use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use crate::Subscription;

/// What a message takes beside its payload, about.
const MESSAGE_OVERHEAD: usize = 256;

/// Messages on their way to whoever takes them.
pub struct Intake {
    messages: mpsc::UnboundedReceiver<Message>,
    held: Arc<AtomicUsize>,
    leave: Arc<Notify>,
    pump: JoinHandle<()>,
}

impl Intake {
    /// Takes this subscription over. No more than `bytes_max` wait; `on_overflow` is told of each message that is dropped.
    pub fn new(
        subscription: impl Into<Subscription>,
        bytes_max: usize,
        mut on_overflow: impl FnMut(&Message) + Send + 'static,
    ) -> Self {
        let mut subscription = subscription.into();
        #[expect(
            clippy::disallowed_methods,
            reason = "bytes are what is bounded: the pump counts what it sends"
        )]
        let (sender, messages) = mpsc::unbounded_channel();
        let held = Arc::new(AtomicUsize::new(0));
        let of_pump = Arc::clone(&held);
        let leave = Arc::new(Notify::new());
        let left = Arc::clone(&leave);
        let pump = async move {
            loop {
                let message = tokio::select! {
                    biased;
                    () = left.notified() => {
                        // It ends after what has come; if the connection is closed, at once.
                        let _ = subscription.drain().await;
                        continue;
                    }
                    message = subscription.next() => message,
                };
                let Some(mut message) = message else { return };
                let bytes = bytes_of(&message);
                if of_pump.load(Relaxed) + bytes > bytes_max {
                    on_overflow(&message);
                    continue;
                }
                of_pump.fetch_add(bytes, Relaxed);
                // As it came it is a slice of what was read at once, of which it would keep all, a megabyte or more.
                message.payload = Bytes::copy_from_slice(&message.payload);
                // Nobody reads them, and they may be as large as a payload.
                message.headers = None;
                if sender.send(message).is_err() {
                    return;
                }
            }
        };
        // The client puts thousands of messages into a subscription at a time; with tokio's bound of 128 at a time it would overflow.
        let pump = tokio::spawn(tokio::task::unconstrained(pump));
        Self {
            messages,
            held,
            leave,
            pump,
        }
    }

    /// The next message; `None` once the subscription has ended. Nothing is lost when this is dropped.
    pub async fn next(&mut self) -> Option<Message> {
        let message = self.messages.recv().await?;
        self.held.fetch_sub(bytes_of(&message), Relaxed);
        Some(message)
    }

    /// Takes no more: what has come is still given out, and then the end.
    pub fn drain(&self) {
        self.leave.notify_one();
    }

    /// The next message, if it is there.
    pub fn try_next(&mut self) -> Option<Message> {
        let message = self.messages.try_recv().ok()?;
        self.held.fetch_sub(bytes_of(&message), Relaxed);
        Some(message)
    }
}

impl Drop for Intake {
    /// Ends the subscription too, which the task owns.
    fn drop(&mut self) {
        self.pump.abort();
    }
}

fn bytes_of(message: &Message) -> usize {
    MESSAGE_OVERHEAD + message.subject.len() + message.payload.len()
}
