//! `baton status`: the cluster as its API server sees it.

use std::io::Write;
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use crate::Failure;
use crate::api_client::ApiServerArg;

#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    server: ApiServerArg,
    /// Print what the API server says as it is
    #[arg(long)]
    json: bool,
}

const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Prints tables of workers and of the connections between them; fails if the cluster cannot serve.
pub fn run(args: StatusArgs) -> Result<(), Failure> {
    let cluster = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(ask(&args))?;
    let text = match args.json {
        true => format!("{cluster:#}\n"),
        false => render(&cluster),
    };
    std::io::stdout().write_all(text.as_bytes())?;
    match cluster["healthy"].as_bool() {
        Some(false) => Err("the cluster cannot serve".into()),
        _ => Ok(()),
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
            word(&worker["state"]),
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
    if !peers.rows.is_empty() {
        text += "\nKV can be pulled\n";
        text += &peers.render();
    }
    text
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A value for a person: strings as they are, nothing as a dash.
fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Columns as wide as what is in them.
struct Table {
    rows: Vec<Vec<String>>,
    header: Vec<String>,
}

impl Table {
    fn new(header: &[&str]) -> Self {
        Self {
            rows: Vec::new(),
            header: header.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    fn row<const N: usize>(&mut self, row: [String; N]) {
        debug_assert_eq!(N, self.header.len());
        self.rows.push(row.into());
    }

    fn render(&self) -> String {
        let all = || std::iter::once(&self.header).chain(&self.rows);
        let width = |column: usize| {
            all()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.header.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells: Vec<_> = row
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:<width$}"))
                .collect();
            format!("{}\n", cells.join("  ").trim_end())
        };
        all().map(line).collect()
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
    fn a_strange_answer_is_no_panic() {
        render(&json!({}));
        render(&json!({"workers": [1, {"peers": "x"}], "reasons": 3}));
    }
}
