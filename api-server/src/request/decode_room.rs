//! Who waits for a place on a decode worker: interactive requests before batch ones, then by priority, then in the order in which they
//! began to wait. As a generation leaves its decode worker, the first of them asks again at once. A worker's own line, which serves
//! several API servers, has the same order, so who is woken is mostly who is next there.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_protocol::deadlines::BATCH_TURN_MS;
use baton_protocol::{Service, Tier};
use tokio::sync::Notify;
use tokio::time::Instant;

/// A batch request that waits is told of a place after this time, whoever else waits.
const BATCH_TURN: Duration = Duration::from_millis(BATCH_TURN_MS);

use crate::request::inbox::lock;

/// Those of this API server that wait.
#[derive(Debug, Default)]
pub struct DecodeRoom {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    tickets: BTreeMap<Order, Entry>,
    next: u64,
    /// When a batch request was last told of a place, or the first began to wait.
    batch_waits: Option<Instant>,
}

/// Who goes first: the lesser.
type Order = (Tier, Reverse<i32>, u64);

#[derive(Debug)]
struct Entry {
    state: State,
    wake: Arc<Notify>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waits,
    /// It was told of a place and has not asked yet.
    Told,
    Asks,
}

/// A place among those that wait, kept until it is dropped.
pub struct Ticket {
    room: Arc<DecodeRoom>,
    order: Order,
    wake: Arc<Notify>,
}

impl DecodeRoom {
    /// Takes a place behind all others of its class.
    pub fn wait(self: &Arc<Self>, service: Service) -> Ticket {
        let wake = Arc::new(Notify::new());
        let waiting = &mut *lock(&self.waiting);
        let order = (service.tier, Reverse(service.priority), waiting.next);
        waiting.next += 1;
        if service.tier == Tier::Batch {
            waiting.batch_waits.get_or_insert_with(Instant::now);
        }
        let entry = Entry {
            state: State::Waits,
            wake: Arc::clone(&wake),
        };
        waiting.tickets.insert(order, entry);
        Ticket {
            room: Arc::clone(self),
            order,
            wake,
        }
    }

    /// A place became free: the first that waits is told, or else the first that is asking, should it be refused.
    pub fn made(&self) {
        let waiting = &mut *lock(&self.waiting);
        let now = Instant::now();
        let is_due = |since: Instant| now.saturating_duration_since(since) >= BATCH_TURN;
        let is_turn = waiting.batch_waits.is_some_and(is_due);
        let first = |wanted: State, tier: Option<Tier>| {
            let mut all = waiting.tickets.iter();
            all.find(|((of, ..), entry)| {
                entry.state == wanted && tier.is_none_or(|tier| tier == *of)
            })
            .map(|(order, _)| *order)
        };
        let told = (is_turn.then(|| first(State::Waits, Some(Tier::Batch))))
            .flatten()
            .or_else(|| first(State::Waits, None))
            .or_else(|| first(State::Asks, None));
        let Some(order) = told else {
            return;
        };
        if order.0 == Tier::Batch {
            waiting.batch_waits = Some(now);
        }
        if let Some(entry) = waiting.tickets.get_mut(&order) {
            entry.state = State::Told;
            entry.wake.notify_one();
        }
    }
}

impl Ticket {
    /// Waits until it is told of a place.
    pub async fn told(&self) {
        self.wake.notified().await;
        self.set(State::Told, State::Asks);
    }

    /// It asks unasked, because its time is over.
    pub fn asks(&self) {
        self.set(State::Waits, State::Asks);
    }

    /// It was refused, and waits on.
    pub fn waits_on(&self) {
        self.set(State::Asks, State::Waits);
    }

    fn set(&self, from: State, to: State) {
        if let Some(entry) = lock(&self.room.waiting).tickets.get_mut(&self.order)
            && entry.state == from
        {
            entry.state = to;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut waiting = lock(&self.room.waiting);
        let gone = waiting.tickets.remove(&self.order);
        // Batch is last.
        let last = waiting.tickets.last_key_value();
        if last.is_none_or(|((tier, ..), _)| *tier == Tier::Interactive) {
            waiting.batch_waits = None;
        }
        drop(waiting);
        // What it was told of is another's now.
        if gone.is_some_and(|entry| entry.state == State::Told) {
            self.room.made();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn is_told(ticket: &Ticket) -> bool {
        ticket.told().now_or_never().is_some()
    }

    #[test]
    fn who_waits_longest_is_told_first() {
        let room = Arc::new(DecodeRoom::default());
        let [first, second, third] = [0; 3].map(|_| room.wait(Service::default()));
        room.made();
        room.made();
        assert!(is_told(&first) && is_told(&second) && !is_told(&third));
        // Refused, it keeps its place before those that came later.
        first.waits_on();
        room.made();
        assert!(is_told(&first) && !is_told(&third));
    }

    #[test]
    fn a_place_is_not_lost_with_whom_it_was_told() {
        let room = Arc::new(DecodeRoom::default());
        let [first, second] = [0; 2].map(|_| room.wait(Service::default()));
        room.made();
        drop(first);
        assert!(is_told(&second));
        // One that asks already is told too, and asks again if it is refused.
        room.made();
        second.waits_on();
        assert!(is_told(&second));
        drop(second);
        assert!(lock(&room.waiting).tickets.is_empty());
        room.made();
    }

    #[tokio::test(start_paused = true)]
    async fn batch_requests_are_told_last_and_in_their_turn() {
        let of = |tier, priority| Service {
            tier,
            priority,
            itl_ms: None,
        };
        let room = Arc::new(DecodeRoom::default());
        let batch = room.wait(of(Tier::Batch, 9));
        let [first, second] = [0; 2].map(|_| room.wait(Service::default()));
        let before = room.wait(of(Tier::Interactive, 1));
        room.made();
        assert!(is_told(&before) && !is_told(&first));
        room.made();
        assert!(is_told(&first) && !is_told(&batch));
        first.waits_on();
        tokio::time::advance(BATCH_TURN).await;
        room.made();
        assert!(is_told(&batch) && !is_told(&first));
        // One turn in that time.
        batch.waits_on();
        room.made();
        assert!(is_told(&first) && !is_told(&batch));
        drop(batch);
        room.made();
        assert!(is_told(&second));
    }
}
