//! The way of events to the generations they concern: from the bus to the HTTP thread's mailbox, and from there to
//! the inbox of each.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_protocol::{FrameItem, RequestId, TokenFrame};
use tokio::sync::Notify;

use crate::lifecycle::Target;

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
}

/// Events that may wait for one generation. Its worker makes some hundred a second, and its client may leave it unread for half a
/// minute. What is beyond is dropped, which the next item's number tells.
const ITEMS_MAX: usize = 1 << 14;

/// Events on their way to one generation's driver.
#[derive(Debug, Default)]
pub struct Inbox {
    events: Mutex<VecDeque<Event>>,
    notify: Notify,
}

impl Inbox {
    /// Adds an event and wakes the driver if it was idle.
    pub fn push(&self, event: Event) {
        let was_empty = {
            let mut events = lock(&self.events);
            if events.len() >= ITEMS_MAX && matches!(event, Event::Item { .. }) {
                return;
            }
            events.push_back(event);
            events.len() == 1
        };
        if was_empty {
            self.notify.notify_one();
        }
    }

    /// Waits for events and swaps them into `into`, which is empty.
    pub async fn take(&self, into: &mut VecDeque<Event>) {
        loop {
            std::mem::swap(&mut *lock(&self.events), into);
            if !into.is_empty() {
                return;
            }
            self.notify.notified().await;
        }
    }
}

/// Events for the generations of one HTTP thread. What a frame brings for all of them wakes the thread once;
/// from there on it is a matter of that thread alone.
#[derive(Debug, Default)]
pub struct Mailbox {
    events: Mutex<Vec<(Arc<Inbox>, Event)>>,
    notify: Notify,
}

impl Mailbox {
    /// Hands events on for ever. Runs on the thread whose mailbox it is.
    pub async fn distribute(self: Arc<Self>) {
        let mut batch = Vec::new();
        loop {
            std::mem::swap(&mut *lock(&self.events), &mut batch);
            if batch.is_empty() {
                self.notify.notified().await;
            }
            for (inbox, event) in batch.drain(..) {
                inbox.push(event);
            }
        }
    }
}

/// The inboxes of all generations in flight.
#[derive(Debug, Default)]
pub struct Registry {
    places: Mutex<BTreeMap<RequestId, Place>>,
}

/// Where a generation is driven.
#[derive(Debug)]
struct Place {
    mailbox: Arc<Mailbox>,
    inbox: Arc<Inbox>,
}

/// Puts events into mailboxes, and at the end wakes each that got some.
#[derive(Default)]
struct Delivery(Vec<Arc<Mailbox>>);

impl Delivery {
    fn put(&mut self, place: &Place, event: Event) {
        let Place { mailbox, inbox } = place;
        lock(&mailbox.events).push((Arc::clone(inbox), event));
        // As many as there are HTTP threads.
        if !self.0.iter().any(|known| Arc::ptr_eq(known, mailbox)) {
            self.0.push(Arc::clone(mailbox));
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.0
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
        lock(&self.places).insert(request, Place { mailbox, inbox });
        Registered {
            registry: Arc::clone(self),
            request,
        }
    }

    /// Generations in flight.
    pub fn len(&self) -> usize {
        lock(&self.places).len()
    }

    /// Hands every item of a frame to its generation. Gives back the sender and those requests that are not over there
    /// and are known to nobody here any more: the sender was deaf when it was told, or the telling was lost.
    pub fn dispatch(&self, frame: TokenFrame) -> (Arc<Target>, Vec<RequestId>) {
        let mut delivery = Delivery::default();
        let from = Arc::new(Target {
            worker: frame.worker,
            incarnation: frame.incarnation,
        });
        let mut strays = Vec::new();
        let places = lock(&self.places);
        for item in frame.items {
            if let Some(place) = places.get(&item.request) {
                let from = Arc::clone(&from);
                delivery.put(place, Event::Item { from, item });
            } else if item.end.is_none() {
                strays.push(item.request);
            }
        }
        (from, strays)
    }

    /// Tells every generation.
    pub fn broadcast(&self, event: impl Fn() -> Event) {
        let mut delivery = Delivery::default();
        for place in lock(&self.places).values() {
            delivery.put(place, event());
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
        lock(&self.registry.places).remove(&self.request);
    }
}

/// Locks; a panic elsewhere while it was held leaves plain data that is still whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
