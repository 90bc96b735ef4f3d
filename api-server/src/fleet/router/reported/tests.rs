use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use baton_protocol::{Incarnation, PROTOCOL_VERSION, PackedLinks, WorkerId};
use proptest::prelude::*;

use super::*;

const SLOT: Slot = 5;

/// Blocks of a worker's arena, and of a page.
const BLOCKS: usize = 12;
const PAGE: usize = 4;

fn report(since: u64, version: u64, added: &[u64], removed: &[u64]) -> PrefixReport {
    PrefixReport {
        v: PROTOCOL_VERSION,
        worker: WorkerId::new("w").unwrap(),
        incarnation: Incarnation(1),
        since,
        version,
        added: PackedLinks(added.to_vec()),
        removed: PackedLinks(removed.to_vec()),
        is_part: false,
    }
}

fn page(version: u64, links: &[u64], next: Option<u32>) -> PrefixPage {
    PrefixPage {
        v: PROTOCOL_VERSION,
        worker: WorkerId::new("w").unwrap(),
        incarnation: Incarnation(1),
        version,
        links: PackedLinks(links.to_vec()),
        next,
        is_part: false,
    }
}

fn settle(reported: &mut Reported) {
    while reported.take_in() {}
}

fn blocks(reported: &mut Reported, slot: Slot, chain: &[u64]) -> usize {
    let mut cached = Cached::default();
    reported.cached(chain, &mut cached);
    assert_eq!(reported.blocks_of(slot, chain), cached.of(slot));
    cached.of(slot)
}

#[test]
fn reports_in_order_are_what_a_worker_holds() {
    let mut reported = Reported::default();
    reported.report(SLOT, report(0, 1, &[1], &[]));
    assert!(!reported.knows(SLOT), "nobody beat");
    reported.beat(SLOT, Some(0));
    assert_eq!(reported.asks(SLOT, Instant::now()), None, "it began empty");
    reported.report(SLOT, report(0, 1, &[1, 2, 3], &[]));
    reported.report(SLOT, report(1, 2, &[4], &[3]));
    reported.report(SLOT, report(1, 2, &[9], &[]));
    settle(&mut reported);
    reported.holds_exactly(SLOT, &[1, 2, 4]).unwrap();
    assert_eq!(blocks(&mut reported, SLOT, &[1, 2, 3]), 2);
    // An older one takes its place.
    reported.beat(SLOT, None);
    assert!(!reported.knows(SLOT));
    assert_eq!(blocks(&mut reported, SLOT, &[1, 2, 3]), 0);
    while reported.sweep() {}
    assert_eq!(reported.len(), 0);
}

#[test]
fn a_gap_is_seen_by_the_next_report_or_by_two_beats() {
    for by_beats in [true, false] {
        let (mut reported, now) = (Reported::default(), Instant::now());
        reported.beat(SLOT, Some(0));
        reported.report(SLOT, report(0, 1, &[1], &[]));
        match by_beats {
            true => {
                reported.beat(SLOT, Some(2));
                assert_eq!(reported.asks(SLOT, now), None, "it may be under way");
                reported.beat(SLOT, Some(2));
            }
            false => reported.report(SLOT, report(2, 3, &[3], &[])),
        }
        settle(&mut reported);
        assert_eq!(
            blocks(&mut reported, SLOT, &[1]),
            1,
            "what was known stands"
        );
        let ask = reported.asks(SLOT, now).expect("a gap");
        assert_eq!(reported.asks(SLOT, now), None, "it is asked already");
        // One report overtakes the page that was made before it, one was in it.
        reported.report(SLOT, report(3, 4, &[5], &[2]));
        assert_eq!(
            reported.page(ask, 0, &page(3, &[2, 3], Some(8))),
            Paged::Next(8)
        );
        assert_eq!(reported.page(ask, 8, &page(4, &[5], None)), Paged::Over);
        settle(&mut reported);
        reported.holds_exactly(SLOT, &[3, 5]).unwrap();
    }
}

#[test]
fn who_does_not_answer_is_asked_again_a_second_later() {
    let (mut reported, now) = (Reported::default(), Instant::now());
    reported.beat(SLOT, Some(7));
    let ask = reported.asks(SLOT, now).expect("it is new here");
    reported.gave_up(ask);
    assert_eq!(reported.asks(SLOT, now), None);
    let again = reported.asks(SLOT, now + ASK_INTERVAL).expect("it is due");
    assert_eq!(
        reported.page(ask, 0, &page(7, &[1], None)),
        Paged::Over,
        "nobody waits for it"
    );
    // Pages that go round in a circle are no answer.
    assert_eq!(
        reported.page(again, 0, &page(7, &[1], Some(8))),
        Paged::Next(8)
    );
    assert_eq!(
        reported.page(again, 8, &page(7, &[1], Some(8))),
        Paged::Over
    );
    assert!(!reported.knows(SLOT));
    settle(&mut reported);
    while reported.sweep() {}
    assert_eq!(reported.len(), 0);
}

#[test]
fn few_are_asked_at_the_same_time() {
    let (mut reported, now) = (Reported::default(), Instant::now());
    let asked: Vec<_> = (0..ASKED_MAX + 5)
        .filter_map(|slot| {
            reported.beat(slot, Some(1));
            reported.asks(slot, now)
        })
        .collect();
    assert_eq!(asked.len(), ASKED_MAX);
    reported.gave_up(asked[0]);
    reported.left(asked[1].slot());
    assert!(reported.asks(ASKED_MAX, now).is_some());
    assert!(reported.asks(ASKED_MAX + 1, now).is_some());
    assert!(reported.asks(ASKED_MAX + 2, now).is_none());
}

#[test]
fn too_many_reports_during_the_pages_make_it_ask_again() {
    let (mut reported, now) = (Reported::default(), Instant::now());
    reported.beat(SLOT, Some(1));
    let ask = reported.asks(SLOT, now).unwrap();
    let links: Vec<u64> = (0..LATER_MAX as u64 / 4).collect();
    for version in 2..8 {
        reported.report(SLOT, report(version - 1, version, &links, &[]));
    }
    assert_eq!(reported.page(ask, 0, &page(1, &[], None)), Paged::Over);
    assert!(!reported.knows(SLOT));
    assert!(reported.asks(SLOT, now + ASK_INTERVAL).is_some());
}

/// A worker whose index changes, and what is under way from it to an API server.
#[derive(Default)]
struct World {
    arena: [Option<u64>; BLOCKS],
    /// Links whose state is not told.
    waiting: BTreeMap<u64, bool>,
    version: u64,
    reports: VecDeque<PrefixReport>,
    beats: VecDeque<u64>,
    ask: Option<(AskAll, u32)>,
    answer: Option<PrefixPage>,
}

impl World {
    fn change(&mut self, block: usize, link: u64) {
        let before = self.arena[block].take();
        if let Some(before) = before {
            self.waiting.insert(before, false);
        }
        if !self.arena.contains(&Some(link)) && before != Some(link) {
            self.arena[block] = Some(link);
            self.waiting.insert(link, true);
        }
    }

    fn report(&mut self, links_max: usize) {
        let mut told = (Vec::new(), Vec::new());
        for _ in 0..links_max {
            match self.waiting.pop_first() {
                Some((link, true)) => told.0.push(link),
                Some((link, false)) => told.1.push(link),
                None => break,
            }
        }
        let since = self.version;
        self.version += 1;
        self.reports
            .push_back(report(since, self.version, &told.0, &told.1));
    }

    fn answer(&mut self, block: u32) -> PrefixPage {
        let end = block as usize + PAGE;
        let links: Vec<u64> = self.arena[block as usize..end]
            .iter()
            .copied()
            .flatten()
            .collect();
        page(self.version, &links, (end < BLOCKS).then_some(end as u32))
    }

    /// What comes next is delivered, in any order of kinds.
    fn deliver(&mut self, reported: &mut Reported, kind: u8, now: Instant) {
        match kind {
            0 => {
                if let Some(report) = self.reports.pop_front() {
                    reported.report(SLOT, report);
                }
            }
            1 => {
                if let Some(version) = self.beats.pop_front() {
                    reported.beat(SLOT, Some(version));
                }
            }
            2 => {
                if let Some((_, block)) = self.ask
                    && self.answer.is_none()
                {
                    self.answer = Some(self.answer(block));
                }
            }
            3 => {
                if let (Some((ask, block)), Some(answer)) = (self.ask, self.answer.take()) {
                    self.ask = match reported.page(ask, block, &answer) {
                        Paged::Next(block) => Some((ask, block)),
                        Paged::Over => None,
                    };
                }
            }
            _ => {
                if self.ask.is_none() {
                    self.ask = reported.asks(SLOT, now).map(|ask| (ask, 0));
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Change(usize, u64),
    Report(usize),
    Beat,
    Deliver(u8),
    LoseReport,
    /// The request, or its answer.
    LoseAnswer,
    TakeIn,
    Sweep,
    Later,
    /// The worker is restarted under its name.
    Restart,
    /// The API server is restarted.
    Forget,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (0..BLOCKS, 0..20u64).prop_map(|(block, link)| Act::Change(block, link)),
        6 => (1..6usize).prop_map(Act::Report),
        4 => Just(Act::Beat),
        20 => (0..5u8).prop_map(Act::Deliver),
        1 => Just(Act::LoseReport),
        1 => Just(Act::LoseAnswer),
        4 => Just(Act::TakeIn),
        1 => Just(Act::Sweep),
        2 => Just(Act::Later),
        1 => Just(Act::Restart),
        1 => Just(Act::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever is lost, delayed or overtaken, and whoever is restarted: once all is said, the API server knows exactly what the
    /// worker holds.
    #[test]
    fn once_all_is_said_what_is_known_is_what_is_held(acts in prop::collection::vec(act(), 1..250)) {
        let (mut reported, mut world) = (Reported::default(), World::default());
        let mut now = Instant::now();
        for act in acts {
            match act {
                Act::Change(block, link) => world.change(block, link),
                Act::Report(links_max) => world.report(links_max),
                Act::Beat => world.beats.push_back(world.version),
                Act::Deliver(kind) => world.deliver(&mut reported, kind, now),
                Act::LoseReport => drop(world.reports.pop_front()),
                Act::LoseAnswer => if let Some((ask, _)) = world.ask.take() {
                    world.answer = None;
                    reported.gave_up(ask);
                },
                Act::TakeIn => drop(reported.take_in()),
                Act::Sweep => drop(reported.sweep()),
                Act::Later => now += Duration::from_millis(700),
                Act::Restart => {
                    world = World { ask: world.ask, ..World::default() };
                    // Its beat, or its silence, says so before anything of the new life is heard.
                    reported.left(SLOT);
                    reported.beat(SLOT, Some(0));
                }
                Act::Forget => {
                    reported = Reported::default();
                    (world.ask, world.answer) = (None, None);
                }
            }
        }
        // Silence, and all that is said is heard.
        world.report(BLOCKS * 20);
        for _ in 0..4 {
            world.beats.push_back(world.version);
            now += ASK_INTERVAL;
            for kind in [0, 1, 4].into_iter().chain([2, 3].repeat(8)) {
                loop {
                    let left = (world.reports.len(), world.beats.len());
                    world.deliver(&mut reported, kind, now);
                    if (world.reports.len(), world.beats.len()) == left {
                        break;
                    }
                }
            }
        }
        settle(&mut reported);
        while reported.sweep() {}
        let all: BTreeSet<u64> = world.arena.iter().copied().flatten().collect();
        let all: Vec<u64> = all.into_iter().collect();
        let known = reported.holds_exactly(SLOT, &all);
        prop_assert!(known.is_ok(), "{:?} of {:?}", known, all);
        prop_assert_eq!(reported.len(), all.len(), "nothing else is kept");
        prop_assert_eq!(reported.asked, 0);
    }
}
