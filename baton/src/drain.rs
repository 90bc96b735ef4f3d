//! `baton drain`: asks a worker to leave, by way of an API server.

use std::io::Write;
use std::time::Duration;

use baton_protocol::WorkerId;
use clap::Args;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::Failure;
use crate::api_client::{ApiClient, ApiServerArg};

#[derive(Args, Debug)]
pub struct DrainArgs {
    /// The worker's name, as `baton status` shows it
    worker: String,
    #[command(flatten)]
    server: ApiServerArg,
    /// Come back when it has left, or fail after so many seconds; without it, as soon as it drains
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    wait_s: Option<u64>,
    /// Print JSON, once: that it drains, or with --wait-s that it has left
    #[arg(long)]
    json: bool,
}

/// Longer than an API server waits for the worker.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Between two looks whether it is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// The worker drains, and with `--wait-s` has left; else a sentence says why not. Needs an API key.
pub fn run(args: DrainArgs) -> Result<(), Failure> {
    // A name is a part of a path.
    let worker = WorkerId::new(args.worker).map_err(|error| format!("drain: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let client = args.server.client(|builder| builder.timeout(ANSWER_WAIT))?;
    runtime.block_on(async {
        let life = life(&client, &worker).await?;
        let path = format!("/workers/{worker}/drain");
        client.post(&path, &Value::Null).await?;
        if !args.json {
            say(&format!(
                "{worker} drains: it finishes what it has, and leaves"
            ))?;
        }
        let Some(seconds) = args.wait_s else {
            return match args.json {
                true => say(&format!(
                    "{:#}",
                    json!({"worker": worker, "state": "draining"})
                )),
                false => Ok(()),
            };
        };
        let began = Instant::now();
        let left = async {
            while life.is_some() && self::life(&client, &worker).await? == life {
                sleep(LOOK_INTERVAL).await;
            }
            Ok::<_, Failure>(())
        };
        match timeout(Duration::from_secs(seconds), left).await {
            Ok(left) => left?,
            Err(_) => return Err(format!(
                "{worker} has not left after {seconds} s: its --drain-s says how long it may take"
            )
            .into()),
        }
        let seconds = began.elapsed().as_secs_f64();
        let left = json!({"worker": worker, "state": "left", "seconds": seconds});
        match args.json {
            true => say(&format!("{left:#}")),
            false => say(&format!("{worker} has left after {seconds:.1} s")),
        }
    })
}

fn say(sentence: &str) -> Result<(), Failure> {
    Ok(writeln!(std::io::stdout(), "{sentence}")?)
}

/// Which life of the worker is there, if one is.
async fn life(client: &ApiClient, worker: &WorkerId) -> Result<Option<Value>, Failure> {
    let cluster = client.get("/cluster").await?;
    let workers = cluster["workers"].as_array().into_iter().flatten();
    let mut found = workers.filter(|row| row["worker"] == worker.as_str());
    Ok(found.next().map(|row| row["incarnation"].clone()))
}
