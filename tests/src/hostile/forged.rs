//! Workers that are none: they beat on the bus, and answer what they like.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::Client;
use baton_protocol::Beat;
use baton_protocol::subjects::Cluster as Subjects;
use bytes::Bytes;
use futures::StreamExt;
use tokio::task::JoinHandle;

use crate::nats::settled;

/// It beats this often.
const BEAT_EVERY: Duration = Duration::from_millis(500);

/// A worker that is none. It falls silent when this is dropped.
pub struct Forged {
    beats: JoinHandle<()>,
    answers: JoinHandle<()>,
    asked: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Forged {
    /// Joins the cluster with this beat. `answer` gives what it answers to a request of a kind (`describe`, `decode`, …), if
    /// anything.
    pub async fn join(
        client: &Client,
        subjects: &Subjects,
        beat: &Beat,
        answer: impl Fn(&str) -> Option<Bytes> + Send + 'static,
    ) -> Self {
        let inbox = subjects.inbox(&beat.worker);
        let mut inbox = client.subscribe(inbox).await.expect("a connected bus");
        settled(client).await;
        let asked = Arc::new(Mutex::new(BTreeMap::new()));
        let (counts, to) = (Arc::clone(&asked), client.clone());
        let answers = tokio::spawn(async move {
            while let Some(message) = inbox.next().await {
                let kind = message
                    .subject
                    .split('.')
                    .nth(2)
                    .unwrap_or_default()
                    .to_owned();
                let reply = message.reply.zip(answer(&kind));
                *counts
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .entry(kind)
                    .or_default() += 1;
                if let Some((reply, said)) = reply {
                    let _ = to.publish(reply, said).await;
                }
            }
        });
        let (client, subject) = (client.clone(), subjects.beat(&beat.worker));
        let beat = Bytes::from(serde_json::to_vec(beat).expect("a message"));
        let beats = tokio::spawn(async move {
            loop {
                let _ = client.publish(subject.clone(), beat.clone()).await;
                tokio::time::sleep(BEAT_EVERY).await;
            }
        });
        Self {
            beats,
            answers,
            asked,
        }
    }

    /// How often it was asked for this.
    pub fn asked(&self, kind: &str) -> usize {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.get(kind).copied().unwrap_or(0)
    }
}

impl Drop for Forged {
    fn drop(&mut self) {
        self.beats.abort();
        self.answers.abort();
    }
}
