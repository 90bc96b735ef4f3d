//! The wire to the bus as its users see it: a NATS connection, or what a simulation puts in its place.
//!
//! The one seam between Baton and its bus. Everything said over it is in NATS's own words (subjects, replies, no
//! responders), so that what runs in the simulation is what runs over NATS.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_nats::{Client, Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::answers::Answers;

/// How long a request without a deadline of its own waits: NATS's default.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What carries messages where there is no NATS server. It decides what becomes of each.
pub trait Carrier: Send + Sync {
    /// Takes a message that somebody sends. Where nobody listens and there is a reply subject, it sends NATS's
    /// `no responders` there.
    fn publish(&self, subject: Subject, reply: Option<Subject>, payload: Bytes);

    /// Everything sent to subjects that match this one from now on, for as long as the receiver lives.
    fn subscribe(&self, subject: Subject) -> mpsc::UnboundedReceiver<Message>;

    /// A subject for one answer.
    fn new_inbox(&self) -> Subject;

    /// Whether the bus is there.
    fn is_connected(&self) -> bool;

    /// Largest payload that it carries.
    fn max_payload(&self) -> usize;
}

/// A wire to the bus. Clones share it.
#[derive(Clone)]
pub struct Wire(Backend);

#[derive(Clone)]
enum Backend {
    Nats(Client, Arc<Answers>),
    Carrier(Arc<dyn Carrier>),
}

/// Why a message was not sent, or a subscription not made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireError(String);

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// Nobody listens there.
    NoResponders,
    /// No answer in time.
    TimedOut,
    /// Over the bus's bound.
    TooLarge,
    /// The wire failed.
    Broken(String),
}

impl Wire {
    /// A wire over something else than NATS.
    pub fn over(carrier: Arc<dyn Carrier>) -> Self {
        Self(Backend::Carrier(carrier))
    }

    /// Sends a message. Waits only where the connection's queue is full.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn publish(
        &self,
        subject: impl Into<Subject>,
        payload: Bytes,
    ) -> Result<(), WireError> {
        match &self.0 {
            Backend::Nats(client, _) => Ok(client.publish(subject.into(), payload).await?),
            Backend::Carrier(carrier) => {
                carrier.publish(subject.into(), None, payload);
                Ok(())
            }
        }
    }

    /// Sends a message and waits for its answer, as long as NATS does by default.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(
        &self,
        subject: impl Into<Subject>,
        payload: Bytes,
    ) -> Result<Message, RequestError> {
        self.request_within(subject, payload, REQUEST_TIMEOUT).await
    }

    /// Sends a message and waits for its answer, for at most `allowed`.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request_within(
        &self,
        subject: impl Into<Subject>,
        payload: Bytes,
        allowed: Duration,
    ) -> Result<Message, RequestError> {
        let carrier = match &self.0 {
            Backend::Nats(_, answers) => {
                return answers.request(subject.into(), payload, allowed).await;
            }
            Backend::Carrier(carrier) => carrier,
        };
        if payload.len() > carrier.max_payload() {
            return Err(RequestError::TooLarge);
        }
        let inbox = carrier.new_inbox();
        let mut answers = carrier.subscribe(inbox.clone());
        carrier.publish(subject.into(), Some(inbox), payload);
        match timeout(allowed, answers.recv()).await {
            Ok(Some(message)) if message.status == Some(StatusCode::NO_RESPONDERS) => {
                Err(RequestError::NoResponders)
            }
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(RequestError::Broken("the wire is closed".to_owned())),
            Err(_) => Err(RequestError::TimedOut),
        }
    }

    /// Everything sent to subjects that match this one.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn subscribe(&self, subject: impl Into<Subject>) -> Result<Subscription, WireError> {
        Ok(Subscription(match &self.0 {
            Backend::Nats(client, _) => {
                Source::Nats(Box::new(client.subscribe(subject.into()).await?))
            }
            Backend::Carrier(carrier) => Source::Carrier(carrier.subscribe(subject.into())),
        }))
    }

    /// Waits until everything sent so far is on its way.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn flush(&self) -> Result<(), WireError> {
        match &self.0 {
            Backend::Nats(client, _) => Ok(client.flush().await?),
            Backend::Carrier(_) => Ok(()),
        }
    }

    /// Ends subscriptions, sends what is left and closes the connection.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn drain(&self) -> Result<(), WireError> {
        match &self.0 {
            Backend::Nats(client, _) => Ok(client.drain().await?),
            Backend::Carrier(_) => Ok(()),
        }
    }

    /// Whether the bus is there at this moment.
    pub fn is_connected(&self) -> bool {
        match &self.0 {
            Backend::Nats(client, _) => {
                client.connection_state() == async_nats::connection::State::Connected
            }
            Backend::Carrier(carrier) => carrier.is_connected(),
        }
    }

    /// Largest payload that the bus carries.
    pub fn max_payload(&self) -> usize {
        match &self.0 {
            Backend::Nats(client, _) => client.max_payload(),
            Backend::Carrier(carrier) => carrier.max_payload(),
        }
    }
}

impl From<Client> for Wire {
    /// Runs inside a tokio runtime, which reads the answers to requests.
    fn from(client: Client) -> Self {
        let answers = Arc::new(Answers::new(client.clone()));
        Self(Backend::Nats(client, answers))
    }
}

/// What is sent to one subject, as it comes.
pub struct Subscription(Source);

enum Source {
    Nats(Box<Subscriber>),
    Carrier(mpsc::UnboundedReceiver<Message>),
}

impl Subscription {
    /// Takes no more messages than those that the server has sent, and ends after them.
    ///
    /// # Errors
    /// [`WireError`].
    pub async fn drain(&mut self) -> Result<(), WireError> {
        match &mut self.0 {
            Source::Nats(subscriber) => subscriber
                .drain()
                .await
                .map_err(|error| WireError(error.to_string())),
            Source::Carrier(messages) => {
                messages.close();
                Ok(())
            }
        }
    }
}

impl From<Subscriber> for Subscription {
    fn from(subscriber: Subscriber) -> Self {
        Self(Source::Nats(Box::new(subscriber)))
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        match &mut self.0 {
            Source::Nats(subscriber) => subscriber.poll_next_unpin(context),
            Source::Carrier(messages) => messages.poll_recv(context),
        }
    }
}

macro_rules! wire_errors {
    ($($kind:ty),*) => {$(
        impl From<$kind> for WireError {
            fn from(error: $kind) -> Self {
                Self(error.to_string())
            }
        }
    )*};
}

wire_errors!(
    async_nats::PublishError,
    async_nats::SubscribeError,
    async_nats::client::FlushError,
    async_nats::client::DrainError
);

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WireError {}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoResponders => f.write_str("nobody listens there"),
            Self::TimedOut => f.write_str("no answer came in time"),
            Self::TooLarge => f.write_str("the message is over the bus's bound"),
            Self::Broken(detail) => f.write_str(detail),
        }
    }
}

impl std::error::Error for RequestError {}
