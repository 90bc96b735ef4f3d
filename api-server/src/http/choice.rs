//! One choice in the making: tokens in, text out, to a stream or to an answer in one piece.

use std::sync::Arc;

use baton_protocol::{FinishReason, TokenLogprobs, TopLogprob};
use tokio::sync::oneshot;

use super::outbox::Share;
use super::whole::{Held, Whole};
use crate::error::{ApiError, ErrorKind};
use crate::openai::{ID_BYTES, LOGPROB_BYTES, LogprobEntry, Params, Piece, Shape, Usage};
use crate::request::driver::Sink;
use crate::server::Server;
use crate::text::detokenize::Detokenizer;
use crate::text::echo::Echo;
use crate::text::stop::StopMatcher;

/// Where a choice goes.
pub enum Destination {
    /// Into a stream, as it comes.
    Stream(Share, Arc<Shape>),
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

/// One choice.
pub struct Choice {
    server: Arc<Server>,
    index: usize,
    to: Destination,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    min_tokens: u32,
    want_logprobs: bool,
    want_ids: bool,
    /// Special tokens are text.
    special_tokens: bool,
    /// What ends it is text.
    include_stop: bool,
    /// Only the prompt is shown.
    prompt_only: bool,
    echo: Option<Arc<Echo>>,
    opened: bool,
    /// Not yet sent, or all of it for an answer in one piece.
    text: String,
    logprobs: Vec<LogprobEntry>,
    token_ids: Vec<u32>,
    /// Characters of text so far, what is held back included.
    characters: usize,
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
        prompt_tokens: usize,
        echo: Option<Arc<Echo>>,
    ) -> Self {
        let stops = StopMatcher::new(params.stops.clone());
        Self {
            server,
            index,
            to,
            detokenizer: Detokenizer::default(),
            stops: stops.keeping_stop(params.include_stop),
            min_tokens: params.min_tokens,
            want_logprobs: params.sampling.logprobs.is_some(),
            want_ids: params.token_ids,
            special_tokens: params.special_tokens,
            include_stop: params.include_stop,
            prompt_only: params.max_tokens == Some(0),
            echo,
            opened: false,
            text: String::new(),
            logprobs: Vec::new(),
            token_ids: Vec::new(),
            characters: 0,
            piece: String::new(),
            usage: Usage {
                prompt: prompt_tokens as u64,
                ..Usage::default()
            },
        }
    }

    /// Notes what an answer that is not a stream holds. One for which there is no memory any more has failed: whoever waits for it is
    /// told, and the client's leave of the other choices ends this one too.
    fn note_held(&mut self, text_before: usize, logprobs_before: usize, ids_before: usize) {
        let Destination::Whole(gathering) = &mut self.to else {
            return;
        };
        let new = &self.logprobs[logprobs_before.min(self.logprobs.len())..];
        let alternatives: usize = new.iter().map(|entry| entry.top.capacity()).sum();
        let bytes = (self.text.len() - text_before)
            + size_of_val(new)
            + size_of::<u32>() * (self.token_ids.len() - ids_before)
            + alternatives * size_of::<TopLogprob>();
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
        self.logprobs = Vec::new();
        self.token_ids = Vec::new();
    }

    /// As [`Sink::tokens`].
    fn add_tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) -> bool {
        let mut logprobs = logprobs.into_iter();
        for (i, token) in tokens.iter().enumerate() {
            self.usage.completion += 1;
            if self.want_ids {
                self.token_ids.push(*token);
            }
            if self.want_logprobs {
                let next = logprobs.next();
                let vocabulary = &self.server.model.vocabulary;
                // A special token has no text here, unless it is asked for.
                let broken = match vocabulary.special(*token) && !self.special_tokens {
                    true => 0,
                    false => self.detokenizer.broken_before(vocabulary, *token),
                };
                self.add_logprobs(*token, next, self.characters + broken);
            }
            if stop && i + 1 == tokens.len() && !self.include_stop {
                break;
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
            if self.want_logprobs {
                self.characters += self.piece.chars().count();
            }
            if self.usage.completion <= u64::from(self.min_tokens) {
                self.text.push_str(&self.piece);
            } else if self.stops.push(&self.piece, &mut self.text) {
                // It may hold the beginning of a character that comes after the stop string.
                self.detokenizer = Detokenizer::default();
                return true;
            }
        }
        false
    }

    fn add_logprobs(&mut self, token: u32, logprobs: Option<TokenLogprobs>, offset: usize) {
        if self.want_logprobs {
            let (logprob, top) = match logprobs {
                Some(TokenLogprobs { logprob, top }) => (Some(logprob), top),
                None => (None, Vec::new()),
            };
            self.logprobs.push(LogprobEntry {
                token,
                logprob,
                top,
                offset,
            });
        }
    }
}

impl Sink for Choice {
    fn prompt(&mut self, cached_tokens: u32, logprobs: Option<Vec<TokenLogprobs>>) {
        self.usage.cached = u64::from(cached_tokens);
        let Some(echo) = self.echo.take() else { return };
        if self.want_logprobs {
            // The first token of a prompt follows nothing, so it has no probability.
            let known = std::iter::once(None).chain(logprobs.into_iter().flatten().map(Some));
            let known = known.chain(std::iter::repeat(None));
            let places = echo.tokens.iter().zip(&echo.offsets);
            for ((token, offset), logprobs) in places.zip(known) {
                self.add_logprobs(*token, logprobs, *offset);
            }
        }
        self.characters = echo.characters;
        self.text.push_str(&echo.text);
        self.detokenizer = echo.detokenizer.clone();
        self.note_held(0, 0, 0);
    }

    fn tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) -> bool {
        if self.prompt_only || matches!(self.to, Destination::Whole(None)) {
            return false;
        }
        let (text_before, logprobs_before) = (self.text.len(), self.logprobs.len());
        let ids_before = self.token_ids.len();
        let stopped = self.add_tokens(tokens, logprobs, stop);
        self.note_held(text_before, logprobs_before, ids_before);
        stopped
    }

    fn has_room(&self) -> bool {
        match &self.to {
            Destination::Stream(share, _) => {
                let logprobs: usize = self.logprobs.iter().map(|entry| 1 + entry.top.len()).sum();
                let ids = self.token_ids.len() * ID_BYTES;
                share.has_room(self.text.len() + logprobs * LOGPROB_BYTES + ids)
            }
            Destination::Whole(_) => true,
        }
    }

    async fn room(&self) {
        if let Destination::Stream(share, _) = &self.to {
            share.room().await;
        }
    }

    fn flush(&mut self) {
        let Destination::Stream(share, shape) = &self.to else {
            return;
        };
        if self.text.is_empty() && self.logprobs.is_empty() && self.token_ids.is_empty() {
            return;
        }
        let (index, model, usage) = (self.index, &self.server.model, self.usage);
        let piece = Piece {
            text: &self.text,
            logprobs: &self.logprobs,
            token_ids: &self.token_ids,
        };
        let first = !std::mem::replace(&mut self.opened, true);
        share.write(|out| {
            if first {
                shape.role_chunk(index, usage, out);
            }
            shape.text_chunk(index, piece, usage, model, out);
        });
        self.text.clear();
        self.logprobs.clear();
        self.token_ids.clear();
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
            if !self.stops.push(&self.piece, &mut self.text) {
                self.stops.finish(&mut self.text);
            }
        }
        if let Destination::Whole(_) = self.to {
            // Tokens of a stop string begin where the text ends.
            let characters = self.text.chars().count();
            for entry in &mut self.logprobs {
                entry.offset = entry.offset.min(characters);
            }
        }
        self.flush();
        match (&mut self.to, end) {
            (Destination::Stream(share, shape), Ok(finish)) => {
                let (index, opened, usage) = (self.index, self.opened, self.usage);
                share.write(|out| {
                    if !opened {
                        shape.role_chunk(index, usage, out);
                    }
                    shape.finish_chunk(index, finish, usage, out);
                });
                share.done(self.index, self.usage, shape);
            }
            (Destination::Stream(share, _), Err(error)) => {
                let label = error.kind.row().label;
                if share.fail(error) {
                    let errors = &self.server.metrics.errors_total;
                    errors.with_label_values(&[label]).inc();
                }
            }
            (Destination::Whole(gathering), end) => {
                if let Some(Gathering { to, held }) = gathering.take() {
                    let whole = end.map(|finish| Whole {
                        text: std::mem::take(&mut self.text),
                        logprobs: std::mem::take(&mut self.logprobs),
                        token_ids: std::mem::take(&mut self.token_ids),
                        finish,
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
