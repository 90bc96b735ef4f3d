//! The jobs that wait for blocks, in the order in which they first asked.
//!
//! A long sequence needs many blocks at once, a short one few. Were each admitted as soon as it fits, short ones would take
//! every block that becomes free, and a long one would wait for as long as they come. So whoever was refused for want of
//! blocks has a place in a line, and others are admitted only if there is room for all before them too. API servers ask again
//! within half a second; a place that nobody asks for is given up.

use std::time::Duration;

use baton_protocol::RequestId;
use tokio::time::Instant;

/// Whoever still wants its blocks has asked again within this time.
const KEPT: Duration = Duration::from_secs(2);

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
}

impl Line {
    /// Blocks for all that stand before this request.
    pub(crate) fn before(&mut self, request: RequestId, now: Instant) -> usize {
        self.0.retain(|place| now < place.until);
        let before = self.0.iter().take_while(|place| place.request != request);
        before.map(|place| place.blocks).sum()
    }

    /// A request was refused for want of these blocks.
    pub(crate) fn refused(&mut self, request: RequestId, blocks: usize, now: Instant) {
        let until = now + KEPT;
        let has_room = self.0.len() < PLACES_MAX;
        match self.0.iter_mut().find(|place| place.request == request) {
            Some(place) => (place.blocks, place.until) = (blocks, until),
            None if has_room => self.0.push(Place {
                request,
                blocks,
                until,
            }),
            None => {}
        }
    }

    /// A request was admitted, or has ended.
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
        assert_eq!(line.before(SHORT, now), 0);
        line.refused(LONG, 20, now);
        line.refused(SHORT, 2, now);
        line.refused(LONG, 20, now);
        assert_eq!(line.before(LONG, now), 0);
        assert_eq!(line.before(SHORT, now), 20);
        assert_eq!(line.before(NEW, now), 22);
        line.leave(LONG);
        assert_eq!(line.before(SHORT, now), 0);
        assert_eq!(line.before(NEW, now), 2);
    }

    #[test]
    fn a_place_lasts_while_it_is_asked_for_and_not_much_longer() {
        let now = Instant::now();
        let mut line = Line::default();
        line.refused(LONG, 20, now);
        line.refused(LONG, 20, now + KEPT / 2);
        assert_eq!(line.before(SHORT, now + KEPT), 20);
        assert_eq!(line.before(SHORT, now + 2 * KEPT), 0);
        assert!(line.0.is_empty());
    }

    #[test]
    fn places_are_bounded() {
        let now = Instant::now();
        let mut line = Line::default();
        for request in 0..2 * PLACES_MAX as u128 {
            line.refused(RequestId(request), 1, now);
        }
        assert_eq!(line.before(RequestId(u128::MAX), now), PLACES_MAX);
    }
}
