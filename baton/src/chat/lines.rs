//! What a person or a script types: on a terminal with a line editor and a history, else as it comes.

use std::fs::DirBuilder;
use std::io::{self, BufRead, IsTerminal, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::thread;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use rustyline::error::{ReadlineError, Signal};
use rustyline::history::DefaultHistory;
use rustyline::{
    Behavior, Cmd, ConditionalEventHandler, Config, Editor, Event, EventContext, EventHandler,
    KeyEvent, Movement, RepeatCount,
};
use tokio::sync::mpsc::{Receiver, channel};

use crate::Failure;

/// Has a terminal send what is pasted as if it were typed, which the editor turns off.
const PASTE_PLAIN: &[u8] = b"\x1b[?2004l\n";

/// Lines that are kept.
const HISTORY_MAX: usize = 1000;

/// Standard input, a line at a time. It is read on a thread of its own, which nobody waits for: a signal is heard while a person thinks.
pub struct Lines {
    ask: SyncSender<String>,
    answers: Receiver<io::Result<Option<String>>>,
    /// How a terminal was before.
    before: Option<Termios>,
    /// A line is asked for.
    is_asked: bool,
}

impl Lines {
    /// Standard input. On a terminal lines are edited, and remembered in this file, if there is one.
    ///
    /// # Errors
    /// If there can be no editor.
    pub fn open(history: Option<PathBuf>) -> Result<Self, Failure> {
        let (ask, asked) = std::sync::mpsc::sync_channel::<String>(1);
        let (answer, answers) = channel(1);
        let before = tcgetattr(io::stdin()).ok();
        let mut source = match io::stdin().is_terminal() {
            true => Source::Editor(Box::new(Typed::new(history)?)),
            false => Source::Pipe,
        };
        thread::Builder::new()
            .name("input".to_owned())
            .spawn(move || {
                while let Ok(prompt) = asked.recv() {
                    if answer.blocking_send(source.line(&prompt)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            ask,
            answers,
            before,
            is_asked: false,
        })
    }

    /// The next line; `None` at the end. `prompt` is shown on a terminal alone.
    ///
    /// # Errors
    /// If standard input cannot be read.
    pub async fn next(&mut self, prompt: &str) -> io::Result<Option<String>> {
        let gone = || io::Error::other("the thread that reads standard input has ended");
        self.ask.send(prompt.to_owned()).map_err(|_| gone())?;
        self.is_asked = true;
        let line = self.answers.recv().await;
        self.is_asked = false;
        line.unwrap_or_else(|| Err(gone()))
    }
}

impl Drop for Lines {
    /// The editor may still be at work, and this process ends: a terminal is left as it was.
    fn drop(&mut self) {
        if let Some(before) = self.before.as_ref().filter(|_| self.is_asked) {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
            let _ = io::stderr().write_all(PASTE_PLAIN);
        }
    }
}

enum Source {
    Editor(Box<Typed>),
    Pipe,
}

impl Source {
    fn line(&mut self, prompt: &str) -> io::Result<Option<String>> {
        match self {
            Self::Editor(typed) => typed.line(prompt),
            Self::Pipe => io::stdin().lock().lines().next().transpose(),
        }
    }
}

struct Typed {
    editor: Editor<(), DefaultHistory>,
    history: Option<PathBuf>,
}

impl Typed {
    fn new(history: Option<PathBuf>) -> Result<Self, Failure> {
        let config = Config::builder()
            // What is typed is no part of the answers, wherever these go.
            .behavior(Behavior::PreferTerm)
            .max_history_size(HISTORY_MAX)?
            .history_ignore_dups(true)?
            .history_ignore_space(true)
            .build();
        let mut editor = Editor::with_config(config)?;
        editor.bind_sequence(
            KeyEvent::ctrl('C'),
            EventHandler::Conditional(Box::new(CtrlC)),
        );
        if let Some(file) = &history {
            // There is none before the first line.
            let _ = editor.load_history(file);
        }
        Ok(Self { editor, history })
    }

    fn line(&mut self, prompt: &str) -> io::Result<Option<String>> {
        loop {
            match self.editor.readline(prompt) {
                Ok(line) => {
                    self.remember(&line);
                    return Ok(Some(line));
                }
                Err(ReadlineError::Signal(Signal::Resize)) => {}
                Err(ReadlineError::Eof | ReadlineError::Interrupted | ReadlineError::Signal(_)) => {
                    return Ok(None);
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    fn remember(&mut self, line: &str) {
        // One that cannot be kept is no reason to stop.
        let is_new = self.editor.add_history_entry(line).unwrap_or(false);
        let Some(file) = self.history.as_ref().filter(|_| is_new) else {
            return;
        };
        if let Some(directory) = file.parent() {
            let _ = DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory);
        }
        let kept = self.editor.append_history(file);
        if let Err(error) = kept {
            let file = file.display();
            super::say(&format!(
                "baton: {file}: {error}: what is typed is not kept; --no-history says the same without this\n"
            ));
            self.history = None;
        }
    }
}

/// Ctrl-C clears a line, and ends the program where there is none.
struct CtrlC;

impl ConditionalEventHandler for CtrlC {
    fn handle(&self, _: &Event, _: RepeatCount, _: bool, context: &EventContext) -> Option<Cmd> {
        match context.line().is_empty() {
            true => None,
            false => Some(Cmd::Kill(Movement::WholeBuffer)),
        }
    }
}

/// Where lines are remembered: `$XDG_STATE_HOME/baton`, else `~/.local/state/baton`; `None` without either.
pub fn history_file(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Option<PathBuf> {
    let absolute = |name: &str| {
        let path = variable(name).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    let state = absolute("XDG_STATE_HOME");
    let state = state.or_else(|| Some(absolute("HOME")?.join(Path::new(".local/state"))));
    Some(state?.join("baton/chat_history"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_remembered_where_the_user_keeps_such_files() {
        let file = |set: &[(&str, &str)]| {
            history_file(|name| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| value.into())
            })
        };
        let home = ("HOME", "/home/u");
        for (set, path) in [
            (&[home][..], Some("/home/u/.local/state/baton/chat_history")),
            (
                &[("XDG_STATE_HOME", "/s"), home],
                Some("/s/baton/chat_history"),
            ),
            // As XDG says: a relative one does not count.
            (
                &[("XDG_STATE_HOME", "s"), home],
                Some("/home/u/.local/state/baton/chat_history"),
            ),
            (&[], None),
        ] {
            assert_eq!(file(set), path.map(PathBuf::from), "{set:?}");
        }
    }
}
