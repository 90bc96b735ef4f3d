//! Who waits for a place on a decode worker, in the order in which they began to wait: as a generation leaves its decode
//! worker, the first of them asks again at once. A worker's own line, which serves several API servers, has the same order,
//! so who is woken is mostly who is next there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::request::inbox::lock;

/// Those of this API server that wait.
#[derive(Debug, Default)]
pub struct DecodeRoom {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    tickets: BTreeMap<u64, Entry>,
    next: u64,
}

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
    number: u64,
    wake: Arc<Notify>,
}

impl DecodeRoom {
    /// Takes a place behind all others.
    pub fn wait(self: &Arc<Self>) -> Ticket {
        let wake = Arc::new(Notify::new());
        let waiting = &mut *lock(&self.waiting);
        let number = waiting.next;
        waiting.next += 1;
        let entry = Entry {
            state: State::Waits,
            wake: Arc::clone(&wake),
        };
        waiting.tickets.insert(number, entry);
        Ticket {
            room: Arc::clone(self),
            number,
            wake,
        }
    }

    /// A place became free: the first that waits is told, or else the first that is asking, should it be refused.
    pub fn made(&self) {
        let tickets = &mut lock(&self.waiting).tickets;
        let first = |wanted: State| {
            let mut all = tickets.iter();
            all.find(|(_, entry)| entry.state == wanted)
                .map(|(number, _)| *number)
        };
        let told = first(State::Waits).or_else(|| first(State::Asks));
        if let Some(entry) = told.and_then(|number| tickets.get_mut(&number)) {
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
        if let Some(entry) = lock(&self.room.waiting).tickets.get_mut(&self.number)
            && entry.state == from
        {
            entry.state = to;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let gone = lock(&self.room.waiting).tickets.remove(&self.number);
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
        let [first, second, third] = [0; 3].map(|_| room.wait());
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
        let [first, second] = [0; 2].map(|_| room.wait());
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
}
