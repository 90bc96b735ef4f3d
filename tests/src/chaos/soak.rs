//! Hours without a fault: what a cluster holds must not grow.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use baton_protocol::Load;
use tokio::task::{AbortHandle, JoinSet};

use super::audit::{Findings, pulse};
use super::client::{Clients, Story};
use super::judgement::Judgement;
use super::load::{self, Arrival};
use super::plan::Options;
use super::reference::Reference;
use super::tally::Tally;
use super::vitals::Vitals;
use crate::cluster::Cluster;
use crate::setup::Setup;
use crate::turn::Turn;

/// How often everything is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Before that, caches fill: the prefix index, the allocator's, connections.
const WARM_UP: Duration = Duration::from_secs(300);

/// What may be called flat, in KiB an hour: a thousandth of what a worker has.
const RESIDENT_KIB_AN_HOUR: f64 = 1024.0;

/// The same for files and threads: one in an hour.
const COUNT_AN_HOUR: f64 = 1.0;

/// Longer messages of the bus are not kept by this process: beats are what it looks at.
const KEPT_BYTES_MAX: usize = 16 << 10;

/// How many standard deviations a slope must be above what may be called flat: what a large request takes at the moment of a look
/// comes and goes, and a short run has few looks.
const CERTAINTY: f64 = 3.0;

/// KV of a worker on the fake device: some 8,000 blocks, all of which have been used when it counts. The prefix index has its memory
/// from the start, and touches a block's share when the block is first full.
const FAKE_KV_MIB: usize = 2;

/// Seconds that a request may take: far more than it needs.
const BUDGET_S: u64 = 120;

/// Runs a load of so many requests a second on two and two workers for `span`, prints what they held, and gives the
/// numbers. Clients leave as they do in every load; nothing else is in the way.
pub async fn soak(
    turn: &Turn,
    span: Duration,
    options: &Options,
    reference: &mut Reference,
) -> Tally {
    let nobody = async |_: &Cluster| tokio::spawn(std::future::pending::<()>()).abort_handle();
    soak_beside(turn, span, options, reference, nobody).await
}

/// The same with somebody else beside the load, whom `begin` starts and who is ended with it.
pub(crate) async fn soak_beside(
    turn: &Turn,
    span: Duration,
    options: &Options,
    reference: &mut Reference,
    begin: impl AsyncFnOnce(&Cluster) -> AbortHandle,
) -> Tally {
    let load = load::Load::of(0, span, options.rate, 1);
    let expected = reference.answers(&load.asks).await;
    let setup = Setup {
        device: options.device,
        api_args: vec!["--request-budget-s".to_owned(), BUDGET_S.to_string()],
        ..Setup::split(2, 2)
    };
    let setup = match options.device {
        "fake" => Setup {
            kv_mib: FAKE_KV_MIB,
            ..setup
        },
        _ => setup,
    };
    let mut cluster = Cluster::start(turn, setup).await;
    cluster.tap.keep_small(KEPT_BYTES_MAX);
    let beside = begin(&cluster).await;
    println!("{} requests in {span:?}", load.arrivals.len());

    let clients = Clients {
        epoch: Instant::now(),
        model: reference.model().to_owned(),
        bases: vec![cluster.api.base().to_owned()],
        budgets: vec![Duration::from_secs(BUDGET_S)],
    };
    let judgement = Judgement {
        seed: 0,
        asks: &load.asks,
        expected: &expected,
        windows: &[],
        roles: &[],
        budgets: &clients.budgets,
        promised: false,
    };
    let mut tally = Tally::default();
    let mut looks = Looks::default();
    let mut under_way: JoinSet<(Arrival, Story)> = JoinSet::new();
    let mut arrivals = load.arrivals.iter().peekable();
    let mut look = tokio::time::interval(LOOK_EVERY);
    while arrivals.peek().is_some() || !under_way.is_empty() {
        let next = arrivals
            .peek()
            .map_or(Duration::MAX / 4, |arrival| arrival.at);
        tokio::select! {
            () = tokio::time::sleep_until((clients.epoch + next).into()), if arrivals.peek().is_some() => {
                if let Some(arrival) = arrivals.next() {
                    let client = clients.client(arrival, &load.asks[arrival.ask]);
                    let arrival = arrival.clone();
                    under_way.spawn(async move { (arrival, client.await) });
                }
            }
            Some(over) = under_way.join_next() => {
                let (arrival, story) = over.expect("a client does not panic");
                judgement.count(&arrival, &story, &mut tally);
            }
            _ = look.tick() => looks.take(clients.epoch.elapsed(), &cluster).await,
        }
    }
    beside.abort();
    println!("{looks}");

    let mut findings = Findings::default();
    findings
        .settled(&mut cluster, Duration::from_secs(30))
        .await;
    findings.leaked.extend(looks.growing());
    findings.ended(&mut cluster).await;
    findings.logs(&cluster);
    findings.report("soak", &mut tally);
    tally
}

/// What each process held, look by look.
#[derive(Default)]
struct Looks(BTreeMap<String, Vec<(Duration, Look)>>);

/// What one process held at one moment.
#[derive(Clone, Copy, Default)]
struct Look {
    vitals: Vitals,
    /// What it beat; nothing for an API server.
    load: Load,
}

/// One column of the table.
struct Column {
    name: &'static str,
    of: fn(&Look) -> u64,
    an_hour: f64,
}

const COLUMNS: [Column; 5] = [
    Column {
        name: "resident KiB",
        of: |look| look.vitals.resident_kib,
        an_hour: RESIDENT_KIB_AN_HOUR,
    },
    Column {
        name: "files",
        of: |look| look.vitals.files,
        an_hour: COUNT_AN_HOUR,
    },
    Column {
        name: "threads",
        of: |look| look.vitals.threads,
        an_hour: COUNT_AN_HOUR,
    },
    Column {
        name: "blocks used",
        of: |look| look.load.blocks_used.into(),
        an_hour: COUNT_AN_HOUR,
    },
    Column {
        name: "blocks quarantined",
        of: |look| look.load.blocks_quarantined.into(),
        an_hour: COUNT_AN_HOUR,
    },
];

impl Looks {
    async fn take(&mut self, at: Duration, cluster: &Cluster) {
        let beats = cluster.beats().await;
        for ((_, name), vitals) in pulse(cluster) {
            let load = beats.get(&name).map(|beat| beat.load).unwrap_or_default();
            self.0
                .entry(name)
                .or_default()
                .push((at, Look { vitals, load }));
        }
    }

    /// Sentences about what is not flat.
    fn growing(&self) -> Vec<String> {
        let mut growing = Vec::new();
        for (name, looks) in &self.0 {
            for column in &COLUMNS {
                let slope = Slope::of(&warm(looks, column.of));
                if slope.least > column.an_hour {
                    growing.push(format!(
                        "{name} grows by {:.1} {} an hour, by {:.1} at least",
                        slope.median, column.name, slope.least
                    ));
                }
            }
        }
        growing
    }
}

impl fmt::Display for Looks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| process | | first | max | last | slope an hour | at least |\n|---|---|---|---|---|---|---|"
        )?;
        for (name, looks) in &self.0 {
            for column in &COLUMNS {
                let series = warm(looks, column.of);
                let most = series.iter().map(|(_, value)| *value).fold(0.0, f64::max);
                let first = series.first().map_or(0.0, |(_, value)| *value);
                let last = series.last().map_or(0.0, |(_, value)| *value);
                let Slope { median, least } = Slope::of(&series);
                let word = if least > column.an_hour {
                    "grows"
                } else {
                    "flat"
                };
                let what = column.name;
                writeln!(
                    f,
                    "| {name} | {what} | {first} | {most} | {last} | {median:+.1} | {least:+.1}, {word} |"
                )?;
            }
        }
        Ok(())
    }
}

/// Hours and values after the warm-up.
fn warm(looks: &[(Duration, Look)], of: fn(&Look) -> u64) -> Vec<(f64, f64)> {
    let warm = looks.iter().filter(|(at, _)| *at >= WARM_UP);
    warm.map(|(at, look)| (at.as_secs_f64() / 3600.0, of(look) as f64))
        .collect()
}

/// How a series grows in an hour.
#[derive(Clone, Copy, Debug, Default)]
struct Slope {
    /// The median of the slopes between all pairs of points (Theil 1950, Sen 1968): a moment's outlier does not move it.
    median: f64,
    /// Its lower confidence limit, [`CERTAINTY`] standard deviations of Kendall's statistic below (Sen 1968).
    least: f64,
}

impl Slope {
    fn of(series: &[(f64, f64)]) -> Self {
        let mut slopes = Vec::new();
        for (number, (at, value)) in series.iter().enumerate() {
            let later = &series[number + 1..];
            slopes.extend(later.iter().map(|(later, is)| (is - value) / (later - at)));
        }
        slopes.sort_by(f64::total_cmp);
        let (points, pairs) = (series.len() as f64, slopes.len());
        let deviation = (points * (points - 1.0) * (2.0 * points + 5.0) / 18.0).sqrt();
        // Negative as long as there are too few points to say anything.
        let rank = (pairs as f64 - CERTAINTY * deviation) / 2.0;
        let least = match rank >= 0.0 {
            true => slopes.get(rank as usize).copied(),
            false => None,
        };
        Self {
            median: slopes.get(pairs / 2).copied().unwrap_or(0.0),
            least: least.unwrap_or(f64::NEG_INFINITY),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::{Look, Looks, Slope, Vitals};

    #[test]
    fn a_slope_is_told_from_noise() {
        let noise = |number: usize| (number * 7919 % 13) as f64;
        let hours = |number: usize| number as f64 / 360.0;
        let flat: Vec<(f64, f64)> = (0..360).map(|n| (hours(n), 1000.0 + noise(n))).collect();
        let slope = Slope::of(&flat);
        assert!(slope.median.abs() < 1.0 && slope.least < 0.0, "{slope:?}");
        let grows: Vec<(f64, f64)> = flat
            .iter()
            .map(|(at, value)| (*at, value + 50.0 * at))
            .collect();
        let slope = Slope::of(&grows);
        assert!((slope.median - 50.0).abs() < 1.0, "{slope:?}");
        assert!(
            slope.least > 40.0 && slope.least <= slope.median,
            "{slope:?}"
        );
    }

    #[test]
    fn a_few_looks_say_nothing() {
        let series = [(0.0, 1.0), (0.1, 9.0), (0.2, 30.0)];
        assert_eq!(Slope::of(&series).least, f64::NEG_INFINITY);
        assert_eq!(Slope::of(&[]).least, f64::NEG_INFINITY);
    }

    #[test]
    fn what_grows_is_named() {
        let look = |number: u64, grows: u64| {
            let vitals = Vitals {
                resident_kib: 10_000 + number * grows,
                files: 9,
                threads: 4,
            };
            let look = Look {
                vitals,
                ..Look::default()
            };
            (Duration::from_secs(10 * number), look)
        };
        let series = |grows| (0..120).map(|number| look(number, grows)).collect();
        let looks = Looks(BTreeMap::from([
            ("a".to_owned(), series(0)),
            ("b".to_owned(), series(8)),
        ]));
        let growing = looks.growing();
        assert!(
            growing.len() == 1 && growing[0].starts_with("b grows by 2880"),
            "{growing:?}"
        );
    }
}
