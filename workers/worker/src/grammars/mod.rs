//! Structured output: grammars are compiled, and masks made, on threads of their own beside the engine's.
//!
//! A sequence with a grammar comes to the engine thread as a command like any other. It is held back there while a
//! [`Constraint`] is made for it ([`Grammars::build`]): compiled, moved over the output that is there already, and with its
//! first mask. From then on each token that the engine tells it starts a mask on the threads ([`constraint`]).
//!
//! Threads start, and the tokenizer is read, when the first grammar comes: most workers never see one.

mod constraint;
mod recent;
mod threads;

use std::path::PathBuf;
use std::sync::Arc;

use baton_engine::Constraint;
use baton_protocol::{Grammar, SequenceSpec};
use crossbeam_channel::{Receiver, Sender, bounded};

use threads::{Build, Threads};

/// News that may lie unread. Of masks it does not matter whether they are told: they are asked for anyway.
const NEWS_MAX: usize = 1024;

/// What the threads tell the engine thread.
#[derive(Debug)]
pub(crate) enum News {
    /// What a sequence waited for, or why it cannot be had, as a sentence.
    Built {
        key: u64,
        built: Result<Box<dyn Constraint>, String>,
    },
    /// A mask is made.
    Mask,
}

/// What a constraint is made of.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) grammar: Grammar,
    /// Ids that may end the output where the grammar allows it.
    pub(crate) ends: Vec<u32>,
    /// The output so far.
    pub(crate) output: Vec<u32>,
}

impl Wanted {
    /// What a sequence wants, if it has a grammar; `next` is a token after those of the sequence.
    pub(crate) fn of(spec: &SequenceSpec, next: Option<u32>) -> Option<Self> {
        let grammar = spec.generation.grammar.as_ref()?;
        let output = spec.tokens.0.iter().skip(spec.prompt_tokens as usize);
        Some(Self {
            grammar: grammar.clone(),
            ends: spec.generation.stop_token_ids.clone(),
            output: output.copied().chain(next).collect(),
        })
    }
}

/// The engine thread's end of the threads.
pub(crate) struct Grammars {
    source: Arc<Source>,
    threads: Option<Threads>,
    news: Sender<News>,
    heard: Receiver<News>,
}

/// Where the vocabulary comes from.
#[derive(Debug)]
pub(crate) struct Source {
    /// The model's `tokenizer.json`.
    pub(crate) tokenizer: PathBuf,
    /// Logits of the model.
    pub(crate) vocab: u32,
}

impl Grammars {
    /// Over the vocabulary of a model. Nothing is read yet.
    pub(crate) fn new(tokenizer: PathBuf, vocab: u32) -> Self {
        let (news, heard) = bounded(NEWS_MAX);
        Self {
            source: Arc::new(Source { tokenizer, vocab }),
            threads: None,
            news,
            heard,
        }
    }

    /// What the threads have to say.
    pub(crate) fn news(&self) -> &Receiver<News> {
        &self.heard
    }

    /// Has a constraint made for a sequence; [`News::Built`] brings it. Never waits.
    ///
    /// # Errors
    /// Why it cannot be made, as a sentence.
    pub(crate) fn build(&mut self, key: u64, wanted: Wanted) -> Result<(), String> {
        let threads = match &mut self.threads {
            Some(threads) => threads,
            none => none.insert(Threads::start(&self.source)?),
        };
        threads.build(Build {
            key,
            wanted,
            news: self.news.clone(),
        })
    }
}
