//! One choice in the making: tokens in, text out, to a stream or to an answer in one piece.

use std::sync::Arc;

use baton_chat_formats::Piece as Written;
use baton_protocol::{FinishReason, TokenLogprobs};
use tokio::sync::oneshot;

use super::outbox::Share;
use super::tokens::{First, Tokens, entries_bytes};
use super::whole::{Held, Whole};
use crate::error::{ApiError, ErrorKind};
use crate::openai::Params;
use crate::output::{Call, Finish, LogprobEntry, Part, Piece, Stop, Usage};
use crate::request::driver::Sink;
use crate::server::Server;
use crate::text::detokenize::Detokenizer;
use crate::text::echo::Echo;
use crate::text::reader::{Reader, Reading};
use crate::text::stop::StopMatcher;

/// Where a choice goes.
pub enum Destination {
    /// Into a stream, as it comes.
    Stream(Share),
    /// To whoever waits for all of it.
    Whole(Option<Gathering>),
}

/// A choice of which all is waited for.
pub struct Gathering {
    /// Who waits.
    pub to: oneshot::Sender<Result<Whole, ApiError>>,
    /// Memory of what there is of it.
    pub held: Held,
}

/// What was read of an answer in one piece.
#[derive(Default)]
struct Message {
    content: String,
    reasoning: String,
    calls: Vec<Call>,
}

impl Message {
    /// Appends a part.
    fn add(&mut self, part: Part) {
        match part {
            Part::Content(text) => self.content.push_str(&text),
            Part::Reasoning(text) => self.reasoning.push_str(&text),
            Part::Call { id, name, .. } => self.calls.push(Call {
                id,
                name,
                arguments: String::new(),
            }),
            // Calls come one after the other.
            Part::Arguments { delta, .. } => {
                if let Some(call) = self.calls.last_mut() {
                    call.arguments.push_str(&delta);
                }
            }
        }
    }
}

/// One choice.
pub struct Choice {
    server: Arc<Server>,
    index: usize,
    to: Destination,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Ids that the client ends it with.
    stop_token_ids: Vec<u32>,
    /// The one of them that did.
    stop_token: Option<u32>,
    min_tokens: u32,
    /// The prompt, and the alternatives that are shown with each of its tokens, if its log-probabilities are wanted for themselves.
    want_prompt: Option<(Arc<[u32]>, usize)>,
    /// Special tokens are text.
    special_tokens: bool,
    /// What ends it is text.
    include_stop: bool,
    /// Only the prompt is shown.
    prompt_only: bool,
    echo: Option<Arc<Echo>>,
    opened: bool,
    /// Not yet sent, or all of it for an answer in one piece. With a reader it is not yet read.
    text: String,
    /// Tells reasoning and calls from content, in chats of models that have them.
    reader: Option<Reader>,
    /// What it read: not yet sent, or not yet put with the rest.
    parts: Vec<Part>,
    message: Message,
    prompt_logprobs: Vec<LogprobEntry>,
    /// What is told of its tokens beside their text.
    tokens: Tokens,
    piece: String,
    usage: Usage,
}

impl Choice {
    /// A choice with nothing in it.
    pub fn new(
        server: Arc<Server>,
        index: usize,
        to: Destination,
        params: &Params,
        prompt: &Arc<[u32]>,
        prompt_logprobs: Option<u8>,
        echo: Option<Arc<Echo>>,
    ) -> Self {
        let stops = StopMatcher::new(params.stops.clone());
        Self {
            reader: None,
            parts: Vec::new(),
            message: Message::default(),
            server,
            index,
            tokens: Tokens::new(params, matches!(to, Destination::Stream(_))),
            to,
            detokenizer: Detokenizer::default(),
            stops: stops.keeping_stop(params.include_stop),
            stop_token_ids: params.stop_token_ids.clone(),
            stop_token: None,
            min_tokens: params.min_tokens,
            want_prompt: prompt_logprobs.map(|top| (Arc::clone(prompt), top.into())),
            special_tokens: params.special_tokens,
            include_stop: params.include_stop,
            prompt_only: params.max_tokens == Some(0),
            echo,
            opened: false,
            text: String::new(),
            prompt_logprobs: Vec::new(),
            piece: String::new(),
            usage: Usage {
                prompt: prompt.len() as u64,
                ..Usage::default()
            },
        }
    }

    /// The same, with its output read in these formats.
    #[must_use]
    pub fn read_as(mut self, reading: Option<Reading>) -> Self {
        self.reader = reading.map(Reader::new);
        self
    }

    /// Notes what an answer that is not a stream holds. One for which there is no memory any more has failed: whoever waits for it is
    /// told, and the client's leave of the other choices ends this one too.
    fn note_held(&mut self, text_before: usize, tokens_before: First) {
        let text = self.text_bytes().saturating_sub(text_before);
        let bytes = text + self.tokens.memory(tokens_before);
        self.hold(bytes);
    }

    /// Takes so many bytes more for an answer that is not a stream, as [`Self::note_held`] says.
    fn hold(&mut self, bytes: usize) {
        let Destination::Whole(gathering) = &mut self.to else {
            return;
        };
        if gathering
            .as_mut()
            .is_none_or(|whole| whole.held.grow(bytes))
        {
            return;
        }
        if let Some(Gathering { to, .. }) = gathering.take() {
            let message = format!(
                "the answers under way that are not streams have this server's bound of {} bytes; try again, or ask for a stream",
                self.server.limits.answers_bytes_max
            );
            let error = ApiError::new(ErrorKind::TooManyRequests, message);
            // Whoever waited may have left.
            let _ = to.send(Err(error));
        }
        self.text = String::new();
        self.message = Message::default();
        self.tokens.clear();
        self.prompt_logprobs = Vec::new();
    }

    /// Has the text read that there is, if there is a reader. True if the answer is over with it.
    fn read(&mut self, is_end: bool) -> bool {
        let Some(reader) = &mut self.reader else {
            return false;
        };
        let is_over = reader.push(Written::text(&self.text), &mut self.parts);
        self.text.clear();
        if is_end {
            reader.finish(&mut self.parts);
        }
        self.gather();
        is_over
    }

    /// Has a special token read. True if the answer is over with it.
    fn read_special(&mut self, token: u32) -> bool {
        // It ends the text before it, and with that what may have become a stop string.
        self.stops.finish(&mut self.text);
        if self.read(false) {
            return true;
        }
        let vocabulary = &self.server.model.vocabulary;
        let (Some(reader), Ok(text)) = (
            &mut self.reader,
            std::str::from_utf8(vocabulary.bytes(token)),
        ) else {
            return false;
        };
        let is_over = reader.push(Written::special(text), &mut self.parts);
        self.gather();
        is_over
    }

    /// Counts what was read, and puts it together where it is not sent.
    fn gather(&mut self) {
        if let Some(reader) = &self.reader {
            self.usage.reasoning = reader.reasoning_tokens();
        }
        if let Destination::Whole(_) = self.to {
            for part in self.parts.drain(..) {
                self.message.add(part);
            }
        }
    }

    /// Bytes of the text so far, of an answer in one piece.
    fn text_bytes(&self) -> usize {
        let calls = self.message.calls.iter();
        let calls: usize = calls
            .map(|call| size_of::<Call>() + call.name.len() + call.arguments.len())
            .sum();
        self.text.len() + self.message.content.len() + self.message.reasoning.len() + calls
    }

    /// Looks for stop strings in the piece of text that was just made. True if one ends the text.
    fn find_stop(&mut self) -> bool {
        let before = self.text.len();
        let is_found = if self.usage.completion <= u64::from(self.min_tokens) {
            self.text.push_str(&self.piece);
            false
        } else {
            self.stops.push(&self.piece, &mut self.text)
        };
        self.tokens.made(&self.piece, &self.text[before..]);
        is_found
    }

    /// As [`Sink::tokens`].
    fn add_tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) -> bool {
        let mut logprobs = logprobs.into_iter();
        let last = tokens.last().filter(|_| stop);
        self.stop_token = last
            .filter(|last| self.stop_token_ids.contains(last))
            .copied();
        for (i, token) in tokens.iter().enumerate() {
            self.usage.completion += 1;
            let vocabulary = &self.server.model.vocabulary;
            // A special token has no text here, unless it is asked for.
            let has_text = self.special_tokens || !vocabulary.special(*token);
            let detokenizer = &mut self.detokenizer;
            let broken = || match has_text {
                true => detokenizer.broken_before(vocabulary, *token),
                false => 0,
            };
            self.tokens.push(*token, logprobs.next(), broken);
            if stop && i + 1 == tokens.len() && !self.include_stop {
                break;
            }
            if let Some(reader) = &mut self.reader {
                reader.count_token();
                // If special tokens are to be text they are read as text, in which markers are found too.
                if !self.special_tokens && self.server.model.vocabulary.special(*token) {
                    if self.read_special(*token) {
                        return true;
                    }
                    continue;
                }
            }
            self.piece.clear();
            let vocabulary = &self.server.model.vocabulary;
            match self.special_tokens {
                true => {
                    self.detokenizer
                        .push_special_too(vocabulary, *token, &mut self.piece);
                }
                false => self.detokenizer.push(vocabulary, *token, &mut self.piece),
            }
            if self.find_stop() {
                // It may hold the beginning of a character that comes after the stop string.
                self.detokenizer = Detokenizer::default();
                self.read(false);
                return true;
            }
            if self.reader.is_some() && self.read(false) {
                return true;
            }
            if let Some(entry) = self.tokens.logprobs.last_mut().filter(|_| has_text) {
                entry.in_content = self.reader.as_ref().is_none_or(Reader::is_in_content);
            }
        }
        false
    }
}

impl Sink for Choice {
    fn prompt(&mut self, cached_tokens: u32, logprobs: Option<Vec<TokenLogprobs>>) {
        self.usage.cached = u64::from(cached_tokens);
        if let (Some((prompt, top)), Some(logprobs)) = (self.want_prompt.take(), &logprobs) {
            // The first token of a prompt follows nothing, so it has no probability.
            let known = std::iter::once(None).chain(logprobs.iter().map(Some));
            let entry = |(token, known): (&u32, Option<&TokenLogprobs>)| LogprobEntry {
                token: *token,
                logprob: known.map(|known| known.logprob),
                top: known.map_or_else(Vec::new, |known| {
                    known.top[..top.min(known.top.len())].to_vec()
                }),
                offset: 0,
                in_content: false,
            };
            self.prompt_logprobs = prompt.iter().zip(known).map(entry).collect();
            self.hold(entries_bytes(&self.prompt_logprobs));
        }
        let Some(echo) = self.echo.take() else { return };
        if self.tokens.want_logprobs {
            let known = std::iter::once(None).chain(logprobs.into_iter().flatten().map(Some));
            let known = known.chain(std::iter::repeat(None));
            let places = echo.tokens.iter().zip(&echo.offsets);
            for ((token, offset), logprobs) in places.zip(known) {
                self.tokens.push_logprobs(*token, logprobs, *offset);
            }
        }
        self.tokens.begin_behind(echo.characters);
        self.text.push_str(&echo.text);
        self.detokenizer = echo.detokenizer.clone();
        self.note_held(0, First::default());
    }

    fn tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) -> bool {
        if self.prompt_only || matches!(self.to, Destination::Whole(None)) {
            return false;
        }
        let before = (self.text_bytes(), self.tokens.all());
        let stopped = self.add_tokens(tokens, logprobs, stop);
        self.note_held(before.0, before.1);
        stopped
    }

    fn has_room(&self) -> bool {
        match &self.to {
            Destination::Stream(share) => {
                let ready = self.tokens.ready(self.stops.held());
                let parts: usize = self.parts.iter().map(Part::len).sum();
                share.has_room(self.text.len() + parts + self.tokens.json_bytes(ready))
            }
            Destination::Whole(_) => true,
        }
    }

    async fn room(&self) {
        if let Destination::Stream(share) = &self.to {
            share.room().await;
        }
    }

    fn flush(&mut self) {
        let Destination::Stream(share) = &self.to else {
            return;
        };
        let has_text = !self.text.is_empty() || !self.parts.is_empty();
        let ready = self.tokens.ready(self.stops.held());
        if !has_text && ready.logprobs + ready.ids == 0 {
            return;
        }
        let (index, model, usage) = (self.index, &self.server.model, self.usage);
        // Tokens go with the first part that they made.
        let mut piece = Piece {
            text: "",
            logprobs: &self.tokens.logprobs[..ready.logprobs],
            token_ids: &self.tokens.ids[..ready.ids],
        };
        let first = !std::mem::replace(&mut self.opened, true);
        share.write(|writer, out| {
            if first {
                writer.open(index, usage, out);
            }
            for part in &self.parts {
                writer.part(index, part, piece, usage, model, out);
                piece = Piece::default();
            }
            piece.text = &self.text;
            if !piece.is_empty() {
                writer.text(index, piece, usage, model, out);
            }
        });
        self.text.clear();
        self.parts.clear();
        self.tokens.sent(ready);
    }

    fn end(&mut self, mut end: Result<FinishReason, ApiError>) {
        // What follows a prompt that is only repeated is made and not shown.
        if self.prompt_only {
            end = end.map(|_| FinishReason::Length);
        }
        if end.is_ok() {
            // After a stop string both hold nothing.
            self.piece.clear();
            self.detokenizer
                .finish(&self.server.model.vocabulary, &mut self.piece);
            if !self.find_stop() {
                let before = self.text.len();
                self.stops.finish(&mut self.text);
                self.tokens.made("", &self.text[before..]);
            }
            self.read(true);
        }
        let has_called = self.reader.as_ref().is_some_and(Reader::has_called);
        let found = self.stops.found().map(|text| Stop::Text(text.into()));
        let stop = found.or(self.stop_token.map(Stop::Token));
        if let (Destination::Whole(_), true) = (&self.to, self.reader.is_some()) {
            self.text = std::mem::take(&mut self.message.content);
        }
        self.tokens.end();
        self.flush();
        match (&mut self.to, end) {
            (Destination::Stream(share), Ok(reason)) => {
                let finish = Finish {
                    reason,
                    has_called,
                    stop,
                };
                let (index, opened, usage) = (self.index, self.opened, self.usage);
                share.write(|writer, out| {
                    if !opened {
                        writer.open(index, usage, out);
                    }
                    writer.finish(index, &finish, usage, out);
                });
                share.done(self.index, self.usage);
            }
            (Destination::Stream(share), Err(error)) => {
                let label = error.kind.row().label;
                if share.fail(error) {
                    let errors = &self.server.metrics.errors_total;
                    errors.with_label_values(&[label]).inc();
                }
            }
            (Destination::Whole(gathering), end) => {
                if let Some(Gathering { to, held }) = gathering.take() {
                    let whole = end.map(|reason| Whole {
                        text: std::mem::take(&mut self.text),
                        reasoning: std::mem::take(&mut self.message.reasoning),
                        calls: std::mem::take(&mut self.message.calls),
                        logprobs: std::mem::take(&mut self.tokens.logprobs),
                        prompt_logprobs: std::mem::take(&mut self.prompt_logprobs),
                        token_ids: std::mem::take(&mut self.tokens.ids),
                        finish: Finish {
                            reason,
                            has_called,
                            stop,
                        },
                        usage: self.usage,
                        _held: held,
                    });
                    // Whoever waited may have left.
                    let _ = to.send(whole);
                }
            }
        }
    }
}
