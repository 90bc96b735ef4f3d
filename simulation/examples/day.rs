//! A day on a thousand workers: `cargo run --release -p baton-simulation --example day -- [HOURS [WORKERS [SEED]]]`.
//!
//! 200 requests a second in the mean for each thousand workers, 320 at noon and 80 at midnight, with a burst of three times that for 30 s in each half hour.

use baton_simulation::scale::{Calm, Lengths, Load, Part, Report, Scale};

/// The goal of a choice, in microseconds at p99.
const GOAL_US: f64 = 20.0;

fn main() {
    let numbers: Result<Vec<u64>, _> = std::env::args().skip(1).map(|arg| arg.parse()).collect();
    let Ok(numbers) = numbers else {
        eprintln!("HOURS, WORKERS and SEED are numbers");
        std::process::exit(2);
    };
    let of = |at: usize, default| numbers.get(at).copied().unwrap_or(default);
    let (hours, workers, seed) = (of(0, 24).clamp(1, 24), of(1, 1_000).max(1), of(2, 1));
    let begun = std::time::Instant::now();
    let load = load(hours, workers, seed);
    let (report, choices) = Scale::slow(workers as usize).run(load, seed);
    println!(
        "{workers} workers, {hours} hours, {} requests, in {:.0} s",
        report.requests,
        begun.elapsed().as_secs_f64()
    );
    tell_requests(&report);
    tell_bursts(&report);
    for (what, took) in [
        ("the wait for a place is told", &choices.wait),
        ("a context worker is chosen", &choices.context),
        ("a decode worker is chosen", &choices.decode),
        ("all that a request asks", &choices.request),
    ] {
        let [p50, p99] = [500, 990].map(|part| took.within(part));
        let goal = match p99 <= GOAL_US {
            true => "within",
            false => "NOT within",
        };
        println!("{what} in {p50:.1} us at p50, {p99:.1} at p99, {goal} {GOAL_US} us");
    }
}

/// Its busiest hours, if they are not all.
fn load(hours: u64, workers: u64, seed: u64) -> Load {
    let lengths = |median, most| Lengths {
        median,
        sigma: 0.8,
        most,
    };
    let mut load = Load {
        parts: vec![Part {
            from: 0.0,
            rate: 0.2 * workers as f64,
            swings: 0.6,
            prompts: lengths(1_024.0, 8_192),
            outputs: lengths(128.0, 1_024),
        }],
        begins: (24 - hours) as f64 / 2.0 * 3_600.0,
        seconds: hours as f64 * 3_600.0,
        bursts: Vec::new(),
        burst: 3.0,
    };
    load.draw_bursts(1_800.0, 30.0, seed);
    load
}

fn tell_requests(report: &Report) {
    let share = |part: u64| 100.0 * part as f64 / report.requests.max(1) as f64;
    println!(
        "within both times {:.2}%, refused {:.2}%, first token late {:.2}%, between tokens late {:.2}%; KV moved of {:.0}%",
        100.0 * report.attainment(),
        share(report.refused),
        share(report.late[0]),
        share(report.late[1]),
        share(report.moved)
    );
    let at_half_past = report.seconds.iter().skip(1_799).step_by(3_600);
    let counts: Vec<String> = at_half_past
        .map(|second| format!("{}/{}", second.prompting, second.generating))
        .collect();
    println!(
        "workers that run prompts / that generate, at half past each hour: {}",
        counts.join(" ")
    );
    let (mean, most) = report.turned_in_a_minute();
    println!("workers that began to generate or ceased to in a minute: {mean:.0}, at most {most}");
}

fn tell_bursts(report: &Report) {
    let calm = report.calm();
    let of = |what: fn(&Calm) -> f64| {
        let mut all: Vec<f64> = calm.iter().map(what).collect();
        all.sort_by(f64::total_cmp);
        let at = |part: usize| all.get((all.len() * part / 100).min(all.len().saturating_sub(1)));
        let [median, nine, most] = [50, 90, 100].map(|part| at(part).copied().unwrap_or_default());
        format!("{median:.2} (nine in ten {nine:.2}, most {most:.2})")
    };
    let settled = calm.iter().filter(|calm| calm.settled.is_some()).count();
    println!(
        "{settled} of {} bursts settled; seconds until then: {}",
        calm.len(),
        of(|calm| calm.settled.map_or(f64::INFINITY, |seconds| seconds as f64))
    );
    println!(
        "from then on the number of workers that run prompts goes up and down by {} of itself, of those that generate by {}",
        of(|calm| calm.swing[0]),
        of(|calm| calm.swing[1])
    );
    println!(
        "generations that a worker gets or loses at once: {}; changes correlate with those a second before by {}, two before by {}",
        of(|calm| calm.at_once),
        of(|calm| calm.correlations[0].abs()),
        of(|calm| calm.correlations[1].abs())
    );
}
