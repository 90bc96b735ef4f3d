//! The jobs that wait for a place in the batch, or for blocks: interactive before batch, then by priority, then in the order in which
//! they first asked. Where no batch request is at work, one that has waited for [`BATCH_TURN`] goes before all others, so that none waits
//! for ever.
//!
//! A long sequence needs many blocks at once, a short one few. Were each admitted as soon as it fits, short ones would take
//! every block that becomes free, and a long one would wait for as long as they come; and whoever asks oftenest would
//! take each place in the batch. So whoever was refused for want of room has a place in a line, and others are admitted only if
//! there is room for all before them too. API servers ask again within [`ASK_AGAIN_MAX_MS`](baton_protocol::deadlines);
//! a place that nobody asks for is given up.
//!
//! A place counts once its job has asked again. One that is refused here asks the next worker at once and mostly finds room
//! there; were room kept for it, a worker could refuse everybody with all its blocks free. One that found room elsewhere, or
//! ended, is aborted here by its API server.

use std::cmp::Reverse;
use std::time::Duration;

use baton_protocol::deadlines::{BATCH_TURN_MS, PLACE_KEPT_MS};
use baton_protocol::{RequestId, Service, Tier};
use tokio::time::Instant;

/// Whoever still wants its room has asked again within this time.
const KEPT: Duration = Duration::from_millis(PLACE_KEPT_MS);

/// The first batch request has its turn after this time.
const BATCH_TURN: Duration = Duration::from_millis(BATCH_TURN_MS);

/// Places. Who finds none may wait longer than others.
const PLACES_MAX: usize = 256;

/// The line, in the order in which jobs first asked.
#[derive(Debug, Default)]
pub(crate) struct Line {
    places: Vec<Place>,
    next: u64,
    /// Since when batch requests wait and none of them had room.
    batch_waits: Option<Instant>,
}

#[derive(Debug)]
struct Place {
    request: RequestId,
    order: Order,
    blocks: usize,
    until: Instant,
    /// It has come back, so it waits.
    waits: bool,
}

/// Who goes first: the lesser.
type Order = (Tier, Reverse<i32>, u64);

/// What those before a request want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    /// Places in the batch: one each.
    pub(crate) jobs: usize,
    /// Blocks of them all.
    pub(crate) blocks: usize,
}

impl Line {
    /// Who stands before this request. `has_batch`: batch requests are at work here, so they get on.
    pub(crate) fn before(
        &mut self,
        request: RequestId,
        service: Service,
        has_batch: bool,
        now: Instant,
    ) -> Before {
        self.places.retain(|place| now < place.until);
        let batch = self
            .places
            .iter()
            .filter(|place| place.waits && place.is_batch());
        let first_batch = batch.min_by_key(|place| place.order);
        match first_batch {
            Some(_) if !has_batch => drop(self.batch_waits.get_or_insert(now)),
            _ => self.batch_waits = None,
        }
        let is_due = |since: Instant| now.saturating_duration_since(since) >= BATCH_TURN;
        let turn = first_batch.filter(|_| self.batch_waits.is_some_and(is_due));
        let turn = turn.map(|place| place.request);
        let own = self.places.iter().find(|place| place.request == request);
        let order = own.map_or(
            (service.tier, Reverse(service.priority), self.next),
            |own| own.order,
        );
        let goes_before = |place: &&Place| {
            let has_turn = turn == Some(place.request);
            place.waits && turn != Some(request) && (has_turn || place.order < order)
        };
        let before = self.places.iter().filter(goes_before);
        before.fold(Before::default(), |before, place| Before {
            jobs: before.jobs + 1,
            blocks: before.blocks + place.blocks,
        })
    }

    /// A request was refused for want of a place and these blocks.
    pub(crate) fn refused(
        &mut self,
        request: RequestId,
        service: Service,
        blocks: usize,
        now: Instant,
    ) {
        let until = now + KEPT;
        if let Some(place) = self
            .places
            .iter_mut()
            .find(|place| place.request == request)
        {
            (place.blocks, place.until) = (blocks, until);
            place.waits = true;
            return;
        }
        if self.places.len() == PLACES_MAX && !self.make_room(service) {
            return;
        }
        self.places.push(Place {
            request,
            order: (service.tier, Reverse(service.priority), self.next),
            blocks,
            until,
            waits: false,
        });
        self.next += 1;
    }

    /// The last batch request leaves a full line for an interactive one.
    fn make_room(&mut self, service: Service) -> bool {
        let batch = self.places.iter().rposition(Place::is_batch);
        let victim = batch.filter(|_| service.tier == Tier::Interactive);
        victim.map(|at| self.places.remove(at)).is_some()
    }

    /// A request was admitted, here or elsewhere, or has ended.
    pub(crate) fn leave(&mut self, request: RequestId) {
        self.places.retain(|place| place.request != request);
    }
}

impl Place {
    fn is_batch(&self) -> bool {
        self.order.0 == Tier::Batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: RequestId = RequestId(1);
    const SHORT: RequestId = RequestId(2);
    const NEW: RequestId = RequestId(3);

    #[test]
    fn who_asked_first_goes_first() {
        let now = Instant::now();
        let mut line = Line::default();
        assert_eq!(line.before(SHORT, Service::default(), false, now).blocks, 0);
        line.refused(LONG, Service::default(), 20, now);
        line.refused(SHORT, Service::default(), 2, now);
        line.refused(SHORT, Service::default(), 2, now);
        line.refused(LONG, Service::default(), 20, now);
        assert_eq!(line.before(LONG, Service::default(), false, now).blocks, 0);
        assert_eq!(
            line.before(SHORT, Service::default(), false, now).blocks,
            20
        );
        assert_eq!(line.before(NEW, Service::default(), false, now).blocks, 22);
        line.leave(LONG);
        assert_eq!(line.before(SHORT, Service::default(), false, now).blocks, 0);
        assert_eq!(line.before(NEW, Service::default(), false, now).blocks, 2);
    }

    #[test]
    fn a_place_lasts_while_it_is_asked_for_and_not_much_longer() {
        let now = Instant::now();
        let mut line = Line::default();
        line.refused(LONG, Service::default(), 20, now);
        line.refused(LONG, Service::default(), 20, now + KEPT / 2);
        assert_eq!(
            line.before(SHORT, Service::default(), false, now + KEPT)
                .blocks,
            20
        );
        assert_eq!(
            line.before(SHORT, Service::default(), false, now + 2 * KEPT)
                .blocks,
            0
        );
        assert!(line.places.is_empty());
    }

    #[test]
    fn nothing_is_kept_for_who_went_elsewhere() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in 100..200 {
            line.refused(RequestId(request), Service::default(), 10, now);
        }
        assert_eq!(
            line.before(NEW, Service::default(), false, now).blocks,
            0,
            "none of them came back"
        );
        line.refused(RequestId(150), Service::default(), 10, now);
        assert_eq!(line.before(NEW, Service::default(), false, now).blocks, 10);
        assert_eq!(
            line.before(RequestId(120), Service::default(), false, now)
                .blocks,
            0,
            "it was there first"
        );
    }

    #[test]
    fn each_that_waits_wants_one_place_in_the_batch() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in [LONG, SHORT, LONG, SHORT] {
            line.refused(request, Service::default(), 0, now);
        }
        let jobs =
            |request, line: &mut Line| line.before(request, Service::default(), false, now).jobs;
        assert_eq!(jobs(LONG, &mut line), 0);
        assert_eq!(jobs(SHORT, &mut line), 1);
        assert_eq!(jobs(NEW, &mut line), 2);
    }

    #[test]
    fn places_are_bounded() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in 0..2 * PLACES_MAX as u128 {
            line.refused(RequestId(request), Service::default(), 1, now);
            line.refused(RequestId(request), Service::default(), 1, now);
        }
        assert_eq!(
            line.before(RequestId(u128::MAX), Service::default(), false, now)
                .blocks,
            PLACES_MAX
        );
        assert_eq!(line.places.len(), PLACES_MAX);
    }

    fn of(tier: Tier, priority: i32) -> Service {
        Service {
            tier,
            priority,
            itl_ms: None,
        }
    }

    #[test]
    fn interactive_requests_go_before_batch_ones_and_by_priority() {
        let now = Instant::now();
        let mut line = Line::default();
        let batch = of(Tier::Batch, 9);
        for _ in 0..2 {
            line.refused(LONG, batch, 20, now);
            line.refused(SHORT, Service::default(), 2, now);
        }
        assert_eq!(line.before(LONG, batch, false, now).blocks, 2);
        assert_eq!(line.before(SHORT, Service::default(), false, now).jobs, 0);
        assert_eq!(line.before(NEW, Service::default(), false, now).blocks, 2);
        assert_eq!(
            line.before(NEW, of(Tier::Interactive, 1), false, now).jobs,
            0
        );
        assert_eq!(line.before(NEW, batch, false, now).blocks, 22);
    }

    #[test]
    fn the_first_batch_request_has_its_turn_where_none_is_at_work() {
        let begun = Instant::now();
        let mut line = Line::default();
        let batch = of(Tier::Batch, 0);
        let mut now = begun;
        while now < begun + BATCH_TURN + KEPT {
            line.refused(LONG, batch, 20, now);
            line.refused(SHORT, batch, 2, now);
            let interactive = line.before(NEW, Service::default(), false, now).blocks;
            let waited = now - begun;
            if waited < BATCH_TURN {
                assert_eq!(interactive, 0, "after {waited:?}");
            } else if waited >= BATCH_TURN + KEPT / 2 {
                assert_eq!(interactive, 20, "after {waited:?}");
                assert_eq!(line.before(LONG, batch, false, now).jobs, 0);
            }
            now += KEPT / 2;
        }
        // With one at work here nobody else has to wait for it.
        assert_eq!(line.before(NEW, Service::default(), true, now).blocks, 0);
        // The next has its turn as long after that.
        line.leave(LONG);
        assert_eq!(line.before(NEW, Service::default(), false, now).blocks, 0);
    }

    #[test]
    fn a_full_line_has_room_for_interactive_requests() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in 100..100 + PLACES_MAX as u128 {
            line.refused(RequestId(request), of(Tier::Batch, 0), 1, now);
        }
        for _ in 0..2 {
            line.refused(LONG, Service::default(), 20, now);
            line.refused(SHORT, of(Tier::Batch, 0), 2, now);
        }
        assert_eq!(line.before(NEW, Service::default(), false, now).blocks, 20);
        assert_eq!(line.places.len(), PLACES_MAX);
    }
}
