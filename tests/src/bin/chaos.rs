//! `tests/chaos.sh`: see there.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use baton_tests::Turn;
use baton_tests::chaos::{self, Options, Plan, Reference, Tally};
use clap::{Parser, ValueEnum};
use serde_json::json;

/// Breaks a cluster of real processes under load, seed by seed, and says what came of it.
#[derive(Parser)]
struct Arguments {
    /// Seeds, one after the other; a seed that failed fails again under its number
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    /// Go on with the numbers after the last seed until so many minutes have passed
    #[arg(long)]
    minutes: Option<u64>,
    /// No faults; looks for `--minutes` at what everything holds
    #[arg(long, requires = "minutes")]
    soak: bool,
    /// Requests a second [default: what the device bears on two cores]
    #[arg(long)]
    rate: Option<f64>,
    /// What workers compute on: real weights, or a fake that bears much load
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Run each seed without its faults first, and write here how long first tokens took without and with them
    #[arg(long, conflicts_with = "soak")]
    json: Option<PathBuf>,
    /// Only say what the seeds would do
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    Cpu,
    Fake,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let device = match arguments.device {
        Device::Cpu => "cpu",
        Device::Fake => "fake",
    };
    let mut options = Options::of(device);
    options.rate = arguments.rate.unwrap_or(options.rate);
    if arguments.dry_run {
        for seed in arguments.seeds {
            print!("{}", Plan::of(seed, &options));
        }
        return ExitCode::SUCCESS;
    }

    let begun = Instant::now();
    let time = Duration::from_secs(60 * arguments.minutes.unwrap_or(0));
    let last = arguments.seeds.last().copied().unwrap_or(0);
    let more = (last + 1..).take_while(|_| begun.elapsed() < time);
    let turn = Turn::take();
    let mut reference = Reference::start(&turn, device).await;
    if arguments.soak {
        let tally = chaos::soak(&turn, time, &options, &mut reference).await;
        return end(&tally);
    }
    // Without faults and with them.
    let [mut calm, mut sum] = [Tally::default(), Tally::default()];
    let mut seeds = Vec::new();
    let mut failed = Vec::new();
    for seed in arguments.seeds.into_iter().chain(more) {
        let since = Instant::now();
        let plan = Plan::of(seed, &options);
        print!("{plan}");
        seeds.push(seed);
        let mut clean = true;
        if arguments.json.is_some() {
            let tally = chaos::run(&turn, &plan.calm(), &mut reference).await;
            println!("seed {seed} without faults: {tally} ({})", tally.kinds());
            clean = tally.clean();
            calm.add(&tally);
        }
        let tally = chaos::run(&turn, &plan, &mut reference).await;
        println!(
            "seed {seed}: {tally} ({}) in {:.0?}",
            tally.kinds(),
            since.elapsed()
        );
        if !(clean && tally.clean()) {
            failed.push(seed.to_string());
        }
        sum.add(&tally);
    }
    drop(reference);
    if let Some(path) = &arguments.json {
        let report = json!({
            "device": device, "rate": options.rate, "seconds": options.span.as_secs(), "seeds": seeds,
            "phases": {"calm": calm.firsts.report(), "broken": sum.firsts.report()},
        });
        if let Err(error) = std::fs::write(path, format!("{report:#}\n")) {
            println!("cannot write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        // What is amiss without faults is amiss all the more.
        sum.add(&calm);
    }
    if !failed.is_empty() {
        println!(
            "to see it again: tests/chaos.sh --device {device} --seeds {}",
            failed.join(",")
        );
    }
    println!("{}; {:.0?} in all", sum.kinds(), begun.elapsed());
    end(&sum)
}

/// The last line.
fn end(sum: &Tally) -> ExitCode {
    println!("{sum}");
    match sum.clean() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
