//! `tests/hostile.sh`: see there.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use baton_tests::Turn;
use baton_tests::chaos::{Options, Reference};
use baton_tests::hostile::{self, ATTACKS, Attack};
use clap::Parser;

/// Attacks a cluster of real processes while good clients ask, and says what came of it.
#[derive(Parser)]
struct Arguments {
    /// Only these attacks, by their names
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only say what the attacks are
    #[arg(long)]
    list: bool,
    /// Hostile clients among good ones for `--minutes`; looks at what everything holds
    #[arg(long, requires = "minutes")]
    soak: bool,
    /// How long the soak goes on
    #[arg(long)]
    minutes: Option<u64>,
    /// Requests of good clients a second, of the soak
    #[arg(long)]
    rate: Option<f64>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for attack in ATTACKS {
            println!("{:<15} {}", attack.name, attack.what);
        }
        return ExitCode::SUCCESS;
    }
    let turn = Turn::take();
    if arguments.soak {
        let time = Duration::from_secs(60 * arguments.minutes.unwrap_or(0));
        let mut options = Options::of("fake");
        options.rate = arguments.rate.unwrap_or(options.rate / 8.0);
        let mut reference = Reference::start(&turn, "fake").await;
        let tally = hostile::soak(&turn, time, &options, &mut reference).await;
        println!("{tally}");
        return exit(tally.clean());
    }
    let unknown = arguments
        .only
        .iter()
        .find(|name| ATTACKS.iter().all(|attack| attack.name != **name));
    if let Some(name) = unknown {
        eprintln!("there is no attack '{name}': --list names them");
        return ExitCode::from(2);
    }
    let named = |attack: &&Attack| arguments.only.iter().any(|name| name == attack.name);
    let wanted = |attack: &&Attack| arguments.only.is_empty() || named(attack);
    let attacks: Vec<Attack> = ATTACKS.iter().filter(wanted).copied().collect();
    let begun = Instant::now();
    let summary = hostile::run(&turn, &attacks).await;
    println!("{:.0?} in all", begun.elapsed());
    if !summary.broken.is_empty() {
        println!(
            "to see it again: tests/hostile.sh --only {}",
            summary.broken.join(",")
        );
    }
    println!("{summary}");
    exit(summary.clean())
}

fn exit(clean: bool) -> ExitCode {
    match clean {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
