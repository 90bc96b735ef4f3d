//! `baton top`: the requests under way at an API server.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use crate::Failure;
use crate::api_client::{ApiClient, ApiServerArg};
use crate::screen;
use crate::table::{Table, list, word};

#[derive(Args, Debug)]
pub struct TopArgs {
    #[command(flatten)]
    server: ApiServerArg,
    /// Print once what the API server says, as it is
    #[arg(long)]
    json: bool,
}

const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Draws the requests again and again on a terminal, also while nobody answers; elsewhere, or as JSON, once.
pub fn run(args: TopArgs) -> Result<(), Failure> {
    let client = args.server.client(|builder| builder.timeout(ANSWER_WAIT))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut stdout = std::io::stdout();
    if args.json || !stdout.is_terminal() {
        let told = runtime.block_on(ask(&client))?;
        let text = match args.json {
            true => format!("{told:#}\n"),
            false => render(&told, usize::MAX),
        };
        return Ok(stdout.write_all(text.as_bytes())?);
    }
    let drawn = screen::redraw(screen::EVERY, async || match ask(&client).await {
        // The line on which the cursor stands is one too.
        Ok(told) => render(&told, screen::lines().map_or(usize::MAX, |lines| lines - 1)),
        Err(failure) => format!("{failure}\n"),
    });
    Ok(runtime.block_on(drawn)?)
}

async fn ask(client: &ApiClient) -> Result<Value, Failure> {
    let told = client.get("/requests").await?;
    match told["running"].is_array() {
        true => Ok(told),
        false => Err(format!(
            "the API server at {} is of an earlier release: it does not tell what runs",
            client.base()
        )
        .into()),
    }
}

/// Lines of a view that are no requests: the totals, an empty one, the columns' names.
const FRAME: usize = 3;

/// Totals, and a line for each request, the oldest first, in `lines` lines at most.
fn render(told: &Value, lines: usize) -> String {
    let totals = &told["totals"];
    let count = |field: &str| totals[field].as_u64().unwrap_or_default();
    let (running, waiting) = (count("running"), count("waiting"));
    let mut text = format!(
        "{running} running, {waiting} waiting, {} tokens/s; TTFT p50 of the last: {}\n",
        decimal(&totals["tokens_per_second"], ""),
        decimal(&totals["ttft_p50_ms"], " ms"),
    );
    let mut rows: Vec<_> = list(&told["running"]).collect();
    if rows.is_empty() {
        return text;
    }
    let age = |row: &Value| row["age_ms"].as_f64().unwrap_or_default();
    rows.sort_by(|one, other| age(other).total_cmp(&age(one)));
    let mut table = Table::new(&[
        "request", "age", "phase", "class", "prompt", "cached", "tokens", "TTFT", "tokens/s",
        "context", "decode",
    ]);
    let all = usize::try_from(running + waiting).unwrap_or(usize::MAX);
    let mut room = lines.saturating_sub(FRAME).max(1);
    if rows.len().max(all) > room {
        // The last line says how many there are besides.
        room = (room - 1).max(1);
    }
    rows.truncate(room);
    for row in &rows {
        table.row([
            word(&row["id"]),
            format!("{:.1} s", age(row) / 1e3),
            word(&row["phase"]),
            class(row),
            word(&row["prompt_tokens"]),
            word(&row["cached_tokens"]),
            word(&row["output_tokens"]),
            decimal(&row["ttft_ms"], " ms"),
            rate(row),
            word(&row["context_worker"]),
            word(&row["decode_worker"]),
        ]);
    }
    text += "\n";
    text += &table.render();
    if all > rows.len() {
        text += &format!("and {} more\n", all - rows.len());
    }
    text
}

/// Interactive or batch, and the priority where there is one.
fn class(row: &Value) -> String {
    let tier = word(&row["tier"]);
    match row["priority"].as_i64() {
        None | Some(0) => tier,
        Some(priority) => format!("{tier} {priority:+}"),
    }
}

/// Tokens a second since the first.
fn rate(row: &Value) -> String {
    let number = |field: &str| row[field].as_f64();
    let rate = || {
        let more = number("output_tokens")? - 1.0;
        let seconds = (number("age_ms")? - number("ttft_ms")?) / 1e3;
        (more > 0.0 && seconds > 0.0).then(|| format!("{:.1}", more / seconds))
    };
    rate().unwrap_or_else(|| "-".to_owned())
}

fn decimal(value: &Value, unit: &str) -> String {
    let number = value.as_f64();
    number.map_or_else(|| "-".to_owned(), |number| format!("{number:.1}{unit}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(id: &str, age_ms: f64, phase: &str, tokens: u64) -> Value {
        json!({"id": id, "age_ms": age_ms, "phase": phase, "tier": "interactive", "priority": 0, "prompt_tokens": 9, "cached_tokens": 0,
               "output_tokens": tokens, "ttft_ms": if tokens > 0 { json!(500.0) } else { json!(null) }, "context_worker": "context-0",
               "decode_worker": if tokens > 0 { json!("decode-1") } else { json!(null) }})
    }

    fn told() -> Value {
        let mut batch = row("cccccccc", 9_000.0, "queued", 0);
        (batch["tier"], batch["priority"]) = (json!("batch"), json!(2));
        json!({"totals": {"running": 2, "waiting": 1, "tokens_per_second": 20.04, "ttft_p50_ms": null},
               "running": [row("aaaaaaaa", 1_500.0, "decoding", 21), row("bbbbbbbb", 2_500.0, "prefilling", 0), batch]})
    }

    #[test]
    fn requests_are_shown_the_oldest_first_with_totals() {
        let text = render(&told(), usize::MAX);
        let lines: Vec<_> = text.lines().collect();
        let totals = "2 running, 1 waiting, 20.0 tokens/s; TTFT p50 of the last: -";
        assert_eq!(lines[0], totals);
        let cells = |line: &str| {
            let cells = line
                .split("  ")
                .map(str::trim)
                .filter(|cell| !cell.is_empty());
            cells.map(str::to_owned).collect::<Vec<_>>()
        };
        let oldest = [
            "cccccccc",
            "9.0 s",
            "queued",
            "batch +2",
            "9",
            "0",
            "0",
            "-",
            "-",
            "context-0",
            "-",
        ];
        assert_eq!(cells(lines[3]), oldest);
        assert_eq!(cells(lines[4])[..3], ["bbbbbbbb", "2.5 s", "prefilling"]);
        let newest = [
            "interactive",
            "9",
            "0",
            "21",
            "500.0 ms",
            "20.0",
            "context-0",
            "decode-1",
        ];
        assert_eq!(cells(lines[5])[3..], newest);
        assert_eq!(lines.len(), 6);
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let text = render(&told(), 5);
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(text.ends_with("and 2 more\n"), "{text}");
        // The server tells of fewer than there are.
        let mut told = told();
        told["totals"]["running"] = json!(700);
        assert!(render(&told, usize::MAX).ends_with("and 698 more\n"));
        assert!(render(&told, 0).contains("cccccccc"));
    }

    #[test]
    fn a_strange_answer_is_no_panic() {
        render(&json!({}), 3);
        render(&json!({"running": [1, {"id": []}], "totals": "x"}), 3);
    }
}
