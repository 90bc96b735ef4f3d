//! Which prefixes workers hold, by what they report.
//!
//! Reports are numbered. A worker of which one was missed, or that is new to this API server, is asked for all, page by page, while
//! reports that come meanwhile wait; until the last page is here, what was known of it stands. What is taken in waits in a queue
//! and goes into the tables a little at a time ([`Reported::take_in`]): the fleet's lock is never held for long.

mod links;

use std::collections::VecDeque;

use baton_protocol::limits::PREFIX_BLOCKS_MAX;
use baton_protocol::{PrefixPage, PrefixReport};
use tokio::time::Instant;

use self::links::{Links, Number, Probing};
use super::cached::Cached;
use crate::fleet::membership::{ASK_INTERVAL, Slot};

/// Workers that are asked for all at the same time.
const ASKED_MAX: usize = 32;

/// Pages of one worker: those of the largest index, should they be half full.
const PAGES_MAX: usize =
    2 * PREFIX_BLOCKS_MAX.div_ceil(baton_protocol::limits::PREFIX_PAGE_MAX as u32) as usize;

/// Links of reports that wait for the last page. Beyond it the worker is asked again.
const LATER_MAX: usize = 1 << 16;

/// Links that go into the tables at a time, some ten microseconds' worth.
const AT_A_TIME: usize = 64;

const NO_SLOT: u32 = u32::MAX;

/// What is known of all workers' prefixes.
#[derive(Debug, Default)]
pub struct Reported {
    links: Links,
    /// By slot; none of workers that report nothing.
    tellers: Vec<Option<Teller>>,
    /// By number: the slot of who stands in the links as it, or [`NO_SLOT`].
    slots: Vec<u32>,
    /// By number: links that it holds.
    counts: Vec<usize>,
    /// What goes into the tables next.
    waiting: VecDeque<Change>,
    asks: u64,
    asked: usize,
    probing: Probing,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    link: u64,
    number: Number,
    is_in: bool,
}

/// A worker that reports.
#[derive(Debug)]
struct Teller {
    /// As which it stands in the links, once anything is known.
    number: Option<Number>,
    knows: Knows,
    /// The last report by its last beat: by the next beat that has come, or it was lost.
    told: u64,
    /// When it was last asked for all.
    asked: Option<Instant>,
    /// It holds more than is known here.
    is_part: bool,
}

#[derive(Debug)]
enum Knows {
    /// All reports up to this one.
    UpTo(u64),
    /// One was missed.
    Missed,
    /// It is being asked.
    Asking(Asking),
}

#[derive(Debug)]
struct Asking {
    ask: u64,
    /// As which it will stand in the links.
    number: Number,
    /// The last report before the first page.
    first: Option<u64>,
    pages: usize,
    /// Reports since.
    later: Vec<PrefixReport>,
    later_links: usize,
}

/// A worker is to be asked for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AskAll {
    slot: Slot,
    ask: u64,
}

impl AskAll {
    /// Whose.
    pub fn slot(&self) -> Slot {
        self.slot
    }
}

/// What follows on a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paged {
    /// The next page begins there.
    Next(u32),
    /// It was the last one, or nobody wants it any more.
    Over,
}

impl Reported {
    /// A beat names the worker's last report; none if it reports nothing.
    pub fn beat(&mut self, slot: Slot, version: Option<u64>) {
        let Some(version) = version else {
            return self.left(slot);
        };
        if slot >= self.tellers.len() {
            self.tellers.resize_with(slot + 1, || None);
        }
        match &mut self.tellers[slot] {
            Some(teller) => {
                if let Knows::UpTo(known) = teller.knows
                    && known < teller.told
                {
                    teller.knows = Knows::Missed;
                }
                teller.told = version;
            }
            new => {
                *new = Some(Teller {
                    number: None,
                    knows: match version {
                        0 => Knows::UpTo(0),
                        _ => Knows::Missed,
                    },
                    told: version,
                    asked: None,
                    is_part: false,
                });
            }
        }
    }

    /// Whether all is known of a worker that it has told.
    pub fn knows(&self, slot: Slot) -> bool {
        let teller = self.tellers.get(slot).and_then(Option::as_ref);
        teller.is_some_and(|teller| matches!(teller.knows, Knows::UpTo(_)))
    }

    /// Whether the worker is to be asked for all now. Who asks tells what comes of it ([`Self::page`], [`Self::gave_up`]).
    pub fn asks(&mut self, slot: Slot, now: Instant) -> Option<AskAll> {
        let is_due = |asked| now.saturating_duration_since(asked) >= ASK_INTERVAL;
        let teller = self.tellers.get_mut(slot)?.as_mut()?;
        let asks = matches!(teller.knows, Knows::Missed) && teller.asked.is_none_or(is_due);
        if !asks || self.asked >= ASKED_MAX {
            return None;
        }
        let number = new_number(&mut self.links, &mut self.counts)?;
        self.asks += 1;
        self.asked += 1;
        teller.asked = Some(now);
        teller.knows = Knows::Asking(Asking {
            ask: self.asks,
            number,
            first: None,
            pages: 0,
            later: Vec::new(),
            later_links: 0,
        });
        let ask = self.asks;
        Some(AskAll { slot, ask })
    }

    /// A report of the worker in this slot came.
    pub fn report(&mut self, slot: Slot, report: PrefixReport) {
        let Some(Some(teller)) = self.tellers.get_mut(slot) else {
            return;
        };
        match &mut teller.knows {
            Knows::UpTo(known) if report.version <= *known => {}
            Knows::UpTo(known) if report.since <= *known => {
                let number = match teller.number {
                    Some(number) => number,
                    None => match new_number(&mut self.links, &mut self.counts) {
                        Some(number) => number,
                        None => {
                            teller.knows = Knows::Missed;
                            return;
                        }
                    },
                };
                *known = report.version;
                teller.number = Some(number);
                teller.is_part |= report.is_part;
                self.stands(slot, number);
                self.queue(number, &report);
            }
            Knows::UpTo(_) => teller.knows = Knows::Missed,
            Knows::Missed => {}
            Knows::Asking(asking) => {
                asking.later_links += report.added.0.len() + report.removed.0.len();
                if asking.later_links <= LATER_MAX {
                    asking.later.push(report);
                }
            }
        }
    }

    /// A page came. What is in it is not used for choices before the last one is here.
    pub fn page(&mut self, AskAll { slot, ask }: AskAll, block: u32, page: &PrefixPage) -> Paged {
        let Some(asking) = self.asking(slot, ask) else {
            return Paged::Over;
        };
        let number = asking.number;
        asking.first.get_or_insert(page.version);
        asking.pages += 1;
        let goes_on = asking.pages < PAGES_MAX && page.next.is_none_or(|next| next > block);
        if !goes_on {
            self.gave_up(AskAll { slot, ask });
            return Paged::Over;
        }
        let links = page.links.0.iter();
        self.waiting.extend(links.map(|link| Change {
            link: *link,
            number,
            is_in: true,
        }));
        match page.next {
            Some(next) => Paged::Next(next),
            None => {
                self.finish(slot, page.is_part);
                Paged::Over
            }
        }
    }

    /// The worker did not answer, or not sensibly: it is asked again later.
    pub fn gave_up(&mut self, AskAll { slot, ask }: AskAll) {
        if self.asking(slot, ask).is_some()
            && let Some(Some(teller)) = self.tellers.get_mut(slot)
            && let Knows::Asking(asking) = std::mem::replace(&mut teller.knows, Knows::Missed)
        {
            self.asked -= 1;
            self.retire(asking.number);
        }
    }

    /// All pages are here: reports that came meanwhile go in behind them.
    fn finish(&mut self, slot: Slot, is_part: bool) {
        let Some(Some(teller)) = self.tellers.get_mut(slot) else {
            return;
        };
        let Knows::Asking(asking) = std::mem::replace(&mut teller.knows, Knows::Missed) else {
            return;
        };
        self.asked -= 1;
        let mut known = asking.first.unwrap_or_default();
        let mut misses = asking.later_links > LATER_MAX;
        let before = teller.number.replace(asking.number);
        teller.is_part = is_part;
        self.stands(slot, asking.number);
        for report in asking.later {
            if report.version <= known || misses {
                continue;
            }
            misses = report.since > known;
            if !misses {
                known = report.version;
                self.queue(asking.number, &report);
            }
        }
        if !misses && let Some(Some(teller)) = self.tellers.get_mut(slot) {
            teller.knows = Knows::UpTo(known);
        }
        if let Some(before) = before {
            self.retire(before);
        }
    }

    /// The worker has left the slot, or begins a new life: what it held is gone.
    pub fn left(&mut self, slot: Slot) {
        let Some(teller) = self.tellers.get_mut(slot).and_then(Option::take) else {
            return;
        };
        if let Knows::Asking(asking) = teller.knows {
            self.asked -= 1;
            self.retire(asking.number);
        }
        if let Some(number) = teller.number {
            self.retire(number);
        }
    }

    /// Takes in some of what waits. Whether there is more.
    pub fn take_in(&mut self) -> bool {
        for _ in 0..AT_A_TIME {
            let Some(change) = self.waiting.pop_front() else {
                break;
            };
            let Change {
                link,
                number,
                is_in,
            } = change;
            let count = &mut self.counts[usize::from(number)];
            if !is_in {
                *count -= usize::from(self.links.remove(link, number));
            } else if *count < PREFIX_BLOCKS_MAX as usize {
                *count += usize::from(self.links.insert(link, number));
            }
        }
        !self.waiting.is_empty()
    }

    /// Clears away some of what those had who left. Whether there is more.
    pub fn sweep(&mut self) -> bool {
        self.links.sweep()
    }

    /// Notes how many blocks of this prompt each worker holds.
    pub(super) fn cached(&mut self, chain: &[u64], cached: &mut Cached) {
        let Self {
            links,
            slots,
            probing,
            ..
        } = self;
        links.depths(chain, probing, |number, blocks| {
            let slot = slots.get(usize::from(number)).copied();
            if let Some(slot) = slot.filter(|slot| *slot != NO_SLOT) {
                cached.raise(slot as Slot, blocks);
            }
        });
    }

    /// How many blocks of this prompt one worker holds.
    pub(super) fn blocks_of(&self, slot: Slot, chain: &[u64]) -> usize {
        let teller = self.tellers.get(slot).and_then(Option::as_ref);
        let Some(number) = teller.and_then(|teller| teller.number) else {
            return 0;
        };
        // Who holds a link holds all before it.
        chain.partition_point(|link| self.links.holds(*link, number))
    }

    /// Links of all workers.
    pub fn len(&self) -> usize {
        self.links.len()
    }

    fn asking(&mut self, slot: Slot, ask: u64) -> Option<&mut Asking> {
        match &mut self.tellers.get_mut(slot)?.as_mut()?.knows {
            Knows::Asking(asking) if asking.ask == ask => Some(asking),
            _ => None,
        }
    }

    fn queue(&mut self, number: Number, report: &PrefixReport) {
        for (links, is_in) in [(&report.removed, false), (&report.added, true)] {
            let links = links.0.iter();
            self.waiting.extend(links.map(|link| Change {
                link: *link,
                number,
                is_in,
            }));
        }
    }

    fn stands(&mut self, slot: Slot, number: Number) {
        let at = usize::from(number);
        if at >= self.slots.len() {
            self.slots.resize(at + 1, NO_SLOT);
        }
        self.slots[at] = slot as u32;
    }

    fn retire(&mut self, number: Number) {
        // Nothing may come into a table that has been cleared of it.
        self.waiting.retain(|change| change.number != number);
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            *slot = NO_SLOT;
        }
        self.counts[usize::from(number)] = 0;
        self.links.retire(number);
    }

    /// Whether this is all that is known of the worker in the slot, where all is known.
    #[cfg(any(test, feature = "simulation"))]
    pub fn holds_exactly(&self, slot: Slot, all: &[u64]) -> Result<(), String> {
        let teller = self.tellers.get(slot).and_then(Option::as_ref);
        let Some(teller) = teller else {
            return Err("it reports nothing".to_owned());
        };
        let Knows::UpTo(version) = teller.knows else {
            return Err(format!("a report of it was missed: {:?}", teller.knows));
        };
        if !self.waiting.is_empty() {
            return Err(format!("{} links wait", self.waiting.len()));
        }
        let Some(number) = teller.number else {
            return match all.is_empty() {
                true => Ok(()),
                false => Err(format!("nothing is known of {} links", all.len())),
            };
        };
        let missing = all.iter().filter(|link| !self.links.holds(**link, number));
        let (missing, count) = (missing.count(), self.counts[usize::from(number)]);
        match missing == 0 && count == all.len() {
            true => Ok(()),
            false => Err(format!(
                "by report {version} it holds {count} links, and {missing} of the {} that it has are not among them",
                all.len()
            )),
        }
    }
}

fn new_number(links: &mut Links, counts: &mut Vec<usize>) -> Option<Number> {
    let number = links.number()?;
    let at = usize::from(number);
    if at >= counts.len() {
        counts.resize(at + 1, 0);
    }
    Some(number)
}

#[cfg(test)]
mod tests;
