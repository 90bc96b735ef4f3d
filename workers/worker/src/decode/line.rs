//! The jobs that wait for a place in the batch, or for blocks, in the order in which they first asked.
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

use std::time::Duration;

use baton_protocol::RequestId;
use baton_protocol::deadlines::PLACE_KEPT_MS;
use tokio::time::Instant;

/// Whoever still wants its room has asked again within this time.
const KEPT: Duration = Duration::from_millis(PLACE_KEPT_MS);

/// Places. Who finds none may wait longer than others.
const PLACES_MAX: usize = 256;

/// The line, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Line(Vec<Place>);

#[derive(Debug)]
struct Place {
    request: RequestId,
    blocks: usize,
    until: Instant,
    /// It has come back, so it waits.
    waits: bool,
}

/// What those before a request want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    /// Places in the batch: one each.
    pub(crate) jobs: usize,
    /// Blocks of them all.
    pub(crate) blocks: usize,
}

impl Line {
    /// Who stands before this request.
    pub(crate) fn before(&mut self, request: RequestId, now: Instant) -> Before {
        self.0.retain(|place| now < place.until);
        let before = self.0.iter().take_while(|place| place.request != request);
        before
            .filter(|place| place.waits)
            .fold(Before::default(), |before, place| Before {
                jobs: before.jobs + 1,
                blocks: before.blocks + place.blocks,
            })
    }

    /// A request was refused for want of a place and these blocks.
    pub(crate) fn refused(&mut self, request: RequestId, blocks: usize, now: Instant) {
        let until = now + KEPT;
        let has_room = self.0.len() < PLACES_MAX;
        match self.0.iter_mut().find(|place| place.request == request) {
            Some(place) => {
                (place.blocks, place.until) = (blocks, until);
                place.waits = true;
            }
            None if has_room => self.0.push(Place {
                request,
                blocks,
                until,
                waits: false,
            }),
            None => {}
        }
    }

    /// A request was admitted, here or elsewhere, or has ended.
    pub(crate) fn leave(&mut self, request: RequestId) {
        self.0.retain(|place| place.request != request);
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
        assert_eq!(line.before(SHORT, now).blocks, 0);
        line.refused(LONG, 20, now);
        line.refused(SHORT, 2, now);
        line.refused(SHORT, 2, now);
        line.refused(LONG, 20, now);
        assert_eq!(line.before(LONG, now).blocks, 0);
        assert_eq!(line.before(SHORT, now).blocks, 20);
        assert_eq!(line.before(NEW, now).blocks, 22);
        line.leave(LONG);
        assert_eq!(line.before(SHORT, now).blocks, 0);
        assert_eq!(line.before(NEW, now).blocks, 2);
    }

    #[test]
    fn a_place_lasts_while_it_is_asked_for_and_not_much_longer() {
        let now = Instant::now();
        let mut line = Line::default();
        line.refused(LONG, 20, now);
        line.refused(LONG, 20, now + KEPT / 2);
        assert_eq!(line.before(SHORT, now + KEPT).blocks, 20);
        assert_eq!(line.before(SHORT, now + 2 * KEPT).blocks, 0);
        assert!(line.0.is_empty());
    }

    #[test]
    fn nothing_is_kept_for_who_went_elsewhere() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in 100..200 {
            line.refused(RequestId(request), 10, now);
        }
        assert_eq!(line.before(NEW, now).blocks, 0, "none of them came back");
        line.refused(RequestId(150), 10, now);
        assert_eq!(line.before(NEW, now).blocks, 10);
        assert_eq!(
            line.before(RequestId(120), now).blocks,
            0,
            "it was there first"
        );
    }

    #[test]
    fn each_that_waits_wants_one_place_in_the_batch() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in [LONG, SHORT, LONG, SHORT] {
            line.refused(request, 0, now);
        }
        let jobs = |request, line: &mut Line| line.before(request, now).jobs;
        assert_eq!(jobs(LONG, &mut line), 0);
        assert_eq!(jobs(SHORT, &mut line), 1);
        assert_eq!(jobs(NEW, &mut line), 2);
    }

    #[test]
    fn places_are_bounded() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in 0..2 * PLACES_MAX as u128 {
            line.refused(RequestId(request), 1, now);
            line.refused(RequestId(request), 1, now);
        }
        assert_eq!(line.before(RequestId(u128::MAX), now).blocks, PLACES_MAX);
        assert_eq!(line.0.len(), PLACES_MAX);
    }
}
