//! The network breaks: between one context worker and one decode worker, everywhere between them, or round one worker
//! altogether. What was on its way arrives all the same, the break is named, and nobody has to mend anything by hand.
//!
//! Workers live in network namespaces. Where those cannot be made, the tests say that they did not run.

use std::process::Command;
use std::time::{Duration, Instant};

use baton_protocol::deadlines::PULL_STALL_MS;
use baton_protocol::{KvHandle, PeerState, Role};
use baton_tests::{
    Cluster, Message, Network, PATIENCE, Setup, Signal, Trace, Turn, baton, eventually,
};
use futures::future::join_all;
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

/// Rounds of questions in which each pair of workers has to have its turn.
const ROUNDS: usize = 8;

/// What a decode worker may receive while a pull is to be caught in the middle.
const SLOW_MEGABITS: u32 = 16;

/// The same while something is to happen before that pull ends.
const SLOWEST_MEGABITS: u32 = 2;

/// A pull that has brought this much, of 8 MB, is in the middle.
const MIDDLE_BYTES: u64 = 1_500_000;

/// The transfer's own deadline, and time for a busy machine to tell.
const SEEN_WITHIN: Duration = Duration::from_millis(2 * PULL_STALL_MS);

/// A request whose KV takes some 8 MB.
fn request(model: &str, first: usize) -> Value {
    let prompt: Vec<usize> = (first..first + 350).collect();
    json!({"model": model, "prompt": prompt, "max_tokens": 24, "ignore_eos": true, "temperature": 1, "seed": 5, "logprobs": 1})
}

/// A request's answer when nothing is wrong.
async fn undisturbed(cluster: &Cluster, request: &Value) -> Value {
    cluster.api.complete(request).await["choices"].clone()
}

/// Waits until the next request's pull is in the middle; names the two workers.
async fn pull_under_way(cluster: &Cluster, network: &Network, from: usize) -> (String, String) {
    let decode = cluster.tap.wait_kind("decode", from, PATIENCE).await;
    let job: Value = decode.read();
    let context = job["handle"]["worker"].as_str().expect("a name").to_owned();
    let decode = decode.whom();
    let before = network.received(&decode);
    eventually("the pull to be in the middle", PATIENCE, async || {
        match network.received(&decode) - before {
            MIDDLE_BYTES.. => Ok(()),
            bytes => Err(format!("{bytes} bytes")),
        }
    })
    .await;
    (context, decode)
}

/// The state of a link as its decode worker last said it.
fn link(message: &Message, decode: &str, context: &str) -> Option<(PeerState, Option<String>)> {
    if message.kind() != Some(("beat", decode)) {
        return None;
    }
    let beat: baton_protocol::Beat = message.read();
    let peer = beat
        .peers
        .into_iter()
        .find(|peer| peer.worker.as_str() == context)?;
    Some((peer.state, peer.error))
}

async fn health(cluster: &Cluster, expected: u16, what: &str) -> Value {
    eventually(what, PATIENCE, async || {
        let answer = cluster.api.look("/health").await?;
        match answer.status == expected && answer.body.to_string().contains(what) {
            true => Ok(answer.body),
            false => Err(format!("{} {}", answer.status, answer.body)),
        }
    })
    .await
}

/// What `baton status` prints, and whether it calls that well.
fn status(cluster: &Cluster) -> (String, bool) {
    let output = Command::new(baton())
        .args(["status", "--url", cluster.api.base()])
        .output()
        .expect("the binary was just built");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (text, output.status.success())
}

/// One link of two by two is cut in the middle of a pull, and the link to a worker that joins is cut before it connects.
#[tokio::test]
async fn a_cut_road_is_seen_named_gone_round_and_comes_back() {
    let Some(network) = Network::new() else {
        return;
    };
    let turn = Turn::take();
    let setup = Setup {
        network: Some(network.clone()),
        // Or the second time nothing is left to pull.
        worker_args: vec!["--no-prefix-cache".to_owned()],
        ..Setup::split(2, 2)
    };
    let mut cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let kinds: Vec<Value> = (0..6)
        .map(|kind| request(&model, 1000 + 400 * kind))
        .collect();
    let expected = join_all(kinds.iter().map(|kind| undisturbed(&cluster, kind))).await;
    cluster.drained(PATIENCE).await;

    // in the middle of a pull
    for decode in ["decode-0", "decode-1"] {
        network.throttle(decode, Some(SLOW_MEGABITS));
    }
    let from = cluster.tap.now();
    let answer = cluster.api.ask(PATH, &kinds[0]);
    let (context, decode) = pull_under_way(&cluster, &network, from).await;
    network.cut(&context, &decode);
    let cut_at = Instant::now();
    for decode in ["decode-0", "decode-1"] {
        network.throttle(decode, None);
    }

    // before a connection
    let late = "decode-2";
    network.cut(&context, late);
    assert_eq!(cluster.add(Role::Decode), late);

    let seen = cluster
        .tap
        .wait(
            "the cut to be seen",
            from,
            SEEN_WITHIN,
            |message| match link(message, &decode, &context)? {
                (PeerState::Broken, error) => Some((message.at, error)),
                _ => None,
            },
        )
        .await;
    println!("seen {:?} after the cut: {:?}", seen.0 - cut_at, seen.1);
    let answer = answer.await.expect("answered").ok();
    assert_eq!(answer["choices"], expected[0]);
    let traces = Trace::all(&cluster.tap, from).await;
    let trace = traces.values().next().expect("one generation");
    assert!(
        trace.prefills.len() >= 2,
        "KV came over a link that was cut"
    );

    // named, and no reason to take the whole cluster out
    let broken = format!("{decode} cannot read KV from {context}");
    let body = health(&cluster, 200, &broken).await;
    assert_eq!(body["status"], "degraded");
    assert_eq!(body["reasons"], json!([]));
    let (text, well) = status(&cluster);
    assert!(well && text.contains(&broken), "{text}");
    health(
        &cluster,
        200,
        &format!("{late} cannot read KV from {context}"),
    )
    .await;

    // gone round: nobody is asked to pull over it
    let from = cluster.tap.now();
    let answers = join_all((0..18).map(|number| cluster.api.complete(&kinds[number % 6]))).await;
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(answer["choices"], expected[number % 6], "answer {number}");
    }
    for trace in Trace::all(&cluster.tap, from).await.values() {
        assert_eq!(trace.prefills.len(), 1, "tried more than once: {trace:?}");
        let (reader, job) = &trace.decodes[0];
        let owner = job.handle.worker.as_str();
        assert!(
            owner != context || (*reader != decode && reader != late),
            "{reader} was asked to read from {owner}"
        );
    }
    // nothing is held for it, quarantined blocks neither
    cluster.drained(PATIENCE).await;

    network.heal(&context, &decode);
    network.heal(&context, late);
    cluster.ready().await;
    let body = health(&cluster, 200, "\"ok\"").await;
    assert_eq!(body["degraded"], json!([]));
    // Which pair a request gets is the router's choice: asked is until both have read over the healed link again.
    let from = cluster.tap.now();
    let readers = [decode.as_str(), late];
    let mut silent: Vec<&str> = readers.to_vec();
    for _ in 0..ROUNDS {
        let answers =
            join_all((0..36).map(|number| cluster.api.complete(&kinds[number % 6]))).await;
        for (number, answer) in answers.iter().enumerate() {
            assert_eq!(answer["choices"], expected[number % 6], "answer {number}");
        }
        let traces = Trace::all(&cluster.tap, from).await;
        silent.retain(|reader| {
            let over_it = |(name, job): &(String, baton_protocol::DecodeJob)| {
                name == reader && job.handle.worker.as_str() == context
            };
            !traces
                .values()
                .any(|trace| trace.decodes.iter().any(over_it))
        });
        if silent.is_empty() {
            break;
        }
    }
    assert!(
        silent.is_empty(),
        "{silent:?} read nothing from {context} any more"
    );
    cluster.drained(PATIENCE).await;
}

/// With the only link cut, what is on its way ends with an error that says why, and what comes is refused at once.
#[tokio::test]
async fn with_every_road_cut_the_error_says_so() {
    let Some(network) = Network::new() else {
        return;
    };
    let turn = Turn::take();
    let setup = Setup {
        network: Some(network.clone()),
        worker_args: vec!["--no-prefix-cache".to_owned()],
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let request = request(&cluster.model().await, 1000);
    let expected = undisturbed(&cluster, &request).await;
    network.throttle("decode-0", Some(SLOW_MEGABITS));
    let from = cluster.tap.now();
    let answer = cluster.api.ask(PATH, &request);
    pull_under_way(&cluster, &network, from).await;
    network.cut("context-0", "decode-0");
    network.throttle("decode-0", None);

    let reason = "no decode worker can read KV from a context worker";
    let body = health(&cluster, 503, reason).await;
    assert_eq!(body["status"], "unavailable");
    let (text, well) = status(&cluster);
    assert!(!well && text.contains(reason), "{text}");
    // one that comes now, and the one that was on its way
    let refused = cluster.api.post(PATH, &request).await;
    for answer in [refused, answer.await.expect("no hang")] {
        assert_eq!(answer.status, 503, "{}", answer.body);
        let message = answer.body["error"]["message"].as_str().expect("a message");
        assert!(message.contains(reason), "{message}");
        assert!(answer.retry_after.is_some());
    }
    cluster.drained(PATIENCE).await;

    network.heal("context-0", "decode-0");
    health(&cluster, 200, "\"ok\"").await;
    assert_eq!(undisturbed(&cluster, &request).await, expected);
    cluster.drained(PATIENCE).await;
}

/// The lease ends while its KV is being read, because the API server that would renew it stands still, and the blocks become
/// another prompt's: what was read is torn.
#[tokio::test]
async fn kv_that_changes_under_a_running_read_never_becomes_text() {
    let Some(network) = Network::new() else {
        return;
    };
    let turn = Turn::take();
    // a block takes 0.7 MiB: 12 of them, of which the prompt takes 11
    let setup = Setup {
        network: Some(network.clone()),
        kv_mib: 9,
        // Without prefixes, or the second time nothing is left to pull.
        worker_args: ["--lease-ms", "500", "--no-prefix-cache"]
            .map(str::to_owned)
            .into(),
        ..Setup::split(1, 1)
    };
    let cluster = Cluster::start(&turn, setup).await;
    let model = cluster.model().await;
    let victim = request(&model, 1000);
    let expected = undisturbed(&cluster, &victim).await;
    // Two blocks of 32 tokens: one of them is the victim's. It is short, so that it is done long before what is left of the read.
    let mut other = request(&model, 3000);
    other["prompt"] = json!((3000..3064).collect::<Vec<usize>>());
    other["max_tokens"] = json!(1);

    network.throttle("decode-0", Some(SLOW_MEGABITS));
    let from = cluster.tap.now();
    let answer = cluster.api.ask(PATH, &victim);
    pull_under_way(&cluster, &network, from).await;
    // What is left takes half a minute from here on, and each read a second: a slow machine has time for all that follows.
    network.throttle("decode-0", Some(SLOWEST_MEGABITS));
    let leased = async |count: u32, what: &str| {
        eventually(what, PATIENCE, async || {
            match cluster.beats().await.get("context-0").map(|beat| beat.load) {
                Some(load) if load.leased == count => Ok(()),
                load => Err(format!("{load:?}")),
            }
        })
        .await;
    };
    // The read begins while the prompt still runs, and the lease at the prompt's end.
    leased(1, "the lease to begin").await;
    cluster.api_servers[0].process.signal(Signal::Stop);
    leased(0, "the lease to end").await;
    cluster.api_servers[0].process.signal(Signal::Continue);
    cluster.api.complete(&other).await;
    let releases = cluster
        .tap
        .heard(from, |message| message.is("release").then_some(()));
    assert!(releases.is_empty(), "it was read before the blocks changed");
    network.throttle("decode-0", None);

    assert_eq!(answer.await.expect("answered").ok()["choices"], expected);
    let traces = Trace::all(&cluster.tap, from).await;
    let handles: Vec<&KvHandle> = traces.values().flat_map(|trace| &trace.handles).collect();
    assert!(handles.len() >= 3, "KV was used whose lease had ended");
    cluster.drained(PATIENCE).await;
}
