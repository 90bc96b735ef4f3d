//! Whoever does not read, and whoever says too much: memory stays bounded, and others are answered as if nothing were.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use baton_tests::{Cluster, PATIENCE, Process, Setup, Turn};
use futures::future::join_all;
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

/// How long others are watched meanwhile.
const WATCHED: Duration = Duration::from_secs(4);

/// The flood: 40,000 messages a second, on each of which two processes waste time that they share with all others here.
const PACE: Duration = Duration::from_millis(5);
const AT_A_TIME: usize = 200;

/// No process may ever hold this much more than it did before. 64 MiB may wait for a desk, and allocators round up.
const GROWTH_MAX: usize = 256 << 20;

fn setup() -> Setup {
    Setup {
        device: "fake:1000",
        batch: 128,
        kv_mib: 64,
        ..Setup::split(1, 1)
    }
}

fn request(model: &str, number: usize) -> Value {
    json!({"model": model, "prompt": format!("The river froze {number}"), "max_tokens": 100, "ignore_eos": true,
           "temperature": 0, "logprobs": 2})
}

fn processes(cluster: &Cluster) -> impl Iterator<Item = &Process> {
    let workers = cluster.workers().iter().map(|worker| &worker.process);
    let api_servers = cluster.api_servers.iter().map(|server| &server.process);
    workers.chain(api_servers)
}

/// What others read while the trouble lasts, and what the processes hold after it.
struct Watch {
    requests: Vec<Value>,
    expected: Vec<Value>,
    resident: Vec<usize>,
}

impl Watch {
    async fn begin(cluster: &Cluster) -> Self {
        let model = cluster.model().await;
        let requests: Vec<_> = (0..4).map(|number| request(&model, number)).collect();
        let answers = join_all(requests.iter().map(|request| cluster.api.complete(request))).await;
        Self {
            requests,
            expected: answers
                .into_iter()
                .map(|answer| answer["choices"].clone())
                .collect(),
            resident: processes(cluster).map(Process::resident_max).collect(),
        }
    }

    /// Everybody is answered rightly.
    async fn others(&self, cluster: &Cluster) {
        let begun = Instant::now();
        let mut answered = 0;
        let mut slowest = Duration::ZERO;
        while begun.elapsed() < WATCHED {
            let asked = Instant::now();
            let answers = self
                .requests
                .iter()
                .map(|request| cluster.api.post(PATH, request));
            for (answer, expected) in join_all(answers).await.into_iter().zip(&self.expected) {
                assert_eq!(answer.ok()["choices"], *expected);
                answered += 1;
            }
            slowest = slowest.max(asked.elapsed());
        }
        eprintln!("{answered} others answered, the slowest in {slowest:?}");
    }

    fn end(&self, cluster: &Cluster) {
        for (process, before) in processes(cluster).zip(&self.resident) {
            let grown = process.grown_since(*before);
            eprintln!("{} grew by {} KiB", process.name(), grown >> 10);
            assert!(
                grown < GROWTH_MAX,
                "{} grew by {grown} bytes",
                process.name()
            );
        }
    }
}

/// Clients with large answers of which they read a byte a second.
#[tokio::test]
async fn clients_that_read_a_byte_a_second() {
    let turn = Turn::take();
    let cluster = Cluster::start(&turn, setup()).await;
    let watch = Watch::begin(&cluster).await;
    let body = json!({"model": cluster.model().await, "prompt": "A river", "max_tokens": 4000, "ignore_eos": true,
                      "temperature": 0, "logprobs": 5, "stream": true})
    .to_string();
    let address = cluster.api.base().trim_start_matches("http://").to_owned();
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let over = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..64)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).expect("a connection");
            stream.write_all(head.as_bytes()).expect("sent");
            stream.write_all(body.as_bytes()).expect("sent");
            let over = Arc::clone(&over);
            std::thread::spawn(move || {
                while !over.load(Relaxed) && stream.read(&mut [0]).is_ok() {
                    std::thread::sleep(Duration::from_secs(1));
                }
            })
        })
        .collect();
    watch.others(&cluster).await;
    watch.end(&cluster);
    over.store(true, Relaxed);
    for reader in readers {
        reader.join().expect("it only reads");
    }
    cluster.drained(PATIENCE).await;
}

/// Somebody says nonsense on every subject, as fast as the bus takes it.
#[tokio::test]
async fn a_flooded_bus() {
    let turn = Turn::take();
    let cluster = Cluster::start(&turn, setup()).await;
    let watch = Watch::begin(&cluster).await;
    let seen = cluster.api.look("/cluster").await.expect("/cluster");
    let api_server = seen.body["api_server"].as_str().expect("a name").to_owned();
    let subjects = [
        "prefill.context-0".to_owned(),
        "decode.decode-0".to_owned(),
        "abort.decode-0".to_owned(),
        "release.context-0".to_owned(),
        "beat.decode-0".to_owned(),
        "beat.nobody".to_owned(),
        format!("api-beat.{api_server}"),
        format!("tokens.{api_server}.decode-0"),
        "hello".to_owned(),
    ]
    .map(|subject| format!("baton.test.{subject}"));

    let over = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicUsize::new(0));
    let uri = cluster.nats.uri();
    let (is_over, count) = (Arc::clone(&over), Arc::clone(&sent));
    let flood = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let client = async_nats::connect(uri).await.expect("a connection");
            let large = bytes::Bytes::from(vec![b'['; 1 << 20]);
            let small = bytes::Bytes::from_static(b"{\"v\":2,\"request\":[]}");
            let mut pace = tokio::time::interval(PACE);
            while !is_over.load(Relaxed) {
                pace.tick().await;
                for _ in 0..AT_A_TIME {
                    let number = count.fetch_add(1, Relaxed);
                    let subject = subjects[number % subjects.len()].clone();
                    let payload = match number % 8191 {
                        0 => large.clone(),
                        _ => small.clone(),
                    };
                    // A job is a request.
                    let reply = format!("_INBOX.flood.{number}");
                    let said = client.publish_with_reply(subject, reply, payload).await;
                    said.expect("the connection stands");
                }
            }
            baton_tests::settled(&client).await;
        });
    });
    watch.others(&cluster).await;
    over.store(true, Relaxed);
    flood.join().expect("it only talks");
    // What it said of beats is no beat, and must be over before beats are looked at.
    cluster.tap.catch_up().await;
    let rate = sent.load(Relaxed) as f64 / WATCHED.as_secs_f64();
    eprintln!("{rate:.0} messages a second");
    watch.end(&cluster);
    let health = cluster.api.look("/health").await.expect("an answer");
    assert_eq!(health.status, 200, "{}", health.body);
    let logged: usize = processes(&cluster).map(|process| process.log().len()).sum();
    assert!(logged < 1 << 20, "{logged} bytes were logged");
    cluster.drained(PATIENCE).await;
}
