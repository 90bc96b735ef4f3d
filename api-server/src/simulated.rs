//! An API server without HTTP and without text, over any wire: what the simulation runs. Everything between a
//! checked request and its tokens is the real thing.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_bus::{Presence, Wire};
use baton_protocol::subjects::Cluster;
use baton_protocol::{
    ApiServerId, CacheSalt, Generation, Incarnation, ModelFingerprint, RequestId, WorkerId,
    prefix_chain,
};
use baton_traces::Tracer;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::Instant;

use crate::bound::Bound;
use crate::bus::Bus;
use crate::config::Limits;
use crate::cors::Origins;
use crate::error::ApiServerError;
use crate::fleet::membership::SUSPECT_AFTER;
use crate::keys::ApiKeys;
use crate::metrics::Metrics;
use crate::model_names::ModelNames;
use crate::openai::responses::ResponseStore;
use crate::request::driver::{Job, Sink, drive};
use crate::request::inbox::{Event, Inbox, Mailbox, Registry};
use crate::server::{Name, Server};
use crate::service::{Class, Promises, ServiceLevel};
use crate::text::texts::TextPool;
use crate::text::tokenizer::ModelText;

/// A running API server. Runs inside a `LocalSet` on one thread.
pub struct SimulatedServer {
    server: Arc<Server>,
    mailbox: Arc<Mailbox>,
    presence: Presence,
    back: Arc<Notify>,
    tasks: Vec<JoinHandle<()>>,
}

/// A generation that was begun.
pub struct SimulatedGeneration {
    inbox: Arc<Inbox>,
    driver: JoinHandle<()>,
}

impl SimulatedServer {
    /// Starts one, of a model whose sequences have at most `tokens_max` tokens.
    ///
    /// # Errors
    /// [`ApiServerError`] if the wire takes no subscriptions.
    pub async fn start(
        name: ApiServerId,
        incarnation: Incarnation,
        cluster: Cluster,
        wire: Wire,
        (model, tokens_max): (ModelFingerprint, u32),
        promises: Promises,
    ) -> Result<Self, ApiServerError> {
        let presence = Presence::new(Instant::now(), SUSPECT_AFTER);
        let back = Arc::new(Notify::new());
        back.notify_one();
        let registry = Arc::new(Registry::default());
        let metrics =
            Metrics::new().map_err(|error| ApiServerError::Http(format!("metrics: {error}")))?;
        let own_name = Name::new(name.clone(), incarnation, false, Instant::now());
        let server = Arc::new(Server {
            cluster: cluster.name().to_owned(),
            bus: Bus::over(
                wire,
                cluster,
                name.clone(),
                incarnation,
                presence.clone(),
                Arc::clone(&back),
            ),
            name,
            incarnation,
            model_names: ModelNames::new(Vec::new(), "simulated")?,
            default_max_tokens: None,
            model: ModelText::wordless("simulated", model, tokens_max)?,
            registry,
            metrics,
            tracer: Tracer::off(),
            in_flight: Arc::new(Bound::new(0)),
            answers: Arc::new(Bound::new(0)),
            responses: Arc::new(ResponseStore::new(0)),
            texts: TextPool::new(0),
            body_room: Arc::new(Semaphore::new(0)),
            running: Arc::default(),
            last_spent: Default::default(),
            limits: Limits::default(),
            keys: ApiKeys::default(),
            wants_certificates: false,
            connections_end: tokio::sync::watch::Sender::new(false),
            origins: Origins::default(),
            request_budget: Duration::ZERO,
            promises,
            started_unix: 0,
            decode_room: Arc::default(),
            leaving: AtomicBool::new(false),
            fleet: Mutex::default(),
            own_name: Mutex::new(own_name),
        });
        let mut tasks = server
            .bus
            .serve(Arc::clone(&server.registry), Arc::clone(&server))
            .await?;
        let mailbox = Arc::new(Mailbox::default());
        tasks.push(tokio::spawn(Arc::clone(&mailbox).distribute()));
        Ok(Self {
            server,
            mailbox,
            presence,
            back,
            tasks,
        })
    }

    /// Begins a generation as the HTTP side does, with other times than those that are promised if it asks for them.
    pub fn generate(
        &self,
        request: RequestId,
        (cache_salt, prompt): (CacheSalt, &[u32]),
        generation: Generation,
        (class, level): (Class, Option<ServiceLevel>),
        budget: Duration,
        sink: impl Sink + 'static,
    ) -> SimulatedGeneration {
        let arrived = Instant::now();
        let server = &self.server;
        let block_tokens = server.fleet().block_tokens(&server.model.fingerprint);
        let job = Job {
            request,
            prompt: prompt.into(),
            chain: prefix_chain(cache_salt, block_tokens, prompt).into(),
            cache_salt,
            generation,
            prompt_logprobs: None,
            class,
            level: level.unwrap_or(self.server.promises.level),
            arrived,
            deadline: arrived + budget,
            trace: None,
        };
        let inbox = Arc::new(Inbox::default());
        let registry = &self.server.registry;
        let registered = registry.register(request, Arc::clone(&self.mailbox), Arc::clone(&inbox));
        let server = Arc::clone(&self.server);
        let driver = spawn_local(drive(server, job, Arc::clone(&inbox), registered, sink));
        SimulatedGeneration { inbox, driver }
    }

    /// The connection to the bus was lost, or is there again.
    pub fn set_connected(&self, connected: bool) {
        let was = self.presence.is_connected();
        self.presence.set_connected(connected);
        if connected && !was {
            self.back.notify_one();
        }
    }

    /// Why requests cannot be served now; empty if they can.
    pub fn faults(&self) -> Vec<String> {
        self.server.faults()
    }

    /// How many generations were retried, by reason.
    pub fn retries(&self) -> Vec<(String, u64)> {
        let families = self.server.metrics.retries_total.collect();
        let metrics = families.iter().flat_map(MetricFamily::get_metric);
        let retries = metrics.filter_map(|metric| {
            let reason = metric.get_label().first()?.value().to_owned();
            Some((reason, metric.get_counter().get_value() as u64))
        });
        retries.collect()
    }

    /// How many generations that were promised something came to what, by its label.
    pub fn service_levels(&self) -> Vec<(String, u64)> {
        let families = self.server.metrics.service_level_total.collect();
        let metrics = families.iter().flat_map(MetricFamily::get_metric);
        let counted = metrics.filter_map(|metric| {
            let labels = metric.get_label();
            let outcome = labels.iter().find(|label| label.name() == "outcome")?;
            let count = metric.get_counter().get_value() as u64;
            Some((outcome.value().to_owned(), count))
        });
        counted.collect()
    }

    /// Tokens of prompts' beginnings that were pulled before their prompts ran.
    pub fn prefix_pull_tokens(&self) -> u64 {
        self.server.metrics.prefix_pull_tokens_total.get()
    }

    /// Whether of a worker's prefixes exactly these are known; what is not so, if they are not.
    pub fn knows_prefixes(&self, worker: &WorkerId, all: &[u64]) -> Result<(), String> {
        self.server.fleet().knows_prefixes(worker, all)
    }

    /// What is left of requests; `None` if nothing is.
    pub fn left_over(&self) -> Option<String> {
        let in_flight = self.server.registry.len();
        let gauge = self.server.metrics.requests_in_flight.get();
        let idle = self.server.fleet().is_idle();
        (in_flight > 0 || gauge != 0 || !idle).then(|| {
            format!("{in_flight} registered, {gauge} counted in flight, router idle: {idle}")
        })
    }
}

impl Drop for SimulatedServer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl SimulatedGeneration {
    /// The client left.
    pub fn leave(&self) {
        self.inbox.push(Event::ClientLeft);
    }

    /// Its driver is gone from one moment to the next, as when the process dies.
    pub fn kill(&self) {
        self.driver.abort();
    }
}
