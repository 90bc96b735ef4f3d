//! Sequences that wait for the constraint that their grammar becomes.

use std::collections::BTreeMap;

use crossbeam_channel::{Receiver, never};

use super::Command;
use crate::grammars::{Grammars, News, Wanted};

/// The commands that began these sequences, by key; the desk bounds how many there are.
pub(super) struct HeldBack {
    grammars: Option<Grammars>,
    commands: BTreeMap<u64, Command>,
    silence: Receiver<News>,
}

impl HeldBack {
    /// Nobody waits. Without `grammars` no sequence begins that has one.
    pub(super) fn new(grammars: Option<Grammars>) -> Self {
        Self {
            grammars,
            commands: BTreeMap::new(),
            silence: never(),
        }
    }

    /// What comes of the grammars.
    pub(super) fn news(&self) -> &Receiver<News> {
        let news = self.grammars.as_ref().map(Grammars::news);
        news.unwrap_or(&self.silence)
    }

    /// Holds a sequence back that has a grammar, and has its constraint made. Gives back what is not held: with a sentence, if it can
    /// never begin, and why.
    pub(super) fn hold(&mut self, command: Command) -> Option<(Command, Option<String>)> {
        let (key, wanted) = match &command {
            Command::Prefill { key, spec, .. } => (*key, Wanted::of(spec, None)),
            Command::Decode {
                key, spec, next, ..
            } => (*key, Wanted::of(spec, Some(*next))),
            Command::Abort { .. } | Command::Wake | Command::Shutdown => {
                return Some((command, None));
            }
        };
        let Some(wanted) = wanted else {
            return Some((command, None));
        };
        let building = match &mut self.grammars {
            Some(grammars) => grammars.build(key, wanted),
            None => Err("this worker has no tokenizer for structured output".to_owned()),
        };
        match building {
            Ok(()) => {
                self.commands.insert(key, command);
                None
            }
            Err(detail) => Some((command, Some(detail))),
        }
    }

    /// A sequence that waits no longer.
    pub(super) fn take(&mut self, key: u64) -> Option<Command> {
        self.commands.remove(&key)
    }

    pub(super) fn len(&self) -> usize {
        self.commands.len()
    }

    pub(super) fn clear(&mut self) {
        self.commands.clear();
    }
}
