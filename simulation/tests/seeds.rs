//! Thousands of seeds. One that fails prints how to see its story: `BATON_SEED=… cargo test -p baton-simulation replay`.

use baton_simulation::run;

/// Seeds of each test here. More at will: `cargo run --release -p baton-simulation -- FIRST..LAST`.
const SEEDS: u64 = 750;

fn quarter(which: u64) {
    let mut bad = Vec::new();
    let mut answered = 0;
    for seed in (0..SEEDS).map(|i| 4 * i + which) {
        let report = run(seed, false);
        answered += report.answered;
        if !report.wrong.is_empty() {
            bad.push(format!(
                "seed {seed}: {:#?}\n  replay: BATON_SEED={seed} cargo test -p baton-simulation replay -- --nocapture",
                report.wrong
            ));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    assert!(
        answered > 5 * SEEDS,
        "only {answered} answers: the simulation is too rough to show anything"
    );
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

/// The same seed is the same run: the same events at the same times.
#[test]
fn a_run_is_a_function_of_its_seed() {
    for seed in 0..60 {
        let (one, other) = (run(seed, false), run(seed, true));
        assert_eq!(
            (one.hash, one.events),
            (other.hash, other.events),
            "seed {seed}"
        );
        assert!(!other.lines.is_empty());
    }
}

/// Tells the story of the seed in `BATON_SEED`.
#[test]
fn replay() {
    let Some(seed) = std::env::var("BATON_SEED").ok() else {
        return;
    };
    let report = run(seed.parse().expect("BATON_SEED is a number"), true);
    for line in &report.lines {
        println!("{line}");
    }
    assert!(report.wrong.is_empty(), "{:#?}", report.wrong);
}
