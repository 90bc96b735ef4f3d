//! Waiting for room: leases that are renewed meanwhile, prompts that are not begun, workers that cannot do what they are asked,
//! and two API servers of one name.

use std::time::{Duration, Instant};

use baton_protocol::deadlines::{JOB_REPORT_INTERVAL_MS, PREFILL_PATIENCE_MS};
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    Incarnation, PROTOCOL_VERSION, PrefillJob, Role, TokenFrame, WorkerId, encode,
};
use serde_json::json;

use crate::support::{Api, Nats, Script, TEXT, Worker, chat, within};

const CHAT: &str = "/v1/chat/completions";

async fn pair(context: Script, decode: Script) -> (Nats, Worker, Worker, Api) {
    let nats = Nats::start().await;
    let context = Worker::start(&nats, "c1", Role::Context, context).await;
    let decode = Worker::start(&nats, "d1", Role::Decode, decode).await;
    let api = Api::start(&nats).await;
    api.sees(2).await;
    (nats, context, decode, api)
}

fn full() -> Script {
    Script {
        busy: true,
        ..Script::default()
    }
}

async fn prefill(context: &mut Worker) -> PrefillJob {
    within("a prefill job", context.prefills.recv())
        .await
        .unwrap()
}

/// The value of a metric with all its labels, 0 if it was never counted.
async fn metric(api: &Api, name: &str) -> f64 {
    let metrics = api.get("/metrics").await.1;
    let value = |line: &str| line.strip_prefix(name)?.trim().parse().ok();
    metrics.lines().find_map(value).unwrap_or(0.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_renewed_for_as_long_as_its_handle_waits() {
    let short = Script {
        lease_ms: 1_500,
        renews: Some(true),
        ..Script::default()
    };
    let (_nats, mut context, decode, api) = pair(short, full()).await;
    let body = chat(json!({"max_tokens": 20})).to_string();
    let mut connection = api.open("POST", CHAT, body.as_bytes()).await;
    let job = prefill(&mut context).await;
    // Longer than the lease.
    for _ in 0..5 {
        let renewal = within("a renewal", context.renewals.recv()).await.unwrap();
        assert_eq!(renewal.request, job.request);
        assert_eq!((renewal.handle.0, renewal.nonce.0), (1, 2));
    }
    decode.script.lock().unwrap().busy = false;
    let response = within("the answer", connection.finish()).await.json();
    let text = &response["choices"][0]["message"]["content"];
    assert_eq!(*text, TEXT[..TEXT.floor_char_boundary(20)]);
    assert!(context.prefills.try_recv().is_err(), "prefilled twice");
}

/// Its lease cannot be renewed, or is lost: then its handle is never sent again, and it is prefilled at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_lease_any_more_is_prefilled_again_and_its_handle_is_sent_to_nobody() {
    for renews in [None, Some(false)] {
        let short = Script {
            lease_ms: 600,
            renews,
            ..Script::default()
        };
        let (_nats, mut context, mut decode, api) = pair(short, full()).await;
        let body = chat(json!({"max_tokens": 20})).to_string();
        let mut connection = api.open("POST", CHAT, body.as_bytes()).await;
        let mut outputs = Vec::new();
        for _ in 0..8 {
            outputs.push(prefill(&mut context).await.sequence.output_tokens());
        }
        assert_eq!(outputs, [0, 1, 2, 3, 4, 5, 6, 7], "each brings a token");
        decode.script.lock().unwrap().busy = false;
        let response = within("the answer", connection.finish()).await.json();
        let text = &response["choices"][0]["message"]["content"];
        assert_eq!(*text, TEXT[..TEXT.floor_char_boundary(20)]);
        // Of more tries than may fail, none counted as failed.
        let lost = metric(&api, "baton_retries_total{reason=\"lease ended\"}").await;
        assert!(lost >= 7.0, "{lost}");
        let mut newest = 0;
        while let Ok(job) = decode.decodes.try_recv() {
            let output = job.sequence.output_tokens();
            assert!(output >= newest, "an older handle was sent");
            newest = output;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_no_decode_worker_will_take_in_time_is_not_begun() {
    let slow = Script {
        batch: 1,
        places: 1,
        decode_ms: 100_000,
        waits_at: Some(5),
        ..Script::default()
    };
    let (_nats, mut context, mut decode, api) = pair(Script::default(), slow).await;
    let body = chat(json!({"max_tokens": 20}));
    let text = body.to_string();
    let mut running = api.open("POST", CHAT, text.as_bytes()).await;
    prefill(&mut context).await;
    within("the decode job", decode.decodes.recv())
        .await
        .unwrap();
    // The only place is taken for a hundred seconds, as far as anybody knows; half a minute is the bound.
    let refused = api.post(CHAT, body.clone()).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert_eq!(refused.json()["error"]["code"], "busy");
    assert!(
        refused.body.contains("decode workers are full"),
        "{}",
        refused.body
    );
    let seconds = refused.head.split("retry-after: ").nth(1).unwrap();
    let seconds: u32 = seconds.lines().next().unwrap().parse().unwrap();
    assert!((60..=100).contains(&seconds), "{seconds}");
    assert!(context.prefills.try_recv().is_err(), "it was begun");
    // One token needs no decode worker.
    let one = api.post(CHAT, chat(json!({"max_tokens": 1}))).await;
    assert_eq!(one.status, 200, "{}", one.body);
    decode.go_on.send_replace(true);
    let response = within("the answer", running.finish()).await;
    assert_eq!(response.status, 200);
    // The place is free again.
    let response = api.post(CHAT, body).await;
    assert_eq!(response.status, 200, "{}", response.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_do_what_it_is_asked_is_gone_round() {
    for wrong in ["wrong_role", "malformed", "of_a_later_release"] {
        let nats = Nats::start().await;
        let refuses = || Script {
            refuses_with: Some(wrong),
            ..Script::default()
        };
        let mut workers = Vec::new();
        for (name, role, script) in [
            ("c1", Role::Context, refuses()),
            ("c2", Role::Context, Script::default()),
            ("d1", Role::Decode, refuses()),
            ("d2", Role::Decode, Script::default()),
        ] {
            workers.push(Worker::start(&nats, name, role, script).await);
        }
        let api = Api::start(&nats).await;
        api.sees(4).await;
        for salt in 0..6 {
            // None has its prefix anywhere: each worker is chosen in turn.
            let body = chat(json!({"max_tokens": 9, "cache_salt": salt.to_string()}));
            let response = api.post(CHAT, body).await;
            assert_eq!(response.status, 200, "{wrong}: {}", response.body);
        }
        let asked = workers[0].prefills.try_recv().is_ok() && workers[2].decodes.try_recv().is_ok();
        assert!(asked, "{wrong}: nobody was gone round");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_api_servers_of_one_name_the_later_stands_by() {
    let (nats, _context, _decode, first) = pair(Script::default(), Script::default()).await;
    let body = || chat(json!({"max_tokens": 9}));
    let later = Api::with(&nats, |config| config.name_is_shared = true).await;
    let (status, health) = later.get("/health").await;
    assert_eq!(status, 503, "{health}");
    assert!(
        health.contains("another API server is called api too"),
        "{health}"
    );
    let refused = later.post(CHAT, body()).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.body.contains("stands by"), "{}", refused.body);
    for _ in 0..3 {
        let response = first.post(CHAT, body()).await;
        assert_eq!(response.status, 200, "{}", response.body);
        let (status, health) = first.get("/health").await;
        assert_eq!(status, 200, "{health}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    first.stop().await;
    within("the later one serves", async {
        while later.get("/health").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let response = later.post(CHAT, body()).await;
    assert_eq!(response.status, 200, "{}", response.body);
}

/// A prompt that its worker reports is waited for however long it takes. Once it is not reported any more, its job may be lost and is
/// sent again.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_sent_again_only_when_it_is_not_reported() {
    let holds = Script {
        refuses_odd_seeds: true,
        ..Script::default()
    };
    let (nats, mut context, _decode, api) = pair(holds, Script::default()).await;
    let body = chat(json!({"stream": true, "seed": 2})).to_string();
    let _connection = api.open("POST", CHAT, body.as_bytes()).await;
    let job = prefill(&mut context).await;

    let bus = async_nats::connect(&nats.url).await.unwrap();
    let worker = WorkerId::new("c1").unwrap();
    let subject = Cluster::new("test")
        .unwrap()
        .tokens(&job.api_server, &worker);
    let report = TokenFrame {
        v: PROTOCOL_VERSION,
        worker,
        incarnation: Incarnation(7),
        items: Vec::new(),
        prompts: vec![job.request],
    };
    let report = encode(&report).unwrap();
    let since = Instant::now();
    while since.elapsed() < Duration::from_millis(PREFILL_PATIENCE_MS * 5 / 4) {
        bus.publish(subject.clone(), report.clone().into())
            .await
            .unwrap();
        bus.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(JOB_REPORT_INTERVAL_MS / 2)).await;
    }
    assert!(context.prefills.try_recv().is_err(), "it was sent again");
    assert!(context.aborts.try_recv().is_err(), "it was ended");
    assert_eq!(prefill(&mut context).await.request, job.request);
}
