//! `baton plan`: which mix of workers keeps a service level at which rate, before anybody starts them.
//!
//! The real API server, router and workers run in virtual time (`baton_simulation::planning`); devices take as long as a worker has measured
//! that its steps take. What a plan is of is said on the command line or read from a running cluster.

mod load;
mod measured;
mod mix;
mod outlook;
mod told;

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use baton_api_server::{Promises, ServiceLevel};
use baton_simulation::planning::{Arrival, Deployment, PlannedWorker, predict};
use clap::{ArgGroup, Args};
use serde_json::json;

use crate::Failure;
use crate::api_client::ApiServerArg;
use crate::api_server::PromiseArgs;
use crate::served::grouped;

use self::measured::Measured;
use self::mix::{Kind, Mix};
use self::outlook::{Outlook, render};
use self::told::CostFile;

/// A request is given up, and has failed, after this: a level that matters is far shorter.
const BUDGET: Duration = Duration::from_secs(60);

/// Mean time between tokens that workers keep to where neither --itl-ms nor a cluster says any: a GPU's default.
const ITL_DEFAULT: Duration = Duration::from_millis(25);

/// The load where its flags are not given. Each that is used is a note of the plan.
const PROMPT_TOKENS_DEFAULT: u32 = 1024;
const MAX_TOKENS_DEFAULT: u32 = 128;
const SECONDS_DEFAULT: f64 = 20.0;

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("load").required(true).args(["rate", "trace"]), group = ArgGroup::new("level").required(true).multiple(true).args(["ttft_ms", "itl_ms"]))]
pub struct PlanArgs {
    /// What steps cost: a JSON file, either a worker's cost alone or what `baton status --json` prints [default: the cluster at --url is
    /// asked]. With a name it is of the groups that say it, `--cost fp8=FILE` of `both:fp8*2`; may be repeated
    #[arg(long, value_name = "[NAME=]FILE")]
    cost: Vec<CostFile>,
    #[command(flatten)]
    server: ApiServerArg,
    /// Model directory, for the size of its KV, where a cluster does not tell
    #[arg(long, value_name = "DIR", conflicts_with = "kv_bytes_per_token")]
    model: Option<PathBuf>,
    /// Bytes of KV of a token, over all layers, where neither a cluster nor --model tells
    #[arg(long, value_name = "BYTES")]
    kv_bytes_per_token: Option<u32>,
    /// Workers to share out, where no --mix is given: all splits, and all of them doing both [default: as many as the cluster has]
    #[arg(long, value_name = "N", conflicts_with = "mix", value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: Option<u32>,
    /// Workers by role: `both*4`, `context*3+decode*1`; may be repeated. `both:fp8*2`: with what `--cost fp8=FILE` says that steps cost.
    /// `both@512*4`: with steps of up to 512 tokens and no promise to anybody, the level only measured
    #[arg(long, value_name = "MIX")]
    mix: Vec<Mix>,
    #[command(flatten)]
    promises: PromiseArgs,
    /// Mean time between tokens that is promised, in milliseconds; workers keep their steps to it
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    itl_ms: Option<u32>,
    /// Only measure against these times and promise them to nobody: requests that would come late are not refused
    #[arg(long)]
    unpromised: bool,
    /// Requests a second, at random times (Poisson): one or several, with commas
    #[arg(long, value_name = "RATES", value_delimiter = ',')]
    rate: Vec<f64>,
    /// Tokens of each prompt [default: 1024]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000), conflicts_with = "trace")]
    prompt_tokens: Option<u32>,
    /// Tokens of each answer [default: 128]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000), conflicts_with = "trace")]
    max_tokens: Option<u32>,
    /// How long requests come at each rate, in seconds [default: 20]
    #[arg(long, conflicts_with = "trace")]
    seconds: Option<f64>,
    /// Requests as this file says, in the form of `baton bench --trace`
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Rate of each worker's link in each direction, in Gbit/s [default: the slowest that the cluster measured, else 100]
    #[arg(long, value_name = "GBPS")]
    link_gbps: Option<f64>,
    /// Memory for KV of each worker, in MiB [default: as the cluster's workers have, else what a full batch needs]
    #[arg(long, value_name = "MIB")]
    kv_mib: Option<u64>,
    /// Most tokens of a step [default: as the cluster's workers, else 8192]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    step_tokens: Option<u32>,
    /// Most sequences of a step [default: as the cluster's workers, else 256]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Chooses arrival times
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
}

/// Requests, and how many of them a second; a trace has no rate.
type Load = (Option<f64>, Vec<Arrival>);

/// Plans and prints.
pub fn run(args: PlanArgs) -> Result<(), Failure> {
    let (outlooks, notes) = outlooks(&args)?;
    let text = match args.json {
        true => {
            let mixes = outlook::rates_kept(&outlooks);
            let all = json!({"rows": outlooks, "mixes": mixes, "notes": notes});
            format!("{all:#}\n")
        }
        false => render(&outlooks, &notes),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Plans. With the rows, what was taken for granted.
fn outlooks(args: &PlanArgs) -> Result<(Vec<Outlook>, Vec<String>), Failure> {
    let level = ServiceLevel {
        ttft_ms: args.promises.ttft_ms,
        itl_ms: args.itl_ms,
    };
    let mut notes = Vec::new();
    let loads = loads(args, &mut notes)?;
    let longest = loads.iter().flat_map(|(_, load)| load);
    let longest = longest.map(|arrival| arrival.prompt_tokens + arrival.max_tokens as usize);
    let measured = Measured::of(args, longest.max().unwrap_or(0))?;
    let mixes = match (&args.mix[..], args.workers.or(measured.workers)) {
        ([], Some(workers)) => Mix::all_of(workers),
        ([], None) => return Err("say --mix, or how many --workers there are".into()),
        (mixes, _) => mixes.to_vec(),
    };
    let promises = |mix: &Mix| Promises {
        level: match args.unpromised || mix.is_by_hand() {
            true => ServiceLevel::default(),
            false => level,
        },
        overload: args.promises.overload.into(),
    };
    notes.extend(measured.notes.iter().cloned());
    let itl = level.itl().or(measured.itl).unwrap_or_else(|| {
        notes.push(format!(
            "no --itl-ms: workers keep their steps to {} ms",
            ITL_DEFAULT.as_millis()
        ));
        ITL_DEFAULT
    });
    let deployment = |mix: &Mix| {
        let worker = |kind: &Kind| {
            let sizes = measured.sizes(kind)?;
            Some(PlannedWorker {
                role: kind.role,
                cost: sizes.cost.clone(),
                itl: (!itl.is_zero() && kind.step_tokens.is_none()).then_some(itl),
                step_tokens: kind.step_tokens.unwrap_or(sizes.step_tokens) as usize,
                batch: sizes.batch as usize,
                steps_in_flight: sizes.steps_in_flight,
                blocks: sizes.blocks,
                queue: sizes.queue as usize,
            })
        };
        Deployment {
            workers: mix.workers().filter_map(worker).collect(),
            kv: measured.kv.clone(),
            tokens_max: measured.tokens_max,
            promises: promises(mix),
            link_bytes_per_second: measured.link_gbps * 1e9 / 8.0,
            budget: BUDGET,
        }
    };
    let pairs = mixes
        .iter()
        .flat_map(|mix| loads.iter().map(move |load| (mix, load)));
    let pairs: Vec<_> = pairs.collect();
    let outlooks = in_parallel(&pairs, |(mix, (rate, load))| {
        let prediction = predict(&deployment(mix), load, args.seed)?;
        Ok(Outlook::new(mix, *rate, level, &prediction))
    });
    let outlooks: Vec<Outlook> = outlooks.into_iter().collect::<Result<_, String>>()?;
    Ok((outlooks, notes))
}

fn loads(args: &PlanArgs, notes: &mut Vec<String>) -> Result<Vec<Load>, Failure> {
    if let Some(path) = &args.trace {
        return Ok(vec![(None, load::traced(path)?)]);
    }
    let mut assumed = |flag: &str, what: String| notes.push(format!("no {flag}: {what}"));
    let prompt_tokens = args.prompt_tokens.unwrap_or_else(|| {
        let tokens = grouped(PROMPT_TOKENS_DEFAULT.into());
        assumed("--prompt-tokens", format!("prompts of {tokens} tokens"));
        PROMPT_TOKENS_DEFAULT
    });
    let max_tokens = args.max_tokens.unwrap_or_else(|| {
        let tokens = grouped(MAX_TOKENS_DEFAULT.into());
        assumed("--max-tokens", format!("answers of {tokens} tokens"));
        MAX_TOKENS_DEFAULT
    });
    let seconds = args.seconds.unwrap_or_else(|| {
        let what = format!("requests come for {SECONDS_DEFAULT} s at each rate");
        assumed("--seconds", what);
        SECONDS_DEFAULT
    });
    let load = |rate: &f64| {
        let sizes = (prompt_tokens as usize, max_tokens);
        let load = load::poisson(*rate, seconds, sizes, args.seed)?;
        Ok((Some(*rate), load))
    };
    args.rate.iter().map(load).collect()
}

/// Does this with each, on all CPUs; what came of it in their order.
fn in_parallel<T: Sync, R: Send>(all: &[T], does: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let work = || {
        while let Some((at, one)) = all.iter().enumerate().nth(next.fetch_add(1, Relaxed)) {
            let result = does(one);
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.push((at, result));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads.min(all.len()) {
            scope.spawn(work);
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests;
