//! Runs seeds: `baton-simulate FIRST..LAST`, which `--first-bad` ends at the first bad one, or `baton-simulate SEED` with
//! the whole story. With `--load` of the scenario in which nothing breaks and time is short.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use baton_simulation::{Counts, Report, Scenario, run};

fn main() -> ExitCode {
    let mut seeds: Vec<String> = std::env::args().skip(1).collect();
    let mut is_given = |flag: &str| {
        let given = seeds.len();
        seeds.retain(|argument| argument != flag);
        seeds.len() < given
    };
    let stops = is_given("--first-bad");
    let scenario = match is_given("--load") {
        true => Scenario::Load,
        false => Scenario::Faults,
    };
    let [seeds] = &seeds[..] else {
        eprintln!("usage: baton-simulate [--load] [--first-bad] FIRST..LAST | SEED");
        return ExitCode::from(2);
    };
    let range = match seeds.split_once("..") {
        Some((first, last)) => first.parse().ok().zip(last.parse().ok()),
        None => {
            return match seeds.parse() {
                Ok(seed) => one(scenario, seed),
                Err(_) => ExitCode::from(2),
            };
        }
    };
    let Some((first, last)) = range else {
        eprintln!("{seeds} is no range of seeds");
        return ExitCode::from(2);
    };
    many(scenario, first, last, stops)
}

fn one(scenario: Scenario, seed: u64) -> ExitCode {
    let report = run(scenario, seed, true);
    for line in &report.lines {
        println!("{line}");
    }
    println!("{}", summary(&report));
    verdict(report.wrong.is_empty())
}

fn many(scenario: Scenario, first: u64, last: u64, stops: bool) -> ExitCode {
    let begun = Instant::now();
    let (mut answered, mut owed, mut pulled, mut events, mut bad) = (0, 0, 0, 0, 0);
    let mut counts = Counts::default();
    let mut errors: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in first..last {
        let report = run(scenario, seed, false);
        answered += report.answered;
        owed += report.owed;
        pulled += report.pulled;
        events += report.events;
        counts += report.counts;
        for (label, count) in &report.errors {
            *errors.entry(label).or_default() += count;
        }
        if !report.wrong.is_empty() {
            bad += 1;
            println!("{}", summary(&report));
            if stops {
                break;
            }
        }
    }
    let (seeds, seconds) = (last - first, begun.elapsed().as_secs_f64());
    println!(
        "seeds={seeds} answered={answered} owed={owed} pulled={pulled} errors={errors:?} counts={counts:?} events={events} bad={bad} seconds={seconds:.1}"
    );
    verdict(bad == 0)
}

fn summary(report: &Report) -> String {
    let Report {
        seed,
        hash,
        answered,
        errors,
        wrong,
        ..
    } = report;
    let lasted = report.lasted.as_secs_f64();
    format!(
        "seed {seed}: hash {hash:016x}, {lasted:.1} s, answered {answered}, errors {errors:?}, wrong {wrong:#?}"
    )
}

fn verdict(is_well: bool) -> ExitCode {
    match is_well {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
