//! What is told of a choice's tokens beside their text: log-probabilities and ids.
//!
//! In a stream a token goes with its text. Text that may become a stop string is held back, and so is what is told of its tokens: if it
//! becomes one, they begin where the text ends, as in an answer in one piece.

use std::collections::VecDeque;

use baton_protocol::{TokenLogprobs, TopLogprob};

use crate::openai::{ID_BYTES, LOGPROB_BYTES, Params};
use crate::output::LogprobEntry;

/// The tokens of a choice of which something is told and is not sent; all of them for an answer in one piece.
pub struct Tokens {
    pub want_logprobs: bool,
    want_ids: bool,
    is_stream: bool,
    /// Alternatives that are shown with each of them.
    top: usize,
    pub logprobs: Vec<LogprobEntry>,
    pub ids: Vec<u32>,
    /// Of a stream, where each of them begins, in bytes of all text.
    begins: VecDeque<usize>,
    /// Bytes of text so far, what is held back included.
    bytes: usize,
    /// Characters of text so far, what is held back included,
    characters: usize,
    /// and those that were given out. Both count where log-probabilities are told.
    given_out: usize,
}

/// So many of each, the first ones.
#[derive(Clone, Copy, Default)]
pub struct First {
    pub logprobs: usize,
    pub ids: usize,
}

impl Tokens {
    /// None yet.
    pub fn new(params: &Params, is_stream: bool) -> Self {
        Self {
            want_logprobs: params.sampling.logprobs.is_some(),
            want_ids: params.token_ids,
            is_stream,
            top: params.sampling.logprobs.unwrap_or(0).into(),
            logprobs: Vec::new(),
            ids: Vec::new(),
            begins: VecDeque::new(),
            bytes: 0,
            characters: 0,
            given_out: 0,
        }
    }

    /// Text of so many characters comes before that of the first token.
    pub fn begin_behind(&mut self, characters: usize) {
        (self.characters, self.given_out) = (characters, characters);
    }

    /// One more, before its text is made. `broken`: characters that end where it begins, because it does not go on with them; asked for only
    /// where log-probabilities are told.
    pub fn push(
        &mut self,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        broken: impl FnOnce() -> usize,
    ) {
        if self.is_stream && (self.want_ids || self.want_logprobs) {
            self.begins.push_back(self.bytes);
        }
        if self.want_ids {
            self.ids.push(token);
        }
        if self.want_logprobs {
            self.push_logprobs(token, logprobs, self.characters + broken());
        }
    }

    /// The log-probabilities of one, and where it begins in the text.
    pub fn push_logprobs(&mut self, token: u32, logprobs: Option<TokenLogprobs>, offset: usize) {
        let (logprob, mut top) = match logprobs {
            Some(TokenLogprobs { logprob, top }) => (Some(logprob), top),
            None => (None, Vec::new()),
        };
        // Those of a prompt may have been asked for with more.
        top.truncate(self.top);
        self.logprobs.push(LogprobEntry {
            token,
            logprob,
            top,
            offset,
            in_content: false,
        });
    }

    /// A piece of text was made of the last one, and this much was given out since.
    pub fn made(&mut self, piece: &str, given_out: &str) {
        self.bytes += piece.len();
        if self.want_logprobs {
            self.characters += piece.chars().count();
            self.given_out += given_out.chars().count();
        }
    }

    /// How many can be sent while so many bytes of the text are held back.
    pub fn ready(&self, held: usize) -> First {
        let given_out = self.bytes - held;
        let waits = |begin: &&usize| held > 0 && **begin >= given_out;
        let waiting = self.begins.iter().rev().take_while(waits).count();
        First {
            logprobs: self.logprobs.len().saturating_sub(waiting),
            ids: self.ids.len().saturating_sub(waiting),
        }
    }

    /// These were sent.
    pub fn sent(&mut self, ready: First) {
        self.logprobs.drain(..ready.logprobs);
        self.ids.drain(..ready.ids);
        let waiting = self.logprobs.len().max(self.ids.len());
        self.begins.drain(..self.begins.len() - waiting);
    }

    /// Bytes that these take as JSON, about.
    pub fn json_bytes(&self, ready: First) -> usize {
        let logprobs = self.logprobs[..ready.logprobs].iter();
        let logprobs: usize = logprobs.map(|entry| 1 + entry.top.len()).sum();
        logprobs * LOGPROB_BYTES + ready.ids * ID_BYTES
    }

    /// The text is over: tokens of a stop string begin where it ends.
    pub fn end(&mut self) {
        for entry in &mut self.logprobs {
            entry.offset = entry.offset.min(self.given_out);
        }
    }

    /// Bytes in memory of those behind the first so many.
    pub fn memory(&self, behind: First) -> usize {
        let new = &self.logprobs[behind.logprobs.min(self.logprobs.len())..];
        entries_bytes(new) + size_of_val(&self.ids[behind.ids.min(self.ids.len())..])
    }

    /// All of them.
    pub fn all(&self) -> First {
        First {
            logprobs: self.logprobs.len(),
            ids: self.ids.len(),
        }
    }

    /// Lets go of all.
    pub fn clear(&mut self) {
        self.logprobs = Vec::new();
        self.ids = Vec::new();
    }
}

/// Memory of these log-probabilities.
pub fn entries_bytes(entries: &[LogprobEntry]) -> usize {
    let alternatives: usize = entries.iter().map(|entry| entry.top.capacity()).sum();
    size_of_val(entries) + alternatives * size_of::<TopLogprob>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::stop::StopMatcher;

    fn tokens(is_stream: bool) -> Tokens {
        Tokens {
            want_logprobs: true,
            want_ids: true,
            is_stream,
            top: 0,
            logprobs: Vec::new(),
            ids: Vec::new(),
            begins: VecDeque::new(),
            bytes: 0,
            characters: 0,
            given_out: 0,
        }
    }

    /// What a client was told of each token, and with how much text before it and with it.
    #[derive(Debug, Default, PartialEq)]
    struct Told {
        text: String,
        ids: Vec<u32>,
        offsets: Vec<usize>,
    }

    impl Told {
        fn take(&mut self, tokens: &mut Tokens, held: usize, text: &mut String) {
            let ready = tokens.ready(held);
            self.text += &std::mem::take(text);
            self.ids.extend(&tokens.ids[..ready.ids]);
            let entries = tokens.logprobs[..ready.logprobs].iter();
            self.offsets.extend(entries.map(|entry| entry.offset));
            tokens.sent(ready);
        }
    }

    /// Makes these texts, a token each; a stream is sent after the tokens that say so.
    fn told(made: &[(String, bool)], stops: &[String], is_stream: bool) -> Told {
        let (mut tokens, mut stops) = (tokens(is_stream), StopMatcher::new(stops.to_vec()));
        let (mut told, mut text) = (Told::default(), String::new());
        for (id, (piece, is_sent)) in (0..).zip(made) {
            tokens.push(id, None, || 0);
            let before = text.len();
            let is_over = stops.push(piece, &mut text);
            tokens.made(piece, &text[before..]);
            if is_over {
                break;
            }
            if is_stream && *is_sent {
                told.take(&mut tokens, stops.held(), &mut text);
                let end = told.text.chars().count();
                // A token that makes no text may stand where the text ends so far.
                let ahead = told.offsets.iter().filter(|offset| **offset > end);
                assert_eq!(ahead.count(), 0, "told before their text");
            }
        }
        let before = text.len();
        stops.finish(&mut text);
        tokens.made("", &text[before..]);
        tokens.end();
        told.take(&mut tokens, 0, &mut text);
        told
    }

    #[test]
    fn a_token_waits_with_its_text() {
        let mut tokens = tokens(true);
        let mut push = |piece: &str, given_out: &str, held: usize| {
            tokens.push(7, None, || 0);
            tokens.made(piece, given_out);
            let ready = tokens.ready(held);
            tokens.sent(ready);
            (ready.logprobs, ready.ids)
        };
        assert_eq!(push("ab", "ab", 0), (1, 1));
        assert_eq!(push("x", "", 1), (0, 0));
        assert_eq!(push("x", "x", 1), (1, 1));
        // The beginning of this one is given out.
        assert_eq!(push("yx", "xy", 1), (2, 2));
        assert_eq!(push("y", "xy", 0), (1, 1));
    }

    proptest! {
        #[test]
        fn a_stream_tells_what_an_answer_in_one_piece_tells(
            made in prop::collection::vec(("[abé]{0,3}", any::<bool>()), 0..24),
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            prop_assert_eq!(told(&made, &stops, true), told(&made, &stops, false));
        }
    }
}
