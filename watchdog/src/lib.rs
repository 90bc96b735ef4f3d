//! Notices that a loop of this process has stopped going round.
//!
//! A loop shows that it goes on with its [`Pulse`]; a thread of its own looks at all pulses and counts, look by look, how long
//! one has not changed. It counts its own looks, not the clock: while the process is stopped or the machine sleeps nobody looks,
//! so coming back is no fault. What is to be done about a loop that is stuck its owner says at [`Watchdog::watch`]; where nothing
//! can be done from within, [`abort`] ends the process, so that a supervisor starts it again.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How often the thread looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// The log has this long to be written before the process is aborted: standard error may be a pipe that nobody reads.
const LOG_WAIT: Duration = Duration::from_secs(1);

/// Looks after loops until it is dropped.
pub struct Watchdog {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    watched: Mutex<Watched>,
    /// Told when the watchdog is dropped.
    over: Condvar,
}

#[derive(Default)]
struct Watched {
    loops: Vec<Watch>,
    is_over: bool,
}

struct Watch {
    turns: Box<dyn FnMut() -> Turn + Send>,
    patience: Duration,
    on_stuck: Box<dyn FnMut(Duration) + Send>,
    last: Turn,
    same_looks: u32,
}

/// How far a loop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It waits for something to do, for as long as it likes.
    Resting,
    /// It is at this turn, which does not take long.
    At(u64),
}

/// A loop's sign of life.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<AtomicU64>);

impl Pulse {
    /// Another turn begins.
    pub fn beat(&self) {
        // Odd numbers are turns, even ones rests.
        self.0.store((self.0.load(Relaxed) + 1) | 1, Relaxed);
    }

    /// From here on until the next beat it may take any time.
    pub fn rest(&self) {
        let turn = self.0.load(Relaxed);
        self.0.store(turn + (turn & 1), Relaxed);
    }

    /// How far it is.
    pub fn turn(&self) -> Turn {
        match self.0.load(Relaxed) {
            turn if turn % 2 == 1 => Turn::At(turn),
            _ => Turn::Resting,
        }
    }
}

impl Watchdog {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there can be no more threads.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || of_thread.run())?;
        Ok(Self { shared })
    }

    /// Watches a loop whose turns `pulse` shows. Each time it has been at one turn for `patience`, `on_stuck` is told, on the
    /// watchdog's thread: it must not wait.
    pub fn watch(
        &self,
        pulse: &Pulse,
        patience: Duration,
        on_stuck: impl FnMut(Duration) + Send + 'static,
    ) {
        let pulse = pulse.clone();
        self.watch_turns(move || pulse.turn(), patience, on_stuck);
    }

    /// As [`Self::watch`], for a loop that shows its turns in another way.
    pub fn watch_turns(
        &self,
        mut turns: impl FnMut() -> Turn + Send + 'static,
        patience: Duration,
        on_stuck: impl FnMut(Duration) + Send + 'static,
    ) {
        let watch = Watch {
            last: turns(),
            turns: Box::new(turns),
            patience,
            on_stuck: Box::new(on_stuck),
            same_looks: 0,
        };
        self.shared.lock().loops.push(watch);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.over.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        let mut watched = self.lock();
        while !watched.is_over {
            for watch in &mut watched.loops {
                watch.look();
            }
            watched = self
                .over
                .wait_timeout_while(watched, LOOK_INTERVAL, |watched| !watched.is_over)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    fn look(&mut self) {
        let turn = (self.turns)();
        let was = std::mem::replace(&mut self.last, turn);
        if turn == Turn::Resting || turn != was {
            self.same_looks = 0;
            return;
        }
        self.same_looks += 1;
        let stuck = LOOK_INTERVAL * self.same_looks;
        if stuck >= self.patience {
            self.same_looks = 0;
            (self.on_stuck)(stuck);
        }
    }
}

/// Ends the process as it is, with this sentence. Nothing is cleaned up: what is stuck would keep that from ending.
pub fn abort(sentence: String) -> ! {
    // On a thread of its own: what hangs may hold what a log line needs.
    let logged = std::thread::Builder::new().spawn(move || {
        tracing::error!("{sentence}");
        baton_logs::flush(LOG_WAIT);
    });
    let begun = std::time::Instant::now();
    while logged.as_ref().is_ok_and(|logged| !logged.is_finished()) && begun.elapsed() < LOG_WAIT {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::process::abort()
}

/// The process is about to end: should something keep it from that for as long as this, [`abort`] does it.
pub fn end_within(time: Duration) {
    let end = move || {
        std::thread::sleep(time);
        abort(format!(
            "the process was to end and has not for {} s: it is ended",
            time.as_secs()
        ));
    };
    if let Err(error) = std::thread::Builder::new().spawn(end) {
        tracing::warn!(%error, "nobody watches over the process's end");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Far longer than the patience of any loop here.
    const WAIT: Duration = Duration::from_secs(20);

    fn look(watch: &mut Watch, times: u32) {
        for _ in 0..times {
            watch.look();
        }
    }

    fn watch(pulse: &Pulse, patience: Duration) -> (Watch, mpsc::Receiver<Duration>) {
        let (sender, stuck) = mpsc::channel();
        let of_watch = pulse.clone();
        let watch = Watch {
            last: pulse.turn(),
            turns: Box::new(move || of_watch.turn()),
            patience,
            on_stuck: Box::new(move |time| sender.send(time).unwrap()),
            same_looks: 0,
        };
        (watch, stuck)
    }

    #[test]
    fn a_loop_is_stuck_that_stays_at_one_turn() {
        let pulse = Pulse::default();
        let (mut watch, stuck) = watch(&pulse, 4 * LOOK_INTERVAL);
        look(&mut watch, 100);
        assert!(stuck.try_recv().is_err(), "it has not begun");
        pulse.beat();
        for _ in 0..10 {
            look(&mut watch, 4);
            pulse.beat();
        }
        pulse.rest();
        look(&mut watch, 100);
        assert!(stuck.try_recv().is_err(), "it goes round, then it rests");
        pulse.beat();
        look(&mut watch, 1 + 4);
        assert_eq!(stuck.try_recv(), Ok(4 * LOOK_INTERVAL));
        look(&mut watch, 3);
        assert!(stuck.try_recv().is_err(), "said once for each time");
        look(&mut watch, 1);
        assert!(stuck.try_recv().is_ok(), "and again");
    }

    #[test]
    fn a_beat_after_a_rest_is_another_turn_than_before_it() {
        let pulse = Pulse::default();
        pulse.beat();
        let before = pulse.turn();
        pulse.rest();
        assert_eq!(pulse.turn(), Turn::Resting);
        pulse.rest();
        pulse.beat();
        assert!(matches!(pulse.turn(), Turn::At(_)));
        assert_ne!(pulse.turn(), before);
    }

    #[test]
    fn the_thread_looks_and_ends() {
        let watchdog = Watchdog::start().unwrap();
        let pulse = Pulse::default();
        let (sender, stuck) = mpsc::channel();
        watchdog.watch(&pulse, LOOK_INTERVAL, move |time| {
            let _ = sender.send(time);
        });
        pulse.beat();
        assert!(stuck.recv_timeout(WAIT).is_ok());
        drop(watchdog);
        while stuck.recv_timeout(WAIT).is_ok() {}
        assert_eq!(stuck.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }
}
