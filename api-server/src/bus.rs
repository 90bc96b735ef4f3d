//! The NATS side: the connection, requests with deadlines, and what is said unasked. What is heard is in [`listening`].

mod listening;

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::{ConnectOptions, Event as NatsEvent};
use baton_bus::{
    BusConfig, BusFault, ConnectionLog, Presence, RequestError, Seldom, Wire, mend_pause,
};
use baton_protocol::deadlines::PREFILL_PATIENCE_MS;
use baton_protocol::limits::MESSAGE_BYTES_MAX;
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    Abort, ApiBeat, ApiServerId, DecodeJob, DecodeReply, Drain, Draining, Hello, Incarnation,
    PROTOCOL_VERSION, PeersReply, PrefillJob, PrefillReply, PrefixPage, PrefixesAsk, Progress,
    ProgressReply, ProtocolError, Renew, Renewed, RequestId, Versioned, WorkerId, decode, encode,
};
use futures::FutureExt;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::error::ApiServerError;
use crate::fleet::membership::{GONE_AFTER, SUSPECT_AFTER};
use crate::request::inbox::{Event, Registry, lock};
use crate::request::lifecycle::{NoReply, Target};

/// How often it is said, to the log and to generations, that something cannot be read or was lost.
const FAULT_INTERVAL: Duration = Duration::from_millis(500);

/// A connection on which nothing comes for three of these is made again.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// A job may be lost on the bus, and so may its answer: it is sent again after this time without a report, twice this time, and so on.
const PREFILL_PATIENCE: Duration = Duration::from_millis(PREFILL_PATIENCE_MS);

/// What is said once a second may wait this long for the connection to take it.
const PUBLISH_WAIT: Duration = Duration::from_millis(500);

pub use listening::Watcher;

/// When a context worker last reported that it has a prompt. Clones share it; a generation and what waits for its prompt are one
/// thread's.
#[derive(Clone, Debug, Default)]
pub struct PromptReports(Rc<Cell<Option<Instant>>>);

impl PromptReports {
    /// It did now.
    pub fn note(&self, now: Instant) {
        self.0.set(Some(now));
    }

    fn last(&self) -> Option<Instant> {
        self.0.get()
    }
}

/// The connection.
#[derive(Clone)]
pub struct Bus {
    wire: Wire,
    cluster: Cluster,
    name: ApiServerId,
    incarnation: Incarnation,
    runtime: tokio::runtime::Handle,
    /// Whether we hear ourselves.
    presence: Presence,
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
        let presence = Presence::new(Instant::now(), SUSPECT_AFTER);
        let back = Arc::new(Notify::new());
        let log = Arc::new(ConnectionLog::new(config));
        let options = || {
            let connection = Connection {
                presence: presence.clone(),
                back: Arc::clone(&back),
                registry: Arc::clone(&registry),
                log: Arc::clone(&log),
                slow: Mutex::new(Seldom::new(FAULT_INTERVAL)),
            };
            ConnectOptions::new()
                .name(format!("baton api-server {name}"))
                .custom_inbox_prefix(Cluster::inbox_prefix(&name))
                .client_capacity(8192)
                .ping_interval(PING_INTERVAL)
                .reconnect_delay_callback(mend_pause)
                .event_callback(move |event| {
                    connection.on_event(&event);
                    std::future::ready(())
                })
        };
        let client = config.connect(options).await;
        let client = client.map_err(|error| ApiServerError::Bus(error.to_string()))?;
        Ok(Self::over(
            client.into(),
            cluster,
            name,
            incarnation,
            presence,
            back,
        ))
    }

    /// What goes over this wire; `presence` and `back` tell how it fares. Runs inside a tokio runtime.
    pub fn over(
        wire: Wire,
        cluster: Cluster,
        name: ApiServerId,
        incarnation: Incarnation,
        presence: Presence,
        back: Arc<Notify>,
    ) -> Self {
        Self {
            wire,
            cluster,
            name,
            incarnation,
            runtime: tokio::runtime::Handle::current(),
            presence,
            back,
        }
    }

    /// Why nothing can be said or heard now, if so.
    pub fn fault(&self, now: Instant) -> Option<BusFault> {
        match self.wire.is_connected() {
            true => self.presence.fault(now),
            false => Some(BusFault::Disconnected),
        }
    }

    /// Why nobody new can be served: there is no connection, or it has been silent for so long that nothing is known of the workers
    /// any more.
    pub fn gone(&self, now: Instant) -> Option<BusFault> {
        self.fault(now).filter(|fault| match fault {
            BusFault::Disconnected => true,
            BusFault::Silent(time) => *time >= GONE_AFTER,
        })
    }

    /// Asks a context worker. The answer comes when the prompt has been run, which may take any time. Until then the worker reports
    /// that it has the prompt; if it has not for a while, the job is sent again, and a worker that has it goes on with it.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn prefill(
        &self,
        to: &Target,
        job: &PrefillJob,
        timeout: Duration,
        reports: &PromptReports,
    ) -> Result<PrefillReply, NoReply> {
        let subject = self.cluster.prefill(&to.worker);
        let deadline = Instant::now() + timeout;
        let mut patience = PREFILL_PATIENCE;
        loop {
            let sent = Instant::now();
            let left = deadline.saturating_duration_since(sent);
            let mut reply = pin!(self.request(subject.clone(), job, left));
            let mut heard = sent;
            loop {
                tokio::select! {
                    biased;
                    reply = &mut reply => return reply,
                    () = tokio::time::sleep_until(heard + patience) => {}
                }
                match reports.last() {
                    Some(last) if last > heard => (heard, patience) = (last, PREFILL_PATIENCE),
                    _ => break,
                }
            }
            tracing::warn!(subject, request = %job.request, "neither an answer nor a report: the job is sent again, should it be lost");
            patience *= 2;
        }
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

    /// Asks a context worker to keep a staged handle. The answer comes at once.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn renew(
        &self,
        to: &Target,
        renew: &Renew,
        timeout: Duration,
    ) -> Result<Renewed, NoReply> {
        self.request(self.cluster.renew(&to.worker), renew, timeout)
            .await
    }

    /// Asks a context worker how far a prompt is that is streamed.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn progress(
        &self,
        to: &Target,
        progress: &Progress,
        timeout: Duration,
    ) -> Result<ProgressReply, NoReply> {
        self.request(self.cluster.progress(&to.worker), progress, timeout)
            .await
    }

    /// Asks a worker for all its peers. The answer comes at once, unless it is asked too often.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn peers(&self, worker: &WorkerId, timeout: Duration) -> Result<PeersReply, NoReply> {
        let hello = Hello {
            v: PROTOCOL_VERSION,
            from: self.name.to_string(),
        };
        self.request(self.cluster.peers(worker), &hello, timeout)
            .await
    }

    /// Asks a worker for a page of its prefix index, the blocks of its arena from this one on. The answer comes at once, unless it is
    /// asked too often.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn prefix_page(
        &self,
        worker: &WorkerId,
        block: u32,
        timeout: Duration,
    ) -> Result<PrefixPage, NoReply> {
        let ask = PrefixesAsk {
            v: PROTOCOL_VERSION,
            from: self.name.to_string(),
            block,
        };
        self.request(self.cluster.prefix_pages(worker), &ask, timeout)
            .await
    }

    /// Asks a worker to leave. The answer comes at once; workers of earlier releases give none.
    ///
    /// # Errors
    /// [`NoReply`] if none comes.
    pub async fn drain(&self, to: &Target, timeout: Duration) -> Result<Draining, NoReply> {
        let drain = Drain {
            v: PROTOCOL_VERSION,
            incarnation: to.incarnation,
            from: self.name.to_string(),
        };
        self.request(self.cluster.drain(&to.worker), &drain, timeout)
            .await
    }

    async fn request<M: Versioned, R: Versioned>(
        &self,
        subject: String,
        message: &M,
        timeout: Duration,
    ) -> Result<R, NoReply> {
        let payload = encode(message).map_err(|error| match error {
            ProtocolError::TooLarge {
                bytes, bytes_max, ..
            } => NoReply::TooLarge { bytes, bytes_max },
            other => NoReply::Broken(other.to_string()),
        })?;
        let bytes = payload.len();
        let answer = self.wire.request_within(subject, payload.into(), timeout);
        match answer.await {
            Ok(reply) => decode(&reply.payload).map_err(|error| NoReply::Broken(error.to_string())),
            Err(RequestError::NoResponders) => Err(NoReply::NoResponders),
            Err(RequestError::TimedOut) => Err(NoReply::TimedOut),
            Err(RequestError::TooLarge) => Err(NoReply::TooLarge {
                bytes,
                bytes_max: self.wire.max_payload(),
            }),
            Err(RequestError::Broken(detail)) => Err(NoReply::Broken(detail)),
        }
    }

    /// Largest message that the bus carries, in bytes.
    pub fn bytes_max(&self) -> usize {
        self.wire.max_payload().min(MESSAGE_BYTES_MAX)
    }

    /// Tells a worker to drop a request. Does not wait: it works from a destructor too. Whatever is sent
    /// after this call reaches the worker after the abort; a job sent again would be dropped otherwise.
    pub fn abort(&self, target: &Target, request: RequestId, reason: &str) {
        // It ends at the first poll unless the connection's queue is full. Then order is lost, and a job
        // that is dropped for it comes back as failed.
        let mut send = Box::pin(self.send_abort(target, request, reason));
        if send.as_mut().now_or_never().is_none() {
            self.runtime.spawn(send);
        }
    }

    /// Tells a worker to drop a request that it should not have any more. Where the connection's queue is full, it is not told: its
    /// next frame names the request again. So what others send does not make messages wait without bound.
    pub fn abort_stray(&self, target: &Target, request: RequestId, reason: &str) {
        let _ = self.send_abort(target, request, reason).now_or_never();
    }

    fn send_abort(
        &self,
        target: &Target,
        request: RequestId,
        reason: &str,
    ) -> impl Future<Output = ()> + Send + use<> {
        let subject = self.cluster.abort(&target.worker);
        let abort = Abort {
            v: PROTOCOL_VERSION,
            request,
            reason: reason.to_owned(),
        };
        let wire = self.wire.clone();
        tokio::task::unconstrained(async move {
            let Ok(payload) = encode(&abort) else { return };
            if let Err(error) = wire.publish(subject.clone(), payload.into()).await {
                tracing::warn!(subject, %error, "abort not sent");
            }
        })
    }

    async fn hello(&self) {
        let hello = Hello {
            v: PROTOCOL_VERSION,
            from: self.name.to_string(),
        };
        self.publish(self.cluster.hello(), &hello).await;
    }

    async fn beat(&self, in_flight: u32, serving_ms: u64) {
        let beat = ApiBeat {
            v: PROTOCOL_VERSION,
            api_server: self.name.clone(),
            incarnation: Some(self.incarnation),
            in_flight,
            serving_ms: Some(serving_ms),
        };
        self.publish(self.cluster.api_beat(&self.name), &beat).await;
    }

    async fn publish<M: Versioned>(&self, subject: String, message: &M) {
        let Ok(payload) = encode(message) else { return };
        let published = self.wire.publish(subject.clone(), payload.into());
        match tokio::time::timeout(PUBLISH_WAIT, published).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(subject, %error, "not published"),
            Err(_) => tracing::warn!(subject, "not published: the bus takes nothing"),
        }
    }

    /// Sends what is buffered and closes the connection.
    pub async fn close(&self) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.wire.flush()).await;
        let _ = tokio::time::timeout(Duration::from_secs(1), self.wire.drain()).await;
    }
}

/// Whether the connection stands, and what becomes of what was on its way when it did not.
struct Connection {
    presence: Presence,
    back: Arc<Notify>,
    registry: Arc<Registry>,
    log: Arc<ConnectionLog>,
    slow: Mutex<Seldom>,
}

impl Connection {
    fn on_event(&self, event: &NatsEvent) {
        match event {
            NatsEvent::Connected => {
                self.presence.set_connected(true);
                self.back.notify_one();
            }
            NatsEvent::Disconnected | NatsEvent::Closed => {
                self.presence.set_connected(false);
            }
            NatsEvent::SlowConsumer(_) => {
                if lock(&self.slow).pass(Instant::now()).is_none() {
                    return;
                }
                self.registry.broadcast(|| Event::FramesLost);
            }
            _ => {}
        }
        self.log.note(event);
    }
}

#[cfg(test)]
mod tests {
    use async_nats::{Message, Subject};
    use baton_bus::Carrier;
    use baton_protocol::{
        CacheSalt, Generation, ModelFingerprint, PackedTokens, Sampling, SequenceSpec, WorkerId,
    };
    use bytes::Bytes;
    use tokio::sync::mpsc;

    use super::*;

    /// A bus without workers: no request is ever answered. Counts published messages.
    #[derive(Default)]
    struct Mute {
        published: Mutex<usize>,
        /// Kept open: a reply channel whose sender is dropped would end the request early.
        listeners: Mutex<Vec<mpsc::UnboundedSender<Message>>>,
    }

    impl Carrier for Mute {
        fn publish(&self, _subject: Subject, _reply: Option<Subject>, _payload: Bytes) {
            *lock(&self.published) += 1;
        }

        #[expect(
            clippy::disallowed_methods,
            reason = "the trait's type; nothing is ever sent"
        )]
        fn subscribe(&self, _subject: Subject) -> mpsc::UnboundedReceiver<Message> {
            let (sender, receiver) = mpsc::unbounded_channel();
            lock(&self.listeners).push(sender);
            receiver
        }

        fn new_inbox(&self) -> Subject {
            "_INBOX.test".into()
        }

        fn is_connected(&self) -> bool {
            true
        }

        fn max_payload(&self) -> usize {
            MESSAGE_BYTES_MAX
        }
    }

    fn bus(mute: &Arc<Mute>) -> Bus {
        Bus::over(
            Wire::over(Arc::clone(mute) as Arc<dyn Carrier>),
            Cluster::new("test").unwrap(),
            ApiServerId::new("api").unwrap(),
            Incarnation(1),
            Presence::new(Instant::now(), SUSPECT_AFTER),
            Arc::default(),
        )
    }

    fn job() -> (Target, PrefillJob) {
        let target = Target {
            worker: WorkerId::new("context-0").unwrap(),
            incarnation: Incarnation(2),
        };
        let sequence = SequenceSpec {
            tokens: PackedTokens(vec![1]),
            prompt_tokens: 1,
            generation: Generation {
                sampling: Sampling::default(),
                stop_token_ids: Vec::new(),
                min_tokens: 0,
                max_tokens: 1,
                grammar: None,
                token_rules: None,
            },
            cache_salt: CacheSalt::NONE,
            service: baton_protocol::Service::default(),
        };
        let job = PrefillJob {
            v: PROTOCOL_VERSION,
            request: RequestId(1),
            api_server: ApiServerId::new("api").unwrap(),
            api_incarnation: None,
            budget_ms: 600_000,
            model: ModelFingerprint::new("a".repeat(64)).unwrap(),
            sequence,
            prompt_logprobs: None,
            stream: false,
            source: None,
            trace: None,
        };
        (target, job)
    }

    /// Jobs that are published within this time, of a prompt that is never answered and reported this often.
    async fn jobs_within(time: Duration, report_every: Option<Duration>) -> usize {
        let mute = Arc::new(Mute::default());
        let (target, job) = job();
        let (bus, reports) = (bus(&mute), PromptReports::default());
        let reporting = async {
            let Some(interval) = report_every else {
                return std::future::pending().await;
            };
            loop {
                tokio::time::sleep(interval).await;
                reports.note(Instant::now());
            }
        };
        tokio::select! {
            reply = bus.prefill(&target, &job, time, &reports) => assert_eq!(reply, Err(NoReply::TimedOut)),
            () = reporting => {}
        }
        *lock(&mute.published)
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_is_reported_is_not_sent_again() {
        use baton_protocol::deadlines::JOB_REPORT_INTERVAL_MS;
        let time = 50 * PREFILL_PATIENCE;
        let interval = Duration::from_millis(JOB_REPORT_INTERVAL_MS);
        assert_eq!(jobs_within(time, Some(interval)).await, 1);
        // Most reports may be lost.
        assert_eq!(jobs_within(time, Some(PREFILL_PATIENCE * 9 / 10)).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_not_is_sent_again_ever_less_often() {
        // At 0, 1, 1 + 2 and 1 + 2 + 4 times the patience.
        assert_eq!(jobs_within(PREFILL_PATIENCE * 10, None).await, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_report_silence_is_measured_anew() {
        let mute = Arc::new(Mute::default());
        let (target, job) = job();
        let (bus, reports) = (bus(&mute), PromptReports::default());
        let count = || *lock(&mute.published);
        let begun = Instant::now();
        let asking = bus.prefill(&target, &job, 100 * PREFILL_PATIENCE, &reports);
        let watching = async {
            tokio::time::sleep_until(begun + PREFILL_PATIENCE * 2).await;
            // Sent twice; the third would be sent after three times the patience.
            assert_eq!(count(), 2);
            reports.note(Instant::now());
            tokio::time::sleep_until(begun + PREFILL_PATIENCE * 29 / 10).await;
            assert_eq!(count(), 2);
            tokio::time::sleep_until(begun + PREFILL_PATIENCE * 32 / 10).await;
            assert_eq!(count(), 3);
        };
        tokio::select! {
            reply = asking => panic!("answered: {reply:?}"),
            () = watching => {}
        }
    }
}
