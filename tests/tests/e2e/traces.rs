//! Traces of requests over every process, at a collector.

use std::collections::BTreeSet;

use baton_tests::{Cluster, CollectedSpan, Collector, PATIENCE, Setup, Signal, Turn, eventually};
use serde_json::{Value, json};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// Prompt tokens of a step: a longer prompt runs in chunks.
const STEP_TOKENS: usize = 64;

fn setup(args: &[String]) -> Setup {
    Setup {
        device: "fake",
        kv_mib: 16,
        step_tokens: STEP_TOKENS,
        worker_args: args[..2].to_vec(),
        api_args: args.to_vec(),
        ..Setup::split(1, 1)
    }
}

fn body(model: &str) -> Value {
    let prompt = "The river froze and the ferry stayed where it was. ".repeat(20);
    json!({"model": model, "prompt": prompt, "max_tokens": 8, "ignore_eos": true, "temperature": 0})
}

/// Asks with these headers, and says which `traceresponse` came.
async fn ask(cluster: &Cluster, headers: &[(&str, &str)]) -> Option<String> {
    let http = reqwest::Client::builder().no_proxy().build();
    let url = format!("{}/v1/completions", cluster.api.base());
    let mut request = http.expect("a client").post(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = body(&cluster.model().await);
    let request = request.header("content-type", "application/json");
    let answer = request
        .body(body.to_string())
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.status(), 200);
    let trace = answer.headers().get("traceresponse").cloned();
    let text = answer.text().await.expect("a body");
    assert!(text.contains("\"finish_reason\":\"length\""), "{text}");
    trace.map(|trace| trace.to_str().expect("text").to_owned())
}

/// Waits for all spans of a request: each part comes from the process that did it.
async fn whole(collector: &Collector, trace: &str) -> Vec<CollectedSpan> {
    eventually("all spans of the request", PATIENCE, async || {
        let mut spans = collector.spans();
        spans.retain(|span| span.trace == trace);
        let names: BTreeSet<_> = spans
            .iter()
            .map(|span| (span.service.as_str(), span.name.as_str()))
            .collect();
        let wanted = [
            ("baton-api-server", "POST /v1/completions"),
            ("baton-api-server", "generation"),
            ("baton-api-server", "prefill"),
            ("baton-api-server", "kv.room"),
            ("baton-api-server", "decode"),
            ("baton-context-worker", "prefill"),
            ("baton-context-worker", "queue"),
            ("baton-context-worker", "chunk"),
            ("baton-context-worker", "lease"),
            ("baton-decode-worker", "decode"),
            ("baton-decode-worker", "kv.pull"),
            ("baton-decode-worker", "kv.turn"),
            ("baton-decode-worker", "kv.read"),
            ("baton-decode-worker", "kv.release"),
            ("baton-decode-worker", "generate"),
        ];
        match wanted.iter().find(|span| !names.contains(span)) {
            Some(missing) => Err(format!("no {missing:?} in {names:?}")),
            None => Ok(spans),
        }
    })
    .await
}

fn one<'a>(spans: &'a [CollectedSpan], service: &str, name: &str) -> &'a CollectedSpan {
    let mut found = spans
        .iter()
        .filter(|span| span.service == service && span.name == name);
    match (found.next(), found.next()) {
        (Some(span), None) => span,
        other => panic!("{service} {name}: {other:?}"),
    }
}

/// Every span has its parent, that of the request the given one, and none ended with an error.
fn is_a_tree(spans: &[CollectedSpan], root_parent: &str) {
    let ids: BTreeSet<_> = spans.iter().map(|span| span.id.as_str()).collect();
    assert_eq!(ids.len(), spans.len(), "an id came twice");
    for span in spans {
        assert_eq!(span.error, None, "{span:?}");
        assert!(span.times.0 <= span.times.1, "{span:?}");
        match &*span.name {
            "POST /v1/completions" => assert_eq!(span.parent, root_parent),
            _ => assert!(
                ids.contains(&*span.parent),
                "{span:?} has no parent in {spans:#?}"
            ),
        }
    }
    let of = |service: &str, name: &str| one(spans, &format!("baton-{service}"), name);
    for (child, parent) in [
        (
            of("api-server", "generation"),
            of("api-server", "POST /v1/completions"),
        ),
        (of("api-server", "prefill"), of("api-server", "generation")),
        (of("api-server", "decode"), of("api-server", "generation")),
        (of("context-worker", "prefill"), of("api-server", "prefill")),
        (
            of("context-worker", "lease"),
            of("context-worker", "prefill"),
        ),
        (of("decode-worker", "decode"), of("api-server", "decode")),
        (
            of("decode-worker", "kv.pull"),
            of("decode-worker", "decode"),
        ),
        (
            of("decode-worker", "generate"),
            of("decode-worker", "decode"),
        ),
    ] {
        assert_eq!(child.parent, parent.id, "{child:?}\nbelow {parent:?}");
    }
}

#[tokio::test]
async fn a_request_is_one_trace_over_all_processes() {
    let turn = Turn::take();
    let collector = Collector::start().await;
    let cluster = Cluster::start(&turn, setup(&collector.args())).await;
    let told = ask(&cluster, &[]).await.expect("a traceresponse");
    let trace = told.split('-').nth(1).expect("a trace").to_owned();
    let spans = whole(&collector, &trace).await;
    is_a_tree(&spans, "");
    let request = one(&spans, "baton-api-server", "POST /v1/completions");
    assert_eq!(told, format!("00-{trace}-{}-01", request.id));
    for (name, wanted) in [
        ("http.request.method", json!("POST")),
        ("http.response.status_code", json!(200)),
        ("gen_ai.operation.name", json!("text_completion")),
        ("gen_ai.usage.output_tokens", json!(8)),
        ("gen_ai.response.finish_reasons", json!(["length"])),
    ] {
        assert_eq!(request.attributes.get(name), Some(&wanted), "{request:?}");
    }
    assert_eq!(request.events, ["first token"]);
    let tokens = request.attributes["gen_ai.usage.input_tokens"].as_u64();
    let tokens = tokens.expect("a number");
    assert!(tokens as usize > 2 * STEP_TOKENS, "{tokens}");

    // The chunks are the prompt, one after the other.
    let mut chunks: Vec<_> = spans.iter().filter(|span| span.name == "chunk").collect();
    chunks.sort_by_key(|chunk| chunk.times);
    assert!(chunks.len() > 1, "{chunks:?}");
    let computed = chunks
        .iter()
        .map(|chunk| chunk.attributes["baton.tokens"].as_u64());
    assert_eq!(computed.sum::<Option<u64>>(), Some(tokens));

    let pull = one(&spans, "baton-decode-worker", "kv.pull");
    assert!(
        pull.attributes["baton.bytes"].as_u64() > Some(0),
        "{pull:?}"
    );
    assert_eq!(pull.attributes["baton.worker"], "context-0");
    // That of the connection, as the beat names it: not all that UCX has on this host.
    let beats = cluster.beats().await;
    let peer = &beats["decode-0"].peers[0];
    assert!(!peer.transport.is_empty());
    assert_eq!(pull.attributes["baton.transport"], *peer.transport);
    let lease = one(&spans, "baton-context-worker", "lease");
    assert_eq!(lease.attributes["baton.worker"], "decode-0");
    let generate = one(&spans, "baton-decode-worker", "generate");
    assert_eq!(generate.attributes["gen_ai.usage.output_tokens"], 7);
    assert_eq!(
        (&*pull.instance, &*lease.instance),
        ("decode-0", "context-0")
    );

    let metrics = cluster.api.metrics().await;
    for part in ["room", "turn", "read", "release"] {
        let name = "baton_kv_handover_part_seconds_count";
        let counted = metrics.sum(name, &[&format!("part=\"{part}\"")]);
        assert_eq!(counted, Some(1.0), "{part}");
    }
    assert_eq!(
        metrics.sum("baton_trace_spans_dropped_total", &[]),
        Some(0.0)
    );
}

#[tokio::test]
async fn a_clients_trace_goes_on_and_what_is_not_sampled_leaves_no_span() {
    let turn = Turn::take();
    let collector = Collector::start().await;
    let mut args = collector.args();
    args.extend(["--trace-sample", "0"].map(str::to_owned));
    let cluster = Cluster::start(&turn, setup(&args)).await;
    let parent = |flags: &str| format!("00-{TRACE}-{SPAN}-{flags}");
    assert_eq!(ask(&cluster, &[]).await, None);
    assert_eq!(ask(&cluster, &[("traceparent", &parent("00"))]).await, None);
    assert_eq!(ask(&cluster, &[("traceparent", "00-0-0-01")]).await, None);
    let headers = [("traceparent", &*parent("01")), ("tracestate", "vendor=1")];
    let told = ask(&cluster, &headers).await.expect("a traceresponse");
    assert!(told.starts_with(&format!("00-{TRACE}-")), "{told}");
    let spans = whole(&collector, TRACE).await;
    is_a_tree(&spans, SPAN);
    assert!(
        spans.iter().all(|span| span.state == "vendor=1"),
        "{spans:?}"
    );
    let all = collector.spans();
    assert!(
        all.iter().all(|span| span.trace == TRACE),
        "of the others: {all:?}"
    );
}

#[tokio::test]
async fn a_collector_that_is_not_there_costs_nothing_but_the_spans() {
    let turn = Turn::take();
    // Its port is free again.
    let args = Collector::start().await.args();
    let cluster = Cluster::start(&turn, setup(&args)).await;
    eventually("spans to be dropped", PATIENCE, async || {
        ask(&cluster, &[]).await;
        let metrics = cluster.api.metrics().await;
        let dropped = metrics.sum("baton_trace_spans_dropped_total", &["reason=\"export\""]);
        match dropped {
            Some(1.0..) => Ok(()),
            _ => Err(format!("{dropped:?}")),
        }
    })
    .await;
    cluster.drained(PATIENCE).await;
}

/// Spans of this name at the API server, by their begin, once there are so many.
async fn tries(collector: &Collector, trace: &str, name: &str, count: usize) -> Vec<CollectedSpan> {
    let what = format!("{count} tries of {name}");
    eventually(&what, PATIENCE, async || {
        let mut found = collector.spans();
        found.retain(|span| {
            span.trace == trace && span.service == "baton-api-server" && span.name == name
        });
        found.sort_by_key(|span| span.times);
        match found.len() == count {
            true => Ok(found),
            false => Err(format!("{found:#?}")),
        }
    })
    .await
}

/// A worker that runs a request's prompt, or generates it, is killed: its try ends with an error that says why, and the next one
/// stands beside it.
#[tokio::test]
async fn a_try_whose_worker_is_killed_has_an_error_and_a_sibling() {
    let turn = Turn::take();
    let collector = Collector::start().await;
    let mut setup = setup(&collector.args());
    // Long enough to be hit in the middle: the prompt takes four steps, the output eight, of a quarter of a second each.
    setup.device = "fake:250000";
    (setup.context, setup.decode) = (2, 2);
    let mut cluster = Cluster::start(&turn, setup).await;

    for (message, name) in [("tokens", "decode"), ("prefill", "prefill")] {
        let from = cluster.tap.now();
        let (asked, killed) = tokio::join!(ask(&cluster, &[]), async {
            cluster.tap.wait_kind(message, from, PATIENCE).await;
            let job = cluster.tap.wait_kind(name, from, PATIENCE).await;
            let worker = cluster
                .workers()
                .iter()
                .find(|worker| worker.name == job.whom());
            let worker = worker.expect("a job is for a worker");
            worker.process.signal(Signal::Kill);
            (worker.name.clone(), worker.role)
        });
        let told = asked.expect("a traceresponse");
        let trace = told.split('-').nth(1).expect("a trace");
        let tries = tries(&collector, trace, name, 2).await;
        let [lost, next] = &tries[..] else {
            unreachable!("two of them")
        };
        assert_eq!(lost.parent, next.parent, "{tries:#?}");
        assert_eq!(lost.attributes["baton.worker"], *killed.0);
        assert_ne!(next.attributes["baton.worker"], *killed.0);
        let error = lost.error.as_deref().expect("it failed");
        assert!(error.contains(&killed.0), "{error}");
        assert_eq!(next.error, None, "{next:?}");
        assert!(lost.times.1 <= next.times.0, "{tries:#?}");
        let request = self::tries(&collector, trace, "POST /v1/completions", 1).await;
        assert_eq!(request[0].error, None, "{request:?}");

        cluster.kill(&killed.0);
        cluster.restart(&killed.0, killed.1);
        cluster.ready().await;
    }
}
