//! How a connection fares: whether it still delivers, and how fast.
//!
//! A slow link is not a broken one. What tells them apart is progress: a connection is broken only if the peer owes something
//! (reads, chunks, messages that UCX has not ended) and nothing of it ends for [`PULL_STALL_MS`]. How long one read may be follows
//! from the measured rate, so that a slow link shows progress often enough.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use baton_protocol::deadlines::PULL_STALL_MS;

/// A connection that owes something and delivers nothing for this long is broken.
pub(crate) const STALL: Duration = Duration::from_millis(PULL_STALL_MS);

/// Shortest bound on the length of a read, and the bound while the rate is unknown. A link that needs longer than [`STALL`] for it
/// (26 KB/s) is of no use.
pub(crate) const READ_BYTES_MIN: u64 = 256 << 10;

/// No more is outstanding than the link delivers within this time. The margin to [`STALL`] is for a link that becomes slower.
const OUTSTANDING_TIME: Duration = Duration::from_secs(1);

/// A single read takes a quarter of that at most.
const READS_OUTSTANDING_MIN: u64 = 4;

/// A thread that was not run for this long (its process was stopped, or the machine is overloaded) cannot tell whether anything
/// ended meanwhile. It sleeps for a tenth of that at most.
const ABSENCE: Duration = Duration::from_secs(1);

/// What is known of one connection. UCX's callbacks count, the thread looks.
pub(crate) struct Flow {
    stall_after: Duration,
    /// Reads that UCX holds, those of pulls that were given up included.
    reads: Cell<usize>,
    /// Chunks of staged KV that were asked for and have neither come nor been refused.
    chunks: Cell<usize>,
    /// Messages that UCX holds.
    messages: Cell<usize>,
    /// Bytes of those reads and chunks.
    outstanding: Cell<u64>,
    /// Reads, pieces of chunks and messages that ended.
    ended: Cell<u64>,
    /// Bytes that came and were waited for.
    arrived: Cell<u64>,
    /// Bytes that pulls brought: all that came since the probe ended. Others read it, this thread alone writes.
    pulled: Arc<AtomicU64>,
    clock: RefCell<StallClock>,
    meter: RefCell<Meter>,
}

impl Flow {
    pub(crate) fn new(stall_after: Duration) -> Self {
        Self {
            stall_after,
            reads: Cell::new(0),
            chunks: Cell::new(0),
            messages: Cell::new(0),
            outstanding: Cell::new(0),
            ended: Cell::new(0),
            arrived: Cell::new(0),
            pulled: Arc::default(),
            clock: RefCell::default(),
            meter: RefCell::default(),
        }
    }

    /// How long the connection may owe something without delivering anything.
    pub(crate) fn stall_after(&self) -> Duration {
        self.stall_after
    }

    /// Reads that UCX holds.
    pub(crate) fn reads(&self) -> usize {
        self.reads.get()
    }

    /// Chunks that were asked for.
    pub(crate) fn chunks(&self) -> usize {
        self.chunks.get()
    }

    /// All that the peer or UCX owes.
    pub(crate) fn owed(&self) -> usize {
        self.reads.get() + self.chunks.get() + self.messages.get()
    }

    /// A read was posted and UCX holds it.
    pub(crate) fn read_posted(&self, bytes: u64) {
        self.reads.set(self.reads.get() + 1);
        self.outstanding.set(self.outstanding.get() + bytes);
    }

    /// A read ended. `came` is how much it brought.
    pub(crate) fn read_ended(&self, bytes: u64, came: u64) {
        self.reads.set(self.reads.get() - 1);
        self.outstanding.set(self.outstanding.get() - bytes);
        self.delivered(came);
    }

    /// A chunk was asked for.
    pub(crate) fn chunk_asked(&self, bytes: u64) {
        self.chunks.set(self.chunks.get() + 1);
        self.outstanding.set(self.outstanding.get() + bytes);
    }

    /// A chunk has come, or will not. Its pieces were counted as they came.
    pub(crate) fn chunk_ended(&self, bytes: u64) {
        self.chunks.set(self.chunks.get() - 1);
        self.outstanding.set(self.outstanding.get() - bytes);
    }

    /// A message was sent and UCX holds it.
    pub(crate) fn message_posted(&self) {
        self.messages.set(self.messages.get() + 1);
    }

    /// A message ended.
    pub(crate) fn message_ended(&self) {
        self.messages.set(self.messages.get() - 1);
        self.delivered(0);
    }

    /// Something ended and brought this much.
    pub(crate) fn delivered(&self, bytes: u64) {
        self.ended.set(self.ended.get() + 1);
        self.arrived.set(self.arrived.get() + bytes);
        self.pulled(bytes);
    }

    fn pulled(&self, bytes: u64) {
        if bytes > 0 && self.meter.borrow().probe.is_some() {
            let before = self.pulled.load(Relaxed);
            self.pulled.store(before.saturating_add(bytes), Relaxed);
        }
    }

    /// Where bytes of pulls are counted, for whoever looks from another thread.
    pub(crate) fn pulled_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.pulled)
    }

    /// Something was posted: from now on the rate is measured.
    pub(crate) fn begin(&self, now: Instant) {
        self.meter.borrow_mut().begin(now, self.arrived.get());
    }

    /// Bytes that came while they were posted, which took this long.
    pub(crate) fn came_at_once(&self, bytes: u64, time: Duration) {
        self.meter.borrow_mut().add(bytes, time);
        self.pulled(bytes);
    }

    /// Longest read or chunk that may be posted now; none if enough is outstanding.
    pub(crate) fn read_bytes(&self) -> Option<u64> {
        let rate = self.meter.borrow().rate();
        let outstanding_max = rate.map_or(0, |rate| {
            (rate * OUTSTANDING_TIME.as_secs_f64()).min(u64::MAX as f64) as u64
        });
        let is_idle = self.reads.get() + self.chunks.get() == 0;
        let is_open = is_idle || self.outstanding.get() < outstanding_max;
        is_open.then(|| (outstanding_max / READS_OUTSTANDING_MIN).max(READ_BYTES_MIN))
    }

    /// Once round the thread's loop. Returns whether the connection is broken: it owes something and delivers nothing.
    pub(crate) fn look(&self, now: Instant) -> bool {
        let busy = self.reads.get() + self.chunks.get() > 0;
        let mut meter = self.meter.borrow_mut();
        meter.look(now, self.arrived.get(), busy);
        let mut clock = self.clock.borrow_mut();
        let silent = clock.silent(now, self.owed(), self.ended.get());
        silent.is_some_and(|silent| silent >= self.stall_after)
    }

    /// The probe begins: what was before it (connecting, mapping the peer's memory) tells nothing of the rate.
    pub(crate) fn begin_probe(&self) {
        *self.meter.borrow_mut() = Meter::default();
    }

    /// The probe is over. Its rate in bytes a second: that of its fastest stretch, for a worker that just starts is busy with
    /// much else.
    pub(crate) fn end_probe(&self) -> Option<f64> {
        self.meter.borrow_mut().end_probe()
    }

    /// The rate of real pulls in bytes a second, if it changed since it was last asked for.
    pub(crate) fn news_of_rate(&self) -> Option<f64> {
        self.meter.borrow_mut().news()
    }
}

/// Since when nothing has ended although something is owed.
#[derive(Debug, Default)]
struct StallClock {
    seen: Option<Seen>,
}

#[derive(Debug)]
struct Seen {
    /// When something last ended, or began to be owed.
    since: Instant,
    /// The last look.
    looked: Instant,
    ended: u64,
}

impl StallClock {
    /// How long nothing has ended; `None` where nothing is owed. `ended` only grows.
    fn silent(&mut self, now: Instant, owed: usize, ended: u64) -> Option<Duration> {
        if owed == 0 {
            self.seen = None;
            return None;
        }
        let seen = self.seen.get_or_insert(Seen {
            since: now,
            looked: now,
            ended,
        });
        let absence = now.saturating_duration_since(seen.looked);
        if seen.ended != ended {
            (seen.since, seen.ended) = (now, ended);
        } else if absence >= ABSENCE {
            seen.since += absence;
        }
        seen.looked = now;
        Some(now.saturating_duration_since(seen.since))
    }
}

/// Measures the rate of a connection while something is outstanding on it.
#[derive(Debug, Default)]
struct Meter {
    /// When the stretch that is being measured began, and what had come by then.
    stretch: Option<(Instant, u64)>,
    /// Stretches too short to be a sample.
    bytes: u64,
    time: Duration,
    /// Bytes a second: a moving average of samples.
    average: Option<f64>,
    /// The best sample.
    best: f64,
    /// What the probe reached.
    probe: Option<f64>,
    is_news: bool,
}

impl Meter {
    /// A sample is of this time or of this many bytes at least; shorter ones are latency.
    const SAMPLE_TIME: Duration = Duration::from_millis(1);
    const SAMPLE_BYTES: u64 = 1 << 20;

    /// Weight of a short sample. One of [`Self::LONG_TIME`] or more counts alone: a link that became slow is believed at once.
    const WEIGHT_MIN: f64 = 1.0 / 8.0;
    const LONG_TIME: Duration = Duration::from_millis(250);

    fn rate(&self) -> Option<f64> {
        self.average.or(self.probe)
    }

    fn begin(&mut self, now: Instant, arrived: u64) {
        self.stretch.get_or_insert((now, arrived));
    }

    fn look(&mut self, now: Instant, arrived: u64, busy: bool) {
        let Some((since, before)) = self.stretch else {
            return;
        };
        let time = now.saturating_duration_since(since);
        let is_sample = arrived > before && time >= Self::SAMPLE_TIME;
        if busy && !is_sample {
            return;
        }
        self.stretch = busy.then_some((now, arrived));
        if arrived > before {
            self.add(arrived - before, time);
        }
    }

    fn add(&mut self, bytes: u64, time: Duration) {
        self.bytes += bytes;
        self.time += time;
        // The first of all is taken as it is: until there is one, only short reads are posted.
        let is_sample = self.time >= Self::SAMPLE_TIME
            || self.bytes >= Self::SAMPLE_BYTES
            || self.rate().is_none();
        if !is_sample || self.time.is_zero() {
            return;
        }
        let sample = self.bytes as f64 / self.time.as_secs_f64();
        let weight = self.time.div_duration_f64(Self::LONG_TIME);
        let weight = weight.clamp(Self::WEIGHT_MIN, 1.0);
        (self.bytes, self.time) = (0, Duration::ZERO);
        self.best = self.best.max(sample);
        self.average = Some(
            self.average
                .map_or(sample, |average| average + (sample - average) * weight),
        );
        self.is_news = true;
    }

    fn end_probe(&mut self) -> Option<f64> {
        self.probe = (self.best > 0.0).then_some(self.best);
        self.average = None;
        (self.bytes, self.time) = (0, Duration::ZERO);
        self.is_news = false;
        self.probe
    }

    fn news(&mut self) -> Option<f64> {
        std::mem::take(&mut self.is_news)
            .then_some(self.average)
            .flatten()
            .filter(|_| self.probe.is_some())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn flow() -> Flow {
        let flow = Flow::new(STALL);
        flow.begin_probe();
        flow
    }

    /// Reads end at this rate, one after the other, and the thread looks every 10 ms. Returns the longest silence between two ends.
    fn run_at(flow: &Flow, start: Instant, bytes_per_second: f64, seconds: f64) -> f64 {
        let (mut now, mut longest) = (0.0, 0.0_f64);
        while now < seconds {
            let at = |now: f64| start + Duration::from_secs_f64(now);
            let bytes = flow
                .read_bytes()
                .expect("nothing is outstanding")
                .min(256 * MIB);
            flow.begin(at(now));
            flow.read_posted(bytes);
            let takes = bytes as f64 / bytes_per_second;
            let mut waited = 0.01;
            while waited < takes {
                assert!(!flow.look(at(now + waited)), "{bytes} bytes take {takes} s");
                waited += 0.01;
            }
            now += takes;
            longest = longest.max(takes);
            flow.read_ended(bytes, bytes);
            assert!(!flow.look(at(now)));
        }
        longest
    }

    #[test]
    fn a_read_is_as_long_as_the_link_delivers_in_a_quarter_of_a_second() {
        let start = Instant::now();
        // 1 Mbit/s, 50 Mbit/s, 100 MB/s, 390 GB/s.
        for rate in [125e3, 6.25e6, 100e6, 390e9] {
            let flow = flow();
            assert_eq!(flow.read_bytes(), Some(READ_BYTES_MIN), "not known yet");
            run_at(&flow, start, rate, 3.0);
            flow.end_probe().expect("it was measured");
            run_at(&flow, start, rate, 3.0);
            let bytes = flow.read_bytes().expect("nothing is outstanding") as f64;
            let expected = (rate / 4.0).max(READ_BYTES_MIN as f64);
            assert!((0.8..1.25).contains(&(bytes / expected)), "{rate}: {bytes}");
        }
    }

    #[test]
    fn a_link_that_becomes_a_thousand_times_slower_is_followed() {
        let (start, flow) = (Instant::now(), flow());
        run_at(&flow, start, 10e9, 1.0);
        flow.end_probe();
        let mut at = start + Duration::from_secs(1);
        for rate in [1e9, 100e6, 10e6] {
            let longest = run_at(&flow, at, rate, 30.0);
            assert!(longest < STALL.as_secs_f64(), "{rate}: {longest} s");
            at += Duration::from_secs(60);
        }
        assert!(flow.read_bytes().expect("idle") < 4 * MIB);
    }

    #[test]
    fn no_more_is_outstanding_than_a_second_brings() {
        let (start, flow) = (Instant::now(), flow());
        run_at(&flow, start, 100e6, 1.0);
        flow.end_probe();
        let mut outstanding = 0;
        while let Some(bytes) = flow.read_bytes() {
            flow.read_posted(bytes);
            outstanding += bytes;
        }
        assert!(
            (90e6..130e6).contains(&(outstanding as f64)),
            "{outstanding}"
        );
    }

    #[test]
    fn pulls_are_told_of_and_the_probe_is_not() {
        let (start, flow) = (Instant::now(), flow());
        flow.came_at_once(64 * MIB, Duration::from_millis(4));
        flow.came_at_once(64 * MIB, Duration::from_millis(40));
        let probe = flow.end_probe().expect("it was measured");
        assert!(
            (16e9..17e9).contains(&probe),
            "the fastest stretch: {probe}"
        );
        assert_eq!(flow.news_of_rate(), None);
        let pulled = flow.pulled_bytes();
        assert_eq!(pulled.load(Relaxed), 0);
        flow.came_at_once(3, Duration::from_nanos(1));
        assert_eq!(pulled.load(Relaxed), 3);
        run_at(&flow, start, 5e9, 0.5);
        let brought = pulled.load(Relaxed) as f64;
        assert!((2.4e9..4e9).contains(&brought), "{brought}");
        let rate = flow.news_of_rate().expect("pulls");
        assert!((4.5e9..5.5e9).contains(&rate), "{rate}");
        assert_eq!(flow.news_of_rate(), None, "told once");
    }

    #[test]
    fn a_thread_that_was_stopped_takes_nobody_for_broken() {
        let (start, flow) = (Instant::now(), flow());
        flow.read_posted(MIB);
        assert!(!flow.look(start));
        assert!(!flow.look(start + 10 * STALL), "it was away");
        let mut now = start + 10 * STALL;
        let end = now + STALL;
        while now + Duration::from_millis(100) < end {
            now += Duration::from_millis(100);
            assert!(!flow.look(now), "not yet");
        }
        assert!(flow.look(end));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Post,
        End,
        Wait(u16),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Post),
            Just(Event::End),
            (1u16..900).prop_map(Event::Wait),
            (1u16..900).prop_map(Event::Wait),
        ]
    }

    proptest! {
        /// Broken if, and only if, something has been owed all the time and nothing ended for that long.
        #[test]
        fn only_silence_breaks_a_link(events in prop::collection::vec(event(), 1..200)) {
            let flow = Flow::new(STALL);
            let start = Instant::now();
            let (mut now, mut owed, mut since) = (start, 0_usize, start);
            for event in events {
                match event {
                    Event::Post => {
                        if owed == 0 {
                            since = now;
                        }
                        owed += 1;
                        flow.read_posted(1);
                    }
                    Event::End if owed > 0 => {
                        owed -= 1;
                        since = now;
                        flow.read_ended(1, 1);
                    }
                    Event::End => {}
                    Event::Wait(ms) => now += Duration::from_millis(ms.into()),
                }
                let broken = owed > 0 && now - since >= STALL;
                prop_assert_eq!(flow.look(now), broken);
            }
        }
    }
}
