//! Listening to the bus: what is said there are the events that tests wait for.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Client;
use baton_protocol::{Beat, TokenFrame};
use bytes::Bytes;
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::nats::settled;
use crate::wait::{PATIENCE, within};

/// One message, as it passed.
#[derive(Clone, Debug)]
pub struct Message {
    /// Place in the order in which the tap heard it.
    pub index: usize,
    /// When the tap heard it.
    pub at: Instant,
    /// Its subject.
    pub subject: String,
    /// Where its answer goes.
    pub reply: Option<String>,
    /// Its JSON.
    pub payload: Bytes,
}

impl Message {
    /// Its kind and whom it concerns, if it is one of Baton's: `("prefill", "context-0")`.
    pub fn kind(&self) -> Option<(&str, &str)> {
        let mut tokens = self.subject.split('.');
        if tokens.next()? != baton_protocol::subjects::ROOT {
            return None;
        }
        tokens.next()?;
        Some((tokens.next()?, tokens.next().unwrap_or_default()))
    }

    /// Whether it is of this kind.
    pub fn is(&self, kind: &str) -> bool {
        self.kind().is_some_and(|(its, _)| its == kind)
    }

    /// Whom it concerns.
    ///
    /// # Panics
    /// If it is none of Baton's.
    pub fn whom(&self) -> String {
        self.kind().expect("a message of Baton").1.to_owned()
    }

    /// What it says.
    ///
    /// # Panics
    /// If it does not say a `T`.
    pub fn read<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.payload).unwrap_or_else(|e| {
            let text = String::from_utf8_lossy(&self.payload);
            panic!("{}: {e}: {text}", self.subject)
        })
    }
}

/// Hears everything on the bus and forgets nothing.
pub struct Tap {
    client: Client,
    heard: Arc<Heard>,
    task: JoinHandle<()>,
}

struct Heard {
    messages: Mutex<Vec<Message>>,
    more: Notify,
    /// Messages with a longer payload are not kept.
    bytes_max: AtomicUsize,
}

impl Tap {
    /// Joins the bus.
    ///
    /// # Panics
    /// If it cannot.
    pub async fn join(uri: &str) -> Self {
        let client = async_nats::ConnectOptions::new()
            .retry_on_initial_connect()
            // a test that floods the bus must not lose messages here
            .subscription_capacity(1 << 20)
            .connect(uri)
            .await
            .unwrap_or_else(|e| panic!("cannot join {uri}: {e}"));
        let mut subscription = client
            .subscribe(">")
            .await
            .unwrap_or_else(|e| panic!("cannot subscribe: {e}"));
        settled(&client).await;
        let heard = Arc::new(Heard {
            messages: Mutex::default(),
            more: Notify::new(),
            bytes_max: AtomicUsize::new(usize::MAX),
        });
        let ours = Arc::clone(&heard);
        let task = tokio::spawn(async move {
            while let Some(message) = subscription.next().await {
                if message.payload.len() > ours.bytes_max.load(Relaxed) {
                    continue;
                }
                let mut messages = ours.messages.lock().unwrap_or_else(PoisonError::into_inner);
                let index = messages.len();
                messages.push(Message {
                    index,
                    at: Instant::now(),
                    subject: message.subject.to_string(),
                    reply: message.reply.map(|reply| reply.to_string()),
                    payload: message.payload,
                });
                drop(messages);
                ours.more.notify_waiters();
            }
        });
        Self {
            client,
            heard,
            task,
        }
    }

    /// The connection.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// From now on messages with a longer payload are not kept: for tests that send so many that this process would not
    /// hold them all.
    pub fn keep_small(&self, bytes_max: usize) {
        self.heard.bytes_max.store(bytes_max, Relaxed);
    }

    /// How many messages were heard so far: the index of the next one.
    pub fn now(&self) -> usize {
        self.messages(|all| all.len())
    }

    /// All messages from `from` on that `wanted` picks.
    pub fn heard<T>(&self, from: usize, mut wanted: impl FnMut(&Message) -> Option<T>) -> Vec<T> {
        self.messages(|all| all[from..].iter().filter_map(&mut wanted).collect())
    }

    /// The first message from `from` on that `wanted` picks, waited for.
    ///
    /// # Panics
    /// After `deadline`.
    pub async fn wait<T>(
        &self,
        what: &str,
        from: usize,
        deadline: Duration,
        mut wanted: impl FnMut(&Message) -> Option<T>,
    ) -> T {
        let mut next = from;
        within(what, deadline, async {
            loop {
                let more = self.heard.more.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                let found = self.messages(|all| {
                    let found = all[next.min(all.len())..].iter().find_map(&mut wanted);
                    next = all.len();
                    found
                });
                match found {
                    Some(found) => return found,
                    None => more.await,
                }
            }
        })
        .await
    }

    /// The first message of this kind from `from` on.
    ///
    /// # Panics
    /// After `deadline`.
    pub async fn wait_kind(&self, kind: &str, from: usize, deadline: Duration) -> Message {
        self.wait(&format!("a {kind} message"), from, deadline, |message| {
            message.is(kind).then(|| message.clone())
        })
        .await
    }

    /// The first message with generated tokens. Others of that kind say only that a worker still has a job.
    pub async fn wait_tokens(&self, from: usize, deadline: Duration) -> Message {
        self.wait("generated tokens", from, deadline, |message| {
            let generated = message.is("tokens")
                && message
                    .read::<TokenFrame>()
                    .items
                    .iter()
                    .any(|item| !item.tokens.0.is_empty());
            generated.then(|| message.clone())
        })
        .await
    }

    /// The answer to a request.
    ///
    /// # Panics
    /// After `deadline`, and if the message wants no answer.
    pub async fn answer(&self, to: &Message, deadline: Duration) -> Message {
        let inbox = to.reply.clone().expect("a message that wants an answer");
        let what = format!("the answer to {}", to.subject);
        self.wait(&what, to.index, deadline, |message| {
            (message.subject == inbox).then(|| message.clone())
        })
        .await
    }

    /// Waits until everything was heard that was said before this call.
    ///
    /// # Panics
    /// If the bus is down for long.
    pub async fn catch_up(&self) {
        let from = self.now();
        let marker = format!("tests.caught-up.{from}");
        self.client
            .publish(marker.clone(), Bytes::new())
            .await
            .unwrap_or_else(|e| panic!("cannot publish: {e}"));
        self.wait("the tap to catch up", from, PATIENCE, |message| {
            (message.subject == marker).then_some(())
        })
        .await;
    }

    /// Whether a request was answered so far.
    pub fn answered(&self, to: &Message) -> bool {
        self.messages(|all| {
            all[to.index..]
                .iter()
                .any(|message| Some(&message.subject) == to.reply.as_ref())
        })
    }

    /// The beats heard from `from` on, oldest first.
    pub fn beats(&self, from: usize) -> Vec<Beat> {
        self.heard(from, |message| message.is("beat").then(|| message.read()))
    }

    fn messages<T>(&self, look: impl FnOnce(&Vec<Message>) -> T) -> T {
        look(
            &self
                .heard
                .messages
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.task.abort();
    }
}
