//! The NATS server is away: for a moment, for ten seconds, frozen, not there yet, or it does not let us in. Nobody has to be
//! started again by hand.

use std::time::Duration;

use baton_protocol::Role;
use baton_tests::{Api, Cluster, PATIENCE, Setup, Signal, Trace, Turn, eventually};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const PATH: &str = "/v1/completions";

/// How long the bus is away: longer than workers and API servers may be silent.
const AWAY: Duration = Duration::from_secs(10);

fn story(model: &str, number: usize) -> Value {
    json!({"model": model, "prompt": format!("Story {number} of the tide:"), "max_tokens": 1000, "ignore_eos": true,
           "temperature": 1, "seed": number, "logprobs": 0})
}

fn ask(api: &Api, request: &Value) -> JoinHandle<Value> {
    let (api, request) = (api.clone(), request.clone());
    tokio::spawn(async move { api.complete(&request).await["choices"].clone() })
}

/// Waits until `/health` is red, and gives its reasons.
async fn red(api: &Api) -> String {
    eventually("/health to be red", PATIENCE, async || {
        let answer = api.look("/health").await?;
        match answer.status {
            503 => Ok(answer.body["reasons"].to_string()),
            _ => Err(format!("{} {}", answer.status, answer.body)),
        }
    })
    .await
}

/// Every worker in turn is exchanged for one on another device.
async fn exchange(cluster: &mut Cluster, setup: &Setup) {
    let all: Vec<(String, Role)> = cluster
        .workers()
        .iter()
        .map(|worker| (worker.name.clone(), worker.role))
        .collect();
    for (name, role) in all {
        cluster.kill(&name);
        cluster.add_with(role, setup);
    }
    cluster.ready().await;
}

#[tokio::test]
async fn streams_outlive_ten_seconds_without_the_bus() {
    let turn = Turn::take();
    let fast = Setup {
        device: "fake",
        ..Setup::split(2, 2)
    };
    let mut cluster = Cluster::start(&turn, fast.clone()).await;
    let model = cluster.model().await;
    let mut expected = Vec::new();
    for number in 0..6 {
        expected.push(cluster.api.complete(&story(&model, number)).await);
    }
    // from here on an answer takes five seconds, so that the bus is gone in the midst of it
    let slow = Setup {
        device: "fake:5000",
        ..fast
    };
    exchange(&mut cluster, &slow).await;

    let from = cluster.tap.now();
    let mut streams = Vec::new();
    for number in 0..expected.len() {
        let mut events = cluster.api.stream(PATH, &story(&model, number)).await;
        let first = events.next().await.expect("an event");
        streams.push(tokio::spawn(async move {
            let mut all = vec![first];
            all.extend(events.rest().await);
            all
        }));
    }
    cluster.nats.kill();
    let reasons = red(&cluster.api).await;
    assert!(reasons.contains("bus"), "{reasons}");
    let refused = cluster.api.post(PATH, &story(&model, 99)).await;
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.retry_after.is_some());
    let message = refused.body["error"]["message"].as_str().expect("a text");
    assert!(message.contains("bus"), "{message}");
    // no event tells that time passes: it is the fault itself
    tokio::time::sleep(AWAY).await;
    cluster.nats.restart();
    cluster.ready().await;

    for (number, stream) in streams.into_iter().enumerate() {
        let events = stream.await.expect("it went on");
        let text: String = events
            .iter()
            .filter_map(|event| event["choices"][0]["text"].as_str())
            .collect();
        assert_eq!(
            text, expected[number]["choices"][0]["text"],
            "stream {number}"
        );
    }
    cluster.drained(PATIENCE).await;
    // What was on its way when the bus went is computed again, the rest waited in its worker. How often depends on who is back
    // first, and so on the machine's speed; but never without end.
    for trace in Trace::all(&cluster.tap, from).await.values() {
        assert!(trace.prefills.len() <= 4, "{}", trace.prefills.len());
    }
}

/// The answer of a context worker is lost with the bus: nothing but the bus's return tells that it will not come.
#[tokio::test]
async fn a_prompt_whose_answer_is_lost_with_the_bus_is_asked_for_again() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake:300000",
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let request = json!({"model": model, "prompt": "The sea", "max_tokens": 2, "ignore_eos": true, "temperature": 0});
    let expected = cluster.api.complete(&request).await["choices"].clone();
    let from = cluster.tap.now();
    let answer = ask(&cluster.api, &request);
    let job = cluster.tap.wait_kind("prefill", from, PATIENCE).await;
    eventually("the prompt to run", PATIENCE, async || {
        match cluster.beats().await["context-0"].load {
            load if load.running + load.waiting > 0 => Ok(()),
            load => Err(format!("{load:?}")),
        }
    })
    .await;
    cluster.nats.signal(Signal::Stop);
    assert!(!cluster.tap.answered(&job), "it was answered too soon");
    // The worker answers into a connection that nobody reads; nothing tells when. Were it later, the answer would come
    // when the bus is back.
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.nats.kill();
    cluster.nats.restart();
    assert_eq!(answer.await.expect("answered"), expected);
    cluster.ready().await;
    cluster.drained(PATIENCE).await;
}

#[tokio::test]
async fn processes_that_find_no_bus_say_so_once_and_come_up_when_it_is_there() {
    let turn = Turn::take();
    let setup = Setup {
        device: "fake",
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    cluster.nats.kill();
    let uri = cluster.nats.uri();
    cluster.kill("context-0");
    cluster.kill("decode-0");
    cluster.restart_api_server(0);
    cluster.add(Role::Context);
    cluster.add(Role::Decode);
    eventually("all to say what they miss", PATIENCE, async || {
        let api_server = &cluster.api_servers[0].process;
        let all = cluster.workers().iter().map(|worker| &worker.process);
        for process in all.chain([api_server]) {
            let log = process.log();
            let said: Vec<&str> = log
                .lines()
                .filter(|line| {
                    line.contains(&uri) && line.contains("is nats-server running there?")
                })
                .collect();
            match said[..] {
                [] => return Err(format!("{} says nothing", process.name())),
                [_] => {}
                _ => panic!("{} says it again and again: {said:?}", process.name()),
            }
        }
        Ok(())
    })
    .await;
    cluster.nats.restart();
    cluster.ready().await;
    let model = cluster.model().await;
    ask(&cluster.api, &story(&model, 0))
        .await
        .expect("answered");
    cluster.drained(PATIENCE).await;
}

/// Those whom `names` names, each with its name for a password; whoever gives no name may do all, as the tap does.
fn users(names: &[&str]) -> String {
    let users: String = names
        .iter()
        .map(|name| format!("{{ user: {name}, password: {name} }}\n"))
        .collect();
    format!(
        "authorization {{ users: [\n{{ user: tap, password: tap }}\n{users}] }}\nno_auth_user: tap\n"
    )
}

#[tokio::test]
async fn a_worker_that_is_not_let_in_says_so_and_comes_in_when_it_is() {
    let turn = Turn::take();
    let all = ["api-0", "context-0", "decode-0", "decode-1"];
    let setup = Setup {
        device: "fake",
        users: Some(users(&all[..3])),
        ..Setup::split(1, 1)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    // one that never was, and one that no longer is
    let stranger = cluster.add(Role::Decode);
    let not_let_in = |cluster: &mut Cluster, name: &str| {
        let log = cluster.worker(name).process.log();
        let said = log.lines().filter(|line| {
            line.contains("the NATS server at") && line.to_lowercase().contains("authorization")
        });
        said.count()
    };
    let said = async |cluster: &mut Cluster, name: &str| {
        eventually(
            "it to say that it is not let in",
            PATIENCE,
            async || match not_let_in(cluster, name) {
                0 => Err(cluster.worker(name).process.log()),
                1 => Ok(()),
                many => panic!("{name} says it {many} times"),
            },
        )
        .await;
    };
    said(&mut cluster, &stranger).await;
    cluster.nats.configure(&users(&["api-0", "decode-0"]));
    cluster.nats.restart();
    let reasons = red(&cluster.api).await;
    assert!(
        reasons.contains("bus") || reasons.contains("context"),
        "{reasons}"
    );
    said(&mut cluster, "context-0").await;

    cluster.nats.configure(&users(&all));
    cluster.nats.restart();
    cluster.ready().await;
    let model = cluster.model().await;
    ask(&cluster.api, &story(&model, 0))
        .await
        .expect("answered");
    cluster.drained(PATIENCE).await;
}
