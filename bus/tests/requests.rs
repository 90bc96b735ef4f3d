//! Requests that nobody answers.

use std::task::Poll;
use std::time::Duration;

use baton_bus::{RequestError, Wire};
use baton_tests::{Nats, PATIENCE, settled};
use bytes::Bytes;
use futures::StreamExt;
use tempfile::TempDir;
use tokio::time::timeout;

const REQUESTS: usize = 20_000;

/// Each takes some 400 bytes for as long as it is remembered.
const BYTES_MAX: usize = REQUESTS * 100;

#[tokio::test]
async fn a_request_that_was_given_up_leaves_nothing_behind() {
    let directory = TempDir::new().unwrap();
    let nats = Nats::start(directory.path(), "").await;
    let deaf = async_nats::connect(nats.uri()).await.unwrap();
    let mut heard = deaf.subscribe("deaf").await.unwrap();
    settled(&deaf).await;
    let wire: Wire = async_nats::connect(nats.uri()).await.unwrap().into();
    let mut before = 0;
    for number in 0..REQUESTS {
        // What the first ones take is kept and used again.
        if number == REQUESTS / 10 {
            before = resident();
        }
        // Half of them wait no longer, those who asked the others have left.
        let allowed = [PATIENCE, Duration::ZERO][number % 2];
        let mut request = Box::pin(wire.request_within("deaf", Bytes::new(), allowed));
        match futures::poll!(&mut request) {
            Poll::Pending if allowed == PATIENCE => drop(request),
            Poll::Pending => assert_eq!(request.await.err(), Some(RequestError::TimedOut)),
            Poll::Ready(answer) => assert_eq!(answer.err(), Some(RequestError::TimedOut)),
        }
        let message = timeout(PATIENCE, heard.next()).await;
        assert!(message.unwrap().is_some());
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < BYTES_MAX, "{grown} bytes for {REQUESTS} requests");
}

/// Bytes that this process has in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
    kibibytes.parse::<usize>().unwrap() << 10
}

/// Requests of a connection share one inbox: the server has one subscription of it, however many wait.
#[tokio::test]
async fn requests_that_wait_have_one_subscription_and_each_has_its_own_answer() {
    const WAITING: usize = 64;
    let directory = TempDir::new().unwrap();
    let port = baton_tests::free_port();
    let monitor = format!("http: \"127.0.0.1:{port}\"");
    let nats = Nats::start(directory.path(), &monitor).await;
    let echo = async_nats::connect(nats.uri()).await.unwrap();
    let mut heard = echo.subscribe("echo").await.unwrap();
    settled(&echo).await;
    let before = subscriptions(port);
    let wire: Wire = async_nats::connect(nats.uri()).await.unwrap().into();
    let ask = |number: usize| {
        let payload = Bytes::from(number.to_string());
        wire.request_within("echo", payload, PATIENCE)
    };
    let answers = async {
        let all = futures::future::join_all((0..WAITING).map(ask)).await;
        for (number, answer) in all.into_iter().enumerate() {
            assert_eq!(answer.unwrap().payload, number.to_string());
        }
    };
    let echoing = async {
        let mut questions = Vec::new();
        while questions.len() < WAITING {
            questions.push(heard.next().await.unwrap());
        }
        assert_eq!(subscriptions(port), before + 1);
        // The last one first, and each answered twice.
        for question in questions.into_iter().rev() {
            for _ in 0..2 {
                let reply = question.reply.clone().unwrap();
                let payload = question.payload.clone();
                echo.publish(reply, payload).await.unwrap();
            }
        }
        echo.flush().await.unwrap();
    };
    timeout(PATIENCE, futures::future::join(answers, echoing))
        .await
        .unwrap();
    let nobody = wire.request("nobody", Bytes::new()).await;
    assert_eq!(nobody.err(), Some(RequestError::NoResponders));
    let large = Bytes::from(vec![0; (8 << 20) + 1]);
    let large = wire.request("echo", large).await;
    assert_eq!(large.err(), Some(RequestError::TooLarge));
}

/// Subscriptions of all clients, as the server's monitoring port says: its own, which come and go, are not among them.
fn subscriptions(port: u16) -> usize {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /connz HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    let connections = body["connections"].as_array().unwrap().iter();
    let counts = connections.map(|connection| connection["subscriptions"].as_u64().unwrap());
    counts.sum::<u64>() as usize
}
