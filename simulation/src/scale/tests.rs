//! Bursts after which nothing may swing, and a load that turns into another.

use super::report::follows;
use super::*;

/// Log-normal lengths as those of load D (`docs/goodput.md`).
fn lengths(median: f64, most: u32) -> Lengths {
    Lengths {
        median,
        sigma: 0.8,
        most,
    }
}

/// So many requests a second for each worker, and three times as many in bursts.
fn load(scale: &Scale, rate: f64, seconds: f64, bursts: &[(f64, f64)]) -> Load {
    Load {
        parts: vec![Part {
            from: 0.0,
            rate: rate * scale.workers as f64,
            swings: 0.0,
            prompts: lengths(1_024.0, 8_192),
            outputs: lengths(128.0, 1_024),
        }],
        begins: 0.0,
        seconds,
        bursts: bursts.to_vec(),
        burst: 3.0,
    }
}

/// 1,000 workers, and a burst of 15 seconds.
fn slow(defect: Option<Defect>) -> Report {
    let scale = Scale {
        defect,
        ..Scale::slow(1_000)
    };
    let load = load(&scale, 0.3, 140.0, &[(60.0, 75.0)]);
    scale.run(load, 1).0
}

/// 100 workers so quick that they have answered many times between two beats, and a burst of 10 seconds.
fn quick(defect: Option<Defect>) -> Report {
    let scale = Scale {
        defect,
        ttft_ms: 500,
        ..Scale::fast(100)
    };
    let load = load(&scale, 6.0, 135.0, &[(60.0, 70.0)]);
    scale.run(load, 1).0
}

/// What there may be of it.
struct Limits {
    name: &'static str,
    /// Generations that a worker gets or loses in a second.
    at_once: f64,
    attainment: f64,
}

const SLOW: Limits = Limits {
    name: "1,000 workers",
    at_once: 4.0,
    attainment: 0.95,
};

const QUICK: Limits = Limits {
    name: "100 quick workers",
    at_once: 20.0,
    attainment: 0.95,
};

impl Limits {
    /// Seconds after a burst's end until as many workers run prompts and generate as before it.
    const SETTLED: usize = 10;

    /// By how much their numbers go up and down from then on, as a part.
    const SWING: [f64; 2] = [0.5, 0.25];

    /// What is beyond them.
    fn beyond(&self, report: &Report) -> Vec<String> {
        let calm = report.calm();
        assert_eq!(calm.len(), 1);
        let calm = calm[0];
        println!("{}: {:.4} {calm:?}", self.name, report.attainment());
        let mut beyond = Vec::new();
        let mut look = |is: bool, what: String| {
            if is {
                beyond.push(format!("{}: {what}", self.name));
            }
        };
        let settled = calm.settled;
        look(
            settled.is_none_or(|seconds| seconds > Self::SETTLED),
            format!("settled after {settled:?} s"),
        );
        let swings = calm.swing.iter().zip(Self::SWING);
        look(
            swings.into_iter().any(|(swing, most)| *swing > most),
            format!("swings by {:?}", calm.swing),
        );
        look(
            calm.at_once > self.at_once,
            format!("{:.1} generations at once", calm.at_once),
        );
        look(
            report.attainment() < self.attainment,
            format!("attainment {:.3}", report.attainment()),
        );
        beyond
    }
}

#[test]
fn after_a_burst_the_router_does_not_swing() {
    for (limits, report) in [(SLOW, slow(None)), (QUICK, quick(None))] {
        assert_eq!(limits.beyond(&report), Vec::<String>::new());
    }
}

/// The same figures of a router that runs after what beats told a second ago.
#[test]
fn without_what_keeps_it_from_that_the_router_swings() {
    let alone = (SLOW, slow(Some(Defect::EachAlone)));
    let counts_nothing = (QUICK, quick(Some(Defect::CountsNothing)));
    for (limits, report) in [alone, counts_nothing] {
        let beyond = limits.beyond(&report);
        let is_seen = |word: &str| beyond.iter().any(|what| what.contains(word));
        assert!(is_seen("at once") && is_seen("attainment"), "{beyond:?}");
    }
}

#[test]
fn the_same_seed_gives_the_same_report() {
    let scale = Scale::slow(100);
    let load = load(&scale, 0.3, 30.0, &[(10.0, 15.0)]);
    let (report, _) = scale.run(load.clone(), 7);
    assert_eq!(report, scale.run(load.clone(), 7).0);
    assert_ne!(report, scale.run(load, 8).0);
}

/// 2,048 tokens in and 128 out for a minute (load A), then 512 in and 512 out for a minute and a half (load C), then the first again: of each generation there
/// are four times as many tokens, and of each prompt a quarter.
#[test]
fn the_share_that_generates_follows_the_load_within_seconds() {
    let scale = Scale::fast(40);
    let part = |from, rate, prompt, output| Part {
        from,
        rate: rate * scale.workers as f64,
        swings: 0.0,
        prompts: Lengths::all(prompt),
        outputs: Lengths::all(output),
    };
    let load = Load {
        parts: vec![
            part(0.0, 11.0, 2_048, 128),
            part(60.0, 15.0, 512, 512),
            part(150.0, 11.0, 2_048, 128),
        ],
        begins: 0.0,
        seconds: 240.0,
        bursts: Vec::new(),
        burst: 1.0,
    };
    let (report, _) = scale.run(load, 1);
    assert!(report.attainment() > 0.99, "{}", report.attainment());
    let generate: Vec<u32> = report.seconds.iter().map(|of| of.generating).collect();
    let run_prompts: Vec<u32> = report.seconds.iter().map(|of| of.prompting).collect();
    // Of each part what its last 40 seconds have in the mean, and seconds until it stays within five workers of that.
    let of_part = |counts: &[u32]| {
        let last = &counts[counts.len() - 40..];
        let mean = last.iter().sum::<u32>() as f64 / last.len() as f64;
        (mean, follows(counts, 40, 5.0).unwrap())
    };
    let parts = [0..60, 60..150, 150..240];
    let [a, c, again] = parts.clone().map(|part| of_part(&generate[part]));
    let [prompts_a, prompts_c, prompts_again] = parts.map(|part| of_part(&run_prompts[part]));
    println!("generate: {a:?} {c:?} {again:?}");
    println!("run prompts: {prompts_a:?} {prompts_c:?} {prompts_again:?}");
    // A fifth of the workers generates, then nearly all, then a fifth.
    assert!(a.0 < 12.0 && again.0 < 12.0 && c.0 > 28.0);
    assert!(prompts_a.0 > 14.0 && prompts_again.0 > 14.0 && prompts_c.0 < 10.0);
    for (_, seconds) in [c, again, prompts_c, prompts_again] {
        assert!(seconds <= 6, "{seconds} s");
    }
}
