//! The NATS side: requests with deadlines, the one subscription for tokens, and membership beats.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_nats::{Client, ConnectOptions, Event as NatsEvent, RequestErrorKind};
use baton_bus::{BusConfig, ConnectionLog, mend_pause};
use baton_protocol::subjects::{Cluster, speaker};
use baton_protocol::{
    Abort, ApiBeat, ApiServerId, Beat, DecodeJob, DecodeReply, Hello, Incarnation,
    PROTOCOL_VERSION, PrefillJob, PrefillReply, ProtocolError, RequestId, TokenFrame, Versioned,
    decode, encode, limits,
};
use futures::{FutureExt, StreamExt};
use tokio::sync::Notify;

use crate::error::ApiServerError;
use crate::inbox::{Event, Registry};
use crate::lifecycle::{NoReply, Target};
use crate::membership::GONE_AFTER;

/// Messages a subscription may hold before NATS drops some. Drops are noticed by their numbers.
const SUBSCRIPTION_CAPACITY: usize = 65_536;

/// What beats and connection events are reported to.
pub trait Watcher: Send + Sync + 'static {
    /// A worker beat.
    fn beat(&self, beat: Beat, now: Instant);
    /// An API server beat.
    fn api_beat(&self, beat: ApiBeat, now: Instant);
    /// The bus is there, for the first time or again: what was said meanwhile is lost.
    fn bus_back(&self, now: Instant);
    /// Time to look for who fell silent.
    fn sweep(&self, now: Instant);
    /// Generations in flight, for our own beat.
    fn in_flight(&self) -> u32;
    /// Messages that could not be read, or were dropped, by kind.
    fn bus_fault(&self, kind: &'static str);
}

/// The connection.
#[derive(Clone)]
pub struct Bus {
    client: Client,
    cluster: Cluster,
    name: ApiServerId,
    incarnation: Incarnation,
    runtime: tokio::runtime::Handle,
    connected: Arc<AtomicBool>,
    /// Told at each connection.
    back: Arc<Notify>,
}

impl Bus {
    /// Connects. Later breaks of the connection are mended in the background.
    ///
    /// # Errors
    /// [`ApiServerError::Bus`] if there is no server, or it refuses.
    pub async fn connect(
        config: &BusConfig,
        cluster: Cluster,
        name: ApiServerId,
        incarnation: Incarnation,
        registry: Arc<Registry>,
    ) -> Result<Self, ApiServerError> {
        let connected = Arc::new(AtomicBool::new(true));
        let back = Arc::new(Notify::new());
        let log = Arc::new(ConnectionLog::new(config));
        let options = || {
            let (flag, registry) = (Arc::clone(&connected), Arc::clone(&registry));
            let (log, back) = (Arc::clone(&log), Arc::clone(&back));
            ConnectOptions::new()
                .name(format!("baton api-server {name}"))
                .custom_inbox_prefix(Cluster::inbox_prefix(&name))
                .subscription_capacity(SUBSCRIPTION_CAPACITY)
                .client_capacity(8192)
                .ping_interval(Duration::from_secs(5))
                .reconnect_delay_callback(mend_pause)
                .event_callback(move |event| {
                    log.note(&event);
                    on_event(&event, &flag, &back, &registry);
                    std::future::ready(())
                })
        };
        let client = config.connect(options).await;
        let client = client.map_err(|error| ApiServerError::Bus(error.to_string()))?;
        Ok(Self {
            client,
            cluster,
            name,
            incarnation,
            runtime: tokio::runtime::Handle::current(),
            connected,
            back,
        })
    }

    /// Whether the connection stands.
    pub fn connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
            && self.client.connection_state() == async_nats::connection::State::Connected
    }

    /// Asks a context worker. The answer comes when the prompt has been run.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn prefill(
        &self,
        to: &Target,
        job: &PrefillJob,
        timeout: Duration,
    ) -> Result<PrefillReply, NoReply> {
        self.request(self.cluster.prefill(&to.worker), job, timeout)
            .await
    }

    /// Asks a decode worker. The answer comes at once.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn decode(
        &self,
        to: &Target,
        job: &DecodeJob,
        timeout: Duration,
    ) -> Result<DecodeReply, NoReply> {
        self.request(self.cluster.decode(&to.worker), job, timeout)
            .await
    }

    async fn request<M: Versioned, R: Versioned>(
        &self,
        subject: String,
        message: &M,
        timeout: Duration,
    ) -> Result<R, NoReply> {
        let payload = encode(message).map_err(|error| match error {
            ProtocolError::TooLarge { bytes, .. } => NoReply::TooLarge {
                bytes,
                bytes_max: limits::MESSAGE_BYTES_MAX,
            },
            other => NoReply::Broken(other.to_string()),
        })?;
        let bytes = payload.len();
        let request = async_nats::Request::new()
            .payload(payload.into())
            .timeout(Some(timeout));
        match self.client.send_request(subject, request).await {
            Ok(reply) => decode(&reply.payload).map_err(|error| NoReply::Broken(error.to_string())),
            Err(error) => Err(match error.kind() {
                RequestErrorKind::NoResponders => NoReply::NoResponders,
                RequestErrorKind::TimedOut => NoReply::TimedOut,
                RequestErrorKind::MaxPayloadExceeded => NoReply::TooLarge {
                    bytes,
                    bytes_max: self.client.max_payload(),
                },
                _ => NoReply::Broken(error.to_string()),
            }),
        }
    }

    /// Tells a worker to drop a request. Does not wait: it works from a destructor too. Whatever is sent
    /// after this call reaches the worker after the abort; a job sent anew would be dropped otherwise.
    pub fn abort(&self, target: &Target, request: RequestId, reason: &str) {
        let subject = self.cluster.abort(&target.worker);
        let abort = Abort {
            v: PROTOCOL_VERSION,
            request,
            reason: reason.to_owned(),
        };
        let Ok(payload) = encode(&abort) else { return };
        let client = self.client.clone();
        let send = async move {
            if let Err(error) = client.publish(subject.clone(), payload.into()).await {
                tracing::warn!(subject, %error, "abort not sent");
            }
        };
        // It ends at the first poll unless the connection's queue is full. Then order is lost, and a job
        // that is dropped for it comes back as failed.
        let mut send = Box::pin(tokio::task::unconstrained(send));
        if send.as_mut().now_or_never().is_none() {
            self.runtime.spawn(send);
        }
    }

    /// Subscribes to tokens and beats, asks everybody to beat, and serves both until the task is dropped.
    ///
    /// # Errors
    /// [`ApiServerError::Bus`] if a subscription fails.
    pub async fn serve<W: Watcher>(
        &self,
        registry: Arc<Registry>,
        watcher: Arc<W>,
    ) -> Result<Vec<tokio::task::JoinHandle<()>>, ApiServerError> {
        let fault = |error: &dyn std::fmt::Display| {
            ApiServerError::Bus(format!("NATS subscription: {error}"))
        };
        let subscribe = |subject: String| async move {
            self.client
                .subscribe(subject)
                .await
                .map_err(|error| fault(&error))
        };
        let mut tokens = subscribe(self.cluster.all_tokens(&self.name)).await?;
        let mut beats = subscribe(self.cluster.beats()).await?;
        let mut api_beats = subscribe(self.cluster.api_beats()).await?;
        let mut hellos = subscribe(self.cluster.hello()).await?;

        let (bus, on_tokens) = (self.clone(), Arc::clone(&watcher));
        let token_task = tokio::spawn(async move {
            while let Some(message) = tokens.next().await {
                match decode::<TokenFrame>(&message.payload) {
                    // NATS may let a worker send on its own subjects alone.
                    Ok(frame) if speaker(&message.subject) == frame.worker.as_str() => {
                        let (from, strays) = registry.dispatch(frame);
                        for request in strays {
                            bus.abort(&from, request, "it is over");
                        }
                    }
                    Ok(frame) => {
                        let (subject, worker) = (&message.subject, &frame.worker);
                        tracing::warn!(%subject, %worker, "a token frame in another worker's name");
                        on_tokens.bus_fault("frame_forged");
                    }
                    Err(error) => {
                        tracing::warn!(%error, "unreadable token frame");
                        on_tokens.bus_fault("frame_unreadable");
                        registry.broadcast(|| Event::FramesLost);
                    }
                }
            }
        });

        let bus = self.clone();
        let beat_task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(limits::BEAT_INTERVAL_MS));
            let mut sweep = tokio::time::interval(Duration::from_millis(250));
            let mut down: Option<Instant> = None;
            loop {
                tokio::select! {
                    () = bus.back.notified() => {
                        watcher.bus_back(Instant::now());
                        bus.hello().await;
                    }
                    Some(message) = beats.next() => match decode::<Beat>(&message.payload) {
                        Ok(beat) if speaker(&message.subject) == beat.worker.as_str() => {
                            watcher.beat(beat, Instant::now());
                        }
                        Ok(beat) => {
                            let (subject, worker) = (&message.subject, &beat.worker);
                            tracing::warn!(%subject, %worker, "a beat in another worker's name");
                            watcher.bus_fault("beat_forged");
                        }
                        Err(error) => {
                            tracing::warn!(subject = %message.subject, %error, "unreadable beat");
                            watcher.bus_fault("beat_unreadable");
                        }
                    },
                    Some(message) = api_beats.next() => {
                        if let Ok(beat) = decode::<ApiBeat>(&message.payload)
                            && speaker(&message.subject) == beat.api_server.as_str()
                        {
                            watcher.api_beat(beat, Instant::now());
                        }
                    }
                    Some(_) = hellos.next() => bus.beat(watcher.in_flight()).await,
                    _ = tick.tick() => bus.beat(watcher.in_flight()).await,
                    _ = sweep.tick() => {
                        let now = Instant::now();
                        let was_down = down.is_some_and(|at| now - at < GONE_AFTER);
                        if !bus.connected() {
                            down = Some(now);
                        } else if !was_down {
                            // While the bus is down, and until all had time to beat again, silence
                            // says nothing about the workers.
                            watcher.sweep(now);
                        }
                    }
                }
            }
        });
        Ok(vec![token_task, beat_task])
    }

    async fn hello(&self) {
        let hello = Hello {
            v: PROTOCOL_VERSION,
            from: self.name.to_string(),
        };
        self.publish(self.cluster.hello(), &hello).await;
    }

    async fn beat(&self, in_flight: u32) {
        let beat = ApiBeat {
            v: PROTOCOL_VERSION,
            api_server: self.name.clone(),
            incarnation: Some(self.incarnation),
            in_flight,
        };
        self.publish(self.cluster.api_beat(&self.name), &beat).await;
    }

    async fn publish<M: Versioned>(&self, subject: String, message: &M) {
        let Ok(payload) = encode(message) else { return };
        if let Err(error) = self.client.publish(subject.clone(), payload.into()).await {
            tracing::warn!(subject, %error, "not published");
        }
    }

    /// Sends what is buffered and closes the connection.
    pub async fn close(&self) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.client.flush()).await;
        let _ = tokio::time::timeout(Duration::from_secs(1), self.client.drain()).await;
    }
}

fn on_event(event: &NatsEvent, connected: &AtomicBool, back: &Notify, registry: &Registry) {
    match event {
        NatsEvent::Connected => {
            connected.store(true, Ordering::Relaxed);
            back.notify_one();
        }
        NatsEvent::Disconnected | NatsEvent::Closed => connected.store(false, Ordering::Relaxed),
        NatsEvent::SlowConsumer(_) => registry.broadcast(|| Event::FramesLost),
        _ => {}
    }
}
