//! Lines on their way to standard error, and the thread that writes them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

/// Bytes of lines that may wait: some ten thousand lines, the log of a minute that says much.
const BYTES_MAX: usize = 1 << 20;

/// Longest line. What is longer is cut: a line quotes what others send, and a screen shows a few hundred bytes.
const LINE_BYTES_MAX: usize = 16 << 10;

/// What a line takes beside its bytes, about.
const LINE_OVERHEAD: usize = 64;

/// Pause before a write is tried again on a standard error that somebody made non-blocking.
const RETRY: Duration = Duration::from_millis(5);

/// Lines that wait, bounded in bytes.
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Told when a line came.
    came: Condvar,
    /// Told when none is left.
    empty: Condvar,
    thread: Once,
    full: AtomicU64,
    failed: AtomicU64,
}

struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// A line was taken out and is not written yet.
    is_writing: bool,
    writer: Option<ThreadId>,
}

impl Queue {
    pub(crate) const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                lines: VecDeque::new(),
                bytes: 0,
                is_writing: false,
                writer: None,
            }),
            came: Condvar::new(),
            empty: Condvar::new(),
            thread: Once::new(),
            full: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Puts a line at the end, or drops it where there is no room. Takes what is left of a line over the bound.
    pub(crate) fn push(&'static self, line: Vec<u8>) {
        self.thread.call_once(|| {
            let name = "logs".to_owned();
            // Without a thread lines wait, and are dropped when there is no more room.
            let _ = thread::Builder::new()
                .name(name)
                .spawn(|| self.write_all(standard_error));
        });
        self.put(line);
    }

    fn put(&self, line: Vec<u8>) {
        let line = cut(line);
        let bytes = line.len() + LINE_OVERHEAD;
        let mut state = self.lock();
        if state.bytes + bytes > BYTES_MAX {
            drop(state);
            self.full.fetch_add(1, Relaxed);
            return;
        }
        state.bytes += bytes;
        state.lines.push_back(line);
        drop(state);
        self.came.notify_one();
    }

    pub(crate) fn flush(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut state = self.lock();
        let nobody_writes = state.writer.is_none() && !self.thread.is_completed();
        if nobody_writes || state.writer == Some(thread::current().id()) {
            return;
        }
        while !state.lines.is_empty() || state.is_writing {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self
                .empty
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lines dropped for want of room, and because they could not be written.
    pub(crate) fn dropped(&self) -> (u64, u64) {
        (self.full.load(Relaxed), self.failed.load(Relaxed))
    }

    /// Writes lines as they come, for ever.
    fn write_all(&self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) {
        self.lock().writer = Some(thread::current().id());
        loop {
            self.write_next(&mut write);
        }
    }

    /// Waits for a line and writes it.
    fn write_next(&self, write: &mut impl FnMut(&[u8]) -> io::Result<usize>) {
        let mut state = self
            .came
            .wait_while(self.lock(), |state| state.lines.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        let line = state.lines.pop_front().unwrap_or_default();
        state.bytes -= line.len() + LINE_OVERHEAD;
        state.is_writing = true;
        drop(state);
        if write_whole(&line, write).is_err() {
            self.failed.fetch_add(1, Relaxed);
        }
        self.lock().is_writing = false;
        self.empty.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The system call itself: the standard library's `stderr` has a lock, which a blocked write would hold.
fn standard_error(bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::write(rustix::stdio::stderr(), bytes)?)
}

fn write_whole(
    mut line: &[u8],
    write: &mut impl FnMut(&[u8]) -> io::Result<usize>,
) -> io::Result<()> {
    while !line.is_empty() {
        match write(line) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => line = line.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A line over the bound without its middle: the beginning says what, the end of a quoted message says where.
fn cut(line: Vec<u8>) -> Vec<u8> {
    if line.len() <= LINE_BYTES_MAX {
        return line;
    }
    const END: usize = 1 << 10;
    let note = format!(" … {} bytes … ", line.len() - LINE_BYTES_MAX);
    let (begin, end) = (LINE_BYTES_MAX - END, line.len() - END);
    let mut short = String::from_utf8_lossy(&line[..begin]).into_owned();
    short.push_str(&note);
    short.push_str(&String::from_utf8_lossy(&line[end..]));
    short.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> &'static Queue {
        Box::leak(Box::new(Queue::new()))
    }

    #[test]
    fn lines_are_written_in_order_and_whole() {
        let queue = queue();
        let mut written = Vec::new();
        // A bit at a time, and not always.
        let mut turn = 0;
        let mut write = |bytes: &[u8]| {
            turn += 1;
            match turn % 3 {
                0 => Err(ErrorKind::WouldBlock.into()),
                1 => Err(ErrorKind::Interrupted.into()),
                _ => {
                    let some = bytes.len().min(3);
                    written.extend_from_slice(&bytes[..some]);
                    Ok(some)
                }
            }
        };
        for line in ["one line\n", "another\n"] {
            queue.put(line.into());
        }
        queue.write_next(&mut write);
        queue.write_next(&mut write);
        assert_eq!(written, b"one line\nanother\n");
        assert_eq!(queue.dropped(), (0, 0));
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_the_next_line_is_tried() {
        let queue = queue();
        let mut outcomes = [Err(ErrorKind::StorageFull), Ok(5)].into_iter();
        let mut write = |_: &[u8]| outcomes.next().unwrap().map_err(io::Error::from);
        for _ in 0..2 {
            queue.put(b"line\n".to_vec());
            queue.write_next(&mut write);
        }
        assert_eq!(queue.dropped(), (0, 1));
    }

    #[test]
    fn what_nobody_writes_is_bounded_and_nobody_waits_for_it() {
        let queue = queue();
        let line = vec![b'x'; 1000];
        let lines = 3 * BYTES_MAX / line.len();
        for _ in 0..lines {
            queue.put(line.clone());
        }
        let (full, failed) = queue.dropped();
        assert_eq!(failed, 0);
        let kept = lines as u64 - full;
        assert_eq!(kept as usize, BYTES_MAX / (line.len() + LINE_OVERHEAD));
        assert!(queue.lock().bytes <= BYTES_MAX);
        // There is room again.
        queue.write_next(&mut |bytes| Ok(bytes.len()));
        queue.put(line);
        assert_eq!(queue.dropped(), (full, 0));
    }

    #[test]
    fn a_line_of_megabytes_is_cut() {
        let mut line = b"it says: ".to_vec();
        line.extend(std::iter::repeat_n(b'x', 3 << 20));
        line.extend_from_slice(b" at line 1\n");
        let short = String::from_utf8(cut(line)).unwrap();
        assert!(short.len() < 2 * LINE_BYTES_MAX, "{}", short.len());
        assert!(short.starts_with("it says: xxx") && short.ends_with("xxx at line 1\n"));
    }

    #[test]
    fn a_flush_ends_when_all_is_written_or_its_time_is_over() {
        let queue = queue();
        queue.flush(Duration::from_secs(600));
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let (go, gone) = std::sync::mpsc::channel::<()>();
        thread::spawn(move || {
            queue.write_all(|bytes| {
                let _ = gone.recv();
                thread::sleep(Duration::from_millis(20));
                WRITTEN.fetch_add(1, Relaxed);
                Ok(bytes.len())
            })
        });
        while queue.lock().writer.is_none() {
            thread::yield_now();
        }
        queue.put(b"line\n".to_vec());
        queue.flush(Duration::from_millis(1));
        assert!(queue.lock().is_writing || !queue.lock().lines.is_empty());
        drop(go);
        queue.flush(Duration::from_secs(600));
        assert!(queue.lock().lines.is_empty());
        assert_eq!(WRITTEN.load(Relaxed), 1);
    }
}
