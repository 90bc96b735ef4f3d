//! The NATS connection: subscriptions, and the one task that publishes.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, Message, Subject};
use baton_bus::{BusConfig, ConnectionLog, Intake, Seldom, Wire, mend_pause};
use baton_protocol::limits::MESSAGE_BYTES_MAX;
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    DecodeReply, Incarnation, PROTOCOL_VERSION, PrefillReply, ProtocolError, Refusal, Versioned,
    WorkerId, encode,
};
use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::WorkerError;
use crate::engine_thread::EngineWaker;
use crate::frames::{TokenOutbox, messages};

/// Messages the NATS client may hold while the server is away. Beyond it, publishing waits.
const CLIENT_CAPACITY: usize = 256;

/// Control messages (answers, beats) that may wait for the publisher. Beyond it they are dropped, and
/// what they would have handed out is taken back.
const OUTBOX_CAPACITY: usize = 4_096;

/// Connects. The receiver says whether the server is there; the client repairs later losses by itself.
pub(crate) async fn connect(
    config: &BusConfig,
    worker: &WorkerId,
) -> Result<(Client, watch::Receiver<bool>), WorkerError> {
    let (up, is_up) = watch::channel(true);
    let log = Arc::new(ConnectionLog::new(config));
    let slow = Arc::new(Mutex::new(Seldom::new(Duration::from_secs(1))));
    let options = || {
        let (up, log, slow) = (up.clone(), Arc::clone(&log), Arc::clone(&slow));
        ConnectOptions::new()
            .name(format!("baton worker {worker}"))
            .custom_inbox_prefix(Cluster::inbox_prefix(worker))
            .client_capacity(CLIENT_CAPACITY)
            .ping_interval(Duration::from_secs(5))
            .reconnect_delay_callback(mend_pause)
            .event_callback(move |event| {
                let mut slow = slow.lock().unwrap_or_else(PoisonError::into_inner);
                let is_slow = matches!(event, Event::SlowConsumer(_));
                if !is_slow || slow.pass(Instant::now()).is_some() {
                    log.note(&event);
                }
                match event {
                    Event::Connected => up.send_replace(true),
                    Event::Disconnected | Event::Closed => up.send_replace(false),
                    _ => true,
                };
                std::future::ready(())
            })
    };
    let client = config.connect(options).await.map_err(WorkerError::Bus)?;
    Ok((client, is_up))
}

/// Bytes of jobs, aborts and releases that may wait for the desk, which takes one in microseconds. A prompt of a million tokens
/// has 5 MB; what finds no room is refused.
const INBOX_BYTES_MAX: usize = 64 << 20;

/// When it may be worth asking a worker again that is flooded.
const UNREAD_RETRY_MS: u32 = 1_000;

/// Bytes of beats, and of hellos, that may wait. They are repeated.
const BEATS_BYTES_MAX: usize = 4 << 20;

/// What a worker listens to.
pub(crate) struct Subscriptions {
    /// Jobs, aborts and releases for this worker, in the order they were sent.
    pub(crate) inbox: Intake,
    /// Other workers' beats, for who pulls from them.
    beats: Option<Intake>,
    api_beats: Intake,
    hello: Intake,
    /// Whose turn it was last.
    turn: u8,
}

/// What was heard.
pub(crate) enum Heard {
    Inbox(Message),
    Beat(Message),
    ApiBeat(Message),
    Hello,
}

impl Subscriptions {
    /// Subscribes, and waits until the server knows. `with_beats`: to other workers' beats too, of which there are as many a second
    /// as there are workers.
    pub(crate) async fn new(
        wire: &Wire,
        cluster: &Cluster,
        worker: &WorkerId,
        with_beats: bool,
        outbox: &Outbox,
    ) -> Result<Self, WorkerError> {
        let refused = |detail: String| WorkerError::System {
            what: "subscribing on the bus",
            detail,
        };
        let subscribe = async |subject: String| {
            wire.subscribe(subject)
                .await
                .map_err(|error| refused(error.to_string()))
        };
        let (outbox, prefill, decode) = (
            outbox.clone(),
            cluster.prefill(worker),
            cluster.decode(worker),
        );
        let refuse = move |message: &Message| {
            refuse_unread(&outbox, message, &prefill, &decode);
        };
        let inbox = subscribe(cluster.inbox(worker)).await?;
        let beats = async |subject: String| {
            let subscriber = subscribe(subject).await?;
            Ok(Intake::new(subscriber, BEATS_BYTES_MAX, |_| {}))
        };
        let all = Self {
            inbox: Intake::new(inbox, INBOX_BYTES_MAX, refuse),
            beats: match with_beats {
                true => Some(beats(cluster.beats()).await?),
                false => None,
            },
            api_beats: beats(cluster.api_beats()).await?,
            hello: beats(cluster.hello()).await?,
            turn: 0,
        };
        wire.flush()
            .await
            .map_err(|error| refused(error.to_string()))?;
        Ok(all)
    }

    /// A message that is there, of each subscription in turn.
    pub(crate) fn try_next(&mut self) -> Option<Heard> {
        for _ in 0..4 {
            self.turn = (self.turn + 1) % 4;
            let heard = match self.turn {
                0 => self.inbox.try_next().map(Heard::Inbox),
                1 => self
                    .beats
                    .as_mut()
                    .and_then(Intake::try_next)
                    .map(Heard::Beat),
                2 => self.api_beats.try_next().map(Heard::ApiBeat),
                _ => self.hello.try_next().map(|_| Heard::Hello),
            };
            if heard.is_some() {
                return heard;
            }
        }
        None
    }

    /// The next message, each subscription having its turn: a flood on one starves no other. Nothing is lost when this is dropped.
    ///
    /// # Errors
    /// If the connection is closed for good.
    pub(crate) async fn next(&mut self) -> Result<Heard, WorkerError> {
        // In order, so that a run can be repeated; `try_next`, which follows each message, takes turns.
        let heard = tokio::select! {
            biased;
            message = self.inbox.next() => message.map(Heard::Inbox),
            message = next_beat(&mut self.beats) => message.map(Heard::Beat),
            message = self.api_beats.next() => message.map(Heard::ApiBeat),
            message = self.hello.next() => message.map(|_| Heard::Hello),
        };
        heard.ok_or_else(|| WorkerError::System {
            what: "listening on the bus",
            detail: "the connection was closed".to_owned(),
        })
    }
}

/// The next beat; none ever comes to who does not listen to them.
async fn next_beat(beats: &mut Option<Intake>) -> Option<Message> {
    match beats {
        Some(beats) => beats.next().await,
        None => std::future::pending().await,
    }
}

/// Says to whoever waits for an answer that there is no room, and no time to read what came.
fn refuse_unread(outbox: &Outbox, message: &Message, prefill: &str, decode: &str) {
    let Some(reply) = message.reply.clone() else {
        return;
    };
    let (v, subject) = (PROTOCOL_VERSION, message.subject.as_str());
    let refusal = Refusal::Busy {
        retry_after_ms: UNREAD_RETRY_MS,
    };
    // If this finds no room either, the asker's deadline says it.
    let _ = if subject == prefill {
        outbox.send(reply, &PrefillReply::Refused { v, refusal })
    } else if subject == decode {
        outbox.send(reply, &DecodeReply::Refused { v, refusal })
    } else {
        Ok(())
    };
}

/// Where control messages are put without waiting.
#[derive(Clone)]
pub(crate) struct Outbox {
    sender: mpsc::Sender<(Subject, Bytes)>,
    wire: Wire,
}

impl Outbox {
    pub(crate) fn new(wire: Wire) -> (Self, mpsc::Receiver<(Subject, Bytes)>) {
        let (sender, receiver) = mpsc::channel(OUTBOX_CAPACITY);
        (Self { sender, wire }, receiver)
    }

    /// Hands a message to the publisher.
    ///
    /// # Errors
    /// Why it cannot be sent.
    pub(crate) fn send<M: Versioned>(
        &self,
        subject: impl Into<Subject>,
        message: &M,
    ) -> Result<(), Unsent> {
        let too_large = |bytes| Unsent::TooLarge {
            message: M::NAME,
            bytes,
            bytes_max: self.bytes_max(),
        };
        let bytes = encode(message).map_err(|error| match error {
            ProtocolError::TooLarge { bytes, .. } => too_large(bytes),
            other => Unsent::Unwritable(other),
        })?;
        if bytes.len() > self.bytes_max() {
            return Err(too_large(bytes.len()));
        }
        self.sender
            .try_send((subject.into(), bytes.into()))
            .map_err(|_| Unsent::NoRoom)
    }

    /// Largest message that the bus carries, in bytes.
    pub(crate) fn bytes_max(&self) -> usize {
        bytes_max(&self.wire)
    }
}

/// Why a message was not sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unsent {
    /// It is over the bus's bound, and would be again.
    TooLarge {
        message: &'static str,
        bytes: usize,
        bytes_max: usize,
    },
    /// The bus has been away for so long that no more messages may wait for it.
    NoRoom,
    /// It cannot be written as JSON.
    Unwritable(ProtocolError),
}

impl fmt::Display for Unsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge {
                message,
                bytes,
                bytes_max,
            } => write!(
                f,
                "a {message} message of {bytes} bytes is over the bus's bound of {bytes_max} bytes"
            ),
            Self::NoRoom => f.write_str("the bus takes no messages"),
            Self::Unwritable(error) => write!(f, "{error}"),
        }
    }
}

/// Largest message the server takes.
pub(crate) fn bytes_max(wire: &Wire) -> usize {
    wire.max_payload().min(MESSAGE_BYTES_MAX)
}

/// The task that publishes. Control messages go first, so a job is admitted before its tokens come.
/// Ends when every [`Outbox`] is gone, after sending what is left.
pub(crate) struct Publisher {
    pub(crate) wire: Wire,
    pub(crate) cluster: Cluster,
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: Incarnation,
    pub(crate) control: mpsc::Receiver<(Subject, Bytes)>,
    pub(crate) tokens: Arc<TokenOutbox>,
    pub(crate) is_up: watch::Receiver<bool>,
    pub(crate) engine: EngineWaker,
}

impl Publisher {
    pub(crate) async fn run(mut self) {
        loop {
            // While the server is away, tokens merge in their outbox instead of piling up as messages.
            let is_up = &mut self.is_up;
            let tokens = &self.tokens;
            let next_tokens = async move {
                let _ = is_up.wait_for(|up| *up).await;
                tokens.take().await
            };
            tokio::select! {
                biased;
                control = self.control.recv() => match control {
                    Some((subject, bytes)) => self.publish(subject, bytes).await,
                    None => break,
                },
                taken = next_tokens => {
                    if taken.was_full {
                        self.engine.wake();
                    }
                    for (api_server, items) in taken.servers {
                        self.publish_items(&api_server, items).await;
                    }
                }
            }
        }
        for (api_server, items) in self
            .tokens
            .try_take()
            .into_iter()
            .flat_map(|taken| taken.servers)
        {
            self.publish_items(&api_server, items).await;
        }
        if let Err(error) = self.wire.flush().await {
            tracing::warn!(%error, "the last messages may not have reached the bus");
        }
    }

    async fn publish_items(
        &self,
        api_server: &baton_protocol::ApiServerId,
        items: Vec<baton_protocol::FrameItem>,
    ) {
        let subject = Subject::from(self.cluster.tokens(api_server, &self.worker));
        for bytes in messages(&self.worker, self.incarnation, items, bytes_max(&self.wire)) {
            self.publish(subject.clone(), bytes.into()).await;
        }
    }

    async fn publish(&self, subject: Subject, bytes: Bytes) {
        if let Err(error) = self.wire.publish(subject.clone(), bytes).await {
            tracing::warn!(%subject, %error, "a message was not published");
        }
    }
}
