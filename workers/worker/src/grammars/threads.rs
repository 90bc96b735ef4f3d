//! The threads that compile grammars and make masks.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use baton_grammar::{Compiler, GrammarError, Matcher};
use crossbeam_channel::{Receiver, Sender, bounded};

use super::constraint::{Following, MaskJob, mask_of};
use super::recent::{Recent, compile};
use super::{News, Source, Wanted};

/// Grammars that wait to be compiled. More than a worker has sequences.
const BUILDS_MAX: usize = 4096;
/// Masks that wait to be made. A sequence waits for one at most.
const MASKS_MAX: usize = 4096;
/// Threads that compile: one slow grammar does not hold up all others.
const BUILDERS: usize = 2;
/// Most threads that make masks. Each is busy for some 10 µs a token and sequence.
const MASKERS_MAX: usize = 8;

/// A constraint to be made.
pub(super) struct Build {
    pub(super) key: u64,
    pub(super) wanted: Wanted,
    pub(super) news: Sender<News>,
}

/// Jobs in; the threads end when this is dropped, and each constraint.
pub(super) struct Threads {
    builds: Sender<Build>,
}

/// What the threads that compile share.
struct Builder {
    source: Arc<Source>,
    /// Read by the first that needs it.
    compiler: OnceLock<Result<Compiler, GrammarError>>,
    recent: Mutex<Recent>,
    masks: Sender<MaskJob>,
}

impl Threads {
    pub(super) fn start(source: &Arc<Source>) -> Result<Self, String> {
        let (builds, to_build) = bounded::<Build>(BUILDS_MAX);
        let (masks, to_mask) = bounded::<MaskJob>(MASKS_MAX);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..(cores / 2).clamp(1, MASKERS_MAX) {
            let to_mask: Receiver<MaskJob> = to_mask.clone();
            spawn("mask", move || to_mask.iter().for_each(MaskJob::run))?;
        }
        let builder = Arc::new(Builder {
            source: Arc::clone(source),
            compiler: OnceLock::new(),
            recent: Mutex::default(),
            masks,
        });
        for _ in 0..BUILDERS {
            let (builder, to_build) = (Arc::clone(&builder), to_build.clone());
            spawn("grammar", move || {
                for Build { key, wanted, news } in &to_build {
                    let built = builder.build(&wanted, &news);
                    let built = built.map_err(|error| error.to_string());
                    // The engine thread reads its news whenever it has a turn; without it nobody waits.
                    let _ = news.send(News::Built { key, built });
                }
            })?;
        }
        Ok(Self { builds })
    }

    pub(super) fn build(&self, build: Build) -> Result<(), String> {
        let sent = self.builds.try_send(build);
        sent.map_err(|_| "the threads that compile grammars are gone or overrun".to_owned())
    }
}

impl Builder {
    fn build(
        &self,
        wanted: &Wanted,
        news: &Sender<News>,
    ) -> Result<Box<dyn baton_engine::Constraint>, GrammarError> {
        let mut matcher = self.matcher(wanted)?;
        for token in &wanted.output {
            matcher.accept(*token)?;
        }
        let mask = mask_of(&mut matcher).map_err(GrammarError::Token)?;
        let (masks, news) = (self.masks.clone(), news.clone());
        Ok(Box::new(Following::new(matcher, mask, masks, news)))
    }

    fn matcher(&self, wanted: &Wanted) -> Result<Matcher, GrammarError> {
        let Wanted { grammar, ends, .. } = wanted;
        let recent = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(matcher) = recent().find(grammar, ends) {
            return Ok(matcher);
        }
        let compiler = self.compiler.get_or_init(|| self.source.compiler());
        let compiler = compiler.as_ref().map_err(Clone::clone)?;
        let matcher = compile(compiler, grammar, ends)?;
        let branch = matcher.branch();
        recent().keep(grammar, ends, matcher);
        Ok(branch)
    }
}

impl Source {
    fn compiler(&self) -> Result<Compiler, GrammarError> {
        let Self { tokenizer, vocab } = self;
        let text = std::fs::read(tokenizer).map_err(|error| {
            GrammarError::Tokenizer(format!("{}: {error}", tokenizer.display()))
        })?;
        Compiler::new(&text, *vocab)
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(run);
    let started = spawned.map(drop);
    started.map_err(|error| format!("the system starts no thread for grammars: {error}"))
}
