//! One choice in the making: tokens in, text out, to a stream or to an answer in one piece.

use std::sync::Arc;

use baton_protocol::{FinishReason, TokenLogprobs};
use tokio::sync::oneshot;

use super::sse::Share;
use crate::detokenize::Detokenizer;
use crate::driver::Sink;
use crate::error::ApiError;
use crate::openai::{LogprobEntry, Shape, Usage};
use crate::server::Server;
use crate::stop::StopMatcher;

/// What one log-probability takes in the stream, nearly.
const LOGPROB_BYTES: usize = 64;

/// A finished choice of an answer in one piece.
pub struct Whole {
    /// Its text.
    pub text: String,
    /// Log-probabilities, if asked for.
    pub logprobs: Vec<LogprobEntry>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Output tokens, and prompt tokens that were cached.
    pub usage: Usage,
}

/// Where a choice goes.
pub enum Destination {
    /// Into a stream, as it comes.
    Stream(Share, Arc<Shape>),
    /// To whoever waits for all of it.
    Whole(Option<oneshot::Sender<Result<Whole, ApiError>>>),
}

/// A prompt that is repeated before its output.
pub struct Echo {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Arc<[u32]>,
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
    echo: Option<Echo>,
    opened: bool,
    /// Not yet sent, or all of it for an answer in one piece.
    text: String,
    logprobs: Vec<LogprobEntry>,
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
        stops: Vec<String>,
        min_tokens: u32,
        want_logprobs: bool,
        echo: Option<Echo>,
    ) -> Self {
        Self {
            server,
            index,
            to,
            detokenizer: Detokenizer::default(),
            stops: StopMatcher::new(stops),
            min_tokens,
            want_logprobs,
            echo,
            opened: false,
            text: String::new(),
            logprobs: Vec::new(),
            characters: 0,
            piece: String::new(),
            usage: Usage::default(),
        }
    }

    fn add_logprobs(&mut self, token: u32, logprobs: Option<TokenLogprobs>) {
        if self.want_logprobs {
            let (logprob, top) = match logprobs {
                Some(TokenLogprobs { logprob, top }) => (Some(logprob), top),
                None => (None, Vec::new()),
            };
            self.logprobs.push(LogprobEntry {
                token,
                logprob,
                top,
                offset: self.characters,
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
            for (token, logprobs) in echo.tokens.iter().zip(known) {
                self.add_logprobs(*token, logprobs);
                let bytes = self.server.model.vocabulary.bytes(*token);
                self.characters += String::from_utf8_lossy(bytes).chars().count();
            }
        }
        self.characters = echo.text.chars().count();
        self.text.push_str(&echo.text);
    }

    fn tokens(&mut self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, stop: bool) -> bool {
        let mut logprobs = logprobs.into_iter();
        for (i, token) in tokens.iter().enumerate() {
            self.usage.completion += 1;
            if self.want_logprobs {
                let next = logprobs.next();
                self.add_logprobs(*token, next);
            }
            if stop && i + 1 == tokens.len() {
                break;
            }
            self.piece.clear();
            self.detokenizer
                .push(&self.server.model.vocabulary, *token, &mut self.piece);
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

    fn has_room(&self) -> bool {
        match &self.to {
            Destination::Stream(share, _) => {
                let logprobs: usize = self.logprobs.iter().map(|entry| 1 + entry.top.len()).sum();
                share.has_room(self.text.len() + logprobs * LOGPROB_BYTES)
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
        if self.text.is_empty() && self.logprobs.is_empty() {
            return;
        }
        let (index, model) = (self.index, &self.server.model);
        let first = !std::mem::replace(&mut self.opened, true);
        share.write(|out| {
            if first {
                shape.role_chunk(index, out);
            }
            shape.text_chunk(index, &self.text, &self.logprobs, model, out);
        });
        self.text.clear();
        self.logprobs.clear();
    }

    fn end(&mut self, end: Result<FinishReason, ApiError>) {
        if end.is_ok() {
            // After a stop string both hold nothing.
            self.piece.clear();
            self.detokenizer
                .finish(&self.server.model.vocabulary, &mut self.piece);
            if !self.stops.push(&self.piece, &mut self.text) {
                self.stops.finish(&mut self.text);
            }
        }
        self.flush();
        match (&mut self.to, end) {
            (Destination::Stream(share, shape), Ok(finish)) => {
                let (index, opened) = (self.index, self.opened);
                share.write(|out| {
                    if !opened {
                        shape.role_chunk(index, out);
                    }
                    shape.finish_chunk(index, finish, out);
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
            (Destination::Whole(sender), end) => {
                let whole = end.map(|finish| Whole {
                    text: std::mem::take(&mut self.text),
                    logprobs: std::mem::take(&mut self.logprobs),
                    finish,
                    usage: self.usage,
                });
                if let Some(sender) = sender.take() {
                    // Whoever waited may have left.
                    let _ = sender.send(whole);
                }
            }
        }
    }
}
