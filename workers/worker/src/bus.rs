//! The NATS connection: subscriptions, and the one task that publishes.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, Subject, Subscriber};
use baton_bus::{BusConfig, ConnectionLog, mend_pause};
use baton_protocol::limits::MESSAGE_BYTES_MAX;
use baton_protocol::subjects::Cluster;
use baton_protocol::{Incarnation, Versioned, WorkerId, encode};
use bytes::Bytes;
use tokio::sync::{mpsc, watch};

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
    let options = || {
        let (up, log) = (up.clone(), log.clone());
        ConnectOptions::new()
            .name(format!("baton worker {worker}"))
            .custom_inbox_prefix(Cluster::inbox_prefix(worker))
            .client_capacity(CLIENT_CAPACITY)
            .ping_interval(Duration::from_secs(5))
            .reconnect_delay_callback(mend_pause)
            .event_callback(move |event| {
                log.note(&event);
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

/// What a worker listens to.
pub(crate) struct Subscriptions {
    /// Jobs, aborts and releases for this worker, in the order they were sent.
    pub(crate) inbox: Subscriber,
    pub(crate) beats: Subscriber,
    pub(crate) api_beats: Subscriber,
    pub(crate) hello: Subscriber,
}

impl Subscriptions {
    /// Subscribes, and waits until the server knows.
    pub(crate) async fn new(
        client: &Client,
        cluster: &Cluster,
        worker: &WorkerId,
    ) -> Result<Self, WorkerError> {
        let refused = |detail: String| WorkerError::System {
            what: "subscribing on the bus",
            detail,
        };
        let subscribe = async |subject: String| {
            client
                .subscribe(subject)
                .await
                .map_err(|error| refused(error.to_string()))
        };
        let all = Self {
            inbox: subscribe(cluster.inbox(worker)).await?,
            beats: subscribe(cluster.beats()).await?,
            api_beats: subscribe(cluster.api_beats()).await?,
            hello: subscribe(cluster.hello()).await?,
        };
        client
            .flush()
            .await
            .map_err(|error| refused(error.to_string()))?;
        Ok(all)
    }

    /// Takes no more messages, of the inbox too: [`crate::desk::Desk::answer_latecomers`] has emptied it.
    pub(crate) async fn close(&mut self) {
        for subscriber in [
            &mut self.inbox,
            &mut self.beats,
            &mut self.api_beats,
            &mut self.hello,
        ] {
            if let Err(error) = subscriber.unsubscribe().await {
                tracing::debug!(%error, "unsubscribing");
            }
        }
    }
}

/// Where control messages are put without waiting.
#[derive(Clone)]
pub(crate) struct Outbox {
    sender: mpsc::Sender<(Subject, Bytes)>,
    client: Client,
}

impl Outbox {
    pub(crate) fn new(client: Client) -> (Self, mpsc::Receiver<(Subject, Bytes)>) {
        let (sender, receiver) = mpsc::channel(OUTBOX_CAPACITY);
        (Self { sender, client }, receiver)
    }

    /// Hands a message to the publisher.
    ///
    /// # Errors
    /// Why it cannot be sent: too large for the bus, or the bus has been away for too long.
    pub(crate) fn send<M: Versioned>(
        &self,
        subject: impl Into<Subject>,
        message: &M,
    ) -> Result<(), String> {
        let bytes = encode(message).map_err(|error| error.to_string())?;
        let bytes_max = bytes_max(&self.client);
        if bytes.len() > bytes_max {
            let name = M::NAME;
            return Err(format!(
                "a {name} message of {} bytes is over the bus's bound of {bytes_max} bytes: raise max_payload",
                bytes.len()
            ));
        }
        self.sender
            .try_send((subject.into(), bytes.into()))
            .map_err(|_| "the bus takes no messages".to_owned())
    }
}

/// Largest message the server takes.
pub(crate) fn bytes_max(client: &Client) -> usize {
    client.max_payload().min(MESSAGE_BYTES_MAX)
}

/// The task that publishes. Control messages go first, so a job is admitted before its tokens come.
/// Ends when every [`Outbox`] is gone, after sending what is left.
pub(crate) struct Publisher {
    pub(crate) client: Client,
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
        if let Err(error) = self.client.flush().await {
            tracing::warn!(%error, "the last messages may not have reached the bus");
        }
    }

    async fn publish_items(
        &self,
        api_server: &baton_protocol::ApiServerId,
        items: Vec<baton_protocol::FrameItem>,
    ) {
        let subject = Subject::from(self.cluster.tokens(api_server, &self.worker));
        for bytes in messages(
            &self.worker,
            self.incarnation,
            items,
            bytes_max(&self.client),
        ) {
            self.publish(subject.clone(), bytes.into()).await;
        }
    }

    async fn publish(&self, subject: Subject, bytes: Bytes) {
        if let Err(error) = self.client.publish(subject.clone(), bytes).await {
            tracing::warn!(%subject, %error, "a message was not published");
        }
    }
}
