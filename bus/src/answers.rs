//! Answers to requests over NATS: one inbox for all requests of a connection, which forgets those that were given up.
//!
//! The client's own inbox for requests keeps an entry for each that never had an answer, and an inbox for each request costs a
//! subscription, which the server makes and ends again. Here a request has an entry in a map for as long as somebody waits for it.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::client::PublishErrorKind;
use async_nats::{Client, Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, oneshot};
use tokio::task::{AbortHandle, unconstrained};
use tokio::time::timeout;

use crate::RequestError;

/// Requests that may wait for an answer at a time: many times as many as an API server has in flight. Beyond it they fail.
const WAITING_MAX: usize = 1 << 16;

/// A connection's requests.
pub(crate) struct Answers {
    client: Client,
    /// What the inbox's subjects begin with, the dot before a request's token included.
    prefix: String,
    /// Makes tokens of numbers, so that a worker that sees its own jobs' tokens cannot guess those of others' jobs.
    tokens: RandomState,
    numbers: AtomicU64,
    waiting: Arc<Waiting>,
    /// The inbox is subscribed to by the first request, and read on the runtime that the connection was made on.
    inbox: OnceCell<AbortHandle>,
    runtime: Handle,
}

/// Who waits for an answer, by token; `None` once the connection is closed for good.
#[derive(Default)]
struct Waiting(Mutex<Option<HashMap<u64, oneshot::Sender<Message>>>>);

impl Answers {
    /// For this connection. Runs inside the runtime that is to read the inbox.
    pub(crate) fn new(client: Client) -> Self {
        Self {
            prefix: format!("{}.", client.new_inbox()),
            client,
            tokens: RandomState::new(),
            numbers: AtomicU64::new(0),
            waiting: Arc::new(Waiting(Mutex::new(Some(HashMap::new())))),
            inbox: OnceCell::new(),
            runtime: Handle::current(),
        }
    }

    /// Sends a message and waits for its answer, for at most `allowed`, the wait for the connection to take it included. Nothing
    /// is left of it when this is dropped.
    pub(crate) async fn request(
        &self,
        subject: Subject,
        payload: Bytes,
        allowed: Duration,
    ) -> Result<Message, RequestError> {
        let answer = self.ask(subject, payload);
        let message = timeout(allowed, answer)
            .await
            .map_err(|_| RequestError::TimedOut)??;
        match message.status {
            Some(StatusCode::NO_RESPONDERS) => Err(RequestError::NoResponders),
            _ => Ok(message),
        }
    }

    async fn ask(&self, subject: Subject, payload: Bytes) -> Result<Message, RequestError> {
        self.inbox.get_or_try_init(|| self.subscribe()).await?;
        let (token, answer) = self.expect()?;
        let _forget = Forget {
            waiting: &self.waiting,
            token,
        };
        let reply = format!("{}{token:016x}", self.prefix);
        let sent = self.client.publish_with_reply(subject, reply, payload);
        sent.await.map_err(|error| match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => RequestError::TooLarge,
            _ => RequestError::Broken(error.to_string()),
        })?;
        answer.await.map_err(|_| closed())
    }

    /// The server hears of the inbox before it hears of any request: both go over one connection.
    async fn subscribe(&self) -> Result<AbortHandle, RequestError> {
        let inbox = self.client.subscribe(format!("{}*", self.prefix)).await;
        let inbox = inbox.map_err(|error| RequestError::Broken(error.to_string()))?;
        let deliver = deliver(inbox, Arc::clone(&self.waiting), self.prefix.len());
        Ok(self.runtime.spawn(unconstrained(deliver)).abort_handle())
    }

    /// Makes a place for an answer.
    fn expect(&self) -> Result<(u64, oneshot::Receiver<Message>), RequestError> {
        let (sender, answer) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        let waiting = waiting.as_mut().ok_or_else(closed)?;
        if waiting.len() >= WAITING_MAX {
            let detail = format!("{WAITING_MAX} requests wait for an answer already");
            return Err(RequestError::Broken(detail));
        }
        loop {
            let token = self.tokens.hash_one(self.numbers.fetch_add(1, Relaxed));
            if let Entry::Vacant(place) = waiting.entry(token) {
                place.insert(sender);
                return Ok((token, answer));
            }
        }
    }
}

impl Drop for Answers {
    /// Ends the subscription too, which the task owns.
    fn drop(&mut self) {
        if let Some(inbox) = self.inbox.get() {
            inbox.abort();
        }
    }
}

/// Hands answers out until the connection is closed. What nobody waits for any more is dropped.
async fn deliver(mut inbox: Subscriber, waiting: Arc<Waiting>, prefix: usize) {
    while let Some(message) = inbox.next().await {
        let token = message.subject.get(prefix..).unwrap_or_default();
        let Ok(token) = u64::from_str_radix(token, 16) else {
            continue;
        };
        let sender = waiting.lock().as_mut().and_then(|all| all.remove(&token));
        if let Some(sender) = sender {
            // Whoever asked may have left at this moment.
            let _ = sender.send(message);
        }
    }
    waiting.lock().take();
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Message>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is over, answered or not, has no place any more.
struct Forget<'a> {
    waiting: &'a Waiting,
    token: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.lock().as_mut() {
            waiting.remove(&self.token);
        }
    }
}

fn closed() -> RequestError {
    RequestError::Broken("the wire is closed".to_owned())
}
