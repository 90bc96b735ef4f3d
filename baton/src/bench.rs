//! `baton bench`: load on a running cluster, and what came of it.
//!
//! The client is made to cost little, since it shares the machine with what it measures: one thread, connections kept,
//! events told apart by their bytes. Tokens are what the server's usage says, never a guess from chunks.

mod client;
mod cpu;
mod http;
pub mod prompt;
mod report;
pub mod trace;

use std::cell::RefCell;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use clap::{ArgGroup, Args};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep_until, timeout};

use self::client::{Connection, Target};
use self::cpu::CpuMeter;
use self::prompt::{Prompts, Random};
use self::report::Report;
use self::trace::Traced;
use crate::Failure;
use crate::api_client::ApiClient;
use crate::api_key::ApiKeyArg;
use crate::shutdown::Shutdown;
use crate::up::Ready;

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("input").args(["input_words", "prompt_tokens"]))]
pub struct BenchArgs {
    /// Where the API server answers; without a scheme, over http [default: what --ready-file says, else http://127.0.0.1:8000]
    #[arg(long, env = "BATON_URL")]
    url: Option<String>,
    #[command(flatten)]
    api_key: ApiKeyArg,
    /// Model to ask for [default: the one that is served]
    #[arg(long)]
    model: Option<String>,
    /// Requests at the same time
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// Requests in all
    #[arg(long, default_value_t = 100)]
    requests: usize,
    /// Requests before these, which are not counted
    #[arg(long, default_value_t = 0)]
    warmup: usize,
    /// Words of each prompt, all different, as one chat message
    #[arg(long, default_value_t = 100)]
    input_words: usize,
    /// Tokens of each prompt, exactly, through /v1/completions instead of chat
    #[arg(long)]
    prompt_tokens: Option<usize>,
    /// Most tokens of each answer
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Go on to --max-tokens whatever the model says; fewer tokens are then a fault
    #[arg(long)]
    ignore_eos: bool,
    /// Arrivals a second, at random times (Poisson); late ones count their waiting. Without it, each answer is followed
    /// by the next request
    #[arg(long)]
    request_rate: Option<f64>,
    /// Requests as this file says, a JSON object a line: {"at": SECONDS, "prompt_tokens": N, "max_tokens": N}; late ones count
    /// their waiting
    #[arg(long, conflicts_with_all = ["request_rate", "requests", "input", "max_tokens"])]
    trace: Option<PathBuf>,
    /// Chooses prompts and arrival times
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Give a request up after this many seconds
    #[arg(long, default_value_t = 600)]
    timeout_s: u64,
    /// Measure the CPU time of this process: NAME=PID; may be repeated
    #[arg(long, value_parser = cpu::named_pid)]
    pid: Vec<(String, i32)>,
    /// The ready file of `baton up`: address and processes from there
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
    /// With --json, each answer's time to its first token, and mean and longest time between tokens
    #[arg(long, requires = "json")]
    each: bool,
}

/// How long the server may take to name its model.
const MODEL_WAIT: Duration = Duration::from_secs(10);

/// Loads, measures and prints; fails if any request did.
pub fn run(mut args: BenchArgs) -> Result<(), Failure> {
    if args.concurrency == 0 || args.requests == 0 {
        return Err("--concurrency and --requests must be at least 1".into());
    }
    if args
        .request_rate
        .is_some_and(|rate| !(rate > 0.0 && rate.is_finite()))
    {
        return Err("--request-rate must be above 0".into());
    }
    if let Some(file) = &args.ready_file {
        let unreadable = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let text = std::fs::read(file).map_err(|error| unreadable(&error))?;
        let ready: Ready = serde_json::from_slice(&text).map_err(|error| unreadable(&error))?;
        args.url.get_or_insert(ready.url);
        args.model.get_or_insert(ready.model);
        args.pid
            .extend(ready.pids.into_iter().filter(|(name, _)| name != "up"));
    }
    let url = args
        .url
        .get_or_insert_with(|| "http://127.0.0.1:8000".to_owned());
    let target = Target::parse(url)?.with_headers(args.api_key.headers()?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = LocalSet::new().block_on(&runtime, async {
        let mut shutdown = Shutdown::catch()?;
        tokio::select! {
            biased;
            _ = shutdown.requested() => Err(Failure::from("interrupted")),
            report = load(args, target) => report,
        }
    })?;
    let text = match report.json_wanted {
        true => format!("{:#}\n", report.to_json()),
        false => report.to_string(),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    match report.failed() {
        0 => Ok(()),
        failed => Err(format!("{failed} of {} requests failed", report.requests()).into()),
    }
}

/// What all slots share.
struct Run {
    target: Target,
    prompts: Prompts,
    arrivals: RefCell<Arrivals>,
    report: RefCell<Report>,
    timeout: Duration,
}

async fn load(args: BenchArgs, target: Target) -> Result<Report, Failure> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => {
            let base = target.base();
            let client = ApiClient::plain(base, &args.api_key, MODEL_WAIT)?;
            client.served_model().await?
        }
    };
    let trace = args.trace.as_deref().map(trace::read).transpose()?;
    let prompts = Prompts::new(&args, &model);
    let timeout = Duration::from_secs(args.timeout_s);
    if args.warmup > 0 {
        let arrivals = Arrivals::new(args.warmup, None, args.seed);
        let run = Run {
            target: target.clone(),
            prompts: prompts.warmup(),
            arrivals,
            report: Report::default().into(),
            timeout,
        };
        let warmup = run_slots(run, args.concurrency).await?;
        if warmup.failed() > 0 {
            return Err(format!(
                "{} of {} warm-up requests failed:\n{warmup}",
                warmup.failed(),
                args.warmup
            )
            .into());
        }
    }
    let meter = CpuMeter::start(&args.pid)?;
    let (prompts, arrivals) = match trace {
        Some(trace) => (prompts.sized(&trace), Arrivals::traced(&trace)),
        None => (
            prompts,
            Arrivals::new(args.requests, args.request_rate, args.seed),
        ),
    };
    let run = Run {
        target,
        prompts,
        arrivals,
        report: Report::default().into(),
        timeout,
    };
    let mut report = run_slots(run, args.concurrency).await?;
    report.cpu = meter.stop();
    report.json_wanted = args.json;
    report.each_wanted = args.each;
    Ok(report)
}

/// Runs all requests over this many slots, each one request at a time on a connection of its own.
async fn run_slots(run: Run, slots: usize) -> Result<Report, Failure> {
    let run = Rc::new(run);
    run.report.borrow_mut().begin();
    let slots: Vec<_> = (0..slots)
        .map(|_| tokio::task::spawn_local(slot(Rc::clone(&run))))
        .collect();
    for slot in slots {
        slot.await?;
    }
    let run = Rc::into_inner(run).expect("every slot has ended");
    let mut report = run.report.into_inner();
    report.end();
    Ok(report)
}

async fn slot(run: Rc<Run>) {
    let mut connection = Connection::new(run.target.clone());
    loop {
        let Some(arrival) = run.arrivals.borrow_mut().next() else {
            return;
        };
        if let Some(at) = arrival.at {
            sleep_until(at).await;
        }
        let request = run.prompts.request(arrival.index);
        // Waiting for a free slot is waiting too, so time counts from the arrival.
        let since = arrival.at.unwrap_or_else(Instant::now);
        let outcome = match timeout(run.timeout, connection.stream(&request)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                connection.close();
                Err(format!("no end within {} s", run.timeout.as_secs()))
            }
        };
        let wanted = run.prompts.wanted(arrival.index);
        run.report.borrow_mut().add(since, wanted, outcome);
    }
}

/// When which request is due.
struct Arrivals {
    next: usize,
    count: usize,
    rate: Option<f64>,
    /// From the beginning, of each, if that is written down.
    times: Vec<Duration>,
    at: Instant,
    random: Random,
}

struct Arrival {
    index: usize,
    /// `None`: as soon as a slot is free.
    at: Option<Instant>,
}

impl Arrivals {
    fn new(count: usize, rate: Option<f64>, seed: u64) -> RefCell<Self> {
        RefCell::new(Self {
            next: 0,
            count,
            rate,
            times: Vec::new(),
            at: Instant::now(),
            random: Random::new(seed),
        })
    }

    fn traced(trace: &[Traced]) -> RefCell<Self> {
        let arrivals = Self::new(trace.len(), None, 0);
        arrivals.borrow_mut().times = trace.iter().map(|request| request.at).collect();
        arrivals
    }

    fn next(&mut self) -> Option<Arrival> {
        if self.next == self.count {
            return None;
        }
        let index = self.next;
        self.next += 1;
        let at = match (self.times.get(index), self.rate) {
            (Some(time), _) => Some(self.at + *time),
            (None, Some(rate)) => {
                // Gaps of a Poisson process are exponential: -ln(1 - u) / rate.
                self.at += Duration::from_secs_f64(-(1.0 - self.random.unit()).ln() / rate);
                Some(self.at)
            }
            (None, None) => None,
        };
        Some(Arrival { index, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_rate_asked_for() {
        let arrivals = Arrivals::new(20_000, Some(1000.0), 7);
        let start = arrivals.borrow().at;
        let mut last = start;
        while let Some(arrival) = arrivals.borrow_mut().next() {
            let at = arrival.at.unwrap();
            assert!(at >= last);
            last = at;
        }
        let seconds = (last - start).as_secs_f64();
        assert!((19.0..21.0).contains(&seconds), "{seconds}");
    }
}
