//! The table "Deadlines, hop by hop" of `docs/reliability.md` says what the constants say.
//!
//! `BATON_WRITE_DOCS=1 cargo test -p baton-protocol --test deadlines_page` writes the page.

use std::path::PathBuf;

use baton_protocol::deadlines::*;

const BEGIN: &str = "<!-- made from protocol/src/deadlines.rs: begin -->\n";
const END: &str = "<!-- made from protocol/src/deadlines.rs: end -->\n";

/// A time as the page has it: `0.5 s`, `4.5 s`, `30 s`.
fn s(ms: u64) -> String {
    format!("{} s", ms as f64 / 1e3)
}

/// Hop, when it ends, where that stands, what the client reads, what shows it.
fn rows() -> Vec<[String; 5]> {
    let row = |hop: &str, ends: String, place: &str, reads: &str, shown: &str| {
        [hop, &ends, place, reads, shown].map(str::to_owned)
    };
    let (gone, control, lease) = (s(GONE_AFTER_MS), s(CONTROL_TIMEOUT_MS), s(LEASE_MS.into()));
    let ask = (s(ASK_AGAIN_MIN_MS), s(ASK_AGAIN_MAX_MS));
    let patience = [1, 2, 4]
        .map(|times| s(times * PREFILL_PATIENCE_MS))
        .join(", ");
    vec![
        row(
            "TLS handshake",
            "10 s".to_owned(),
            "`api-server/src/http/https.rs`",
            "the connection is closed",
            "–",
        ),
        row(
            "HTTP head",
            "15 s".to_owned(),
            "`api-server/src/http/mod.rs`",
            "408",
            "– (actix)",
        ),
        row(
            "body",
            "a pause of 15 s; the request's time".to_owned(),
            "`Limits::body_stall`, `http/body.rs`",
            "408 `body_stalled`: \"nothing came of the request body for 15 s\", \"… while its body was still coming\"",
            "`api_server/deadlines.rs`",
        ),
        row(
            "template and tokens: a turn, and the work",
            "the request's time".to_owned(),
            "`texts.rs`",
            "504 \"… while its prompt was made into tokens\"",
            "`api_server/deadlines.rs`",
        ),
        row(
            "a bus that is away",
            format!("at once, after {gone}"),
            "`GONE_AFTER_MS`; `Bus::gone`",
            "503 `bus_unavailable`: \"the bus is silent: … no worker can be asked; try again\"",
            "`e2e/still.rs`",
        ),
        row(
            "decode workers that have more to do than they can take",
            format!(
                "at once, if that would take over {}, or longer than the request has",
                s(DECODE_WAIT_MAX_MS)
            ),
            "`DECODE_WAIT_MAX_MS`, `router/wait.rs`",
            "503 `busy`: \"the decode workers are full: …\"; `Retry-After` says when they may not be",
            "`router/tests.rs`, `api_server/waiting.rs`",
        ),
        row(
            "a context worker with room",
            format!(
                "at once on the first try; once the client has its first token, never: it is asked again every {} to {}",
                ask.0, ask.1
            ),
            "`ASK_AGAIN_…`, `lifecycle/room.rs`",
            "503 `busy`: \"every context worker is busy\"",
            "`lifecycle/tests.rs`",
        ),
        row(
            "prefill: bus, queue, compute",
            "the request's time, at both ends".to_owned(),
            "`driver.rs`; `budget_ms`, `desk.rs`",
            "504 \"… while it was prefilling on context-1\"",
            "`api_server/deadlines.rs`, `workers/leaving.rs`",
        ),
        row(
            "– the job or its answer was lost on the bus",
            format!("sent again after {patience}, … without a report of its worker"),
            "`PREFILL_PATIENCE_MS`",
            "nothing",
            "`workers/refusals.rs`",
        ),
        row(
            "– its beginning is pulled from another worker",
            format!(
                "as long as computing it is expected to take, {} at least; {control} if that is not known; then it is computed",
                s(PREFIX_PULL_MIN_MS)
            ),
            "`PREFIX_PULL_MIN_MS`, `decode/prefix.rs`",
            "nothing",
            "`workers/prefixes.rs`, `e2e/prefixes.rs`",
        ),
        row(
            "– its worker is silent",
            format!("{gone}, then elsewhere"),
            "`GONE_AFTER_MS`",
            "nothing",
            "`e2e/failure.rs`",
        ),
        row(
            "– the next chunk of a prompt that is streamed",
            format!(
                "answered within {} whether there is one or not; asked twice, {control} each",
                s(PROGRESS_WAIT_MS)
            ),
            "`PROGRESS_WAIT_MS`, `CONTROL_TIMEOUT_MS`",
            "nothing: the prompt runs again, unless a decode worker has read it, which then has the first token",
            "`workers/streaming.rs`, `lifecycle/tests.rs`",
        ),
        row(
            "– the bus was away meanwhile",
            "when it is back, asked for again".to_owned(),
            "`bus_back`, `lifecycle/ends.rs`",
            "nothing",
            "`lifecycle/tests.rs`",
        ),
        row(
            "the lease",
            format!(
                "{lease}; renewed every {} while its API server wants it; then prefilled again, which is no failed try",
                s(LEASE_RENEW_INTERVAL_MS)
            ),
            "`LEASE_MS`, `LEASE_RENEW_INTERVAL_MS`, `driver/lease.rs`",
            "nothing",
            "`workers/leases.rs`, `api_server/waiting.rs`",
        ),
        row(
            "a decode worker with room",
            format!(
                "the request's time, asked again every {} to {}; its place in that worker's line is kept for {}",
                ask.0,
                ask.1,
                s(PLACE_KEPT_MS)
            ),
            "`ASK_AGAIN_…`, `PLACE_KEPT_MS`",
            "504 \"… while its KV waited on context-1 for a decode worker with room\"",
            "`api_server/deadlines.rs`, `api_server/waiting.rs`, `e2e/load.rs`",
        ),
        row(
            "a worker where none is there",
            format!("{}, if it was begun", s(ABSENT_WAIT_MS)),
            "`ABSENT_WAIT_MS`, `lifecycle/room.rs`",
            "503 `no_worker`",
            "`lifecycle/tests.rs`",
        ),
        row(
            "admission; a renewal",
            format!("{control}, then elsewhere; then again"),
            "`CONTROL_TIMEOUT_MS`",
            "nothing",
            "`e2e/failure.rs`, `driver/lease.rs`",
        ),
        row(
            "a turn to pull, and the pull",
            format!(
                "the request's time; {} in which the link owes something and delivers nothing, then prefilled again",
                s(PULL_STALL_MS)
            ),
            "`PULL_STALL_MS`, `workers/transfer/src/flow.rs`",
            "504 \"… while decode-0 pulled its KV from context-1\" if that is the request's end",
            "`api_server/deadlines.rs`, `links.rs`, `e2e/slow_link.rs`",
        ),
        row(
            "the release's answer",
            format!("{control}, then prefilled again"),
            "`CONTROL_TIMEOUT_MS`, `pulls.rs`",
            "nothing",
            "`workers/leases.rs`",
        ),
        row(
            "pull and release, seen from the API server",
            format!(
                "{} without a word of it (it is reported every {}), then retried",
                s(PULL_SILENCE_MS),
                s(JOB_REPORT_INTERVAL_MS)
            ),
            "`PULL_SILENCE_MS`",
            "nothing",
            "`lifecycle/tests.rs`",
        ),
        row(
            "the next token",
            format!(
                "{} without a word of it; {} after frames were lost, or the bus is back",
                s(DECODE_SILENCE_MS),
                s(SILENCE_AFTER_LOSS_MS)
            ),
            "`DECODE_SILENCE_MS`, `SILENCE_AFTER_LOSS_MS`",
            "nothing: it is retried",
            "`api_server/main.rs`, `e2e/still.rs`",
        ),
        row(
            "all tokens",
            "the request's time, at both ends".to_owned(),
            "`driver.rs`; `budget_ms`, `desk.rs`",
            "504 \"… while it was decoding on decode-0\"",
            "`api_server/deadlines.rs`",
        ),
        row(
            "tries",
            "5".to_owned(),
            "`RETRIES_MAX`, `lifecycle/ends.rs`",
            "502 `worker_failed`: \"5 tries failed, the last one because …\"",
            "`lifecycle/tests.rs`",
        ),
        row(
            "– executors that break over it or refuse it: it may be what breaks them",
            "2".to_owned(),
            "`EXECUTORS_MAX`, `lifecycle/ends.rs`",
            "502 `worker_failed`: \"2 workers failed over it, the last one because: …\"",
            "`lifecycle/tests.rs`",
        ),
        row(
            "a client that does not read",
            "30 s with 64 KiB unread; 60 s without a byte".to_owned(),
            "`Limits::reader_stall`, `connection_stall`",
            "its stream ends",
            "`api_server/main.rs`",
        ),
        row(
            "one step of the executor",
            format!(
                "{} on a GPU, {} on a CPU",
                s(STEP_MAX_GPU_MS),
                s(STEP_MAX_CPU_MS)
            ),
            "`STEP_MAX_GPU_MS`, `STEP_MAX_CPU_MS`",
            "nothing: elsewhere; the worker ends",
            "`workers/faults.rs`, `e2e/stuck.rs`",
        ),
    ]
}

fn table() -> String {
    let mut table = String::from(
        "| hop | ends after | where that stands | what the client reads | shown by |\n|---|---|---|---|---|\n",
    );
    for row in rows() {
        table.push_str(&format!("| {} |\n", row.join(" | ")));
    }
    table
}

#[test]
fn the_page_says_what_the_constants_say() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/reliability.md");
    let page = std::fs::read_to_string(&path).expect("the page");
    let (before, rest) = page.split_once(BEGIN).expect("where the table begins");
    let (written, after) = rest.split_once(END).expect("where it ends");
    let table = table();
    if std::env::var_os("BATON_WRITE_DOCS").is_some() {
        let page = format!("{before}{BEGIN}{table}{END}{after}");
        return std::fs::write(&path, page).expect("writes");
    }
    for (written, made) in written.lines().zip(table.lines()) {
        assert_eq!(
            written, made,
            "docs/reliability.md is not what protocol/src/deadlines.rs says: BATON_WRITE_DOCS=1 writes it"
        );
    }
    assert_eq!(written, table, "rows are missing, or there are too many");
    let budget = format!("(`--request-budget-s`, {} s)", REQUEST_BUDGET_MS / 1000);
    assert!(before.contains(&budget), "the page has no {budget}");
}
