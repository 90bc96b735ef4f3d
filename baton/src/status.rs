//! `baton status`: the cluster as its API server sees it.

use std::io::Write;
use std::time::Duration;

use baton_protocol::deadlines::BEAT_INTERVAL_MS;
use clap::Args;
use serde_json::Value;

use crate::Failure;
use crate::api_client::ApiServerArg;
use crate::screen;
use crate::table::{Table, list, word};

#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    server: ApiServerArg,
    /// Print what the API server says as it is
    #[arg(long)]
    json: bool,
    /// Show it again every so many seconds, until Ctrl-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..))]
    watch: Option<u64>,
}

const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// A worker that was not heard for longer has missed a heartbeat: the interval, and a quarter for its way here.
const SILENT_AFTER_MS: u64 = BEAT_INTERVAL_MS + BEAT_INTERVAL_MS / 4;

/// Prints tables of workers and of the connections between them; fails if the cluster cannot serve. With `--watch` it goes on for
/// ever, also while nobody answers.
pub fn run(args: StatusArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let Some(seconds) = args.watch else {
        let cluster = runtime.block_on(ask(&args))?;
        std::io::stdout().write_all(shown(&args, &cluster).as_bytes())?;
        return match cluster["healthy"].as_bool() {
            Some(false) => Err("the cluster cannot serve".into()),
            _ => Ok(()),
        };
    };
    let drawn = screen::redraw(Duration::from_secs(seconds), async || {
        match ask(&args).await {
            Ok(cluster) => shown(&args, &cluster),
            Err(failure) => format!("{failure}\n"),
        }
    });
    Ok(runtime.block_on(drawn)?)
}

fn shown(args: &StatusArgs, cluster: &Value) -> String {
    match args.json {
        // One that is followed by others is a line.
        true if args.watch.is_some() => format!("{cluster}\n"),
        true => format!("{cluster:#}\n"),
        false => render(cluster),
    }
}

async fn ask(args: &StatusArgs) -> Result<Value, Failure> {
    let client = args.server.client(|builder| builder.timeout(ANSWER_WAIT))?;
    client.get("/cluster").await
}

fn render(cluster: &Value) -> String {
    let mut text = format!(
        "cluster {}, model {}, API server {}: {}\n",
        word(&cluster["cluster"]),
        word(&cluster["model"]["name"]),
        word(&cluster["api_server"]),
        if cluster["healthy"].as_bool() == Some(true) {
            "healthy"
        } else {
            "NOT healthy"
        },
    );
    for reason in list(&cluster["reasons"]).chain(list(&cluster["degraded"])) {
        text += &format!("  {}\n", word(reason));
    }

    let mut workers = Table::new(&[
        "worker",
        "role",
        "state",
        "device",
        "ranks",
        "weights",
        "running",
        "waiting",
        "leased",
        "pulling",
        "blocks",
        "transport",
    ]);
    let mut peers = Table::new(&[
        "from",
        "to",
        "state",
        "transport",
        "GB/s of pulls",
        "of the probe",
        "last error",
    ]);
    for worker in list(&cluster["workers"]) {
        let load = &worker["load"];
        workers.row([
            word(&worker["worker"]),
            word(&worker["role"]),
            state(worker),
            word(&worker["device"]),
            word(&worker["ranks"]),
            word(&worker["weights"]),
            word(&load["running"]),
            word(&load["waiting"]),
            word(&load["leased"]),
            word(&load["pulling"]),
            format!(
                "{}/{}",
                word(&load["blocks_used"]),
                word(&worker["capacity"]["blocks"])
            ),
            word(&worker["transport"]),
        ]);
        for peer in list(&worker["peers"]) {
            let rate = |field: &str| {
                let rate = peer[field].as_f64().filter(|rate| *rate > 0.0);
                rate.map_or("-".to_owned(), |rate| format!("{rate:.2}"))
            };
            peers.row([
                word(&peer["worker"]),
                word(&worker["worker"]),
                word(&peer["state"]),
                word(&peer["transport"]),
                rate("pulled_gigabytes_per_second"),
                rate("gigabytes_per_second"),
                word(&peer["error"]),
            ]);
        }
    }
    text += "\n";
    text += &workers.render();
    if !peers.is_empty() {
        text += "\nKV can be pulled\n";
        text += &peers.render();
    }
    text
}

/// The state that the API server reports, and for how long the worker has been silent. The API server takes a worker for
/// `serving` until it is suspect; until then the silence alone shows that something is wrong.
fn state(worker: &Value) -> String {
    let state = word(&worker["state"]);
    match worker["silent_ms"].as_u64() {
        Some(ms) if ms > SILENT_AFTER_MS => {
            let silent = format!("silent {:.1} s", ms as f64 / 1e3);
            match state.as_str() {
                "serving" => silent,
                _ => format!("{state}, {silent}"),
            }
        }
        _ => state,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn workers_and_their_connections_are_shown() {
        let text = render(&json!({
            "cluster": "baton", "api_server": "api-1", "healthy": false, "reasons": ["no decode worker"],
            "degraded": ["decode-0 cannot read KV from context-0: cut"],
            "model": {"name": "smol"},
            "workers": [
                {"worker": "context-0", "role": "context", "state": "serving", "device": "cpu", "ranks": 3, "weights": "fp8-channel",
                 "load": {"running": 1, "waiting": 2, "leased": 3, "pulling": 0, "blocks_used": 4},
                 "capacity": {"blocks": 100}, "transport": "ucx 1.13.1 tcp", "peers": []},
                {"worker": "decode-0", "role": "decode", "state": "failed", "device": "cpu", "reason": "the executor hangs",
                 "load": {}, "capacity": {}, "transport": "",
                 "peers": [{"worker": "context-0", "state": "ready", "transport": "posix,cma",
                            "gigabytes_per_second": 6.789, "pulled_gigabytes_per_second": 19.5},
                           {"worker": "context-1", "state": "ready", "transport": "posix,cma",
                            "gigabytes_per_second": 6.789}]},
            ],
        }));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "cluster baton, model smol, API server api-1: NOT healthy"
        );
        assert_eq!(lines[1], "  no decode worker");
        assert_eq!(lines[2], "  decode-0 cannot read KV from context-0: cut");
        let cells = |line: &str| {
            line.split("  ")
                .map(str::trim)
                .filter(|c| !c.is_empty())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            cells(lines[5])[..6],
            ["context-0", "context", "serving", "cpu", "3", "fp8-channel"]
        );
        // One of old says nothing of its ranks.
        assert_eq!(cells(lines[6])[3..5], ["cpu", "-"]);
        assert!(lines[5].contains("4/100"), "{text}");
        let [pulled, probed] = [lines.len() - 2, lines.len() - 1].map(|line| cells(lines[line]));
        assert_eq!(pulled[3..], ["posix,cma", "19.50", "6.79", "-"]);
        assert_eq!(probed[3..], ["posix,cma", "-", "6.79", "-"]);
    }

    #[test]
    fn a_worker_that_misses_a_heartbeat_is_shown_as_silent() {
        for (reported, silent_ms, shown) in [
            ("serving", json!(0), "serving"),
            ("serving", json!(BEAT_INTERVAL_MS), "serving"),
            ("serving", json!(SILENT_AFTER_MS), "serving"),
            ("serving", json!(1_340), "silent 1.3 s"),
            ("suspect", json!(2_600), "suspect, silent 2.6 s"),
            ("draining", json!(2_600), "draining, silent 2.6 s"),
            // Not said by an earlier release.
            ("serving", json!(null), "serving"),
        ] {
            let worker = json!({"worker": "both-0", "state": reported, "silent_ms": silent_ms});
            assert_eq!(state(&worker), shown);
            assert!(render(&json!({"workers": [worker]})).contains(shown));
        }
    }

    #[test]
    fn a_strange_answer_is_no_panic() {
        render(&json!({}));
        render(&json!({"workers": [1, {"peers": "x"}], "reasons": 3}));
    }
}
