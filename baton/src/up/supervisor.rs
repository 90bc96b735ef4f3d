//! Child processes: started, listened to, waited for and stopped, always all of them.
//!
//! Children run in process groups of their own, so that Ctrl-C reaches `baton up` alone and the order of stopping is
//! its own: first the API server, which lets requests finish, then workers, then the bus that all of them need.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::select_all;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::reason::{self, LastLines, Stream};
use crate::systemd;

/// A longer log line is shown in pieces.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// How long a killed process may take to disappear: longer means a stuck kernel call.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// How long the last lines of an ended process may take to arrive.
const LAST_LINES_WAIT: Duration = Duration::from_secs(1);

/// When a process is stopped: all of one stage end before the next stage is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Takes requests from outside.
    Front,
    /// Does the work.
    Worker,
    /// Carries the messages of all others.
    Bus,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct ProcessSpec {
    /// Its name in the log.
    pub name: String,
    /// When it is stopped.
    pub stage: Stage,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// A socket that listens, for its standard input: it has it alone once it runs. One that is started again has to listen by itself.
    pub listener: Option<Arc<TcpListener>>,
}

/// How a process ended that nobody asked to.
#[derive(Debug)]
pub struct Exit {
    /// Which.
    pub spec: ProcessSpec,
    /// How.
    pub status: ExitStatus,
    /// How long it ran.
    pub lived: Duration,
    /// The line of its output that explains it, if there is one.
    pub reason: Option<String>,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = reason::sentence(self.status, self.lived, self.reason.as_deref());
        write!(f, "{} {how}", self.spec.name)
    }
}

/// All children.
pub struct Supervisor {
    /// What makes a child die with this process: `baton tether`.
    tether: Option<PathBuf>,
    console: Console,
    running: Vec<Running>,
}

struct Running {
    spec: ProcessSpec,
    child: Child,
    pid: Pid,
    since: Instant,
    last_lines: Arc<Mutex<LastLines>>,
    readers: Vec<JoinHandle<()>>,
}

impl Supervisor {
    /// No children yet. `tether` is the `baton` binary, through which they start; without it (tests) a child
    /// survives a kill -9 of this process.
    ///
    /// Children die with the *thread* that started them: use it from the main thread.
    pub fn new(tether: Option<PathBuf>) -> Self {
        Self {
            tether,
            console: Console::default(),
            running: Vec::new(),
        }
    }

    /// Starts a process and shows its lines from now on.
    ///
    /// # Errors
    /// If the program cannot be run at all.
    pub fn start(&mut self, mut spec: ProcessSpec) -> io::Result<()> {
        let mut command = match &self.tether {
            None => Command::new(&spec.program),
            Some(baton) => {
                let mut command = Command::new(baton);
                command
                    .arg("tether")
                    .arg("--parent")
                    .arg(std::process::id().to_string());
                command.arg("--").arg(&spec.program);
                command
            }
        };
        command.args(&spec.args).process_group(0).kill_on_drop(true);
        // systemd's words are for this process.
        for variable in systemd::VARIABLES {
            command.env_remove(variable);
        }
        let input = match spec.listener.take() {
            None => Stdio::null(),
            Some(listener) => OwnedFd::from(listener.try_clone()?).into(),
        };
        command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let raw = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = raw
            .and_then(Pid::from_raw)
            .expect("a child that was not waited for has an id");

        let last_lines = Arc::new(Mutex::new(LastLines::default()));
        let label = self.console.label(&spec.name);
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            let last_lines = Arc::clone(&last_lines);
            let shown = show(pipe, Stream::Output, label.clone(), last_lines);
            readers.push(tokio::spawn(shown));
        }
        if let Some(pipe) = child.stderr.take() {
            let shown = show(pipe, Stream::Error, label, Arc::clone(&last_lines));
            readers.push(tokio::spawn(shown));
        }
        self.running.push(Running {
            spec,
            child,
            pid,
            since: Instant::now(),
            last_lines,
            readers,
        });
        Ok(())
    }

    /// Names and process ids of what runs, in the order of their start.
    pub fn pids(&self) -> impl Iterator<Item = (&str, i32)> {
        self.running.iter().map(|running| {
            (
                running.spec.name.as_str(),
                running.pid.as_raw_nonzero().get(),
            )
        })
    }

    /// Waits until any child ends; for ever while there is none. Nothing is lost when this future is dropped.
    pub async fn next_exit(&mut self) -> Exit {
        if self.running.is_empty() {
            return std::future::pending().await;
        }
        let waits = self
            .running
            .iter_mut()
            .map(|running| Box::pin(running.child.wait()));
        let (status, index, _) = select_all(waits).await;
        let ended = Instant::now();
        let running = self.running.remove(index);
        // A wait that fails means that somebody else reaped the child; it is gone either way.
        let status = status.unwrap_or_default();
        for reader in running.readers {
            // A grandchild may hold the pipe open; do not wait for that one.
            let _ = timeout(LAST_LINES_WAIT, reader).await;
        }
        let last_lines = {
            let mut kept = running
                .last_lines
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *kept)
        };
        Exit {
            spec: running.spec,
            status,
            lived: ended.duration_since(running.since),
            reason: last_lines.reason(ended),
        }
    }

    /// Ends all children, stage by stage: SIGTERM, then SIGKILL for what is left after `grace`, or at once when
    /// `hurry` completes. Returns when none is left, and never later than the sum of the stages' bounds.
    pub async fn stop(mut self, grace: Duration, hurry: impl Future<Output = ()>) {
        tokio::pin!(hurry);
        let mut hurried = false;
        for stage in [Stage::Front, Stage::Worker, Stage::Bus] {
            let (mut ending, rest) = self
                .running
                .into_iter()
                .partition::<Vec<_>, _>(|r| r.spec.stage == stage);
            self.running = rest;
            if !hurried {
                ending
                    .iter()
                    .for_each(|running| running.signal(Signal::TERM));
                let deadline = Instant::now() + grace;
                tokio::select! {
                    () = &mut hurry => hurried = true,
                    () = all_ended(&mut ending, deadline) => {}
                }
            }
            for running in &ending {
                if !hurried {
                    let name = &running.spec.name;
                    tracing::warn!(
                        "{name} did not end within {} s and is killed",
                        grace.as_secs()
                    );
                }
                running.signal(Signal::KILL);
            }
            all_ended(&mut ending, Instant::now() + KILL_WAIT).await;
        }
    }
}

impl Running {
    /// Signals the whole group: the child and what it may have started.
    fn signal(&self, signal: Signal) {
        // The only error that can come is that it is gone already.
        let _ = kill_process_group(self.pid, signal);
    }
}

/// Waits for all, but not past the deadline; those that ended leave the list.
async fn all_ended(ending: &mut Vec<Running>, deadline: Instant) {
    while let Some(running) = ending.last_mut() {
        if timeout_at(deadline, running.child.wait()).await.is_err() {
            break;
        }
        let Some(running) = ending.pop() else { break };
        for reader in running.readers {
            let _ = timeout(LAST_LINES_WAIT, reader).await;
        }
    }
    ending.retain_mut(|running| !matches!(running.child.try_wait(), Ok(Some(_))));
}

/// Shows a pipe line by line until it closes.
async fn show(
    pipe: impl AsyncRead + Unpin,
    stream: Stream,
    label: String,
    last_lines: Arc<Mutex<LastLines>>,
) {
    let mut pipe = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut pipe)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        // Nobody left to read is no fault, and nobody who reads slowly holds the children up.
        baton_logs::line(&format!("{label} {text}"));
        let mut last_lines = last_lines.lock().unwrap_or_else(PoisonError::into_inner);
        last_lines.push(stream, text);
    }
}

/// How names are shown before lines.
struct Console {
    coloured: bool,
    started: usize,
}

impl Default for Console {
    fn default() -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            coloured: io::stderr().is_terminal() && !plain,
            started: 0,
        }
    }
}

impl Console {
    fn label(&mut self, name: &str) -> String {
        // Green, yellow, blue, magenta, cyan and their bright kin: readable on dark and light.
        const COLOURS: [u8; 10] = [32, 33, 34, 35, 36, 92, 93, 94, 95, 96];
        let colour = COLOURS[self.started % COLOURS.len()];
        self.started += 1;
        match self.coloured {
            true => format!("\x1b[{colour}m{name:>12} |\x1b[0m"),
            false => format!("{name:>12} |"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(name: &str, stage: Stage, script: &str) -> ProcessSpec {
        ProcessSpec {
            name: name.to_owned(),
            stage,
            program: PathBuf::from("/bin/sh"),
            args: vec!["-c".into(), script.into()],
            listener: None,
        }
    }

    /// Waits until a file holds this many lines.
    async fn lines(path: &std::path::Path, count: usize) -> Vec<String> {
        let deadline = Instant::now() + LONG;
        loop {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<_> = text.lines().map(str::to_owned).collect();
            if lines.len() >= count {
                return lines;
            }
            assert!(Instant::now() < deadline, "only {lines:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn an_end_is_reported_with_status_and_reason() {
        let mut supervisor = Supervisor::new(None);
        supervisor
            .start(shell("idle", Stage::Worker, "exec sleep 600"))
            .unwrap();
        supervisor
            .start(shell(
                "faulty",
                Stage::Worker,
                "echo one; echo no room >&2; exit 3",
            ))
            .unwrap();
        let exit = timeout(LONG, supervisor.next_exit()).await.unwrap();
        assert_eq!(
            (exit.spec.name.as_str(), exit.status.code()),
            ("faulty", Some(3))
        );
        assert_eq!(exit.reason.as_deref(), Some("no room"));
        assert_eq!(supervisor.pids().count(), 1);
        supervisor.stop(LONG, pending()).await;
    }

    #[tokio::test]
    async fn a_killed_child_is_reported_by_its_signal_and_not_by_its_last_log_line() {
        let mut supervisor = Supervisor::new(None);
        let script = "echo '2026-11-25T07:05:57Z  INFO KV peer connected' >&2; kill -9 $$";
        supervisor
            .start(shell("victim", Stage::Bus, script))
            .unwrap();
        let exit = timeout(LONG, supervisor.next_exit()).await.unwrap();
        let text = exit.to_string();
        assert!(
            text.starts_with("victim was killed by signal 9 (SIGKILL)"),
            "{text}"
        );
        assert!(!text.contains("it said"), "{text}");
    }

    #[tokio::test]
    async fn stages_stop_in_order_and_each_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let order = directory.path().join("order");
        let mut supervisor = Supervisor::new(None);
        for (name, stage) in [
            ("bus", Stage::Bus),
            ("worker", Stage::Worker),
            ("front", Stage::Front),
        ] {
            let file = order.display();
            let script = format!(
                "trap 'sleep 0.1; echo {name} >> {file}; exit 0' TERM; echo up >> {file}; while :; do sleep 0.02; done"
            );
            supervisor.start(shell(name, stage, &script)).unwrap();
        }
        lines(&order, 3).await;
        timeout(LONG, supervisor.stop(LONG, pending()))
            .await
            .unwrap();
        assert_eq!(lines(&order, 6).await[3..], ["front", "worker", "bus"]);
    }

    #[tokio::test]
    async fn a_deaf_child_is_killed_after_the_grace() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("deaf");
        let mut supervisor = Supervisor::new(None);
        let script = format!(
            "trap '' TERM; echo $$ > {}; while :; do sleep 0.02; done",
            file.display()
        );
        supervisor
            .start(shell("deaf", Stage::Worker, &script))
            .unwrap();
        let pid = lines(&file, 1).await[0].clone();
        timeout(LONG, supervisor.stop(Duration::from_millis(50), pending()))
            .await
            .unwrap();
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[tokio::test]
    async fn hurry_kills_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("deaf");
        let mut supervisor = Supervisor::new(None);
        let script = format!(
            "trap '' TERM; echo $$ > {}; while :; do sleep 0.02; done",
            file.display()
        );
        supervisor
            .start(shell("deaf", Stage::Front, &script))
            .unwrap();
        lines(&file, 1).await;
        // With the grace alone this would take an hour.
        timeout(LONG, supervisor.stop(Duration::from_secs(3600), async {}))
            .await
            .unwrap();
    }
}
