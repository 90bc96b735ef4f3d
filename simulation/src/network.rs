//! The bus in memory: NATS's subjects, replies and `no responders`, and bad weather.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::{Message, StatusCode, Subject};
use baton_bus::{Carrier, Wire};
use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use crate::dice::Dice;
use crate::trace::Trace;
use crate::weather::{Kind, Weather};

/// Payloads as large as the protocol allows.
const PAYLOAD_MAX: usize = baton_protocol::limits::MESSAGE_BYTES_MAX;

/// Whoever reads along on the bus.
pub trait Witness: Send {
    /// Somebody sent a message.
    fn saw(&mut self, kind: Kind, subject: &str, reply: Option<&str>, payload: &[u8]);

    /// What it saw that must not be, in words.
    fn take_wrong(&mut self) -> Vec<String>;
}

/// A bus. Every process has a port of its own to it.
pub struct Network {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    weather: Weather,
    dice: Dice,
    trace: Trace,
    /// Reads along, if somebody should.
    witness: Option<Box<dyn Witness>>,
    ports: Vec<PortState>,
    subscriptions: BTreeMap<u64, Subscribed>,
    /// What is under way, by the time of its arrival and in order of sending.
    under_way: BTreeMap<(Instant, u64), (u64, Message)>,
    /// When the last message of a port to a subscription arrives: NATS keeps their order.
    last: BTreeMap<(usize, u64), Instant>,
    count: u64,
}

struct PortState {
    name: String,
    state: Connectivity,
    /// What was sent while the process or its connection stood still.
    held: Vec<Sent>,
}

/// What of a process's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connectivity {
    /// All is well.
    Up,
    /// The process stands still: what it would send is not sent yet, and what comes waits for it.
    Frozen,
    /// No connection: what comes is lost, and what it sends waits in its client.
    Cut,
    /// The process is gone.
    Dead,
}

struct Subscribed {
    port: usize,
    subject: Subject,
    sender: mpsc::UnboundedSender<Message>,
}

type Sent = (Subject, Option<Subject>, Bytes);

/// A process's connection to the bus.
pub struct Port {
    network: Arc<Network>,
    index: usize,
}

impl Network {
    /// An empty bus.
    pub fn new(
        weather: Weather,
        dice: Dice,
        trace: Trace,
        witness: Option<Box<dyn Witness>>,
    ) -> Arc<Self> {
        let state = State {
            weather,
            dice,
            trace,
            witness,
            ports: Vec::new(),
            subscriptions: BTreeMap::new(),
            under_way: BTreeMap::new(),
            last: BTreeMap::new(),
            count: 0,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Notify::new(),
        })
    }

    /// A new process's connection.
    pub fn port(self: &Arc<Self>, name: &str) -> Arc<Port> {
        let mut state = self.lock();
        state.ports.push(PortState {
            name: name.to_owned(),
            state: Connectivity::Up,
            held: Vec::new(),
        });
        let index = state.ports.len() - 1;
        drop(state);
        let network = Arc::clone(self);
        Arc::new(Port { network, index })
    }

    /// Brings what is under way to its end, for ever.
    pub async fn carry(self: Arc<Self>) {
        loop {
            let next = self.lock().under_way.keys().next().map(|(at, _)| *at);
            let arrival = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.changed.notified() => {}
                () = arrival => self.lock().deliver_due(Instant::now()),
            }
        }
    }

    /// From now on another weather.
    pub fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// Something else happened that the trace should tell.
    pub fn note(&self, numbers: [u64; 4], sentence: std::fmt::Arguments<'_>) {
        self.lock().trace.note(numbers, sentence);
    }

    /// Subscriptions to answers that nobody waits for any more, or still does.
    pub fn open_requests(&self) -> usize {
        let state = self.lock();
        let open = |s: &&Subscribed| s.subject.starts_with("_INBOX") && !s.sender.is_closed();
        state.subscriptions.values().filter(open).count()
    }

    /// What the witness saw that must not be.
    pub fn take_wrong(&self) -> Vec<String> {
        let mut state = self.lock();
        state
            .witness
            .as_mut()
            .map(|witness| witness.take_wrong())
            .unwrap_or_default()
    }

    /// Hash, number of events, and sentences.
    pub fn take_trace(&self) -> (u64, u64, Vec<String>) {
        let mut state = self.lock();
        let trace = &mut state.trace;
        (trace.hash(), trace.events(), trace.take_lines())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port {
    /// The wire that a process speaks over.
    pub fn wire(self: &Arc<Self>) -> Wire {
        Wire::over(Arc::clone(self) as Arc<dyn Carrier>)
    }

    /// The connection gets better or worse.
    pub fn set(&self, connectivity: Connectivity) {
        let mut state = self.network.lock();
        let index = self.index;
        let before = std::mem::replace(&mut state.ports[index].state, connectivity);
        let name = state.ports[index].name.clone();
        state.trace.note(
            [1, index as u64, connectivity as u64, 0],
            format_args!("{name}: {before:?} → {connectivity:?}"),
        );
        match connectivity {
            Connectivity::Dead => {
                state.subscriptions.retain(|_, s| s.port != index);
                state.ports[index].held.clear();
            }
            Connectivity::Up => {
                for (subject, reply, payload) in std::mem::take(&mut state.ports[index].held) {
                    state.send(index, subject, reply, payload);
                }
            }
            Connectivity::Frozen | Connectivity::Cut => {}
        }
        drop(state);
        self.network.changed.notify_one();
    }

    /// How it is.
    pub fn state(&self) -> Connectivity {
        self.network.lock().ports[self.index].state
    }
}

impl Carrier for Port {
    fn publish(&self, subject: Subject, reply: Option<Subject>, payload: Bytes) {
        let mut state = self.network.lock();
        match state.ports[self.index].state {
            Connectivity::Up => state.send(self.index, subject, reply, payload),
            Connectivity::Frozen | Connectivity::Cut => {
                state.ports[self.index].held.push((subject, reply, payload));
            }
            Connectivity::Dead => {}
        }
        drop(state);
        self.network.changed.notify_one();
    }

    fn subscribe(&self, subject: Subject) -> mpsc::UnboundedReceiver<Message> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.network.lock();
        if state.ports[self.index].state != Connectivity::Dead {
            let id = state.next();
            let port = self.index;
            state.subscriptions.insert(
                id,
                Subscribed {
                    port,
                    subject,
                    sender,
                },
            );
        }
        receiver
    }

    fn new_inbox(&self) -> Subject {
        let mut state = self.network.lock();
        let id = state.next();
        format!("_INBOX.{}.{id}", state.ports[self.index].name).into()
    }

    fn is_connected(&self) -> bool {
        !matches!(self.state(), Connectivity::Cut | Connectivity::Dead)
    }

    fn max_payload(&self) -> usize {
        PAYLOAD_MAX
    }
}

// === impl State ===

impl State {
    fn next(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    /// Sends a message to everybody who listens.
    fn send(&mut self, from: usize, subject: Subject, reply: Option<Subject>, payload: Bytes) {
        self.subscriptions.retain(|_, s| !s.sender.is_closed());
        let listens = |s: &Subscribed| {
            matches(&s.subject, &subject) && self.ports[s.port].state != Connectivity::Cut
        };
        let heard: Vec<u64> = self
            .subscriptions
            .iter()
            .filter(|(_, s)| listens(s))
            .map(|(id, _)| *id)
            .collect();
        let kind = Kind::of(&subject);
        if let Some(witness) = &mut self.witness {
            witness.saw(kind, &subject, reply.as_deref(), &payload);
        }
        if heard.is_empty() {
            let name = &self.ports[from].name;
            self.trace.note(
                [2, from as u64, kind as u64, payload.len() as u64],
                format_args!("{name} → {subject}: nobody listens"),
            );
            if let Some(reply) = reply {
                let mut message = message(reply.clone(), None, Bytes::new());
                message.status = Some(StatusCode::NO_RESPONDERS);
                let asked = self.subscriptions.iter().find(|(_, s)| s.subject == reply);
                if let Some(id) = asked.map(|(id, _)| *id) {
                    self.put(from, id, message, Duration::ZERO, true);
                }
            }
            return;
        }
        for id in heard {
            let fate = self.weather.fate(kind, &mut self.dice);
            let to = &self.ports[self.subscriptions[&id].port].name;
            let name = &self.ports[from].name;
            self.trace.note(
                [3, from as u64, kind as u64, payload.len() as u64],
                format_args!("{name} → {to} {subject} {fate}: {}", Excerpt(&payload)),
            );
            for delay in fate.arrivals {
                let message = message(subject.clone(), reply.clone(), payload.clone());
                self.put(from, id, message, delay, fate.in_order);
            }
        }
    }

    fn put(&mut self, from: usize, to: u64, message: Message, delay: Duration, in_order: bool) {
        let mut at = Instant::now() + delay;
        if in_order {
            let last = self.last.entry((from, to)).or_insert(at);
            at = at.max(*last);
            *last = at;
        }
        let order = self.next();
        self.under_way.insert((at, order), (to, message));
    }

    fn deliver_due(&mut self, now: Instant) {
        while let Some(entry) = self.under_way.first_entry() {
            if entry.key().0 > now {
                return;
            }
            let ((_, order), (to, message)) = entry.remove_entry();
            let Some(subscribed) = self.subscriptions.get(&to) else {
                continue;
            };
            if self.ports[subscribed.port].state == Connectivity::Cut {
                continue;
            }
            let port = subscribed.port;
            let name = &self.ports[port].name;
            self.trace.note(
                [4, port as u64, order, message.payload.len() as u64],
                format_args!("{name} ← {}", message.subject),
            );
            // Whoever listened may have stopped.
            let _ = subscribed.sender.send(message);
        }
    }
}

fn message(subject: Subject, reply: Option<Subject>, payload: Bytes) -> Message {
    Message {
        length: payload.len(),
        subject,
        reply,
        payload,
        headers: None,
        status: None,
        description: None,
    }
}

/// Whether a subject is one of those that a subscription names.
fn matches(pattern: &str, subject: &str) -> bool {
    let (mut patterns, mut tokens) = (pattern.split('.'), subject.split('.'));
    loop {
        match (patterns.next(), tokens.next()) {
            (None, None) => return true,
            (Some("*"), Some(_)) => {}
            (Some(pattern), Some(token)) if pattern == token => {}
            _ => return false,
        }
    }
}

/// The beginning of a message, made only if somebody reads it.
struct Excerpt<'a>(&'a [u8]);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(self.0);
        text.chars().take(400).try_for_each(|c| f.write_char(c))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_match_as_in_nats() {
        assert!(matches("baton.c.*.w", "baton.c.prefill.w"));
        assert!(!matches("baton.c.*.w", "baton.c.prefill.v"));
        assert!(!matches("baton.c.*", "baton.c.prefill.w"));
        assert!(!matches("baton.c.prefill.w", "baton.c.*"));
    }
}
