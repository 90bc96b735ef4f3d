//! Threads that hang: one of a process is stopped where it stands, and the others go on, as when a driver's call never returns. And whole
//! processes that do.
#![allow(unsafe_code)] // ptrace, waitid

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::wait::PATIENCE;

/// `PTRACE_SEIZE` and `PTRACE_INTERRUPT` of `linux/ptrace.h`.
const SEIZE: u32 = 0x4206;
const INTERRUPT: u32 = 0x4207;

/// How often it is looked whether a frozen thread has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Returns when a child of this process, to which SIGSTOP was sent, stands still with all its threads, or has ended.
pub(crate) fn stopped(pid: u32) {
    let mut seen = MaybeUninit::<libc::siginfo_t>::uninit();
    let what = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT;
    // It fails only where the process was waited for already.
    // SAFETY: `seen` is one `siginfo_t`; `WNOWAIT` leaves the process to be waited for.
    unsafe { libc::waitid(libc::P_PID, pid, seen.as_mut_ptr(), what) };
}

/// Frozen threads. They go on when this is dropped.
pub struct Frozen {
    /// The tracer: a thread is traced by a thread, and freed by its end.
    tracer: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Frozen {
    /// Freezes the threads of this name (its first 15 bytes count) in a child of this process.
    ///
    /// # Panics
    /// If there are none, or they cannot be traced.
    pub fn threads(pid: u32, name: &str) -> Self {
        let threads = find(pid, name);
        let (release, released) = channel::<()>();
        let (ready, is_ready) = channel();
        let tracer = std::thread::spawn(move || {
            threads.iter().for_each(|thread| seize(*thread));
            let _ = ready.send(());
            while released.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                // A thread that ends with its process is mourned by its tracer, or the process never ends; the first thread by
                // whoever waits for the process.
                for thread in threads.iter().filter(|thread| **thread as u32 != pid) {
                    // SAFETY: no status is asked for.
                    unsafe { libc::waitpid(*thread, null_mut(), libc::__WALL | libc::WNOHANG) };
                }
            }
        });
        is_ready
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| panic!("threads {name} of process {pid} were not frozen"));
        Self {
            tracer: Some((release, tracer)),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some((release, tracer)) = self.tracer.take() {
            drop(release);
            let _ = tracer.join();
        }
    }
}

fn find(pid: u32, name: &str) -> Vec<c_int> {
    let name = &name[..name.len().min(15)];
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
    let threads: Vec<c_int> = tasks
        .flatten()
        .filter(|task| {
            std::fs::read_to_string(task.path().join("comm"))
                .is_ok_and(|comm| comm.trim_end() == name)
        })
        .filter_map(|task| task.file_name().to_string_lossy().parse().ok())
        .collect();
    assert!(!threads.is_empty(), "process {pid} has no thread {name}");
    threads
}

fn seize(thread: c_int) {
    for request in [SEIZE, INTERRUPT] {
        // SAFETY: both requests take no memory of ours.
        let done = unsafe { libc::ptrace(request, thread, null_mut::<()>(), null_mut::<()>()) };
        let error = std::io::Error::last_os_error();
        assert_eq!(done, 0, "ptrace({request:#x}) of thread {thread}: {error}");
    }
    // Taken here, so that nobody who waits for the process's end takes the stop for it.
    // SAFETY: a thread that is traced by this one; no status is asked for.
    let stopped = unsafe { libc::waitpid(thread, null_mut(), libc::__WALL) };
    assert_eq!(stopped, thread, "{}", std::io::Error::last_os_error());
}
