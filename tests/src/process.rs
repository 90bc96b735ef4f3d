//! Child processes that cannot outlive the test.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::freeze;
use crate::wait::eventually;

/// Lines of a log that a failing test shows.
const LOG_LINES_SHOWN: usize = 60;

/// What can be sent to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// Drain and leave.
    Terminate,
    /// Die at once.
    Kill,
    /// Freeze.
    Stop,
    /// Go on.
    Continue,
}

impl Signal {
    fn name(self) -> &'static str {
        match self {
            Self::Interrupt => "INT",
            Self::Terminate => "TERM",
            Self::Kill => "KILL",
            Self::Stop => "STOP",
            Self::Continue => "CONT",
        }
    }
}

/// A child process. It leads a process group, which is killed when the value is dropped; the kernel kills it too when
/// the test dies. What it writes goes to one file, whose end is printed when a test fails.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with `args`; its log is `dir/name.log`, appended to if it is there.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(name: &str, command: &Command, dir: &Path) -> Self {
        let log = dir.join(format!("{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap_or_else(|e| panic!("cannot write {}: {e}", log.display()));
        // setpriv asks the kernel to kill the child when its parent dies, then becomes the child
        let mut wrapped = Command::new("setpriv");
        wrapped
            .args(["--pdeathsig", "KILL", "--"])
            .arg(command.get_program())
            .args(command.get_args())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a file just opened"))
            .stderr(file);
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        let child = wrapped
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {name}: setpriv of util-linux: {e}"));
        Self {
            name: name.to_owned(),
            child,
            log,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id; also that of its group.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most main memory that it ever held at once, in bytes.
    ///
    /// # Panics
    /// If it has ended.
    pub fn resident_max(&self) -> usize {
        let path = format!("/proc/{}/status", self.id());
        let status = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
        kib.unwrap_or_else(|| panic!("{path} has no VmHWM")) << 10
    }

    /// How much more it has held at once than `before`, which [`Self::resident_max`] was then. The kernel's figure may shrink: what was given
    /// back between two looks is not always counted.
    pub fn grown_since(&self, before: usize) -> usize {
        self.resident_max().saturating_sub(before)
    }

    /// Forgets the most memory that it held so far: [`Self::resident_max`] begins again with what it holds now.
    pub fn forget_resident_max(&self) {
        // `CLEAR_REFS_MM_HIWATER_RSS` of proc(5)
        let _ = fs::write(format!("/proc/{}/clear_refs", self.id()), "5");
    }

    /// Bytes it has written so far.
    pub fn log_bytes(&self) -> u64 {
        fs::metadata(&self.log).map_or(0, |log| log.len())
    }

    /// All it has written so far.
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Sends it a signal. It alone gets it, not its group. After [`Signal::Stop`] it stands still when this returns: the signal alone does not
    /// promise that, on another core a process may go on for a moment.
    pub fn signal(&self, signal: Signal) {
        send(signal, &self.id().to_string());
        if signal == Signal::Stop {
            freeze::stopped(self.id());
        }
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .unwrap_or_else(|e| panic!("cannot wait for {}: {e}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// After `deadline`.
    pub async fn end(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        eventually(&what, deadline, async || {
            self.ended().ok_or_else(|| "still running".to_owned())
        })
        .await
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        send(Signal::Kill, &format!("-{}", self.id()));
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(LOG_LINES_SHOWN);
            eprintln!("---- {} (pid {})", self.name, self.id());
            for line in &lines[from..] {
                eprintln!("{line}");
            }
        }
    }
}

/// `kill`, whose only failure is that the process is gone.
fn send(signal: Signal, whom: &str) {
    let _ = Command::new("kill")
        .args(["-s", signal.name(), "--", whom])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
