//! Workers die, freeze and leave; the bus goes down. The client gets exactly the text that it would have got, or a clear
//! error; never a hang, never another text.

use std::time::Duration;

use baton_protocol::Role;
use baton_tests::{Answer, Cluster, PATIENCE, Setup, Signal, Trace, Turn, eventually};
use futures::future::join_all;
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

/// Requests whose text would show the smallest difference: greedy and drawn, with log-probabilities.
fn requests(model: &str, max_tokens: usize) -> Vec<Value> {
    let prompt = "My grandmother told me about the winter in which the river froze, and";
    vec![
        json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0, "logprobs": 3}),
        json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "temperature": 1, "seed": 42,
               "logprobs": 0, "frequency_penalty": 0.5}),
    ]
}

fn choices(answer: Answer) -> Value {
    answer.ok()["choices"].clone()
}

async fn undisturbed(cluster: &Cluster, request: &Value) -> Value {
    cluster.api.complete(request).await["choices"].clone()
}

#[tokio::test]
async fn a_context_worker_dies_during_the_prompt() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(2, 1)).await;
    let request = &requests(&cluster.model().await, 24)[1];
    let expected = undisturbed(&cluster, request).await;

    // the job lies before the worker, unanswered, when it dies
    let names: Vec<String> = names(&cluster, Role::Context);
    for name in &names {
        cluster.signal(name, Signal::Stop);
    }
    let from = cluster.tap.now();
    let answer = cluster.api.ask(PATH, request);
    let job = cluster.tap.wait_kind("prefill", from, PATIENCE).await;
    let victim = job.whom();
    cluster.kill(&victim);
    for name in names.iter().filter(|name| **name != victim) {
        cluster.signal(name, Signal::Continue);
    }
    assert_eq!(choices(answer.await.expect("answered")), expected);
    let trace = Trace::only(&cluster.tap, from).await;
    assert!(trace.prefills.len() >= 2, "nobody tried again");
    cluster.drained(PATIENCE).await;
}

#[tokio::test]
async fn a_context_worker_dies_before_the_pull() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(2, 1)).await;
    let request = &requests(&cluster.model().await, 24)[1];
    let expected = undisturbed(&cluster, request).await;

    let from = cluster.tap.now();
    cluster.signal("decode-0", Signal::Stop);
    let answer = cluster.api.ask(PATH, request);
    cluster.tap.wait_kind("decode", from, PATIENCE).await;
    let victim = cluster
        .tap
        .wait_kind("prefill", from, PATIENCE)
        .await
        .whom();
    cluster.kill(&victim);
    cluster.signal("decode-0", Signal::Continue);
    assert_eq!(choices(answer.await.expect("answered")), expected);
    let trace = Trace::only(&cluster.tap, from).await;
    let (last, _) = trace.prefills.last().expect("prefilled");
    assert_ne!(
        *last, victim,
        "the text came from KV of a worker that was dead"
    );
    cluster.drained(PATIENCE).await;
}

/// Pulled by one-sided reads from memory whose owner may be frozen or gone at any moment.
#[tokio::test]
async fn a_context_worker_dies_during_the_pull() {
    let turn = Turn::take();
    let setup = Setup {
        ucx_tls: Some("tcp,self"),
        ..Setup::split(2, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let request = &requests(&cluster.model().await, 24)[0];
    let expected = undisturbed(&cluster, request).await;

    let from = cluster.tap.now();
    cluster.signal("decode-0", Signal::Stop);
    let answer = cluster.api.ask(PATH, request);
    let job = cluster.tap.wait_kind("decode", from, PATIENCE).await;
    let victim = cluster
        .tap
        .wait_kind("prefill", from, PATIENCE)
        .await
        .whom();
    cluster.signal(&victim, Signal::Stop);
    cluster.signal("decode-0", Signal::Continue);
    cluster.tap.answer(&job, PATIENCE).await;
    cluster.kill(&victim);
    assert_eq!(choices(answer.await.expect("answered")), expected);
    cluster.drained(PATIENCE).await;
}

/// The lease ends while the decode worker sleeps: what it reads afterwards may be anything, and must not be used.
#[tokio::test]
async fn a_handle_outlives_its_lease() {
    let turn = Turn::take();
    let setup = Setup {
        worker_args: vec!["--lease-ms".to_owned(), "300".to_owned()],
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let request = &requests(&model, 24)[1];
    let expected = undisturbed(&cluster, request).await;

    let from = cluster.tap.now();
    cluster.signal("decode-0", Signal::Stop);
    let answer = cluster.api.ask(PATH, request);
    cluster.tap.wait_kind("decode", from, PATIENCE).await;
    eventually("the lease to end", PATIENCE, async || {
        match cluster.beats().await.get("context-0").map(|beat| beat.load) {
            Some(load) if load.leased == 0 && load.blocks_used == 0 => Ok(()),
            load => Err(format!("{load:?}")),
        }
    })
    .await;
    cluster.signal("decode-0", Signal::Continue);
    assert_eq!(choices(answer.await.expect("answered")), expected);
    let trace = Trace::only(&cluster.tap, from).await;
    assert!(
        trace.prefills.len() >= 2,
        "KV was used whose lease had ended"
    );
    cluster.drained(PATIENCE).await;
}

#[tokio::test]
async fn a_decode_worker_dies_in_mid_stream() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 2)).await;
    let model = cluster.model().await;
    for request in requests(&model, 100) {
        let expected = undisturbed(&cluster, &request).await;
        let from = cluster.tap.now();
        let mut events = cluster.api.stream(PATH, &request).await;
        let mut streamed = Vec::new();
        for _ in 0..5 {
            streamed.push(events.next().await.expect("an event"));
        }
        let victim = cluster.tap.wait_kind("decode", from, PATIENCE).await.whom();
        cluster.kill(&victim);
        streamed.extend(events.rest().await);

        let text: String = streamed
            .iter()
            .map(|event| event["choices"][0]["text"].as_str().unwrap_or_default())
            .collect();
        assert_eq!(text, expected[0]["text"]);
        let logprobs: Vec<Value> = streamed
            .iter()
            .filter_map(|event| event["choices"][0]["logprobs"]["token_logprobs"].as_array())
            .flatten()
            .cloned()
            .collect();
        assert_eq!(
            json!(logprobs),
            expected[0]["logprobs"]["token_logprobs"],
            "log-probabilities"
        );
        let trace = Trace::only(&cluster.tap, from).await;
        assert_eq!(trace.output().len(), 100);
        assert!(trace.decodes.len() >= 2, "it was over before the kill");
        cluster.drained(PATIENCE).await;

        // a worker that is added gets work
        let added = cluster.add(Role::Decode);
        cluster.ready().await;
        gets_work(&cluster, &added, &request).await;
    }
}

async fn gets_work(cluster: &Cluster, name: &str, request: &Value) {
    let from = cluster.tap.now();
    let answers = (0..8).map(|_| cluster.api.complete(request));
    join_all(answers).await;
    let traces = Trace::all(&cluster.tap, from).await;
    let used = traces
        .values()
        .any(|trace| trace.decodes.iter().any(|(worker, _)| worker == name));
    assert!(used, "{name} got nothing to do");
}

#[tokio::test]
async fn workers_drain_under_load_and_lose_nothing() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(2, 2)).await;
    let model = cluster.model().await;
    let kinds = requests(&model, 60);
    let mut expected = Vec::new();
    for request in &kinds {
        expected.push(undisturbed(&cluster, request).await);
    }
    for role in [Role::Decode, Role::Context] {
        let from = cluster.tap.now();
        let answers: Vec<_> = (0..16)
            .map(|number| cluster.api.ask(PATH, &kinds[number % kinds.len()]))
            .collect();
        cluster.tap.wait_tokens(from, PATIENCE).await;
        let mut leaving = cluster.take(&names(&cluster, role)[0]);
        leaving.process.signal(Signal::Terminate);
        for (number, answer) in answers.into_iter().enumerate() {
            let answer = choices(answer.await.expect("answered"));
            assert_eq!(answer, expected[number % kinds.len()], "answer {number}");
        }
        let status = leaving.process.end(PATIENCE).await;
        assert!(status.success(), "{}: {status}", leaving.name);
        cluster.drained(PATIENCE).await;
    }
}

#[tokio::test]
async fn no_workers_is_said_clearly_and_new_ones_are_found() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let request = &requests(&cluster.model().await, 8)[0];
    let expected = undisturbed(&cluster, request).await;
    cluster.kill("context-0");
    cluster.kill("decode-0");
    eventually("/health to be red", PATIENCE, async || {
        let answer = cluster.api.look("/health").await?;
        match answer.status {
            503 => Ok(()),
            _ => Err(format!("{} {}", answer.status, answer.body)),
        }
    })
    .await;
    let answer = cluster.api.post(PATH, request).await;
    assert_eq!(answer.status, 503, "{}", answer.body);
    let message = answer.body["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("worker"), "{message}");
    assert!(answer.retry_after.is_some());
    let live = cluster.api.look("/live").await.expect("/live");
    assert_eq!(live.status, 200, "the process itself is well");

    cluster.add(Role::Both);
    cluster.ready().await;
    assert_eq!(undisturbed(&cluster, request).await, expected);
}

#[tokio::test]
async fn the_bus_goes_down_and_comes_back() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let model = cluster.model().await;
    let request = &requests(&model, 8)[0];
    let expected = undisturbed(&cluster, request).await;

    // one that is on its way when the bus breaks must end, well or with an error
    let from = cluster.tap.now();
    let answer = cluster.api.ask(PATH, &requests(&model, 400)[0]);
    cluster.tap.wait_tokens(from, PATIENCE).await;
    cluster.nats.kill();
    eventually("/health to be red", PATIENCE, async || {
        let answer = cluster.api.look("/health").await?;
        match answer.status {
            503 => Ok(()),
            _ => Err(format!("{} {}", answer.status, answer.body)),
        }
    })
    .await;
    cluster.nats.restart();
    cluster.ready().await;
    let answer = answer.await.expect("no hang");
    match answer.status {
        200 => assert_eq!(answer.body["usage"]["completion_tokens"], 400),
        status => {
            assert!(status >= 500, "{status} {}", answer.body);
            assert!(answer.body["error"]["message"].is_string());
        }
    }
    assert_eq!(undisturbed(&cluster, request).await, expected);
    cluster.drained(PATIENCE).await;
}

#[tokio::test]
async fn an_api_server_dies_and_workers_free_what_was_its() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(1, 1)).await;
    let request = &requests(&cluster.model().await, 1500)[0];
    let from = cluster.tap.now();
    let mut events = cluster.api.stream(PATH, request).await;
    events.next().await.expect("an event");
    cluster.tap.wait_tokens(from, PATIENCE).await;
    cluster.restart_api_server(0);
    cluster.ready().await;
    cluster.drained(PATIENCE).await;
    let trace = Trace::only(&cluster.tap, from).await;
    assert!(trace.output().len() < 1500, "it ran to its end for nobody");
}

/// No moment is safe: a decode worker and a context worker die somewhere in a load.
#[tokio::test]
async fn workers_die_at_any_moment_of_a_load() {
    let turn = Turn::take();
    let mut cluster = Cluster::start(&turn, Setup::split(2, 2)).await;
    let model = cluster.model().await;
    let kinds = requests(&model, 40);
    let mut expected = Vec::new();
    for request in &kinds {
        expected.push(undisturbed(&cluster, request).await);
    }
    for (role, kind, count) in [
        (Role::Context, "prefill", 5),
        (Role::Decode, "tokens", 11),
        (Role::Context, "release", 3),
        (Role::Decode, "decode", 6),
    ] {
        let from = cluster.tap.now();
        let answers: Vec<_> = (0..10)
            .map(|number| cluster.api.ask(PATH, &kinds[number % kinds.len()]))
            .collect();
        let mut heard = 0;
        let what = format!("{count} {kind} messages");
        cluster
            .tap
            .wait(&what, from, PATIENCE, |message| {
                heard += usize::from(message.is(kind));
                (heard == count).then_some(())
            })
            .await;
        let victim = names(&cluster, role)[0].clone();
        cluster.kill(&victim);
        for (number, answer) in answers.into_iter().enumerate() {
            let answer = choices(answer.await.expect("answered"));
            assert_eq!(
                answer,
                expected[number % kinds.len()],
                "answer {number} after {victim} died at {what}"
            );
        }
        cluster.drained(PATIENCE + Duration::from_secs(10)).await;
        cluster.add(role);
        cluster.ready().await;
    }
}

fn names(cluster: &Cluster, role: Role) -> Vec<String> {
    let workers = cluster.workers().iter();
    workers
        .filter(|worker| worker.role == role)
        .map(|worker| worker.name.clone())
        .collect()
}
