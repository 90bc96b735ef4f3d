//! Thousands of seeds. One that fails prints how to see its story: `BATON_SEED=… cargo test -p baton-simulation replay`, or
//! `BATON_LOAD_SEED=…`.

use std::process::Command;

use baton_simulation::{Counts, Report, Scenario, run};

/// Seeds of each test here in which things break. More at will: `cargo run --release -p baton-simulation -- FIRST..LAST`.
const SEEDS: u64 = 750;

/// Seeds of each test here in which time is short: `cargo run --release -p baton-simulation -- --load FIRST..LAST`.
const LOAD_SEEDS: u64 = 150;

fn quarter(which: u64) {
    let (owed, pulled) = check(Scenario::Faults, "BATON_SEED", SEEDS, which);
    assert_eq!(owed, 0, "where things break an error may be right");
    // Seeds whose prompts begin alike are all in the last quarter.
    let least = if which == 3 { 5 * SEEDS } else { 0 };
    assert!(
        pulled >= least,
        "only {pulled} tokens of beginnings were pulled: that shows nothing"
    );
}

fn load_quarter(which: u64) {
    let (owed, _) = check(Scenario::Load, "BATON_LOAD_SEED", LOAD_SEEDS, which);
    assert!(
        owed > LOAD_SEEDS,
        "only {owed} answers were owed: that shows nothing"
    );
}

/// How many answers were owed, and how many tokens of prompts' beginnings were pulled.
fn check(scenario: Scenario, variable: &str, seeds: u64, quarter: u64) -> (u64, u64) {
    let mut bad = Vec::new();
    let (mut answered, mut owed, mut pulled) = (0, 0, 0);
    let mut counts = Counts::default();
    for seed in (0..seeds).map(|i| 4 * i + quarter) {
        let report = run(scenario, seed, false);
        answered += report.answered;
        owed += report.owed;
        counts += report.counts;
        pulled += report.pulled;
        if !report.wrong.is_empty() {
            bad.push(format!(
                "seed {seed}: {:#?}\n  replay: {variable}={seed} cargo test -p baton-simulation replay -- --nocapture",
                report.wrong
            ));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    assert!(
        answered > 5 * seeds,
        "only {answered} answers: the simulation is too rough to show anything"
    );
    let Counts {
        streams,
        migrations,
        deflections,
        refusals,
        batched,
    } = counts;
    let done = [streams, migrations, deflections, refusals, batched];
    assert!(
        done.iter().all(|count| *count > 0),
        "some of it was never done: {counts:?}"
    );
    (owed, pulled)
}

#[test]
fn first_quarter() {
    quarter(0);
}

#[test]
fn second_quarter() {
    quarter(1);
}

#[test]
fn third_quarter() {
    quarter(2);
}

#[test]
fn fourth_quarter() {
    quarter(3);
}

#[test]
fn first_quarter_under_load() {
    load_quarter(0);
}

#[test]
fn second_quarter_under_load() {
    load_quarter(1);
}

#[test]
fn third_quarter_under_load() {
    load_quarter(2);
}

#[test]
fn fourth_quarter_under_load() {
    load_quarter(3);
}

/// Seeds beyond these that were red once. 1489: three beats in a row each met a sequence that had just ended, whose blocks were
/// taken for lost. 2758: a pull ended in the moment in which another's request was aborted.
#[test]
fn seeds_that_were_red_are_green() {
    for seed in [1489, 2758] {
        let report = run(Scenario::Load, seed, false);
        assert!(report.wrong.is_empty(), "seed {seed}: {:#?}", report.wrong);
    }
}

/// The same seed is the same run: the same events at the same times.
#[test]
fn a_run_is_a_function_of_its_seed() {
    let faults = (0..60).map(|seed| (Scenario::Faults, seed));
    for (scenario, seed) in faults.chain((0..20).map(|seed| (Scenario::Load, seed))) {
        let (one, other) = (run(scenario, seed, false), run(scenario, seed, true));
        assert_eq!(
            (one.hash, one.events),
            (other.hash, other.events),
            "{scenario:?}, seed {seed}"
        );
        assert!(!other.lines.is_empty());
    }
}

/// It tells the same story each time, in this process and in another. In the runs of the second scenario, pulls end in the
/// same moment because their connection does.
#[test]
fn a_seed_tells_the_same_story_in_every_process() {
    let load = [126, 267].map(|seed| (Scenario::Load, seed));
    let faults = [5, 9, 17].map(|seed| (Scenario::Faults, seed));
    for (scenario, seed) in load.into_iter().chain(faults) {
        let first = run(scenario, seed, true).lines.join("\n");
        let again = run(scenario, seed, true).lines.join("\n");
        let elsewhere = told_by_another_process(scenario, seed);
        for (other, place) in [(&again, "this process"), (&elsewhere, "another process")] {
            if let Some([one, two]) = first_difference(&first, other) {
                panic!("{scenario:?}, seed {seed}, again in {place}:\n  {one}\n  {two}");
            }
        }
    }
}

fn told_by_another_process(scenario: Scenario, seed: u64) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton-simulate"));
    if scenario == Scenario::Load {
        command.arg("--load");
    }
    let output = command.arg(seed.to_string()).output();
    let output = output.expect("the simulator starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let told = String::from_utf8(output.stdout).expect("it writes text");
    // Its last line is a summary.
    let (story, _) = told.rsplit_once("\nseed ").expect("a story and a summary");
    story.to_owned()
}

/// The first lines that differ by more than a nonce, which the operating system draws.
fn first_difference(one: &str, other: &str) -> Option<[String; 2]> {
    let mut lines = [one, other].map(|story| story.lines().map(without_nonces));
    loop {
        let [one, other] = lines.each_mut().map(Iterator::next);
        if one != other {
            return Some([one, other].map(|line| line.unwrap_or_else(|| "the end".to_owned())));
        }
        one?;
    }
}

fn without_nonces(line: &str) -> String {
    const KEY: &str = "\"nonce\":\"";
    let mut parts = line.split(KEY);
    let mut left = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        left.push_str(KEY);
        left.push_str(part.trim_start_matches(|c: char| c.is_ascii_hexdigit()));
    }
    left
}

/// Tells the story of the seed in `BATON_SEED` or `BATON_LOAD_SEED`.
#[test]
fn replay() {
    let seed = |variable: &str| {
        let seed = std::env::var(variable).ok()?;
        Some(seed.parse().expect("a seed is a number"))
    };
    let faults = seed("BATON_SEED").map(|seed| run(Scenario::Faults, seed, true));
    let load = seed("BATON_LOAD_SEED").map(|seed| run(Scenario::Load, seed, true));
    for Report { lines, wrong, .. } in faults.into_iter().chain(load) {
        for line in &lines {
            println!("{line}");
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}
