//! The side that has the KV: copies what readers ask for into slots, and sends it.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ucx_sys::*;

use super::inbox::Received;
use super::message::{Message, ranges};
use super::send::{Body, Sent, send};
use super::{ASKS_MAX, RANGES_MAX, SERVING_SLOTS, Stage};
use crate::context::EMULATED_READ_BYTES;
use crate::descriptor::PeerPlan;
use crate::key::PeerKey;
use crate::peer::Link;
use crate::staging::STAGING_SLOT_BYTES;
use crate::vitals::Vitals;

/// Most readers at once.
const READERS_MAX: usize = 256;

/// A piece of a slot that goes as one message: one of UCX's segments, whose size the agent has set for it.
const PIECE_BYTES: usize = EMULATED_READ_BYTES as usize;

/// Readers, and what they are sent.
pub(crate) struct Serving {
    ucp: &'static Ucp,
    stage: Rc<Stage>,
    vitals: Arc<Vitals>,
    /// A reader that takes nothing of what it is sent for this long is cut off.
    stall_after: Duration,
    readers: HashMap<u64, Rc<Link>>,
    queue: VecDeque<Ask>,
    under_way: Vec<Sending>,
    free: Vec<usize>,
    /// For messages that nobody waits for.
    notes: Rc<Sent>,
}

/// A slot's worth that a reader wants.
struct Ask {
    reader: u64,
    chunk: u64,
    ranges: Vec<Range<u64>>,
    until: Instant,
}

/// One that is being copied or sent.
struct Sending {
    ask: Ask,
    link: Rc<Link>,
    slot: usize,
    is_copied: bool,
    sent: Rc<Sent>,
}

impl Serving {
    pub(crate) fn new(
        ucp: &'static Ucp,
        stage: Rc<Stage>,
        vitals: Arc<Vitals>,
        stall_after: Duration,
    ) -> Self {
        Self {
            ucp,
            stage,
            vitals,
            stall_after,
            readers: HashMap::new(),
            queue: VecDeque::new(),
            under_way: Vec::new(),
            free: (0..SERVING_SLOTS).collect(),
            notes: Rc::default(),
        }
    }

    /// Acts on a message of a reader.
    fn read(&mut self, worker: ucp_worker_h, received: Received, arena_bytes: u64, now: Instant) {
        match received.message {
            Message::Hello { reader } => self.greet(worker, reader, &received.body),
            Message::Ask {
                reader,
                chunk,
                budget_ms,
            } => {
                let Some(link) = self.readers.get(&reader).cloned() else {
                    return tracing::debug!("a reader that did not introduce itself is not served");
                };
                let theirs = self.queue.iter().filter(|ask| ask.reader == reader).count();
                let wanted = ranges(&received.body, arena_bytes, RANGES_MAX).filter(|ranges| {
                    let bytes = ranges
                        .iter()
                        .try_fold(0u64, |sum, range| sum.checked_add(range.end - range.start));
                    bytes.is_some_and(|bytes| bytes <= STAGING_SLOT_BYTES as u64)
                });
                match wanted.filter(|_| theirs < 2 * ASKS_MAX) {
                    Some(ranges) => self.queue.push_back(Ask {
                        reader,
                        chunk,
                        ranges,
                        until: now + Duration::from_millis(budget_ms.into()),
                    }),
                    None => self.note(&link, Message::Refused { chunk }),
                }
            }
            Message::Welcome { .. } | Message::Data { .. } | Message::Refused { .. } => {}
        }
    }

    fn greet(&mut self, worker: ucp_worker_h, reader: u64, address: &[u8]) {
        if self.readers.len() >= READERS_MAX && !self.readers.contains_key(&reader) {
            return tracing::warn!("there are already {READERS_MAX} readers of staged KV");
        }
        let link = match self.readers.get(&reader) {
            Some(link) => link.clone(),
            None => {
                let opened = PeerPlan::reader(address).and_then(|plan| {
                    Link::open(
                        self.ucp,
                        worker,
                        PeerKey(reader),
                        reader,
                        &plan,
                        self.vitals.clone(),
                        self.stall_after,
                    )
                });
                match opened {
                    Ok((link, _)) => {
                        let link = Rc::new(link);
                        self.readers.insert(reader, link.clone());
                        link
                    }
                    Err(error) => {
                        return tracing::warn!("a reader of staged KV is not reached: {error}");
                    }
                }
            }
        };
        let opened = self.stage.open();
        if let Err(error) = &opened {
            tracing::warn!("no host memory to stage KV in: {error}");
        }
        let willing = opened.is_ok();
        self.note(&link, Message::Welcome { reader, willing });
    }

    /// Messages, then what is being sent. Returns whether anything happened, and links to close.
    pub(crate) fn turn(
        &mut self,
        worker: ucp_worker_h,
        received: Vec<Received>,
        arena_bytes: u64,
        now: Instant,
    ) -> (bool, Vec<Rc<Link>>) {
        let mut busy = !received.is_empty();
        for received in received {
            self.read(worker, received, arena_bytes, now);
        }
        busy |= self.begin(now);
        let mut index = 0;
        while let Some(sending) = self.under_way.get_mut(index) {
            let before = (sending.is_copied, sending.sent.in_flight());
            let ended = sending.go_on(self.ucp, &self.stage, now);
            busy |= before != (sending.is_copied, sending.sent.in_flight());
            match ended {
                Ok(Step::Pending) => index += 1,
                Ok(Step::Ended { sent }) => {
                    let sending = self.under_way.remove(index);
                    self.free.push(sending.slot);
                    busy = true;
                    if !sent {
                        let chunk = sending.ask.chunk;
                        self.note(&sending.link, Message::Refused { chunk });
                    }
                }
                Err(error) => {
                    // The slot stays out of use: a copy may still write to it.
                    tracing::error!("staging KV: {error}");
                    let sending = self.under_way.remove(index);
                    let chunk = sending.ask.chunk;
                    self.note(&sending.link, Message::Refused { chunk });
                }
            }
        }
        let closed = self.readers.extract_if(|_, link| {
            if link.flow.look(now) {
                tracing::warn!(
                    "a reader took nothing of the KV that it asked for for {} ms: it is cut off",
                    self.stall_after.as_millis()
                );
                link.stall();
            }
            link.failure().is_some()
        });
        let closed: Vec<_> = closed.collect();
        if !closed.is_empty() {
            let (queue, readers) = (&mut self.queue, &self.readers);
            queue.retain(|ask| readers.contains_key(&ask.reader));
        }
        (busy, closed.into_iter().map(|(_, link)| link).collect())
    }

    /// Takes asks as long as there are slots.
    fn begin(&mut self, now: Instant) -> bool {
        let mut busy = false;
        while let Some(&slot) = self.free.last() {
            let Some(ask) = self.queue.pop_front() else {
                break;
            };
            busy = true;
            let Some(link) = self.readers.get(&ask.reader).cloned() else {
                continue;
            };
            if now >= ask.until {
                // Nobody waits for it any more, but the reader counts what it asked for.
                let chunk = ask.chunk;
                self.note(&link, Message::Refused { chunk });
                continue;
            }
            match self.stage.with(|staging| staging.fetch(slot, &ask.ranges)) {
                Ok(()) => {
                    self.free.pop();
                    self.stage.copying.set(self.stage.copying.get() + 1);
                    self.under_way.push(Sending {
                        ask,
                        link,
                        slot,
                        is_copied: false,
                        sent: Rc::default(),
                    });
                }
                Err(error) => {
                    tracing::error!("staging KV: {error}");
                    let chunk = ask.chunk;
                    self.note(&link, Message::Refused { chunk });
                }
            }
        }
        busy
    }

    fn note(&self, link: &Link, message: Message) {
        // SAFETY: it carries nothing.
        unsafe { send(self.ucp, link, message, Body::Nothing, &self.notes) };
    }

    /// Ends every reader's connection.
    pub(crate) fn end(&mut self) -> Vec<Rc<Link>> {
        self.queue.clear();
        self.readers.drain().map(|(_, link)| link).collect()
    }

    /// Lets go of what has ended, when nothing new begins.
    pub(crate) fn settle(&mut self) {
        let (stage, free) = (&self.stage, &mut self.free);
        self.under_way.retain_mut(|sending| {
            if !sending.is_copied {
                sending.is_copied = stage.has_ended(sending.slot).unwrap_or(false);
            }
            let ended = sending.is_copied && sending.sent.in_flight() == 0;
            if ended {
                free.push(sending.slot);
            }
            !ended
        });
    }

    /// Whether UCX and the device hold nothing of ours.
    pub(crate) fn is_idle(&self) -> bool {
        self.under_way.is_empty() && self.notes.in_flight() == 0
    }
}

/// How far what is being sent is.
enum Step {
    Pending,
    /// It is sent, or is not to be sent any more.
    Ended {
        sent: bool,
    },
}

impl Sending {
    fn go_on(&mut self, ucp: &Ucp, stage: &Stage, now: Instant) -> Result<Step, String> {
        if !self.is_copied {
            if !stage.has_ended(self.slot)? {
                return Ok(Step::Pending);
            }
            self.is_copied = true;
            if self.link.failure().is_some() || now >= self.ask.until {
                return Ok(Step::Ended { sent: false });
            }
            self.send(ucp, stage)?;
        }
        Ok(match self.sent.in_flight() {
            0 => Step::Ended { sent: true },
            _ => Step::Pending,
        })
    }

    fn send(&self, ucp: &Ucp, stage: &Stage) -> Result<(), String> {
        let bytes: u64 = self
            .ask
            .ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        let slot = stage.with(|staging| Ok(staging.slot(self.slot).as_ptr()))?;
        let bytes = bytes as usize;
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let message = Message::Data {
                chunk: self.ask.chunk,
                at: at as u32,
            };
            let body = Body::At(slot.wrapping_add(at), PIECE_BYTES.min(bytes - at));
            // SAFETY: within the slot, which nobody writes to before `sent` has counted everything off: it is not free until
            // then.
            unsafe { send(ucp, &self.link, message, body, &self.sent) };
        }
        Ok(())
    }
}
