//! `prepare SOURCE OUT [TP_SIZE] [--force] [--dry-run]`: make a model directory.

use std::process::ExitCode;

use baton_model_prep::{Outcome, PrepareOptions, prepare};

fn main() -> ExitCode {
    let (flags, words): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|a| a.starts_with("--"));
    let [source, out, tp_size @ ..] = words.as_slice() else {
        eprintln!("usage: prepare SOURCE OUT [TP_SIZE] [--force] [--dry-run]");
        return ExitCode::from(2);
    };
    let mut options = PrepareOptions::new(source, out);
    if let Some(tp_size) = tp_size.first() {
        match tp_size.parse() {
            Ok(tp_size) => options.tp_size = tp_size,
            Err(_) => {
                eprintln!("the number of ranks must be a whole number, it is {tp_size:?}");
                return ExitCode::from(2);
            }
        }
    }
    options.force = flags.iter().any(|f| f == "--force");
    options.dry_run = flags.iter().any(|f| f == "--dry-run");
    match prepare(options) {
        Ok(report) => {
            println!("{}", report.plan);
            println!(
                "{}",
                match report.outcome {
                    Outcome::Planned => "dry run: nothing was written",
                    Outcome::Written => "done",
                    Outcome::AlreadyThere => "already there",
                }
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
