//! The way of events to the generations they concern: from the bus to the HTTP thread's mailbox, and from there to
//! the inbox of each.
//!
//! Both are bounded in bytes: a thread that stands still, or a client that does not read, must not fill the memory with what
//! workers go on sending. What finds no room is dropped, and in its place the generation is told once that it lost something
//! ([`Event::FramesLost`]): it asks for it again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use baton_protocol::{End, FrameItem, RequestId, TokenFrame, TokenLogprobs};
use tokio::sync::Notify;

use crate::request::lifecycle::Target;

/// What may happen to a generation from outside.
#[derive(Debug)]
pub enum Event {
    /// Its share of a token frame.
    Item {
        /// Who says so.
        from: Arc<Target>,
        /// What.
        item: FrameItem,
    },
    /// A context worker reports that it has the prompt, and has not answered yet.
    PromptReported {
        /// Which worker.
        from: Arc<Target>,
    },
    /// A worker is gone.
    WorkerLost(Target),
    /// The bus lost messages: frames may be missing without a gap to show for it.
    FramesLost,
    /// The bus was away and is back: messages of either side may be lost.
    BusBack,
    /// The client left.
    ClientLeft,
    /// This server leaves now.
    Leaving,
    /// Another one has taken its name over: workers have ended, or will end, what it asked for.
    NameLost,
}

impl Event {
    /// Whether it is the last that a generation hears: such events are few, and never dropped.
    fn is_last(&self) -> bool {
        matches!(self, Self::ClientLeft | Self::Leaving)
    }

    /// Bytes that it holds, about.
    fn bytes(&self) -> usize {
        let Self::Item { item, .. } = self else {
            return EVENT_OVERHEAD;
        };
        let top = |logprobs: &TokenLogprobs| size_of_val(logprobs) + size_of_val(&logprobs.top[..]);
        let failure = match &item.end {
            Some(End::Failed(failure)) => failure.message.len(),
            Some(End::Finished(_)) | None => 0,
        };
        EVENT_OVERHEAD
            + size_of_val(&item.tokens.0[..])
            + item.logprobs.iter().map(top).sum::<usize>()
            + failure
    }
}

/// What an event takes beside what it points to: itself, and an allocation or two.
const EVENT_OVERHEAD: usize = size_of::<(Arc<Inbox>, Event)>() + 64;

/// Bytes of events that may wait for one generation. Its worker makes some hundred events a second of some 200 bytes, and its
/// client may leave them unread for half a minute.
const INBOX_BYTES_MAX: usize = 4 << 20;

/// Bytes of events that may wait for one HTTP thread, which takes them at once unless it stands still: what a thread of 4,096
/// generations gets in some 10 s.
const MAILBOX_BYTES_MAX: usize = 16 << 20;

/// Strays of one frame that are acted on: a frame may name thousands, and each is a message.
pub const STRAYS_MAX: usize = 64;

/// Events on their way to one generation's driver, the only one who takes them.
#[derive(Debug, Default)]
pub struct Inbox {
    events: Mutex<Waiting<Event>>,
    /// Its mailbox has dropped something for it, and says so in an event that is still on its way.
    lost: AtomicBool,
}

/// Events in order, with the bytes that they hold.
#[derive(Debug)]
struct Waiting<T> {
    events: VecDeque<T>,
    bytes: usize,
    /// The last thing in line is that something was dropped.
    lost: bool,
    /// Of whoever found nothing in line.
    reader: Option<Waker>,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self {
            events: VecDeque::new(),
            bytes: 0,
            lost: false,
            reader: None,
        }
    }
}

impl Inbox {
    /// Adds an event and wakes the driver if it was idle.
    pub fn push(&self, event: Event) {
        let reader = {
            let mut waiting = lock(&self.events);
            let bytes = event.bytes();
            if waiting.bytes + bytes <= INBOX_BYTES_MAX || event.is_last() {
                waiting.bytes += bytes;
                waiting.events.push_back(event);
            } else if !std::mem::replace(&mut waiting.lost, true) {
                waiting.events.push_back(Event::FramesLost);
            }
            waiting.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Waits for events and swaps them into `into`, which is empty.
    pub async fn take(&self, into: &mut VecDeque<Event>) {
        poll_fn(|cx| {
            let mut waiting = lock(&self.events);
            if !waiting.events.is_empty() {
                std::mem::swap(&mut waiting.events, into);
                (waiting.bytes, waiting.lost) = (0, false);
                return Poll::Ready(());
            }
            let reader = waiting.reader.as_ref();
            if !reader.is_some_and(|reader| reader.will_wake(cx.waker())) {
                waiting.reader = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

/// Events for the generations of one HTTP thread. What a frame brings for all of them wakes the thread once;
/// from there on it is a matter of that thread alone.
#[derive(Debug, Default)]
pub struct Mailbox {
    events: Mutex<Waiting<(Arc<Inbox>, Event)>>,
    notify: Notify,
}

impl Mailbox {
    /// Hands events on for ever. Runs on the thread whose mailbox it is.
    pub async fn distribute(self: Arc<Self>) {
        let mut batch = VecDeque::new();
        loop {
            self.take(&mut batch);
            if batch.is_empty() {
                self.notify.notified().await;
            }
            for (inbox, event) in batch.drain(..) {
                if matches!(event, Event::FramesLost) {
                    inbox.lost.store(false, Relaxed);
                }
                inbox.push(event);
            }
        }
    }

    fn take(&self, into: &mut VecDeque<(Arc<Inbox>, Event)>) {
        let mut waiting = lock(&self.events);
        std::mem::swap(&mut waiting.events, into);
        waiting.bytes = 0;
    }

    /// Adds an event, or, where there is no room, once for each inbox that something was lost. Whether the event was added.
    fn put(&self, inbox: &Arc<Inbox>, event: Event) -> bool {
        let mut waiting = lock(&self.events);
        let bytes = event.bytes();
        let has_room = waiting.bytes + bytes <= MAILBOX_BYTES_MAX || event.is_last();
        if has_room {
            waiting.bytes += bytes;
            waiting.events.push_back((Arc::clone(inbox), event));
        } else if !inbox.lost.swap(true, Relaxed) {
            let told = (Arc::clone(inbox), Event::FramesLost);
            waiting.events.push_back(told);
        }
        has_room
    }
}

/// The inboxes of all generations in flight.
#[derive(Debug, Default)]
pub struct Registry {
    registrations: Mutex<BTreeMap<RequestId, Registration>>,
}

/// Where a generation is driven.
#[derive(Debug)]
struct Registration {
    mailbox: Arc<Mailbox>,
    inbox: Arc<Inbox>,
}

/// Puts events into mailboxes, and at the end wakes each that got some.
#[derive(Default)]
struct Delivery {
    mailboxes: Vec<Arc<Mailbox>>,
    dropped: usize,
}

/// What became of a frame.
#[derive(Debug)]
pub struct Dispatched {
    /// Who sent it.
    pub from: Arc<Target>,
    /// Requests that are not over there and are known to nobody here any more: the sender was deaf when it was told, or the
    /// telling was lost. Each once, [`STRAYS_MAX`] of them at most; the sender's later frames name the others.
    pub strays: BTreeSet<RequestId>,
    /// Items that found no room, because their HTTP thread stands still.
    pub dropped: usize,
}

impl Delivery {
    fn put(&mut self, registration: &Registration, event: Event) {
        let Registration { mailbox, inbox } = registration;
        self.dropped += usize::from(!mailbox.put(inbox, event));
        // As many as there are HTTP threads.
        if !self
            .mailboxes
            .iter()
            .any(|known| Arc::ptr_eq(known, mailbox))
        {
            self.mailboxes.push(Arc::clone(mailbox));
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.mailboxes
            .iter()
            .for_each(|mailbox| mailbox.notify.notify_one());
    }
}

impl Registry {
    /// Adds a generation that is driven on this mailbox's thread; it is removed when the guard is dropped.
    pub fn register(
        self: &Arc<Self>,
        request: RequestId,
        mailbox: Arc<Mailbox>,
        inbox: Arc<Inbox>,
    ) -> Registered {
        lock(&self.registrations).insert(request, Registration { mailbox, inbox });
        Registered {
            registry: Arc::clone(self),
            request,
        }
    }

    /// Generations in flight.
    pub fn len(&self) -> usize {
        lock(&self.registrations).len()
    }

    /// Hands every item of a frame, and every prompt that it reports, to its generation.
    pub fn dispatch(&self, frame: TokenFrame) -> Dispatched {
        let mut delivery = Delivery::default();
        let from = Arc::new(Target {
            worker: frame.worker,
            incarnation: frame.incarnation,
        });
        let mut strays = BTreeSet::new();
        let registrations = lock(&self.registrations);
        for item in frame.items {
            if let Some(registration) = registrations.get(&item.request) {
                let from = Arc::clone(&from);
                delivery.put(registration, Event::Item { from, item });
            } else if item.end.is_none() && strays.len() < STRAYS_MAX {
                strays.insert(item.request);
            }
        }
        for request in frame.prompts {
            if let Some(registration) = registrations.get(&request) {
                let from = Arc::clone(&from);
                delivery.put(registration, Event::PromptReported { from });
            } else if strays.len() < STRAYS_MAX {
                strays.insert(request);
            }
        }
        Dispatched {
            from,
            strays,
            dropped: delivery.dropped,
        }
    }

    /// Tells every generation.
    pub fn broadcast(&self, event: impl Fn() -> Event) {
        let mut delivery = Delivery::default();
        for registration in lock(&self.registrations).values() {
            delivery.put(registration, event());
        }
    }
}

/// Keeps a generation in the registry.
#[derive(Debug)]
pub struct Registered {
    registry: Arc<Registry>,
    request: RequestId,
}

impl Drop for Registered {
    fn drop(&mut self) {
        lock(&self.registry.registrations).remove(&self.request);
    }
}

/// Locks; a panic elsewhere while it was held leaves plain data that is still whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use baton_protocol::{Incarnation, PROTOCOL_VERSION, PackedTokens, WorkerId};
    use futures::FutureExt;

    use super::*;

    fn frame(request: RequestId, index: u32) -> TokenFrame {
        let logprobs = TokenLogprobs {
            logprob: -1.0,
            top: vec![baton_protocol::TopLogprob(1, -1.0); 20],
        };
        TokenFrame {
            v: PROTOCOL_VERSION,
            worker: WorkerId::new("decode-0").unwrap(),
            incarnation: Incarnation(1),
            items: vec![FrameItem {
                request,
                attempt: 0,
                index,
                tokens: PackedTokens(vec![index; 16]),
                logprobs: vec![logprobs; 16],
                pulled: None,
                end: None,
            }],
            prompts: Vec::new(),
        }
    }

    fn item(index: u32) -> Event {
        let frame = frame(RequestId(1), index);
        let from = Target {
            worker: frame.worker,
            incarnation: frame.incarnation,
        };
        let item = frame.items.into_iter().next().unwrap();
        let from = Arc::new(from);
        Event::Item { from, item }
    }

    /// What of these events is not an item, and how many items there are, which must be the first ones.
    fn split(events: &VecDeque<Event>) -> (usize, Vec<&Event>) {
        let is_item = |event: &&Event| matches!(event, Event::Item { .. });
        let items = events.iter().take_while(is_item).count();
        (items, events.iter().skip(items).collect())
    }

    #[tokio::test]
    async fn what_comes_for_a_thread_that_stands_still_is_bounded_and_each_of_its_generations_is_told()
     {
        let (registry, mailbox) = (Arc::new(Registry::default()), Arc::new(Mailbox::default()));
        let inboxes =
            [1, 2, 3, 4, 5, 6, 7, 8].map(|number| (RequestId(number), Arc::new(Inbox::default())));
        let _registered = inboxes.each_ref().map(|(request, inbox)| {
            registry.register(*request, Arc::clone(&mailbox), Arc::clone(inbox))
        });
        let each = item(0).bytes();
        let sent = 3 * MAILBOX_BYTES_MAX / each;
        let mut dropped = 0;
        for index in 0..sent {
            let request = inboxes[index % inboxes.len()].0;
            dropped += registry.dispatch(frame(request, index as u32)).dropped;
        }
        let held = lock(&mailbox.events).bytes;
        assert!(held <= MAILBOX_BYTES_MAX && held + each > MAILBOX_BYTES_MAX);
        assert_eq!(sent - dropped, MAILBOX_BYTES_MAX / each);
        registry.broadcast(|| Event::Leaving);

        // The thread goes on.
        assert!(Arc::clone(&mailbox).distribute().now_or_never().is_none());
        for (_, inbox) in &inboxes {
            let mut events = VecDeque::new();
            inbox.take(&mut events).await;
            let (items, others) = split(&events);
            assert!(items > 0);
            let told = matches!(others[..], [Event::FramesLost, Event::Leaving]);
            assert!(told, "{others:?}");
        }
        // And there is room again, also to tell of the next loss.
        assert_eq!(registry.dispatch(frame(inboxes[0].0, 0)).dropped, 0);
        assert!(!inboxes[0].1.lost.load(Relaxed));
    }

    #[tokio::test]
    async fn whoever_waits_at_an_empty_inbox_is_woken() {
        let inbox = Arc::new(Inbox::default());
        let reader = Arc::clone(&inbox);
        let waits = tokio::spawn(async move {
            let mut events = VecDeque::new();
            reader.take(&mut events).await;
            events.len()
        });
        // One that gives up waiting takes nothing with it.
        let mut events = VecDeque::new();
        assert!(inbox.take(&mut events).now_or_never().is_none());
        tokio::task::yield_now().await;
        inbox.push(item(0));
        inbox.push(item(1));
        let limit = std::time::Duration::from_secs(60);
        let taken = tokio::time::timeout(limit, waits).await;
        assert_eq!(taken.unwrap().unwrap(), 2);
    }

    #[test]
    fn strays_of_a_frame_are_few_and_each_is_named_once() {
        let registry = Arc::new(Registry::default());
        let mut forged = frame(RequestId(1), 0);
        let item = forged.items.remove(0);
        let named = |request| FrameItem {
            request: RequestId(request),
            ..item.clone()
        };
        forged.items = (0..3).flat_map(|_| (0..3).map(named)).collect();
        forged.prompts = (2..5).map(RequestId).collect();
        let strays = registry.dispatch(forged.clone()).strays;
        assert_eq!(strays, (0..5).map(RequestId).collect());
        forged.items = (0..5_000).map(named).collect();
        assert_eq!(registry.dispatch(forged).strays.len(), STRAYS_MAX);
    }

    #[tokio::test]
    async fn a_reported_prompt_reaches_its_generation() {
        let (registry, mailbox) = (Arc::new(Registry::default()), Arc::new(Mailbox::default()));
        let inbox = Arc::new(Inbox::default());
        let request = RequestId(1);
        let _registered = registry.register(request, Arc::clone(&mailbox), Arc::clone(&inbox));
        let mut report = frame(request, 0);
        report.items.clear();
        report.prompts = vec![request];
        assert!(registry.dispatch(report).strays.is_empty());
        assert!(mailbox.distribute().now_or_never().is_none());
        let mut events = VecDeque::new();
        inbox.take(&mut events).await;
        let is_report = |event: &Event| matches!(event, Event::PromptReported { from } if from.worker.as_str() == "decode-0");
        assert!(events.len() == 1 && is_report(&events[0]), "{events:?}");
    }

    #[tokio::test]
    async fn what_a_generation_does_not_take_is_bounded_and_it_is_told_once() {
        let inbox = Inbox::default();
        let each = item(0).bytes();
        let sent = 3 * INBOX_BYTES_MAX / each;
        for index in 0..sent {
            inbox.push(item(index as u32));
        }
        inbox.push(Event::ClientLeft);
        let mut events = VecDeque::new();
        inbox.take(&mut events).await;
        let (items, others) = split(&events);
        assert_eq!(items, INBOX_BYTES_MAX / each);
        let told = matches!(others[..], [Event::FramesLost, Event::ClientLeft]);
        assert!(told, "{others:?}");
        inbox.push(item(0));
        events.clear();
        inbox.take(&mut events).await;
        let (items, others) = split(&events);
        assert!(items == 1 && others.is_empty(), "{others:?}");
    }
}
