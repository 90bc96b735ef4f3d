//! What a run showed: requests, what workers did second after second, and what is to be said of a burst.

use std::time::Duration;

use super::load::Load;
use super::worker::Busy;

/// Seconds before a burst that say how it was.
const BEFORE: usize = 60;

/// Seconds after a burst that there must be to say anything of it.
const AFTER: usize = 60;

/// Seconds over which workers are counted in the mean.
const MEAN: usize = 5;

/// After a burst's end it has settled when as many workers run prompts, and generate, as before it, within this part, or within so many workers.
const SETTLED_PART: f64 = 0.2;
const SETTLED_WORKERS: f64 = 8.0;

/// After its end a burst is looked at for so long, in seconds, if no other begins.
const LOOKED_AT: usize = 240;

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Requests that came.
    pub requests: u64,
    /// Those that got both times that they were promised.
    pub met: u64,
    /// Those that were refused at once.
    pub refused: u64,
    /// Those whose first token was late, and those whose mean time between tokens was too long.
    pub late: [u64; 2],
    /// Those whose KV was moved.
    pub moved: u64,
    /// Tokens of the prompts that each worker ran.
    pub prompt_tokens: Vec<u64>,
    /// Tokens of the answers that each worker generated.
    pub output_tokens: Vec<u64>,
    /// Second after second.
    pub seconds: Vec<Second>,
    /// Beginnings and ends of its bursts, in seconds.
    pub bursts: Vec<(f64, f64)>,
    /// How long requests came, in seconds.
    pub came_for: f64,
}

/// What workers did at the end of one second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Second {
    /// Workers that had prompts to run.
    pub prompting: u32,
    /// Workers that generated.
    pub generating: u32,
    /// Workers that began to generate in it, or ceased to.
    pub turned: u32,
    /// By how much the numbers of generations on each worker changed in it, over all workers.
    pub changed: u64,
    /// Products of a worker's change in it with that in the same second, the one before and the one before that, over all workers.
    pub products: [i64; 3],
}

/// What is to be said of a burst.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calm {
    /// Seconds after its end until it is as before it, and stays so; `None` if it never is.
    pub settled: Option<usize>,
    /// By how much the number of workers that run prompts, and of those that generate, went up and down from then on, as a part of its mean: means of
    /// five seconds, the most less the least.
    pub swing: [f64; 2],
    /// Generations that a worker gets or loses in a second, of those that get or lose any, weighed by that number. A router that runs after
    /// beats sends all that come in a second to one worker.
    pub at_once: f64,
    /// Correlation of a worker's change in a second with that of a second before, and two before. A swing from beat to beat has -1 and 1.
    pub correlations: [f64; 2],
}

impl Report {
    pub(super) fn new(workers: usize, load: &Load) -> Self {
        Self {
            bursts: load.bursts.clone(),
            came_for: load.seconds,
            prompt_tokens: vec![0; workers],
            output_tokens: vec![0; workers],
            ..Self::default()
        }
    }

    /// Part of the requests that got both times.
    pub fn attainment(&self) -> f64 {
        self.met as f64 / self.requests.max(1) as f64
    }

    /// What is to be said of each burst that has a minute before it and one after it.
    pub fn calm(&self) -> Vec<Calm> {
        let next = self.bursts.iter().skip(1).map(|(begin, _)| *begin as usize);
        let next = next.chain([usize::MAX]);
        let bursts = self.bursts.iter().zip(next);
        bursts
            .filter_map(|((begin, end), next)| {
                let (begin, end) = (*begin as usize, end.ceil() as usize);
                let until = next.min(end + LOOKED_AT).min(self.came_for as usize);
                let before = self.seconds.get(begin.checked_sub(BEFORE)?..begin)?;
                let after = self.seconds.get(end..until)?;
                (after.len() >= AFTER).then(|| Calm::new(before, after))
            })
            .collect()
    }

    /// Workers that began to generate or ceased to in a minute: the mean, and the most.
    pub fn turned_in_a_minute(&self) -> (f64, u32) {
        let minutes = self.seconds.chunks_exact(60);
        let minutes: Vec<u32> = minutes
            .map(|seconds| seconds.iter().map(|second| second.turned).sum())
            .collect();
        let mean = minutes.iter().sum::<u32>() as f64 / minutes.len().max(1) as f64;
        (mean, minutes.into_iter().max().unwrap_or(0))
    }
}

impl Calm {
    fn new(before: &[Second], after: &[Second]) -> Self {
        const OF: [fn(&Second) -> f64; 2] = [
            |second| f64::from(second.prompting),
            |second| f64::from(second.generating),
        ];
        let series = OF.map(|of| {
            let level = mean(before, of);
            let means: Vec<f64> = after.windows(MEAN).map(|some| mean(some, of)).collect();
            let most = (SETTLED_PART * level).max(SETTLED_WORKERS);
            let away = means.iter().rposition(|mean| (mean - level).abs() > most);
            (away.map_or(0, |last| last + 1), means)
        });
        let settled = series[0].0.max(series[1].0);
        let is_settled = settled < series[0].1.len();
        let from = if is_settled { settled } else { 0 };
        let swing = series.map(|(_, means)| {
            let rest = &means[from..];
            let most = rest.iter().copied().fold(0.0, f64::max);
            let least = rest.iter().copied().fold(f64::INFINITY, f64::min);
            let all: f64 = rest.iter().sum();
            (most - least) / (all / rest.len() as f64).max(1.0)
        });
        let changed: u64 = after.iter().map(|second| second.changed).sum();
        let product = |at: usize| -> i64 { after.iter().map(|s| s.products[at]).sum() };
        let [all, one, two] = [0, 1, 2].map(|at| product(at) as f64);
        Self {
            settled: is_settled.then_some(settled),
            swing,
            at_once: all / changed.max(1) as f64,
            correlations: [one / all.max(1.0), two / all.max(1.0)],
        }
    }
}

/// The first second from which on the mean of five is what it is in the mean of the last `last` ones, within so many workers. `None` if there are not so many seconds.
pub fn follows(counts: &[u32], last: usize, within: f64) -> Option<usize> {
    let mean = |some: &[u32]| {
        some.iter().map(|count| f64::from(*count)).sum::<f64>() / some.len().max(1) as f64
    };
    let level = mean(counts.get(counts.len().checked_sub(last)?..)?);
    let is_away = |some: &[u32]| (mean(some) - level).abs() > within;
    let away = counts.windows(MEAN).rposition(is_away);
    Some(away.map_or(0, |last| last + 1))
}

fn mean(seconds: &[Second], of: impl Fn(&Second) -> f64) -> f64 {
    seconds.iter().map(of).sum::<f64>() / seconds.len().max(1) as f64
}

/// Looks at all workers, second after second.
pub struct Watch {
    /// Generations on each a second ago.
    counts: Vec<u32>,
    /// Of each, the last two changes.
    changes: Vec<[i64; 2]>,
}

impl Watch {
    pub fn new(workers: usize) -> Self {
        Self {
            counts: vec![0; workers],
            changes: vec![[0; 2]; workers],
        }
    }

    /// A second later.
    pub fn look(&mut self, workers: impl Iterator<Item = Busy>) -> Second {
        let mut second = Second::default();
        let known = self.counts.iter_mut().zip(&mut self.changes);
        for (busy, (before, changes)) in workers.zip(known) {
            let count = busy.generations;
            let change = i64::from(count) - i64::from(*before);
            second.prompting += u32::from(busy.prompts > 0);
            second.generating += u32::from(count > 0);
            second.turned += u32::from((count > 0) != (*before > 0));
            second.changed += change.unsigned_abs();
            for (sum, other) in second
                .products
                .iter_mut()
                .zip([change, changes[0], changes[1]])
            {
                *sum += change * other;
            }
            *changes = [change, changes[0]];
            *before = count;
        }
        second
    }
}

/// How long choices took on this machine.
#[derive(Clone, Debug, Default)]
pub struct Choices {
    /// Of how long a request would wait for a place on a decode worker.
    pub wait: Took,
    /// Of a context worker.
    pub context: Took,
    /// Of a decode worker.
    pub decode: Took,
    /// All that a request that is served asks the router: those three, and when its first token would come.
    pub request: Took,
}

/// Times of one kind, in buckets of a tenth of a microsecond.
#[derive(Clone, Debug)]
pub struct Took(Vec<u64>);

impl Took {
    /// What takes longer is in the last one.
    const BUCKETS: usize = 20_000;

    pub(super) fn note(&mut self, took: Duration) {
        let bucket = (took.as_nanos() / 100) as usize;
        self.0[bucket.min(Self::BUCKETS - 1)] += 1;
    }

    /// Microseconds within which so many of a thousand were made.
    pub fn within(&self, per_mille: u64) -> f64 {
        let all: u64 = self.0.iter().sum();
        let mut left = all * per_mille / 1_000;
        for (bucket, count) in self.0.iter().enumerate() {
            if left <= *count {
                return (bucket + 1) as f64 / 10.0;
            }
            left -= count;
        }
        Self::BUCKETS as f64 / 10.0
    }
}

impl Default for Took {
    fn default() -> Self {
        Self(vec![0; Self::BUCKETS])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_times_that_many_were_made_within() {
        let mut took = Took::default();
        for us in 0..100 {
            took.note(Duration::from_micros(us));
        }
        assert!(
            (took.within(500) - 49.1).abs() < 1e-9,
            "{}",
            took.within(500)
        );
        assert!(
            (took.within(990) - 98.1).abs() < 1e-9,
            "{}",
            took.within(990)
        );
        took.note(Duration::from_secs(1));
        assert_eq!(took.within(1_000), 2_000.0);
    }

    #[test]
    fn who_goes_to_and_fro_is_seen() {
        let mut watch = Watch::new(2);
        let mut look = |counts: [u32; 2]| {
            let busy = |generations| Busy {
                prompts: 1,
                generations,
            };
            watch.look(counts.into_iter().map(busy))
        };
        let swings: Vec<Second> = (0..200)
            .map(|at| look(if at % 2 == 0 { [20, 0] } else { [0, 20] }))
            .collect();
        let calm = Calm::new(&swings[..60], &swings[60..]);
        assert_eq!((calm.settled, calm.swing), (Some(0), [0.0, 0.0]));
        assert_eq!(calm.at_once, 20.0);
        assert_eq!(calm.correlations, [-1.0, 1.0]);
        let rests: Vec<Second> = (0..200).map(|_| look([10, 10])).collect();
        let calm = Calm::new(&rests[..60], &rests[60..]);
        assert_eq!((calm.at_once, calm.settled), (0.0, Some(0)));
    }

    #[test]
    fn a_burst_has_settled_when_it_is_as_before_and_stays_so() {
        let second = |generating| Second {
            generating,
            prompting: 10,
            ..Second::default()
        };
        let before = [second(100); 60];
        let mut after = vec![second(300); 20];
        after.extend([second(100); 80]);
        let calm = Calm::new(&before, &after);
        assert_eq!(calm.settled, Some(20));
        assert_eq!(calm.swing, [0.0, 0.0]);
        after.extend([second(140); 5]);
        assert_eq!(Calm::new(&before, &after).settled, None);
    }

    #[test]
    fn a_count_follows_when_it_stays_where_it_ends() {
        let mut counts = vec![10; 7];
        counts.extend([30; 40]);
        assert_eq!(follows(&counts, 20, 3.0), Some(7));
        assert_eq!(follows(&counts, 50, 3.0), None);
    }
}
