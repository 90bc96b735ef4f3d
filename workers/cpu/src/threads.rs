//! A small pool of threads for one executor.
//!
//! A step is some hundred short parallel phases, so a phase must start and end within a microsecond: workers
//! spin briefly, then park. Every thread has a run of neighbouring pieces, so that it can fetch its next piece's
//! memory ahead, and takes over what is left of the others' when it is done. The caller only waits for pieces
//! that somebody has begun: a worker that the system has put aside costs its help, not its time slice. Who
//! computes a piece never matters to the result.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks. Longer than the serial gaps inside a step, shorter than
/// anything a neighbour on the same core would feel.
const SPIN: Duration = Duration::from_micros(40);

/// Threads that work on one phase at a time. The thread that calls [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<SharedState>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
}

type Piece<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct SharedState {
    /// Phase number in the upper half, then [`CLOSED`], then the number of workers inside the phase.
    state: AtomicU64,
    /// For each thread, how many pieces of its run are taken.
    taken: Vec<Taken>,
    job: UnsafeCell<Option<(*const Piece<'static>, usize)>>,
    parked: AtomicUsize,
    failed: AtomicBool,
    stop: AtomicBool,
}

/// A counter on a cache line of its own.
#[repr(align(128))]
struct Taken(AtomicUsize);

const CLOSED: u64 = 1 << 31;
const PHASE: u64 = 1 << 32;

// SAFETY: `job` is written only by the thread in `run`, while the phase is closed and no worker is inside it;
// workers read it only after they have entered an open phase.
unsafe impl Send for SharedState {}
// SAFETY: as above.
unsafe impl Sync for SharedState {}

impl Pool {
    /// A pool of `threads` threads, the caller included; at least one.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(SharedState {
            state: AtomicU64::new(CLOSED),
            taken: (0..threads.max(1))
                .map(|_| Taken(AtomicUsize::new(0)))
                .collect(),
            job: UnsafeCell::new(None),
            parked: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                let handle = std::thread::Builder::new()
                    .name(format!("cpu-{index}"))
                    .spawn(move || shared.work(index))
                    .expect("the system can start a thread");
                (handle.thread().clone(), Some(handle))
            })
            .collect();
        Self { shared, workers }
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `piece(thread, index)` once for every index below `pieces`, on any thread, and returns when all
    /// are done. `&mut self`: one phase at a time.
    ///
    /// # Panics
    /// If a piece panicked.
    pub fn run(&mut self, pieces: usize, piece: &Piece<'_>) {
        if pieces <= 1 || self.workers.is_empty() {
            (0..pieces).for_each(|index| piece(0, index));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the phase is closed and left by all workers before this
        // function returns (`Phase::drop`), so nobody uses it beyond.
        let job = unsafe { std::mem::transmute::<*const Piece<'_>, *const Piece<'static>>(piece) };
        // SAFETY: the phase is closed and empty here, so no worker reads `job`.
        unsafe { *shared.job.get() = Some((job, pieces)) };
        for taken in &shared.taken {
            taken.0.store(0, SeqCst);
        }
        let phase = Phase(shared);
        let opened = (shared.state.load(SeqCst) & !(PHASE - 1)).wrapping_add(PHASE);
        shared.state.store(opened, SeqCst);
        if shared.parked.load(SeqCst) > 0 {
            self.workers.iter().for_each(|(thread, _)| thread.unpark());
        }
        shared.claim(piece, 0, pieces);
        drop(phase);
        assert!(
            !shared.failed.load(SeqCst),
            "a piece of the step panicked on a worker thread"
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                let _ = handle.join();
            }
        }
    }
}

/// An open phase; dropping it closes it and waits until every worker has left.
struct Phase<'a>(&'a SharedState);

impl Drop for Phase<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_or(CLOSED, SeqCst);
        let mut spins = 0u32;
        while self.0.state.load(SeqCst) & (CLOSED - 1) != 0 {
            spins += 1;
            // A worker may have lost its core in the middle of a piece: let it have this one.
            if spins < 2_000 {
                spin_loop()
            } else {
                std::thread::yield_now()
            }
        }
    }
}

/// The pieces that `thread` of `threads` begins with, in order, when there are `pieces`.
pub fn run_of(thread: usize, threads: usize, pieces: usize) -> Range<usize> {
    pieces * thread / threads..pieces * (thread + 1) / threads
}

/// A worker inside a phase.
struct Inside<'a>(&'a SharedState);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed.store(true, SeqCst);
        }
        self.0.state.fetch_sub(1, SeqCst);
    }
}

impl SharedState {
    fn claim(&self, piece: &Piece<'_>, thread: usize, pieces: usize) {
        let threads = self.taken.len();
        for owner in (thread..threads).chain(0..thread) {
            let run = run_of(owner, threads, pieces);
            let taken = &self.taken[owner].0;
            // Look before taking: of a finished run nothing is written.
            while taken.load(SeqCst) < run.len() {
                let index = run.start + taken.fetch_add(1, SeqCst);
                if index < run.end {
                    piece(thread, index);
                }
            }
        }
    }

    fn work(&self, thread: usize) {
        let mut seen = 0;
        while let Some(opened) = self.wait(seen) {
            seen = opened & !(PHASE - 1);
            if self
                .state
                .compare_exchange(opened, opened + 1, SeqCst, SeqCst)
                .is_err()
            {
                // Another worker entered first, or the phase is over: look again.
                seen = seen.wrapping_sub(PHASE);
                continue;
            }
            let _inside = Inside(self);
            // SAFETY: the phase is open and counts this worker, so `run` has not returned and `job` is set.
            let (piece, pieces) = unsafe { (*self.job.get()).expect("an open phase has a job") };
            // SAFETY: as above, the closure is alive.
            self.claim(unsafe { &*piece }, thread, pieces);
        }
    }

    /// The state of an open phase other than `seen`; `None` when the pool stops.
    fn wait(&self, seen: u64) -> Option<u64> {
        let open = |state: u64| state & CLOSED == 0 && state & !(PHASE - 1) != seen;
        loop {
            let since = Instant::now();
            while since.elapsed() < SPIN {
                for _ in 0..16 {
                    let state = self.state.load(SeqCst);
                    if open(state) {
                        return Some(state);
                    }
                    spin_loop();
                }
            }
            // Say so before looking once more: `run` opens the phase before it looks here.
            self.parked.fetch_add(1, SeqCst);
            if !self.stop.load(SeqCst) && !open(self.state.load(SeqCst)) {
                std::thread::park();
            }
            self.parked.fetch_sub(1, SeqCst);
            if self.stop.load(SeqCst) {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_runs_once_whatever_the_thread_count() {
        for threads in [1, 2, 3, 7] {
            let mut pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for pieces in [0, 1, 2, 5, 100].into_iter().cycle().take(500) {
                let counts: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                pool.run(pieces, &|thread, index| {
                    assert!(thread < threads);
                    counts[index].fetch_add(1, SeqCst);
                });
                assert!(counts.iter().all(|c| c.load(SeqCst) == 1));
            }
        }
    }

    #[test]
    fn a_panic_in_a_piece_reaches_the_caller() {
        let mut pool = Pool::new(2);
        let both = std::sync::Barrier::new(2);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(2, &|thread, _| {
                both.wait();
                assert!(thread == 0, "this message belongs to the test");
            });
        }));
        assert!(outcome.is_err());
    }
}
