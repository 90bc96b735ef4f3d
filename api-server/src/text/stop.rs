//! Stop strings: found across token boundaries, with no text sent that may turn out to be part of one.

/// Looks for stop strings in text that comes in pieces.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// What was found is part of the text.
    keeps_stop: bool,
    /// Text not given out: it may be the beginning of a stop string.
    held: String,
    /// Which string was found.
    found: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these strings; none of them empty.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self {
            stops,
            keeps_stop: false,
            held: String::new(),
            found: None,
        }
    }

    /// The same whose text ends after the stop string, if `keeps_stop`, and not before it.
    #[must_use]
    pub fn keeping_stop(self, keeps_stop: bool) -> Self {
        Self { keeps_stop, ..self }
    }

    /// Takes a piece of text and appends to `out` what is safe to send. True when a stop string was
    /// found: `out` then ends before it, or after it, and the text is over.
    pub fn push(&mut self, piece: &str, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(piece);
            return false;
        }
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter_map(|(i, stop)| Some((self.held.find(stop.as_str())?, stop.len(), i)))
            .min();
        if let Some((at, bytes, i)) = found {
            let end = if self.keeps_stop { at + bytes } else { at };
            out.push_str(&self.held[..end]);
            self.held.clear();
            self.found = Some(i);
            return true;
        }
        let safe = self.held.len() - self.longest_beginning();
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// Bytes of the text that are held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// The stop string that ended the text, if one did.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|i| self.stops[i].as_str())
    }

    /// The text is over without a stop string: gives out what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let held = self.held.as_bytes();
        let begins = |stop: &String| {
            let longest = held.len().min(stop.len() - 1);
            (1..=longest)
                .rev()
                .find(|n| held.ends_with(&stop.as_bytes()[..*n]))
                .unwrap_or(0)
        };
        self.stops.iter().map(begins).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops = stops.iter().map(|s| (*s).to_owned()).collect();
        run_with(StopMatcher::new(stops), pieces)
    }

    fn run_with(mut matcher: StopMatcher, pieces: &[&str]) -> (String, bool) {
        let mut out = String::new();
        for piece in pieces {
            if matcher.push(piece, &mut out) {
                return (out, true);
            }
        }
        matcher.finish(&mut out);
        (out, false)
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_sent() {
        assert_eq!(
            run(&["END"], &["abc E", "N", "D more"]),
            ("abc ".to_owned(), true)
        );
        assert_eq!(
            run(&["END"], &["abc E", "N", "X"]),
            ("abc ENX".to_owned(), false)
        );
        assert_eq!(run(&["aab"], &["aaa", "b"]), ("a".to_owned(), true));
        assert_eq!(
            run(&["é!"], &["caf", "é", "?"]),
            ("café?".to_owned(), false)
        );
    }

    #[test]
    fn the_earliest_of_several_wins() {
        assert_eq!(run(&["yy", "x"], &["a x yy"]), ("a ".to_owned(), true));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,24}", stop in "[abé]{1,4}", cuts in prop::collection::vec(0usize..24, 0..8)) {
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(chars.len())).collect();
            cuts.extend([0, chars.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|w| chars[w[0]..w[1]].iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let expected = match text.find(&stop) {
                Some(at) => (text[..at].to_owned(), true),
                None => (text.clone(), false),
            };
            prop_assert_eq!(run(&[&stop], &pieces), expected.clone());
            let (mut kept, found) = expected;
            if found {
                kept.push_str(&stop);
            }
            let matcher = StopMatcher::new(vec![stop]).keeping_stop(true);
            prop_assert_eq!(run_with(matcher, &pieces), (kept, found));
        }
    }
}
