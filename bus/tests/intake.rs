//! A subscription that nobody reads, while somebody publishes and publishes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use baton_bus::Intake;
use baton_tests::{Nats, PATIENCE, eventually};
use tempfile::TempDir;

const BYTES_MAX: usize = 1 << 20;
const PAYLOAD: usize = 64 << 10;
const SENT: usize = 200;

#[tokio::test]
async fn what_nobody_takes_is_bounded_in_bytes_and_the_rest_is_answered_for() {
    let directory = TempDir::new().unwrap();
    let nats = Nats::start(directory.path(), "").await;
    let client = async_nats::connect(nats.uri()).await.unwrap();
    let dropped = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&dropped);
    let subscriber = client.subscribe("flood").await.unwrap();
    let mut intake = Intake::new(subscriber, BYTES_MAX, move |_| {
        count.fetch_add(1, Relaxed);
    });
    client.flush().await.unwrap();
    for number in 0..SENT {
        let payload = vec![number as u8; PAYLOAD];
        client.publish("flood", payload.into()).await.unwrap();
    }
    client.flush().await.unwrap();
    let fit = BYTES_MAX / (PAYLOAD + 1);
    eventually("the overflow", PATIENCE, async || {
        match dropped.load(Relaxed) {
            dropped if dropped >= SENT - fit => Ok(()),
            dropped => Err(format!("{dropped} dropped")),
        }
    })
    .await;
    let kept = SENT - dropped.load(Relaxed);
    assert!((fit - 1..=fit).contains(&kept), "{kept} kept");
    for number in 0..kept {
        let message = intake.next().await.unwrap();
        assert_eq!(
            message.payload[0], number as u8,
            "in the order they were sent"
        );
    }
    // There is room again. What is not counted is not kept.
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("large", "x".repeat(PAYLOAD));
    let sent = client.publish_with_headers("flood", headers, "more".into());
    sent.await.unwrap();
    let more = tokio::time::timeout(Duration::from_secs(20), intake.next()).await;
    let more = more.unwrap().unwrap();
    assert_eq!((more.payload.as_ref(), more.headers), (&b"more"[..], None));
}
