//! The faults of a seed: what happens to whom, and when.

use std::fmt;
use std::time::Duration;

use super::draw::Draw;
use super::shape::Shape;

/// One thing that goes wrong. Workers are named by their place in [`Shape::roles`]: a worker that takes a lost one's
/// place has its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// kill -9; the same worker is started again after a while.
    Kill {
        /// Which worker.
        worker: usize,
        /// Until it is started again.
        down: Duration,
    },
    /// SIGSTOP, then SIGCONT.
    Freeze {
        /// Which worker.
        worker: usize,
        /// How long.
        time: Duration,
    },
    /// The way between a context and a decode worker is cut; both reach everybody else. Only in a [`Shape::network`].
    Cut {
        /// The context worker.
        context: usize,
        /// The decode worker.
        decode: usize,
        /// How long.
        time: Duration,
    },
    /// A worker reaches nobody, the bus neither. Only in a [`Shape::network`].
    Unplug {
        /// Which worker.
        worker: usize,
        /// How long.
        time: Duration,
    },
    /// SIGTERM, and another worker at the same moment.
    Replace {
        /// Which worker.
        worker: usize,
    },
    /// kill -9 of nats-server; it is started again on its port.
    BusLost {
        /// Until it is started again.
        down: Duration,
    },
    /// kill -9 of an API server; it is started again on its port.
    ApiKill {
        /// Which API server.
        server: usize,
        /// Until it is started again.
        down: Duration,
    },
    /// SIGSTOP of an API server, then SIGCONT.
    ApiFreeze {
        /// Which API server.
        server: usize,
        /// How long.
        time: Duration,
    },
}

/// What a fault lies on. Two never lie on one thing at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A worker.
    Worker(usize),
    /// The way between a context and a decode worker.
    Way(usize, usize),
    /// nats-server.
    Bus,
    /// An API server.
    Api(usize),
}

impl Target {
    /// Whether a fault on this one must wait for the end of one on the other. A host that leaves takes its ways along.
    fn meets(self, other: Self) -> bool {
        match (self, other) {
            (Self::Way(context, decode), Self::Worker(worker))
            | (Self::Worker(worker), Self::Way(context, decode)) => {
                worker == context || worker == decode
            }
            _ => self == other,
        }
    }
}

impl Fault {
    /// What it lies on.
    pub fn target(self) -> Target {
        match self {
            Self::Kill { worker, .. }
            | Self::Freeze { worker, .. }
            | Self::Unplug { worker, .. }
            | Self::Replace { worker } => Target::Worker(worker),
            Self::Cut {
                context, decode, ..
            } => Target::Way(context, decode),
            Self::BusLost { .. } => Target::Bus,
            Self::ApiKill { server, .. } | Self::ApiFreeze { server, .. } => Target::Api(server),
        }
    }

    /// How long until it is undone.
    pub fn lasts(self) -> Duration {
        match self {
            Self::Kill { down, .. } | Self::BusLost { down } | Self::ApiKill { down, .. } => down,
            Self::Freeze { time, .. }
            | Self::ApiFreeze { time, .. }
            | Self::Cut { time, .. }
            | Self::Unplug { time, .. } => time,
            Self::Replace { .. } => Duration::ZERO,
        }
    }
}

/// A fault in its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// When, from the beginning of the load.
    pub at: Duration,
    /// What.
    pub fault: Fault,
}

/// All faults of one seed, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule(pub Vec<Step>);

/// What comes back needs a moment before it can be hit again: a worker that is never up is no test of anything.
const PAUSE: Duration = Duration::from_secs(4);

/// The longest time that a process is frozen or the bus gone: more than it takes to be given up.
const LONGEST: Duration = Duration::from_secs(12);

impl Schedule {
    /// The faults of this seed, one in some `mean`, all undone before `span` is over.
    pub fn of(seed: u64, shape: &Shape, span: Duration, mean: Duration) -> Self {
        let mut draw = Draw::new(seed, "schedule");
        // Every third seed leaves bus and API servers alone: there no request may fail that has a worker left.
        let workers_only = seed % 3 == 2;
        let mut steps: Vec<Step> = Vec::new();
        let mut at = Duration::from_secs(1);
        loop {
            at += draw.time(mean / 4, mean.mul_f64(1.75));
            if at + Duration::from_secs(1) >= span {
                return Self(steps);
            }
            let fault = fault(&mut draw, shape, workers_only, span - at);
            let free = steps.iter().all(|step| {
                !step.fault.target().meets(fault.target())
                    || step.at + step.fault.lasts() + PAUSE <= at
            });
            if free {
                steps.push(Step { at, fault });
            }
        }
    }
}

fn fault(draw: &mut Draw, shape: &Shape, workers_only: bool, left: Duration) -> Fault {
    let worker = draw.index(shape.roles().len());
    let server = draw.index(shape.api_servers);
    // mostly short: what is seen only when it is over; now and then long enough to be given up
    let short = draw.time(Duration::from_millis(200), Duration::from_millis(2400));
    let long = draw.time(Duration::from_millis(2400), LONGEST);
    let time = draw.weighed(&[(3, short), (2, long)]).min(left);
    let down = draw.time(Duration::ZERO, Duration::from_secs(6)).min(left);
    let gone = draw.time(Duration::ZERO, Duration::from_secs(10)).min(left);
    let mut kinds = vec![
        (4, Fault::Kill { worker, down }),
        (4, Fault::Freeze { worker, time }),
        (2, Fault::Replace { worker }),
    ];
    if shape.network {
        let (context, decode) = pair(draw, shape);
        kinds.extend([
            (
                4,
                Fault::Cut {
                    context,
                    decode,
                    time,
                },
            ),
            (2, Fault::Unplug { worker, time }),
        ]);
    }
    if !workers_only {
        kinds.extend([
            (
                1,
                Fault::BusLost {
                    down: Duration::ZERO,
                },
            ),
            (1, Fault::BusLost { down: gone }),
            (
                1,
                Fault::ApiKill {
                    server,
                    down: down / 3,
                },
            ),
            (1, Fault::ApiFreeze { server, time }),
        ]);
    }
    draw.weighed(&kinds)
}

/// Two workers between which KV moves.
fn pair(draw: &mut Draw, shape: &Shape) -> (usize, usize) {
    if shape.context == 0 || shape.decode == 0 {
        let (one, all) = (draw.index(shape.both), shape.both);
        return (one, (one + 1 + draw.index(all - 1)) % all);
    }
    let context = draw.index(shape.context);
    (context, shape.context + draw.index(shape.decode))
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { worker, down } => write!(f, "worker {worker} killed, down for {down:.1?}"),
            Self::Freeze { worker, time } => write!(f, "worker {worker} frozen for {time:.1?}"),
            Self::Cut {
                context,
                decode,
                time,
            } => write!(
                f,
                "nothing passes between workers {context} and {decode} for {time:.1?}"
            ),
            Self::Unplug { worker, time } => {
                write!(f, "worker {worker} unplugged for {time:.1?}")
            }
            Self::Replace { worker } => write!(f, "worker {worker} drained and replaced"),
            Self::BusLost { down } => write!(f, "nats-server killed, down for {down:.1?}"),
            Self::ApiKill { server, down } => {
                write!(f, "API server {server} killed, down for {down:.1?}")
            }
            Self::ApiFreeze { server, time } => {
                write!(f, "API server {server} frozen for {time:.1?}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{PAUSE, Schedule};
    use crate::chaos::shape::Shape;

    #[test]
    fn a_seed_has_one_schedule_and_faults_do_not_meet_on_one_target() {
        let (span, mean) = (Duration::from_secs(40), Duration::from_secs(3));
        let mut kinds = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let shape = Shape::of(seed, "cpu");
            let schedule = Schedule::of(seed, &shape, span, mean);
            assert_eq!(schedule, Schedule::of(seed, &shape, span, mean));
            let steps = &schedule.0;
            assert!(!steps.is_empty(), "seed {seed} has no fault");
            for (number, step) in steps.iter().enumerate() {
                let word = format!("{:?}", step.fault);
                kinds.insert(word.split(' ').next().expect("a word").to_owned());
                let end = step.at + step.fault.lasts();
                assert!(end <= span, "seed {seed}: {step:?}");
                for later in &steps[number + 1..] {
                    assert!(
                        !later.fault.target().meets(step.fault.target()) || later.at >= end + PAUSE,
                        "seed {seed}: {step:?} and {later:?}"
                    );
                }
            }
        }
        assert_eq!(kinds.len(), 8, "{kinds:?}");
    }
}
